#!/usr/bin/env bash
# Shows a person that it works: a hierarchy of hubs, an IoT Hub emulator and leaves on this machine,
# with a live table, kills and a verdict.
#   scripts/demo.sh [--layers 3] [--leaves 10] [--seconds N]
# Ends with a line `PASS: …` (exit code 0) or `FAIL: …` (1); without --seconds it runs until Ctrl-C.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

step "system packages" scripts/lib/system.sh build python
step "RocksDB" scripts/lib/rocksdb.sh
step "Python SDK" scripts/lib/sdks.sh
step "release build" cargo build --quiet --release -p edgehub-lab -p edgehub -p iothub-emulator --bins
# It becomes the program, so that Ctrl-C and SIGTERM reach it.
exec "${CARGO_TARGET_DIR:-target}/release/edgehub-lab" demo "$@"

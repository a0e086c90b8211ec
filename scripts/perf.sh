#!/usr/bin/env bash
# Throughput beside Debian's mosquitto, on this machine: scripts/perf.sh [options of mqtt-ingest]
#   scripts/perf.sh                              256 B and 1 KiB, 10 connections, 100 in flight each
#   scripts/perf.sh --seconds 30 --json out.json
#   scripts/perf.sh --help                       all options
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

step "system packages" scripts/lib/system.sh build mosquitto
step "RocksDB" scripts/lib/rocksdb.sh
# The first in the words of the lab, which asks cargo again whether anything is out of date.
step "release build of the servers" cargo build --quiet --release -p edgehub -p iothub-emulator --bins
step "release build of the load" cargo build --quiet --release -p edgehub-perf
step "mqtt-ingest" "${CARGO_TARGET_DIR:-target}/release/edgehub-perf" mqtt-ingest "$@"

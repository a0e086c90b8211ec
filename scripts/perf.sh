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
# Together with what it starts, so that nothing is built twice with other features.
build() { build_programs edgehub-perf --release -p edgehub-perf; }
step "release build" build
build
say "==> mqtt-ingest"
# This becomes the program, so that Ctrl-C and SIGTERM reach it.
exec "$program" mqtt-ingest "$@"

#!/usr/bin/env bash
# Throughput on this machine: scripts/perf.sh [SCENARIO] [options of the scenario]
#   scripts/perf.sh                              mqtt-ingest: 256 B and 1 KiB beside Debian's mosquitto
#   scripts/perf.sh amqp-ingest --size 256       AMQP, and MQTT beside it
#   scripts/perf.sh drain                        what an outage has queued, over AMQP and MQTT upstream
#   scripts/perf.sh --seconds 30 --json out.json
#   scripts/perf.sh SCENARIO --help              all options
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

scenario=mqtt-ingest
case "${1:-}" in
  mqtt-ingest | amqp-ingest | drain)
    scenario=$1
    shift
    ;;
esac

step "system packages" scripts/lib/system.sh build mosquitto
step "RocksDB" scripts/lib/rocksdb.sh
# Together with what it starts, so that nothing is built twice with other features.
build() { build_programs edgehub-perf --release -p edgehub-perf; }
step "release build" build
build
say "==> $scenario"
# This becomes the program, so that Ctrl-C and SIGTERM reach it.
exec "$program" "$scenario" "$@"

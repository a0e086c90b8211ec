#!/usr/bin/env bash
# Shows a person that it works: a hierarchy of hubs, an IoT Hub emulator and leaves on this machine,
# with a live table, kills and a verdict.
#   scripts/demo.sh [--layers 3] [--leaves 10] [--seconds N]
# Ends with a line `PASS: …` (exit code 0) or `FAIL: …` (1); without --seconds it runs until Ctrl-C.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"
cd "$ROOT"

usage() { sed -n '2,5s/^# \{0,1\}//p' "$0"; }

# Looked at before minutes go into building.
arguments=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit ;;
    --layers=[1-9]* | --leaves=[1-9]* | --seconds=[0-9]*) shift ;;
    --layers | --leaves | --seconds)
      [[ "${2:-}" =~ ^[0-9]+$ ]] || { usage >&2; die "$1 needs a number"; }
      shift 2
      ;;
    *) usage >&2; die "unknown option: $1" ;;
  esac
done

step "system packages" scripts/lib/system.sh build python clients
step "RocksDB" scripts/lib/rocksdb.sh
step "Python SDK" scripts/lib/sdks.sh python
build() { build_programs edgehub-lab --release; }
step "release build" build
# Again, which takes no time, because a step cannot leave anything in this shell.
build
say "==> demo"
# This becomes the program, so that Ctrl-C and SIGTERM reach it.
exec "$program" demo "${arguments[@]}"

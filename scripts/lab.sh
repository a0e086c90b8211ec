#!/usr/bin/env bash
# A hierarchy on this machine, to play with and to break: see "The lab" in the README.
#   scripts/lab.sh up --layers 3 --leaves 2 --modules 1 --state DIR [--seed FILE]
#   scripts/lab.sh kill|start|pause|resume --state DIR NAME
#   scripts/lab.sh cut|heal --state DIR A B
#   scripts/lab.sh ledger --state DIR
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0"; }

command=${1:-}
case "$command" in
  up | kill | start | pause | resume | cut | heal | ledger) ;;
  -h | --help | help) usage; exit ;;
  *) usage >&2; exit 2 ;;
esac

state=
arguments=("$@")
for i in "${!arguments[@]}"; do
  case "${arguments[$i]}" in
    --state) state=${arguments[$((i + 1))]:-} ;;
    --state=*) state=${arguments[$i]#--state=} ;;
  esac
done
[ -n "$state" ] || { usage >&2; exit 2; }

# A lab leaves a link to its own program: it is asked with that one, without a build.
if [ "$command" != up ]; then
  if [ -x "$state/edgehub-lab" ]; then exec "$state/edgehub-lab" "$@"; fi
  [ -L "$state/edgehub-lab" ] || die "there was never a lab in $state"
fi

# What is built and installed is no part of what a command prints.
{
  "$ROOT/scripts/lib/system.sh" build
  "$ROOT/scripts/lib/rocksdb.sh"
  build_programs edgehub-lab --features edgehub/faults
} >&2
# This becomes the program, so that Ctrl-C and SIGTERM reach it.
exec "$program" "$@"

#!/usr/bin/env bash
# A hierarchy on this machine, to play with and to break: see "The lab" in the README.
#   scripts/lab.sh up --layers 3 --leaves 2 --modules 1 --state DIR [--seed FILE]
#   scripts/lab.sh kill|start|pause|resume --state DIR NAME
#   scripts/lab.sh cut|heal --state DIR A B
#   scripts/lab.sh ledger --state DIR
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

# A lab that runs has left a link to its own program: it is asked with that one, without a build.
if [ $# -gt 0 ] && [ "$1" != up ]; then
  state=
  args=("$@")
  for i in "${!args[@]}"; do
    case "${args[$i]}" in
      --state) state=${args[$((i + 1))]:-} ;;
      --state=*) state=${args[$i]#--state=} ;;
    esac
  done
  if [ -n "$state" ] && [ -x "$state/edgehub-lab" ]; then
    exec "$state/edgehub-lab" "$@"
  fi
fi

if [ "${1:-}" = up ]; then
  "$ROOT/scripts/lib/rocksdb.sh"
fi
# `cargo run` becomes the program, so a signal for this script reaches it.
exec cargo run --quiet --manifest-path "$ROOT/Cargo.toml" -p edgehub-lab -- "$@"

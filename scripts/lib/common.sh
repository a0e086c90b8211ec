# Shared by the scripts: where things are, how they speak, how a step is timed.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Machine-wide cache, outside the checkout: what costs minutes to build and does not depend on our code.
EDGEHUB_CACHE=${EDGEHUB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgehub}
export ROOT EDGEHUB_CACHE

_started=$(date +%s)

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
elapsed() { local s=$(($(date +%s) - _started)); printf '%dm%02ds' $((s / 60)) $((s % 60)); }

# The version of crate $1 in Cargo.lock, nothing when it is not there.
locked_version() {
  awk -v want="name = \"$1\"" '$0 == want { getline; gsub(/version = |"/, ""); print; exit }' "$ROOT/Cargo.lock"
}

# step NAME COMMAND...: runs the command, prints its seconds, ends the script when it fails.
step() {
  local name=$1 from rc=0
  from=$(date +%s%N)
  shift
  printf '==> %s\n' "$name"
  "$@" || rc=$?
  local ms=$((($(date +%s%N) - from) / 1000000))
  if [ "$rc" -ne 0 ]; then
    printf '==> %s: FAILED after %d.%01d s\n' "$name" $((ms / 1000)) $((ms % 1000 / 100)) >&2
    exit "$rc"
  fi
  printf '==> %s: %d.%01d s\n' "$name" $((ms / 1000)) $((ms % 1000 / 100))
}

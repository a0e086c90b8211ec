# Shared by the scripts: where things are, how they speak, how a step is timed.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# A job without a login has no HOME; `~` is then what the user database says.
HOME=${HOME:-$(cd ~ && pwd)}
# Cache outside the checkout: what costs minutes to build and does not depend on our code.
EDGEHUB_CACHE=${EDGEHUB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgehub}
# rustup puts its folder on the PATH of login shells alone.
command -v cargo > /dev/null || PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export ROOT HOME EDGEHUB_CACHE PATH

_started=$(date +%s)

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
elapsed() { local s=$(($(date +%s) - _started)); printf '%dm%02ds' $((s / 60)) $((s % 60)); }

# The version of crate $1 in Cargo.lock, nothing when it is not there.
locked_version() {
  awk -v want="name = \"$1\"" '$0 == want { getline; gsub(/version = |"/, ""); print; exit }' "$ROOT/Cargo.lock"
}

# Ends with a clear text when there is no compiler, or an older one than Cargo.toml asks for.
check_rust() {
  local wanted found
  wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$ROOT/Cargo.toml")
  if ! { command -v cargo && command -v rustc; } > /dev/null; then
    die "cargo and rustc are not on PATH; https://rustup.rs installs them (Rust $wanted or newer)"
  fi
  found=$(rustc --version)
  found=${found#rustc }
  found=${found%% *}
  printf '%s\n%s\n' "$wanted" "$found" | sort -C -V \
    || die "Rust $wanted or newer is needed, here is $found ($(command -v rustc)); try: rustup update stable"
}

# interruptible COMMAND...: runs it in a process group of its own, all of which ends when this script
# is told to: cargo does not end its compilers, and a shell not what it waits for.
interruptible() {
  local rc=0
  # First, so that no moment is without it.
  trap '_end_jobs; exit 130' INT TERM HUP
  set -m
  "$@" < /dev/null &
  set +m
  wait "$!" || rc=$?
  trap - INT TERM HUP
  return "$rc"
}

_end_jobs() {
  local group
  trap '' INT TERM HUP
  for group in $(jobs -p); do kill -TERM -- "-$group" 2> /dev/null || true; done
  wait || true
}

# build_programs NAME CARGO_OPTION...: builds the lab and what it starts, all with one set of
# features, so that nothing is built twice; leaves the path of program NAME in $program.
build_programs() {
  local name=$1 messages quiet=()
  shift
  # A person sees the progress of a build that takes minutes; a log does not need it.
  [ -t 2 ] || quiet=(--quiet)
  messages=$(mktemp)
  interruptible cargo build "${quiet[@]}" --message-format=json-render-diagnostics \
    --manifest-path "$ROOT/Cargo.toml" -p edgehub -p iothub-emulator -p edgehub-lab --bins "$@" \
    > "$messages" || { rm -f "$messages"; die "the build failed"; }
  program=$(sed -n 's|.*"executable":"\([^"]*/'"$name"'\)".*|\1|p' "$messages")
  rm -f "$messages"
  [ -x "$program" ] || die "cargo reported no program $name"
}

# step NAME COMMAND...: runs the command, prints its seconds, ends the script when it fails.
step() {
  local name=$1 from rc ms
  from=$(date +%s%N)
  shift
  printf '==> %s\n' "$name"
  # Not as a condition (`|| rc=$?`): below one, bash goes on after an error inside of a function.
  set +e
  interruptible strictly "$@"
  rc=$?
  set -e
  ms=$((($(date +%s%N) - from) / 1000000))
  if [ "$rc" -ne 0 ]; then
    printf '==> %s: FAILED after %d.%01d s\n' "$name" $((ms / 1000)) $((ms % 1000 / 100)) >&2
    exit "$rc"
  fi
  printf '==> %s: %d.%01d s\n' "$name" $((ms / 1000)) $((ms % 1000 / 100))
}

strictly() { set -e; "$@"; }

#!/usr/bin/env bash
# Puts the cargo tools that scripts/test.sh needs into the cache folder, once per machine, and asks
# rustup for the compiler's own ones.
#
# A tool that the user has on PATH is used as it is. The versions are pinned, `--locked`, and build
# on the compiler that this workspace names. Idempotent; several runs at once wait for one another.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

tools="$EDGEHUB_CACHE/tools"

# ensure COMMAND CRATE VERSION: nothing when this version was installed before or the user has one.
ensure() {
  local command=$1 crate=$2 version=$3 found
  found=$(command -v "$command" || true)
  # One in our own folder may be an earlier version.
  if [ -n "$found" ] && [ "$found" != "$tools/bin/$command" ]; then return 0; fi
  if [ -f "$tools/$crate-$version" ] && [ -x "$tools/bin/$command" ]; then return 0; fi
  say "tools: installing $crate $version once for this machine (some minutes)"
  # A tool runs for a second: the time goes into building it, so it is hardly optimised.
  CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
    CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=false \
    CARGO_TARGET_DIR="$tools/build" \
    cargo install --root "$tools" --locked --quiet --force "$crate@$version" < /dev/null \
    || die "$crate $version did not build; try: cargo install --locked $crate@$version"
  rm -rf "$tools/build" "$tools/$crate"-[0-9]*
  : > "$tools/$crate-$version"
}

# component NAME COMMAND: a part of the compiler that rustup's minimal profile leaves out.
component() {
  if cargo "$2" --version > /dev/null 2>&1; then return 0; fi
  command -v rustup > /dev/null || die "cargo $2 is missing: install $1 for $(command -v cargo)"
  rustup component add "$1" < /dev/null || die "rustup cannot add $1"
}

component rustfmt fmt
component clippy clippy
mkdir -p "$tools"
exec 9> "$tools/lock"
flock -n 9 || { say "tools: another run installs them, waiting"; flock 9; }
ensure cargo-nextest cargo-nextest 0.9.143
ensure cargo-deny cargo-deny 0.20.2
ensure cargo-machete cargo-machete 0.9.2

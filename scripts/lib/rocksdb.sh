#!/usr/bin/env bash
# Builds RocksDB's C++ once per machine and makes this checkout link it.
#
# The bundled C++ takes some 35 CPU minutes and cargo would build it again in every profile and
# every clone. This builds `librocksdb.a` once into the cache folder, keyed by everything that
# changes its content, and writes `.cargo/config.toml` (ignored by git), so that plain cargo
# commands in this checkout link it too. Idempotent; several runs at once wait for one another.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

crate=$(locked_version librocksdb-sys)
[ -n "$crate" ] || die "Cargo.lock names no librocksdb-sys: restore Cargo.lock (git checkout Cargo.lock)"
# What `storage` asks of rocksdb; both must change together (tests/tidy compares them).
features="lz4 bindgen-runtime"
# CRC32C is on the path of every commit: use the instruction that every x86-64 CPU since 2009 has.
flags="-g0"
case "$(uname -m)" in x86_64) flags="$flags -msse4.2 -mpclmul" ;; esac
read -ra cxx <<< "${CXX:-c++}"
command -v "${cxx[0]}" > /dev/null || die "no ${cxx[0]} here: scripts/lib/system.sh build installs one"
compiler=$("${cxx[@]}" --version)
compiler=${compiler%%$'\n'*}
key=$(printf '%s\n' "$crate" "$features" "$flags" "$compiler" "$(uname -m)" | sha256sum | cut -c1-16)
home="$EDGEHUB_CACHE/rocksdb-${crate%%+*}-$key"

build() {
  say "RocksDB: building its C++ once for this machine (about 340 files, 15 to 30 minutes on 2 cores)."
  say "         It is kept in $home and never built again for this version."
  local work="$home.build"
  mkdir -p "$work/src"
  cat > "$work/Cargo.toml" <<EOF
[package]
name = "rocksdb-once"
version = "0.0.0"
edition = "2024"
[workspace]
[dependencies]
librocksdb-sys = { version = "=${crate}", default-features = false, features = ["${features// /\", \"}"] }
[profile.release]
opt-level = 2
debug = false
EOF
  : > "$work/src/lib.rs"
  cp "$ROOT/Cargo.lock" "$work/Cargo.lock"
  local pid files last=-1
  # Job control gives the build a process group of its own, so that all of it can be ended: without
  # it a build in the background would not even hear Ctrl-C.
  set -m
  (
    cd "$work"
    unset ROCKSDB_LIB_DIR ROCKSDB_STATIC
    CARGO_TARGET_DIR="$work/target" CXXFLAGS="$flags" \
      exec cargo build --release > "$work/build.log" 2>&1 < /dev/null
  ) &
  pid=$!
  set +m
  trap 'trap "" INT TERM; kill -TERM -- "-$pid" 2> /dev/null || true; wait "$pid" || true; exit 130' INT TERM HUP
  while kill -0 "$pid" 2> /dev/null; do
    # Files come and go while find walks: what it complains about does not matter.
    files=$({ find "$work/target" -path '*librocksdb-sys*' -name '*.o' 2> /dev/null || true; } | wc -l)
    if [ "$files" -ge $((last + 20)) ]; then
      say "RocksDB: $files of about 340 files, $(elapsed)"
      last=$files
    fi
    # A wait for time itself, in a form that a signal interrupts: progress is looked at every two
    # seconds.
    sleep 2 &
    wait $! || true
  done
  if ! wait "$pid"; then
    tail -n 30 "$work/build.log" >&2
    die "RocksDB did not build; the whole log is $work/build.log"
  fi
  trap - INT TERM HUP
  local lib
  lib=$(find "$work/target/release/build" -path '*librocksdb-sys*/out/librocksdb.a' | head -n 1)
  [ -n "$lib" ] || die "the build left no librocksdb.a below $work/target"
  mkdir -p "$home.new"
  cp "$lib" "$home.new/librocksdb.a"
  mv -T "$home.new" "$home"
  rm -rf "$work"
}

mkdir -p "$EDGEHUB_CACHE"
if [ ! -f "$home/librocksdb.a" ]; then
  exec 9> "$home.lock"
  flock -n 9 || { say "RocksDB: another run is building it, waiting"; flock 9; }
  [ -f "$home/librocksdb.a" ] || build
  exec 9>&-
fi

config="$ROOT/.cargo/config.toml"
wanted=$(cat <<EOF
# Written by scripts/lib/rocksdb.sh; links the RocksDB that was built once for this machine.
[env]
ROCKSDB_LIB_DIR = "$home"
ROCKSDB_STATIC = "1"
EOF
)
mkdir -p "$ROOT/.cargo"
if [ ! -f "$config" ] || [ "$(cat "$config")" != "$wanted" ]; then
  if [ -f "$config" ] && ! grep -q '^# Written by scripts/lib/rocksdb.sh' "$config"; then
    die "$config is not ours; add this to it, or move it away:
$wanted"
  fi
  # At once, because a cargo of another run may be reading it.
  printf '%s\n' "$wanted" > "$config.$$"
  mv "$config.$$" "$config"
fi

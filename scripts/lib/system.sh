#!/usr/bin/env bash
# Makes sure that Debian's packages for the named purposes are there: system.sh PURPOSE...
#   build      C++ compiler and libclang, for RocksDB and its bindings
#   python     Python with venv, for the Python SDK
#   clients    mosquitto_pub and mosquitto_sub, which tests drive
#   mosquitto  the broker that scripts/perf.sh measures beside ours; never started as a service
#
# Installs what is missing through apt when this is root or sudo asks for no password, otherwise
# names the packages and ends. Idempotent.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

has() { command -v "$1" > /dev/null || [ -x "/usr/sbin/$1" ]; }

# The same places and names that the clang-sys crate looks for: `libclang-cpp.so.*`, which comes with
# LLVM alone, is another library.
has_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return
  local folder name
  for folder in '/usr/lib/llvm-*/lib' '/usr/lib/*-linux-gnu*'; do
    for name in 'libclang.so' 'libclang.so.*' 'libclang-[0-9]*.so' 'libclang-[0-9]*.so.*'; do
      compgen -G "$folder/$name" > /dev/null && return
    done
  done
  return 1
}

has_venv() { has python3 && python3 -c 'import ensurepip, venv' 2> /dev/null; }

packages=()
for purpose in "$@"; do
  case "$purpose" in
    build)
      has c++ && has cc || packages+=(g++)
      has_libclang || packages+=(libclang-dev)
      ;;
    python) has_venv || packages+=(python3 python3-venv) ;;
    clients) has mosquitto_pub && has mosquitto_sub || packages+=(mosquitto-clients) ;;
    mosquitto) has mosquitto || packages+=(mosquitto) ;;
    *) die "unknown purpose: $purpose" ;;
  esac
done
[ ${#packages[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  sudo -n true 2> /dev/null || die "please install these packages, then run this again:
  sudo apt-get install ${packages[*]}"
  as_root=(sudo -n)
fi
command -v apt-get > /dev/null || die "no apt-get here; install what Debian calls: ${packages[*]}"

# Debian starts a server when it installs one; exit code 101 of this file forbids that.
policy=/usr/sbin/policy-rc.d
forbid_services() {
  [ ! -e "$policy" ] || return 0
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" > /dev/null
  "${as_root[@]}" chmod 755 "$policy"
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
}

say "system packages: installing ${packages[*]}"
forbid_services
"${as_root[@]}" apt-get update -q < /dev/null > /dev/null \
  || die "apt-get update failed; run it by hand to see why"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -q --no-install-recommends "${packages[@]}" < /dev/null
if [[ " ${packages[*]} " == *" mosquitto "* ]] && [ -d /run/systemd/system ]; then
  # Nor is it to start with the machine: only the perf run wants it, as its own process.
  "${as_root[@]}" systemctl disable --quiet mosquitto || true
fi

#!/usr/bin/env bash
# Makes sure that Debian's packages for the named purposes are there: system.sh PURPOSE...
#   build      C++ compiler and libclang, for RocksDB and its bindings; checks the Rust compiler too
#   python     Python with venv, for the Python SDK
#   proton     OpenSSL's and Python's headers, with which pip compiles Qpid Proton
#   node       Node and npm, for the Node SDK
#   clients    mosquitto_pub and mosquitto_sub, which tests and people drive
#   lint       shellcheck; done without where it cannot be installed
#   mosquitto  the broker that scripts/perf.sh measures beside ours; never started as a service
#
# Installs what is missing through apt when this is root or sudo asks for no password, otherwise
# names the packages and ends. Idempotent; several runs at once wait for one another.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

has() { command -v "$1" > /dev/null || [ -x "/usr/sbin/$1" ]; }

# The same places and names that the clang-sys crate looks for: `libclang-cpp.so.*`, which comes with
# LLVM alone, is another library. And the compiler's own headers (stdarg.h), which come apart from
# it: without them the bindings do not build.
has_libclang() {
  [ -z "${LIBCLANG_PATH:-}" ] || return 0
  local folder name
  compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stdarg.h' > /dev/null || return 1
  for folder in '/usr/lib/llvm-*/lib' '/usr/lib/*-linux-gnu*'; do
    for name in 'libclang.so' 'libclang.so.*' 'libclang-[0-9]*.so' 'libclang-[0-9]*.so.*'; do
      if compgen -G "$folder/$name" > /dev/null; then return 0; fi
    done
  done
  return 1
}

has_venv() { has python3 && python3 -c 'import ensurepip, venv' 2> /dev/null; }

has_python_headers() {
  has python3 && [ -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]
}

# What is missing, into $packages and, where it can be done without, $optional.
look() {
  packages=()
  optional=()
  local purpose
  for purpose in "$@"; do
    case "$purpose" in
      build)
        { has c++ && has cc; } || packages+=(g++)
        has_libclang || packages+=(libclang-dev)
        ;;
      python) has_venv || packages+=(python3 python3-venv) ;;
      proton)
        has_python_headers || packages+=(python3-dev)
        # Proton finds OpenSSL through pkg-config.
        has pkg-config || packages+=(pkg-config)
        { has pkg-config && pkg-config --exists openssl; } || packages+=(libssl-dev)
        { has c++ && has cc; } || packages+=(g++)
        ;;
      node)
        has node || packages+=(nodejs)
        has npm || packages+=(npm)
        ;;
      clients) { has mosquitto_pub && has mosquitto_sub; } || packages+=(mosquitto-clients) ;;
      lint) has shellcheck || optional+=(shellcheck) ;;
      mosquitto) has mosquitto || packages+=(mosquitto) ;;
      *) die "unknown purpose: $purpose" ;;
    esac
  done
}

case " $* " in *" build "*) check_rust ;; esac
look "$@"
[ $((${#packages[@]} + ${#optional[@]})) -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo -n); fi
if ! has apt-get || ! "${as_root[@]}" true 2> /dev/null; then
  [ ${#packages[@]} -gt 0 ] || exit 0
  has apt-get || die "no apt-get here; install what Debian calls: ${packages[*]}"
  die "these packages are missing, and neither is this root nor does sudo go without a password.
Install them, then run this again:
  sudo apt-get install --no-install-recommends ${packages[*]}"
fi

# Another run, perhaps from another clone, may be installing: then look again.
mkdir -p "$EDGEHUB_CACHE"
exec 9> "$EDGEHUB_CACHE/system.lock"
flock -n 9 || { say "system packages: another run installs them, waiting"; flock 9; }
look "$@"
wanted=("${packages[@]}" "${optional[@]}")
[ ${#wanted[@]} -gt 0 ] || exit 0

# Debian starts a server when it installs one; exit code 101 of this file forbids that.
policy=/usr/sbin/policy-rc.d
forbid_services() {
  [ ! -e "$policy" ] || return 0
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" > /dev/null
  "${as_root[@]}" chmod 755 "$policy"
}

# Whoever else uses apt right now (a timer, another user) is waited for.
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -q -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" < /dev/null 9>&-
}

update() {
  local attempt
  for attempt in 1 2 3 4 5 6; do
    if apt update > /dev/null 2> "$EDGEHUB_CACHE/apt-update.log"; then return 0; fi
    # Its lists have a lock that the option above does not wait for.
    grep -q 'Could not get lock' "$EDGEHUB_CACHE/apt-update.log" || break
    [ "$attempt" -eq 6 ] || sleep 10
  done
  cat "$EDGEHUB_CACHE/apt-update.log" >&2
  die "apt-get update failed"
}

say "system packages: installing ${wanted[*]}"
forbid_services
update
apt install -y --no-install-recommends "${wanted[@]}" || die "apt-get install ${wanted[*]} failed"
if [[ " ${wanted[*]} " == *" mosquitto "* ]] && [ -d /run/systemd/system ]; then
  # Nor is it to start with the machine: only the perf run wants it, as its own process.
  "${as_root[@]}" systemctl disable --quiet mosquitto || true
fi

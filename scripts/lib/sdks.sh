#!/usr/bin/env bash
# Installs the Azure SDKs and the AMQP client that the end-to-end tests drive, into folders that git
# ignores: sdks.sh [python] [proton] [node], all when none is named.
#
# The Python packages are pinned in requirements.txt and requirements-proton.txt of
# tests/e2e/sdk/python, those of Node in tests/e2e/sdk/node/package-lock.json. A stamp beside each
# holds the hash of what it was made from, so nothing happens when nothing changed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sdks="$ROOT/tests/e2e/sdk"

# stamped FILE STAMP: whether the file says that all of this is there already.
stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

# venv REQUIREMENTS FOLDER PACKAGE: a virtual environment with these packages, of which the reader is
# told about one.
venv() {
  local requirements="$sdks/python/$1" venv="$sdks/python/$2" stamp
  # A virtual environment points at its interpreter and holds absolute paths: both make it.
  stamp=$({ cat "$requirements"; python3 --version; printf '%s\n' "$venv"; } | sha256sum)
  if [ -x "$venv/bin/python" ] && stamped "$venv/stamp" "$stamp"; then return 0; fi
  say "SDKs: installing $(grep -o "^$3.*" "$requirements") into ${venv#"$ROOT"/}"
  rm -rf "$venv"
  python3 -m venv "$venv" || die "python3 cannot make a virtual environment in $venv"
  "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    -r "$requirements" < /dev/null || die "pip could not install $requirements"
  printf '%s\n' "$stamp" > "$venv/stamp"
}

python_sdk() { venv requirements.txt .venv azure-iot-device; }

# Compiled by pip. Without OpenSSL's headers it still compiles, and then cannot speak TLS.
proton() {
  venv requirements-proton.txt .venv-proton python-qpid-proton
  "$sdks/python/.venv-proton/bin/python" -c 'import sys, proton; sys.exit(not proton.SSL.present())' || {
    rm -rf "$sdks/python/.venv-proton"
    die "python-qpid-proton was built without TLS: run scripts/lib/system.sh proton, then this again"
  }
}

node_sdk() {
  local folder="$sdks/node" modules="$sdks/node/node_modules" stamp version
  version=$(node --version) || die "node does not run"
  version=${version#v}
  [ "${version%%.*}" -ge 18 ] || die "Node 18 or newer is needed, here is $version ($(command -v node))"
  stamp=$({ cat "$folder/package.json" "$folder/package-lock.json"; printf '%s\n' "$version"; } | sha256sum)
  if stamped "$modules/.stamp" "$stamp"; then return 0; fi
  say "SDKs: installing $(grep -o 'azure-iot-device": *"[^"]*' "$folder/package.json" | tr -d '" ') into ${modules#"$ROOT"/}"
  rm -rf "$modules"
  # Without the packages' own scripts: none of ours needs one, and they may do anything.
  (cd "$folder" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error < /dev/null) \
    || die "npm could not install $folder/package-lock.json"
  printf '%s\n' "$stamp" > "$modules/.stamp"
}

mkdir -p "$EDGEHUB_CACHE"
exec 9> "$EDGEHUB_CACHE/sdks.lock"
flock -n 9 || { say "SDKs: another run installs them, waiting"; flock 9; }
[ $# -gt 0 ] || set -- python proton node
for sdk in "$@"; do
  case "$sdk" in
    python) python_sdk ;;
    proton) proton ;;
    node) node_sdk ;;
    *) die "unknown SDK: $sdk" ;;
  esac
done

#!/usr/bin/env bash
# Installs the Azure SDKs that the end-to-end tests drive, into folders that git ignores:
# sdks.sh [python] [node], both when none is named.
#
# The Python packages are pinned in tests/e2e/sdk/python/requirements.txt, those of Node in
# tests/e2e/sdk/node/package-lock.json. A stamp beside each holds the hash of what it was made from,
# so nothing happens when nothing changed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sdks="$ROOT/tests/e2e/sdk"

# stamped FILE STAMP: whether the file says that all of this is there already.
stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

python_sdk() {
  local folder="$sdks/python" venv="$sdks/python/.venv" stamp
  # A virtual environment points at its interpreter and holds absolute paths: both make it.
  stamp=$({ cat "$folder/requirements.txt"; python3 --version; printf '%s\n' "$venv"; } | sha256sum)
  if [ -x "$venv/bin/python" ] && stamped "$venv/stamp" "$stamp"; then return 0; fi
  say "SDKs: installing $(grep -o '^azure-iot-device.*' "$folder/requirements.txt") into ${venv#"$ROOT"/}"
  rm -rf "$venv"
  python3 -m venv "$venv" || die "python3 cannot make a virtual environment in $venv"
  "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    -r "$folder/requirements.txt" < /dev/null || die "pip could not install $folder/requirements.txt"
  printf '%s\n' "$stamp" > "$venv/stamp"
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
[ $# -gt 0 ] || set -- python node
for sdk in "$@"; do
  case "$sdk" in
    python) python_sdk ;;
    node) node_sdk ;;
    *) die "unknown SDK: $sdk" ;;
  esac
done

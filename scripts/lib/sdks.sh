#!/usr/bin/env bash
# Installs the Azure SDKs that the end-to-end tests drive, into folders that git ignores.
#
# The Python packages are pinned in tests/e2e/sdk/python/requirements.txt. A stamp in the virtual
# environment holds the hash of what it was made from, so nothing happens when nothing changed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder="$ROOT/tests/e2e/sdk/python"
venv="$folder/.venv"
# A virtual environment points at its interpreter and holds absolute paths: both make it.
stamp=$({ cat "$folder/requirements.txt"; python3 --version; printf '%s\n' "$venv"; } | sha256sum)

mkdir -p "$EDGEHUB_CACHE"
exec 9> "$EDGEHUB_CACHE/sdks.lock"
flock -n 9 || { say "Python SDK: another run installs it, waiting"; flock 9; }
if [ -x "$venv/bin/python" ] && [ -f "$venv/stamp" ] && [ "$(cat "$venv/stamp")" = "$stamp" ]; then
  exit 0
fi
say "Python SDK: installing $(grep -o '^azure-iot-device.*' "$folder/requirements.txt") into ${venv#"$ROOT"/}"
rm -rf "$venv"
python3 -m venv "$venv" || die "python3 cannot make a virtual environment in $venv"
"$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
  -r "$folder/requirements.txt" < /dev/null || die "pip could not install $folder/requirements.txt"
printf '%s\n' "$stamp" > "$venv/stamp"

#!/usr/bin/env bash
# What an MQTT client needs to speak as one identity of a running lab, as shell variables:
#   eval "$(scripts/identity.sh --state DIR leaf1)"
# sets GATEWAY, PORT, CA_FILE, CLIENT_ID, USER_NAME, PASSWORD (a token for one day) and TOPIC.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib/common.sh"

if [ $# -ne 3 ] || [ "$1" != --state ]; then
  die "usage: scripts/identity.sh --state DIR IDENTITY"
fi
[ -f "$2/lab.json" ] || die "there is no $2/lab.json: start a lab with scripts/lab.sh up --state $2"
command -v python3 > /dev/null || die "python3 is missing: scripts/lib/system.sh python installs it"

exec python3 - "$2/lab.json" "$3" <<'PYTHON'
import base64, hashlib, hmac, json, shlex, sys, time
from urllib.parse import quote

lab = json.load(open(sys.argv[1]))
found = [identity for identity in lab["identities"] if identity["id"] == sys.argv[2]]
if not found:
    sys.exit("no such identity; there are: " + ", ".join(i["id"] for i in lab["identities"]))
identity = found[0]
layer = next(layer for layer in lab["layers"] if layer["name"] == identity["parent"])
part = dict(pair.split("=", 1) for pair in identity["connection_string"].split(";"))
device, module, host = part["DeviceId"], part.get("ModuleId"), part["HostName"]
path = f"{device}/modules/{module}" if module else device
resource = quote(f"{host}/devices/{path}", safe="")
expiry = int(time.time()) + 24 * 3600
key = base64.b64decode(part["SharedAccessKey"])
digest = hmac.digest(key, f"{resource}\n{expiry}".encode(), hashlib.sha256)
signature = quote(base64.b64encode(digest), safe="")
for name, value in {
    "GATEWAY": part["GatewayHostName"],
    "PORT": str(layer["mqtts"]),
    "CA_FILE": lab["ca_file"],
    "CLIENT_ID": identity["id"],
    "USER_NAME": f"{host}/{identity['id']}/?api-version=2021-04-12",
    "PASSWORD": f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}",
    "TOPIC": f"devices/{path}/messages/events/",
}.items():
    print(f"{name}={shlex.quote(value)}")
PYTHON

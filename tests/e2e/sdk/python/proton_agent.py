"""One connection of Apache Qpid Proton, which knows nothing of Azure, to a hub: what the environment
variable PROTON_CASE orders, and what came of it as a JSON object on standard output.

{"host": "…", "port": 5671, "ca": "file",
 "user": "…", "password": "…",                      (or neither: then it is anonymous)
 "tokens": [{"id": 7 | "text", "name": "…", "token": "…"}],
 "links": [{"address": "…", "messages": [{"id": …, "body": "…", "kind": "data" | "text",
                                          "properties": {}}]}]}

{"connected": true | "why not",
 "tokens": [{"status": 200, "description": "OK", "correlation": 7 | "text"}],
 "links": [{"refused": null | "condition", "outcomes": ["ACCEPTED", …]}]}
"""

import json
import os
import sys

from proton import (
    ConnectionException,
    Delivery,
    Message,
    ProtonException,
    SSLDomain,
    ulong,
)
from proton.utils import BlockingConnection, LinkDetached, SendException

TIMEOUT_S = 60


def connect(case):
    domain = SSLDomain(SSLDomain.MODE_CLIENT)
    domain.set_trusted_ca_db(case["ca"])
    domain.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
    credentials = {name: case[name] for name in ("user", "password") if name in case}
    # The mechanism is Proton's own choice among those that the hub offers.
    return BlockingConnection(
        f"amqps://{case['host']}:{case['port']}",
        timeout=TIMEOUT_S,
        ssl_domain=domain,
        sasl_enabled=True,
        **credentials,
    )


def put_tokens(connection, tokens):
    if not tokens:
        return []
    answers = connection.create_receiver("$cbs", credit=len(tokens))
    requests = connection.create_sender("$cbs")
    seen = []
    for token in tokens:
        number = token["id"]
        identifier = ulong(number) if isinstance(number, int) else number
        properties = {
            "operation": "put-token",
            "type": "servicebus.windows.net:sastoken",
            "name": token["name"],
        }
        request = Message(
            id=identifier, reply_to="cbs", properties=properties, body=token["token"]
        )
        requests.send(request)
        answer = answers.receive(timeout=TIMEOUT_S)
        # The hub settles its answers itself; a client must not settle them again.
        if answers.fetcher.unsettled:
            answers.accept()
        seen.append(
            {
                "status": answer.properties["status-code"],
                "description": answer.properties.get("status-description"),
                "correlation": answer.correlation_id,
            }
        )
    return seen


def send(sender, message):
    body = message["body"]
    is_data = message.get("kind", "data") == "data"
    message = Message(
        id=message.get("id"),
        properties=message.get("properties"),
        body=body.encode() if is_data else body,
        # Inferred: bytes are a data section, and not a value of type binary.
        inferred=is_data,
    )
    try:
        state = sender.send(message, timeout=TIMEOUT_S).remote_state
    except SendException as error:
        state = error.state
    names = {
        Delivery.ACCEPTED: "ACCEPTED",
        Delivery.REJECTED: "REJECTED",
        Delivery.RELEASED: "RELEASED",
        Delivery.MODIFIED: "MODIFIED",
    }
    return names.get(state, str(state))


def use(connection, link):
    try:
        sender = connection.create_sender(link["address"])
    except LinkDetached as error:
        return {"refused": error.condition or str(error), "outcomes": []}
    outcomes = [send(sender, message) for message in link["messages"]]
    sender.close()
    return {"refused": None, "outcomes": outcomes}


def main():
    case = json.loads(os.environ["PROTON_CASE"])
    try:
        connection = connect(case)
    except (ConnectionException, ProtonException) as error:
        return {"connected": str(error) or type(error).__name__}
    seen = {"connected": True}
    seen["tokens"] = put_tokens(connection, case["tokens"])
    seen["links"] = [use(connection, link) for link in case["links"]]
    connection.close()
    return seen


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
    print()

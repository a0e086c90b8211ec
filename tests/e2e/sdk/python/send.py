"""Sends messages with azure-iot-device and prints each one that was acknowledged.

The acceptance test compares these lines with what reached the IoT Hub, so every part of a message
that the SDK lets an application set is set here, with the characters that encoders get wrong. The
SDK's send_message returns when the PUBACK is there; nothing is sent again.
"""

import argparse
import base64
import json
import logging
import os
import sys

from azure.iot.device import IoTHubDeviceClient, IoTHubModuleClient, Message


def make_client(connection_string, ca_file):
    with open(ca_file, encoding="utf-8") as file:
        ca = file.read()
    kind = IoTHubModuleClient if "ModuleId=" in connection_string else IoTHubDeviceClient
    return kind.create_from_connection_string(
        connection_string, server_verification_cert=ca, auto_connect=True
    )


def make_message(sequence):
    # Every tenth body is bytes that are no text; the others are JSON with more than ASCII.
    if sequence % 10 == 0:
        message = Message(bytes(range(256)) + sequence.to_bytes(4, "big"))
        message.content_type = "application/octet-stream"
    else:
        text = json.dumps({"sequence": sequence, "text": "Grüße, 世界 🚀"}, ensure_ascii=False)
        message = Message(text, content_encoding="utf-8", content_type="application/json")
    message.message_id = f"message/{sequence} of ü&=%?#+"
    message.correlation_id = f"correlation {sequence};é$"
    message.user_id = "user@example"
    message.custom_properties = {
        "sequence": str(sequence),
        "plain": "value",
        "empty": "",
        "blank": " ",
        "non-ascii": "Grüße, 世界 🚀",
        "schlüssel €": "a key that is not ASCII",
        "special": "a/b?c#d&e=f+g%h\"i'j\\k;l,m$n@o!p*q(r)s[t]{u}|v<w>^x`y~z:",
        "a/key?with#all&of=the+m%$": "x",
        "deviceId": "somebody-else",
        "looks encoded": "%2F%zz%",
        "line": "first\nsecond\tthird",
    }
    return message


def as_sent(message, sequence):
    body = message.data if isinstance(message.data, bytes) else message.data.encode("utf-8")
    system = {
        "message-id": message.message_id,
        "correlation-id": message.correlation_id,
        "user-id": message.user_id,
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
    }
    return {
        "sequence": sequence,
        "body_base64": base64.b64encode(body).decode("ascii"),
        "system": {name: value for name, value in system.items() if value is not None},
        "properties": message.custom_properties,
    }


def main():
    parser = argparse.ArgumentParser(description="Sends messages with azure-iot-device.")
    parser.add_argument("--ca", required=True, help="PEM of the root CA")
    parser.add_argument("--count", type=int, required=True, help="how many messages")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    client = make_client(os.environ["CONNECTION_STRING"], options.ca)
    client.connect()
    for sequence in range(1, options.count + 1):
        message = make_message(sequence)
        client.send_message(message)
        print(json.dumps(as_sent(message, sequence)), flush=True)
    client.shutdown()


if __name__ == "__main__":
    main()

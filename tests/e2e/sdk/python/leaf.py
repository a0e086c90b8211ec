"""A leaf device or module that is nothing but azure-iot-device: sends numbered messages and writes
down which of them were acknowledged.

It is how tests and the demo know what a real client was promised. Each acknowledged message is one
JSON line {"sequence": 7, "sha256": "..."} in the log, written out before the next message is sent.
A message that was not acknowledged is sent again, unchanged, until it is; so nothing may be missing
from the ledger, and a body may be there twice. Started again with the same log it goes on counting.

Ends on SIGTERM, after --count messages, or (with --exit-with-stdin) when standard input closes.
"""

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import threading

from azure.iot.device import IoTHubDeviceClient, IoTHubModuleClient, Message

# After the end was asked for, a message under way may still be acknowledged for this long.
LAST_MESSAGE_SECONDS = 10
# Between attempts to send the same message again.
RETRY_SECONDS = 0.2


def arguments():
    parser = argparse.ArgumentParser(description="Sends numbered messages with azure-iot-device.")
    parser.add_argument("--ca", required=True, help="PEM of the root CA")
    parser.add_argument("--log", required=True, help="file of acknowledged messages")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between messages")
    parser.add_argument("--count", type=int, help="end after this many acknowledged messages")
    parser.add_argument("--body-bytes", type=int, default=256, help="least size of a body")
    parser.add_argument(
        "--property", action="append", default=[], metavar="NAME=VALUE", help="on each message"
    )
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when stdin closes")
    return parser.parse_args()


def make_client(connection_string, ca_file):
    with open(ca_file, encoding="utf-8") as file:
        ca = file.read()
    kind = IoTHubModuleClient if "ModuleId=" in connection_string else IoTHubDeviceClient
    return kind.create_from_connection_string(
        connection_string,
        server_verification_cert=ca,
        # Hubs are back within seconds here; the default of 10 s would hide that.
        connection_retry_interval=1,
        # So that a silent network is noticed within seconds, not after a minute and a half.
        keep_alive=10,
    )


def last_sequence(path):
    """The last number in an existing log. A torn last line is taken off: it was never promised."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb+") as file:
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            file.truncate(sum(len(line) for line in lines))
    return json.loads(lines[-1])["sequence"] if lines else 0


def make_body(sequence, size):
    start = json.dumps({"sequence": sequence, "padding": ""})
    return json.dumps({"sequence": sequence, "padding": "x" * max(0, size - len(start))})


def send(client, sequence, body, properties, stop):
    """Sends until it is acknowledged. False when the end came first."""
    message = Message(body)
    message.message_id = str(sequence)
    message.content_type = "application/json"
    message.content_encoding = "utf-8"
    message.custom_properties.update(properties)
    while True:
        try:
            client.send_message(message)
            return True
        except Exception as error:  # whatever the SDK says about a lost connection
            if stop.is_set():
                return False
            print(f"message {sequence} again: {type(error).__name__}: {error}", flush=True)
            stop.wait(RETRY_SECONDS)


def run(options, stop):
    connection_string = os.environ["CONNECTION_STRING"]
    properties = dict(pair.split("=", 1) for pair in options.property)
    sequence = last_sequence(options.log)
    first = sequence
    client = make_client(connection_string, options.ca)
    with open(options.log, "a", encoding="utf-8") as log:
        while not stop.is_set() and (options.count is None or sequence - first < options.count):
            body = make_body(sequence + 1, options.body_bytes)
            if not send(client, sequence + 1, body, properties, stop):
                return
            sequence += 1
            digest = hashlib.sha256(body.encode("utf-8")).hexdigest()
            log.write(json.dumps({"sequence": sequence, "sha256": digest}) + "\n")
            log.flush()
            stop.wait(options.interval)
    client.shutdown()
    print(f"{sequence - first} messages acknowledged", flush=True)


def main():
    options = arguments()
    # What the SDK's own threads have to say about lost connections, and nothing below it.
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if options.exit_with_stdin:

        def until_closed():
            sys.stdin.buffer.read()
            stop.set()

        threading.Thread(target=until_closed, daemon=True).start()
    failed = []

    def work():
        try:
            run(options, stop)
        except Exception as error:
            logging.exception("the leaf can not go on")
            failed.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive() and not stop.is_set():
        worker.join(0.1)
    worker.join(LAST_MESSAGE_SECONDS)
    # Not sys.exit: the SDK's threads may still wait for a connection that never comes.
    sys.stdout.flush()
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()

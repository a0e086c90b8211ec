"""azure-iot-device as a process that does what it is told: one JSON command per line on standard
input, one JSON line on standard output for each result and each event.

The protocol is the same as that of sdk/node/agent.js. A command is {"id": 1, "do": "...", ...}; its
result {"id": 1, "ok": ...} or {"id": 1, "error": "..."}. What arrives unasked is {"event": "..."}.
The SDK's own behaviour (reconnects, renewals of tokens, what is subscribed again) is left as it is.

Ends when standard input closes.
"""

import argparse
import base64
import json
import logging
import os
import sys
import threading

from azure.iot.device import IoTHubDeviceClient, IoTHubModuleClient, Message, MethodResponse

OUTPUT = threading.Lock()


def say(line):
    with OUTPUT:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def body_of(message):
    data = message.data
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)


class Agent:
    def __init__(self, options):
        connection_string = os.environ["CONNECTION_STRING"]
        with open(options.ca, encoding="utf-8") as file:
            ca = file.read()
        self.is_module = "ModuleId=" in connection_string
        kind = IoTHubModuleClient if self.is_module else IoTHubDeviceClient
        settings = {
            "server_verification_cert": ca,
            "websockets": options.protocol == "mqttws",
            # Hubs are back within seconds here; the default of 10 s would hide that.
            "connection_retry_interval": 1,
            # So that a silent network is noticed within seconds.
            "keep_alive": 10,
        }
        if options.token_ttl:
            settings["sastoken_ttl"] = options.token_ttl
        if options.model_id:
            # This SDK tells a model by its prefix and has no other place for it.
            settings["product_info"] = options.model_id
        self.client = kind.create_from_connection_string(connection_string, **settings)
        self.client.on_connection_state_change = self.connection_changed
        self.output = None

    def connection_changed(self):
        say({"event": "connected" if self.client.connected else "disconnected"})

    def do_connect(self, _):
        self.client.connect()

    def do_send(self, command):
        message = Message(command["body"], content_encoding="utf-8", content_type="application/json")
        message.custom_properties.update(command.get("properties", {}))
        if command.get("message_id"):
            message.message_id = command["message_id"]
        if command.get("output"):
            self.client.send_message_to_output(message, command["output"])
        else:
            self.client.send_message(message)

    def do_get_twin(self, _):
        return self.client.get_twin()

    def do_patch_reported(self, command):
        self.client.patch_twin_reported_properties(command["patch"])

    def do_watch_desired(self, _):
        self.client.on_twin_desired_properties_patch_received = lambda patch: say(
            {"event": "desired", "patch": patch}
        )

    def do_answer_methods(self, _):
        def handle(request):
            say({"event": "method", "name": request.name, "payload": request.payload})
            if request.name == "unanswered":
                return
            if request.name == "echo":
                status, payload = 200, {"echo": request.payload}
            else:
                status, payload = 501, {"unknown": request.name}
            answer = MethodResponse.create_from_method_request(request, status, payload)
            self.client.send_method_response(answer)

        self.client.on_method_request_received = handle

    def do_watch_c2d(self, _):
        self.client.on_message_received = self.message_arrived

    def do_watch_inputs(self, command):
        # With an output, each message goes on to it before the next one is taken.
        self.output = command.get("output")
        self.client.on_message_received = self.message_arrived

    def message_arrived(self, message):
        event = "input" if self.is_module else "c2d"
        say(
            {
                "event": event,
                "input": getattr(message, "input_name", None),
                "body": body_of(message),
                "message_id": message.message_id,
                "properties": message.custom_properties,
            }
        )
        if self.output:
            onward = Message(message.data)
            onward.custom_properties.update(message.custom_properties)
            self.client.send_message_to_output(onward, self.output)

    def do_disconnect(self, _):
        self.client.disconnect()

    def do_invoke(self, command):
        """Calls a method of another client through this module's hub."""
        return self.client.invoke_method(
            command["request"], command["device"], command.get("module")
        )

    def run(self, command):
        try:
            result = getattr(self, "do_" + command["do"])(command)
            say({"id": command["id"], "ok": result})
        except Exception as error:  # whatever the SDK says is the result
            say({"id": command["id"], "error": f"{type(error).__name__}: {error}"})


def main():
    parser = argparse.ArgumentParser(description="An azure-iot-device that does what it is told.")
    parser.add_argument("--ca", required=True, help="PEM of the root CA")
    parser.add_argument("--protocol", choices=["mqtt", "mqttws"], default="mqtt")
    parser.add_argument("--token-ttl", type=int, help="seconds that a token lives")
    parser.add_argument("--model-id", help="Plug and Play model")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    agent = Agent(options)
    for line in sys.stdin:
        # Each in its own thread: a call that waits for a hub that is down holds up no other.
        threading.Thread(target=agent.run, args=(json.loads(line),), daemon=True).start()
    sys.stdout.flush()
    # Not sys.exit: the SDK's threads may still wait for a connection that never comes.
    os._exit(0)


if __name__ == "__main__":
    main()

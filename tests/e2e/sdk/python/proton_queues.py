"""Apache Qpid Proton against a server of plain queues on the port of the first argument
(proto/amqp/tests/interop.rs): what came of it is printed as one JSON object."""

import json
import sys
import time

from proton import ConnectionException, Delivery, Message, ProtonException, Timeout
from proton.reactor import AtMostOnce
from proton.utils import (
    BlockingConnection,
    ConnectionClosed,
    LinkDetached,
    SendException,
)

PORT = sys.argv[1]
SENT = 100
# More than the credit of a link.
SETTLED = 300
TIMEOUT_S = 60
NAMES = {
    Delivery.ACCEPTED: "accepted",
    Delivery.REJECTED: "rejected",
    Delivery.RELEASED: "released",
    Delivery.MODIFIED: "modified",
}


def connect(**options):
    return BlockingConnection(f"amqp://127.0.0.1:{PORT}", timeout=TIMEOUT_S, **options)


def outcome(sender, body):
    try:
        state = sender.send(Message(body=body)).remote_state
    except SendException as error:
        state = error.state
    return NAMES.get(state, str(state))


def receive(connection, address, count, settle):
    receiver = connection.create_receiver(address, credit=1)
    bodies = []
    while len(bodies) < count:
        bodies.append(receiver.receive(timeout=TIMEOUT_S).body)
        getattr(receiver, settle(len(bodies)))()
    # With the queue empty, drained credit comes back.
    receiver.link.drain(1)
    connection.wait(lambda: not receiver.link.draining(), timeout=TIMEOUT_S)
    receiver.close()
    return bodies


def settle(number):
    return {1: "release", 3: "reject"}.get(number, "accept")


def settled(connection):
    """Neither side waits for the other to settle."""
    sender = connection.create_sender("settled", options=AtMostOnce())
    bodies = [f"settled {index}" for index in range(SETTLED)]
    for body in bodies:
        sender.send(Message(body=body))
    receiver = connection.create_receiver("settled", credit=10, options=AtMostOnce())
    arrived = []
    while len(arrived) < SETTLED:
        arrived.append(receiver.receive(timeout=TIMEOUT_S).body)
    return arrived == bodies


def large():
    """Bodies of many frames, whose parts all differ."""
    connection = connect(max_frame_size=512)
    body = ",".join(str(number) for number in range(50000))
    bodies = [f"{index}:{body}" for index in range(3)]
    sender = connection.create_sender("large")
    outcomes = [outcome(sender, body) for body in bodies]
    arrived = receive(connection, "large", len(bodies), lambda _: "accept")
    connection.close()
    return outcomes == ["accepted"] * 3 and arrived == bodies


def credit(connection):
    """How many of 25 messages come with a credit of 10, of 5 more, and of many more."""
    sender = connection.create_sender("credit")
    for index in range(25):
        sender.send(Message(body=str(index)))
    # With another credit, or its `receive`, Proton would give more by itself.
    receiver = connection.create_receiver("credit", credit=0)
    arrived = receiver.fetcher.incoming
    seen = []
    for more, target in ((10, 10), (5, 15), (100, 25)):
        receiver.link.flow(more)
        connection.wait(lambda: len(arrived) >= target, timeout=TIMEOUT_S)
        # Whatever the server would send too much comes before the answers to these.
        for _ in range(2):
            sender_of_others = connection.create_sender("others")
            sender_of_others.send(Message(body="x"))
            sender_of_others.close()
        seen.append(len(arrived))
    receiver.close()
    return seen


def ends(address):
    """The error with which the server ends a link or a connection."""
    connection = connect()
    try:
        connection.create_sender(address).send(Message(body="x"))
        return None
    except (LinkDetached, ConnectionClosed) as error:
        return error.condition


def many(connection):
    """Links beside each other, each with a queue of its own."""
    links = []
    for index in range(50):
        queue = f"many {index}"
        links.append((queue, connection.create_sender(queue)))
    outcomes = [outcome(link, queue) for queue, link in links]
    arrived = [receive(connection, queue, 1, lambda _: "accept") for queue, _ in links]
    return outcomes == ["accepted"] * 50 and arrived == [[queue] for queue, _ in links]


def idle():
    """Heartbeats keep a connection on which nothing happens, for longer than its time-out."""
    connection = connect(heartbeat=10)
    until = time.monotonic() + 12
    try:
        connection.wait(lambda: time.monotonic() > until)
        return outcome(connection.create_sender("idle"), "alive") == "accepted"
    finally:
        connection.close()


def main():
    # On connections of their own, and first: a connection that nobody waits on sends no heartbeats.
    seen = {"idle": idle(), "large": large()}
    connection = connect()
    seen["settled"] = settled(connection)
    seen["many"] = many(connection)
    seen["credit"] = credit(connection)
    seen["detached"] = ends("$detach")
    seen["ended"] = ends("$close")
    queue = connection.create_sender("q")
    bodies = [f"message {index}" for index in range(SENT)]
    seen["accepted"] = [outcome(queue, body) for body in bodies].count("accepted")
    arrived = receive(connection, "q", len(bodies) + 1, settle)
    # The first one was given back and comes again.
    seen["again"] = arrived[0] == bodies[0] == arrived[1]
    seen["in_order"] = arrived[1:] == bodies
    seen["dead"] = receive(connection, "q.dead", 1, lambda _: "accept")
    seen["outcomes"] = [
        outcome(connection.create_sender(address), "x")
        for address in ("$reject", "$release", "$modify")
    ]
    seen["refused"] = []
    for create in (connection.create_sender, connection.create_receiver):
        try:
            create("$forbidden")
        except LinkDetached as error:
            seen["refused"].append(error.condition)
    seen["still_works"] = outcome(queue, "last")
    connection.close()
    seen["closed"] = True
    for name, password in (("plain", "open-sesame"), ("wrong", "guess")):
        try:
            connect(
                user="somebody",
                password=password,
                allowed_mechs="PLAIN",
                allow_insecure_mechs=True,
                sasl_enabled=True,
            ).close()
            seen[name] = True
        except (ConnectionException, ProtonException, Timeout):
            seen[name] = False
    return seen


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
    print()

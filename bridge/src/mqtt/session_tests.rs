//! The sending side of a session against the server of `session_support`. The clock is the runtime's,
//! paused.

use std::num::NonZeroU16;

use bytes::Bytes;
use edgehub_proto::message::{Message, Property, SystemProperty};
use edgehub_proto::stored;
use edgehub_storage::Entry;
use ntex_mqtt::v3::codec::{ConnectAckReason, Decoded, Packet};

use super::super::session_support::start;
use super::*;
use crate::lanes::{Disposition, DropReason};

fn outgoing(token: u64, message: &Message) -> Outgoing {
    let entry = Entry {
        offset: token + 100,
        sender: Identity::parse("edge1/modA").unwrap(),
        message: stored::encode_message(message),
        enqueued_ms: 0,
        expires_at_ms: None,
        shared: None,
    };
    Outgoing {
        token,
        priority: 3,
        resend: false,
        entry,
    }
}

fn message(body: &str) -> Message {
    let mut message = Message {
        body: Bytes::copy_from_slice(body.as_bytes()),
        ..Message::default()
    };
    message.properties.push(Property {
        key: "a b".into(),
        value: Some("c/d".into()),
    });
    message.system.set(SystemProperty::MessageId, "m-1");
    message.system.set(SystemProperty::OutputName, "out");
    message
}

fn puback(id: u16) -> Packet {
    Packet::PublishAck {
        packet_id: NonZeroU16::new(id).unwrap(),
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_one_write_and_its_acknowledgements_are_one_event() {
    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let reads = server.reads;
    client
        .send(
            (0..50)
                .map(|token| outgoing(token, &message("body")))
                .collect(),
        )
        .await;
    for _ in 0..50 {
        let Some(Decoded::Publish(publish, body, _)) = server.receive().await else {
            panic!()
        };
        let topic = "devices/edge1/modules/modA/messages/events/a%20b=c%2Fd&%24.mid=m-1";
        assert_eq!(
            (publish.topic.as_str(), body.as_ref()),
            (topic, &b"body"[..])
        );
    }
    assert_eq!(server.reads - reads, 1, "fifty publishes in one write");
    server.send((1..=50).rev().map(puback)).await;
    let expected: Vec<_> = (0..50)
        .rev()
        .map(|token| (token, Disposition::Accepted))
        .collect();
    assert_eq!(client.disposed().await, expected);
}

#[tokio::test(start_paused = true)]
async fn refusals_and_broken_connections_have_their_causes() {
    for (code, expected) in [
        (
            ConnectAckReason::NotAuthorized,
            "refused by the upstream: not authorized",
        ),
        (
            ConnectAckReason::BadUserNameOrPassword,
            "refused by the upstream: bad user name or password",
        ),
        (
            ConnectAckReason::IdentifierRejected,
            "refused by the upstream: client identifier rejected",
        ),
        (
            ConnectAckReason::ServiceUnavailable,
            "upstream is not available: server unavailable",
        ),
        (
            ConnectAckReason::UnacceptableProtocolVersion,
            "protocol error: unacceptable protocol",
        ),
    ] {
        let (client, mut server) = start(MachineConfig::default());
        server.accept(code).await;
        assert_eq!(client.task.await.unwrap().to_string(), expected);
    }
    let (client, mut server) = start(MachineConfig::default());
    server.receive().await;
    drop(server);
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Unreachable(_)), "{cause}");

    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    server.send([Packet::PingRequest]).await;
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Protocol(_)), "{cause}");

    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    drop(server);
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
}

#[tokio::test(start_paused = true)]
async fn a_black_hole_is_noticed_in_every_phase() {
    // Nothing after CONNECT.
    let begin = Instant::now();
    let (client, server) = start(MachineConfig::default());
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Unreachable(_)), "{cause}");
    assert_eq!(begin.elapsed().as_secs(), 20);
    drop(server);

    // Nothing while idle.
    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let begin = Instant::now();
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
    assert_eq!(begin.elapsed().as_secs(), 60);
    drop(server);

    // Nothing for a publish.
    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let begin = Instant::now();
    client.send(vec![outgoing(0, &message("x"))]).await;
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
    assert_eq!(begin.elapsed().as_secs(), 20);
}

/// The pipe takes nothing more: the probe cannot be written, and the link is still found dead.
#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_noticed_too() {
    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let begin = Instant::now();
    let large = message(&"x".repeat(250_000));
    client
        .send((0..8).map(|token| outgoing(token, &large)).collect())
        .await;
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
    assert_eq!(begin.elapsed().as_secs(), 20);
}

#[tokio::test(start_paused = true)]
async fn close_says_goodbye_after_what_was_handed_over() {
    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    client.send(vec![outgoing(0, &message("x"))]).await;
    client.commands.send(Command::Close).await.unwrap();
    assert_eq!(client.task.await.unwrap(), CloseCause::Requested);
    assert!(matches!(server.receive().await, Some(Decoded::Publish(..))));
    let last = server.receive().await;
    assert!(
        matches!(last, Some(Decoded::Packet(Packet::Disconnect, _))),
        "{last:?}"
    );
    assert!(server.receive().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn messages_that_can_never_be_sent_are_named_and_the_others_go() {
    let (mut client, mut server) = start(MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    let mut corrupt = outgoing(0, &message("x"));
    corrupt.entry.message = Bytes::from_static(&[0xff, 0xff]);
    let mut long = message("x");
    long.properties.push(Property {
        key: "k".into(),
        value: Some("/".repeat(30_000)),
    });
    let batch = vec![corrupt, outgoing(1, &long), outgoing(2, &message("good"))];
    client.send(batch).await;
    let unsendable = client.disposed().await;
    assert_eq!(
        unsendable,
        [
            (0, Disposition::Unsendable(DropReason::CorruptRecord)),
            (1, Disposition::Unsendable(DropReason::TooLarge)),
        ]
    );
    let Some(Decoded::Publish(_, body, _)) = server.receive().await else {
        panic!()
    };
    assert_eq!(body.as_ref(), b"good");
    server.send([puback(1)]).await;
    assert_eq!(client.disposed().await, [(2, Disposition::Accepted)]);
}

#[tokio::test(start_paused = true)]
async fn more_than_the_window_ends_the_session_instead_of_waiting_for_ever() {
    let config = MachineConfig {
        window: 4,
        ..MachineConfig::default()
    };
    let (mut client, mut server) = start(config);
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    client
        .send((0..5).map(|token| outgoing(token, &message("x"))).collect())
        .await;
    let cause = client.task.await.unwrap();
    assert!(matches!(cause, CloseCause::Local(_)), "{cause}");
}

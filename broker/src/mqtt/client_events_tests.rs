//! Events of the hub on their way to a client that reads when it likes (spec/mqtt.md 8.4, 14 item
//! 17; testing.md S6).

use std::sync::Arc;

use bytes::BytesMut;
use edgehub_proto::message::Message;
use mqttbytes::v4::Packet;
use tokio::io::duplex;
use tokio::sync::mpsc;

use super::client::Accepted;
use super::connection::{ConnectionContext, ConnectionEnd, serve};
use super::limits::WRITE_MAX;
use super::machine::{Event, Machine};
use super::subscriber::Subscriber;
use super::test_head::{Client, Head, connect, telemetry};
use super::test_packets::{TIMING, ack, publish1};
use super::transport::Transport;
use crate::hub::{ConnectOptions, Delivery, DeliveryToken, OUTBOX_EVENTS_MAX, ToClient};
use crate::session::{Session, StoredSubscription};
use crate::telemetry::metrics::AckCounters;
use crate::test_support::id;

/// A module that is subscribed to its inputs, with an outbox that the test fills. `buffer` is what
/// its stream holds.
async fn with_outbox(head: &Head, buffer: usize) -> (Client, mpsc::Sender<ToClient>) {
    let (near, far) = duplex(buffer);
    let hub = Arc::clone(&head.hub.hub);
    let (outbox, events) = mpsc::channel(OUTBOX_EVENTS_MAX);
    let stop = head.stop.clone();
    let task = tokio::spawn(async move {
        let claim = crate::test_support::claim("edge1/modA");
        let connected = hub.connect(claim, ConnectOptions::default()).await.unwrap();
        let session = Session {
            subscriptions: vec![StoredSubscription {
                filter: "devices/edge1/modules/modA/#".to_owned(),
                qos: 1,
            }],
        };
        let accepted = Accepted {
            subscriber: Subscriber::new(id("edge1/modA"), None, Some(&session)),
            principal: connected.principal,
            registration: connected.registration,
            outbox: events,
            will: None,
        };
        let now = hub.clock().instant();
        let mut machine = Machine::new(TIMING, now);
        machine.receive(&connect("edge1/modA", false, None), now);
        assert!(matches!(machine.poll(), Some(Event::Connect(_))));
        machine.accept(true, now);
        let context = ConnectionContext {
            hub,
            timing: TIMING,
            acks: AckCounters::new(),
            stop,
        };
        let client =
            super::client::Client::new(Transport::new(far, now), machine, accepted, &context);
        client.run().await
    });
    let mut client = Client {
        stream: near,
        input: BytesMut::new(),
        task,
    };
    assert!(client.accepted().await);
    (client, outbox)
}

fn input(number: u64, bytes: usize) -> ToClient {
    ToClient::Inputs(vec![Delivery {
        token: DeliveryToken { stream: 0, number },
        input: "in1".into(),
        redelivered: false,
        sender: id("leaf0"),
        message: Arc::new(Message {
            body: vec![1; bytes].into(),
            ..Message::default()
        }),
    }])
}

/// Lets every other task of this thread go as far as it can.
async fn settle() {
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_client_that_reads_slowly_is_sent_no_more_than_it_takes_and_loses_nothing() {
    let head = Head::new();
    let (mut client, outbox) = with_outbox(&head, 4_096).await;
    for number in 0..60 {
        outbox.try_send(input(number, 100_000)).unwrap();
    }
    settle().await;
    let left = outbox.max_capacity() - outbox.capacity();
    assert!(
        left >= 60 - 7,
        "{left} of 60 events wait where they came from"
    );
    for number in 0..60u16 {
        let Some(Packet::Publish(publish)) = client.next().await else {
            panic!("{number} is missing")
        };
        assert_eq!((publish.pkid, publish.payload.len()), (number + 1, 100_000));
        client.send(&ack(0x40, publish.pkid)).await;
    }
    client.ping().await;
    client.disconnect().await;
}

#[tokio::test]
async fn one_event_of_many_deliveries_goes_on_when_there_is_room_again() {
    let head = Head::new();
    // The stream takes everything at once: nothing else wakes the connection.
    let (mut client, outbox) = with_outbox(&head, 1 << 24).await;
    let deliveries = (0..20).flat_map(|number| match input(number, 100_000) {
        ToClient::Inputs(deliveries) => deliveries,
        other => panic!("{other:?}"),
    });
    outbox
        .try_send(ToClient::Inputs(deliveries.collect()))
        .unwrap();
    for number in 0..20u16 {
        let Some(Packet::Publish(publish)) = client.next().await else {
            panic!("{number} is missing")
        };
        assert_eq!(publish.pkid, number + 1);
    }
    client.disconnect().await;
}

#[tokio::test]
async fn a_stream_that_gathers_what_is_written_is_flushed() {
    let head = Head::new();
    let (near, far) = duplex(1 << 16);
    let context = ConnectionContext {
        hub: Arc::clone(&head.hub.hub),
        timing: TIMING,
        acks: AckCounters::new(),
        stop: head.stop.clone(),
    };
    let mut client = Client {
        stream: near,
        input: BytesMut::new(),
        task: tokio::spawn(serve(tokio::io::BufStream::new(far), context, None)),
    };
    client.send(&connect("leaf0", false, None)).await;
    client.accepted().await;
    client.ping().await;
    client.disconnect().await;
}

#[tokio::test]
async fn while_a_client_takes_its_time_to_read_its_packets_are_worked_off() {
    let head = Head::new();
    let (mut client, outbox) = with_outbox(&head, 4_096).await;
    outbox.try_send(input(0, 200_000)).unwrap();
    settle().await;
    // Most of the delivery is not read; a message goes its way all the same.
    let own = telemetry("edge1/modA");
    client.send(&publish1(&own, 1, b"x")).await;
    settle().await;
    assert_eq!(head.stored().await.len(), 1);
    assert!(matches!(client.next().await, Some(Packet::Publish(_))));
    assert!(matches!(client.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 1));
    client.disconnect().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_at_all_is_closed() {
    let head = Head::new();
    let (client, outbox) = with_outbox(&head, 4_096).await;
    outbox.try_send(input(0, 200_000)).unwrap();
    settle().await;
    assert!(!client.task.is_finished());
    head.hub.clock.advance(WRITE_MAX);
    assert!(matches!(
        client.task.await.unwrap(),
        ConnectionEnd::NotReading
    ));
}

#[tokio::test]
async fn a_connection_whose_place_was_given_away_ends() {
    let head = Head::new();
    let (mut client, outbox) = with_outbox(&head, 4_096).await;
    client.ping().await;
    drop(outbox);
    assert_eq!(client.next().await, None);
    assert!(matches!(client.ends().await, ConnectionEnd::Revoked));
}

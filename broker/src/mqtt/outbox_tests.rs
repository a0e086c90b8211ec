//! Events of the hub on their way into packets (spec/mqtt.md 3.3, 5, 8.3, 8.5, 12.5).

use std::sync::Arc;

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{Message, Property, SystemProperty};
use mqttbytes::v4::Publish;
use ntex_mqtt::QoS;
use tokio::sync::mpsc;

use super::filters::Subscriptions;
use super::limits::{CLIENT_PACKET_BYTES_MAX, WAITING_MAX};
use super::machine::Event;
use super::outbox::{Outbox, Replaced};
use super::test_packets::*;
use crate::hub::{
    C2D_STREAM, Delivery, DeliveryToken, OUTBOX_EVENTS_MAX, Settlement, ToClient, TwinResponse,
};

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn token(stream: u16, number: u64) -> DeliveryToken {
    DeliveryToken { stream, number }
}

pub(super) fn delivery(stream: u16, number: u64, input: &str) -> Delivery {
    Delivery {
        token: token(stream, number),
        input: input.into(),
        redelivered: false,
        sender: id("d/sensor"),
        message: Arc::new(Message {
            body: Bytes::from(number.to_string()),
            ..Message::default()
        }),
    }
}

fn with_message(message: Message) -> Delivery {
    Delivery {
        message: Arc::new(message),
        ..delivery(0, 0, "in1")
    }
}

/// A client, the hub's end of its outbox, and what it is subscribed to.
pub(super) struct Client {
    pub(super) peer: Peer,
    pub(super) hub: mpsc::Sender<ToClient>,
    pub(super) outbox: Outbox,
    pub(super) subscriptions: Subscriptions,
}

impl Client {
    pub(super) fn new(identity: &str, filters: &[(&str, QoS)]) -> Self {
        let (hub, events) = mpsc::channel(OUTBOX_EVENTS_MAX);
        let mut subscriptions = Subscriptions::default();
        for (filter, qos) in filters {
            subscriptions.add(filter, *qos);
        }
        Self {
            peer: Peer::connected(60),
            hub,
            outbox: Outbox::new(id(identity), events),
            subscriptions,
        }
    }

    pub(super) fn module(filter: &str, qos: QoS) -> Self {
        Self::new("d/m", &[(filter, qos)])
    }

    pub(super) fn all_inputs() -> Self {
        Self::module("devices/d/modules/m/#", QoS::AtLeastOnce)
    }

    pub(super) fn offer(&mut self, event: ToClient) {
        self.hub.try_send(event).unwrap();
        self.pump();
    }

    pub(super) fn pump(&mut self) {
        self.outbox
            .pump(&mut self.peer.machine, &self.subscriptions);
    }

    /// The client reads everything.
    pub(super) fn reads(&mut self) -> Vec<Publish> {
        self.outbox.output_taken();
        let read = self.peer.delivered();
        self.outbox.output_written();
        read
    }

    pub(super) fn topics(&mut self) -> Vec<String> {
        self.reads().into_iter().map(|p| p.topic).collect()
    }

    pub(super) fn acknowledges(&mut self, packet_id: u16) {
        for event in self.peer.feed(&ack(0x40, packet_id)) {
            let Event::Acknowledged(token) = event else {
                panic!("{event:?}")
            };
            self.outbox.acknowledged(token);
        }
        self.pump();
    }
}

use Settlement::{Done, NotSubscribed, Undeliverable};

// Topics

#[test]
fn events_leave_at_qos_0_on_the_topics_of_the_contract() {
    let filters = [
        ("$iothub/twin/res/#", QoS::AtLeastOnce),
        ("$iothub/twin/PATCH/properties/desired/#", QoS::AtLeastOnce),
        ("$iothub/methods/POST/#", QoS::AtLeastOnce),
    ];
    let mut client = Client::new("d", &filters);
    let response = |status, version, body: &'static str| {
        ToClient::TwinResponse(TwinResponse {
            request_id: "R%2f1".into(),
            status,
            version,
            body: body.into(),
        })
    };
    client.offer(response(200, None, "{}"));
    client.offer(response(204, Some(4), ""));
    client.offer(ToClient::Desired {
        version: 8,
        patch: r#"{"$version":8}"#.into(),
    });
    client.offer(ToClient::Method {
        request_id: "0e5c".into(),
        name: "re boot".into(),
        payload: "null".into(),
    });
    let sent = client.reads();
    assert!(sent.iter().all(|p| p.qos as u8 == 0 && !p.dup && !p.retain));
    let sent: Vec<_> = sent
        .iter()
        .map(|p| (p.topic.as_str(), &p.payload[..]))
        .collect();
    assert_eq!(
        sent,
        [
            ("$iothub/twin/res/200/?$rid=R%2f1", &b"{}"[..]),
            ("$iothub/twin/res/204/?$rid=R%2f1&$version=4", b""),
            (
                "$iothub/twin/PATCH/properties/desired/?$version=8",
                br#"{"$version":8}"#
            ),
            ("$iothub/methods/POST/re%20boot/?$rid=0e5c", b"null"),
        ]
    );
}

#[test]
fn what_nobody_subscribed_to_is_not_sent() {
    let mut client = Client::new("d", &[("#", QoS::AtLeastOnce)]);
    client.offer(ToClient::Desired {
        version: 1,
        patch: "{}".into(),
    });
    assert!(
        client.reads().is_empty(),
        "# does not match what begins with $"
    );
    client.subscriptions.add("$iothub/twin/#", QoS::AtMostOnce);
    client.offer(ToClient::Desired {
        version: 1,
        patch: "{}".into(),
    });
    assert_eq!(client.reads().len(), 1);
}

#[test]
fn an_input_message_is_stamped_with_its_true_sender() {
    let mut client = Client::all_inputs();
    let mut message = Message {
        body: "21".into(),
        ..Message::default()
    };
    message.properties.push(Property {
        key: "$.cdid".into(),
        value: Some("spoofed".into()),
    });
    message
        .system
        .set(SystemProperty::ContentType, "application/json");
    client.offer(ToClient::Inputs(vec![with_message(message)]));
    let bag = "%24.ct=application%2Fjson&%24.cdid=d&%24.cmid=sensor";
    assert_eq!(
        client.topics(),
        [format!("devices/d/modules/m/inputs/in1/{bag}")]
    );
}

#[test]
fn a_cloud_to_device_message_is_acknowledged_by_its_id() {
    let filter = ("devices/d/messages/devicebound/#", QoS::AtLeastOnce);
    let mut client = Client::new("d", &[filter]);
    let first = delivery(C2D_STREAM, 0, "");
    let again = Delivery {
        redelivered: true,
        ..delivery(C2D_STREAM, 1, "")
    };
    client.offer(ToClient::CloudToDevice(vec![first, again]));
    let sent = client.reads();
    let bits: Vec<_> = sent.iter().map(|p| (p.pkid, p.dup, p.qos as u8)).collect();
    assert_eq!(bits, [(61_441, false, 1), (61_442, true, 1)]);
    let topic = "devices/d/messages/devicebound/%24.to=%2Fdevices%2Fd%2Fmessages%2FdeviceBound";
    assert_eq!(sent[0].topic, topic, "the bag is never empty");
    assert!(client.outbox.take_settled().is_empty());
    client.acknowledges(61_442);
    client.acknowledges(61_441);
    let settled = client.outbox.take_settled();
    let tokens = [token(C2D_STREAM, 1), token(C2D_STREAM, 0)];
    assert_eq!(settled, tokens.map(|token| (token, Done)));
}

// Quality of service

#[test]
fn a_delivery_of_qos_0_is_done_when_it_is_written() {
    let mut client = Client::module("devices/d/modules/m/#", QoS::AtMostOnce);
    let redelivered = Delivery {
        redelivered: true,
        ..delivery(0, 1, "in1")
    };
    client.offer(ToClient::Inputs(vec![redelivered]));
    assert!(client.outbox.take_settled().is_empty());
    client.outbox.output_taken();
    assert!(
        client.outbox.take_settled().is_empty(),
        "taken is not written"
    );
    client.offer(ToClient::Inputs(vec![delivery(0, 2, "in1")]));
    client.outbox.output_written();
    assert_eq!(client.outbox.take_settled(), [(token(0, 1), Done)]);
    let sent = client.reads();
    assert!(sent.iter().all(|p| p.qos as u8 == 0 && !p.dup));
    assert_eq!(client.outbox.take_settled(), [(token(0, 2), Done)]);
    assert_eq!(client.peer.machine.outstanding(), 0);
}

#[test]
fn the_sender_can_ask_for_qos_0_and_for_nothing_else() {
    for (value, qos) in [
        (Some("0"), 0),
        (Some("1"), 1),
        (Some("2"), 1),
        (Some("00"), 1),
        (None, 1),
    ] {
        let mut client = Client::all_inputs();
        let mut message = Message::default();
        message.properties.push(Property {
            key: "Mqtt-QoS".into(),
            value: value.map(str::to_owned),
        });
        client.offer(ToClient::Inputs(vec![with_message(message)]));
        assert_eq!(client.reads()[0].qos as u8, qos, "{value:?}");
    }
}

// What cannot be sent

#[test]
fn what_never_fits_is_undeliverable_and_blocks_nothing() {
    let mut client = Client::all_inputs();
    let mut long = Message::default();
    long.properties.push(Property {
        key: "k".into(),
        value: Some("v".repeat(65_535)),
    });
    let large = Message {
        body: vec![0; CLIENT_PACKET_BYTES_MAX].into(),
        ..Message::default()
    };
    let numbered = |number, message| Delivery {
        token: token(0, number),
        ..with_message(message)
    };
    let deliveries = vec![numbered(0, long), numbered(1, large), delivery(0, 2, "in1")];
    client.offer(ToClient::Inputs(deliveries));
    assert_eq!(client.reads().len(), 1);
    let expected = [(token(0, 0), Undeliverable), (token(0, 1), Undeliverable)];
    assert_eq!(client.outbox.take_settled(), expected);
    // A device has no inputs.
    let mut device = Client::new("d", &[("#", QoS::AtLeastOnce)]);
    device.offer(ToClient::Inputs(vec![delivery(0, 0, "in1")]));
    assert_eq!(device.outbox.take_settled(), [(token(0, 0), Undeliverable)]);
}

#[test]
fn an_input_without_a_subscription_stays_stored() {
    let mut client = Client::module("devices/d/modules/m/inputs/in1/#", QoS::AtLeastOnce);
    let deliveries = vec![
        delivery(0, 7, "in2"),
        delivery(1, 1, "in1"),
        delivery(0, 8, "in2"),
    ];
    client.offer(ToClient::Inputs(deliveries));
    assert_eq!(client.reads().len(), 1);
    let expected = [(token(0, 7), NotSubscribed), (token(0, 8), NotSubscribed)];
    assert_eq!(client.outbox.take_settled(), expected);
}

#[test]
fn a_later_delivery_does_not_overtake_a_refused_one() {
    let mut client = Client::module("devices/d/modules/m/inputs/in1/#", QoS::AtLeastOnce);
    client.offer(ToClient::Inputs(vec![
        delivery(0, 7, "in2"),
        delivery(14, 1, "in2"),
    ]));
    assert_eq!(client.outbox.take_settled().len(), 2);
    // The client subscribes; before the hub hears of it, more has come.
    client
        .subscriptions
        .add("devices/d/modules/m/inputs/in2/#", QoS::AtLeastOnce);
    client.offer(ToClient::Inputs(vec![delivery(0, 8, "in2")]));
    client
        .hub
        .try_send(ToClient::Inputs(vec![
            delivery(0, 9, "in2"),
            delivery(14, 5, "in1"),
        ]))
        .unwrap();
    client.outbox.settle_refused();
    let expected = [(token(0, 8), NotSubscribed), (token(0, 9), NotSubscribed)];
    assert_eq!(client.outbox.take_settled(), expected);
    client.pump();
    assert_eq!(
        client.reads().len(),
        1,
        "another input of the shared last slot"
    );
    // Now the hub hears of the subscription and begins where it was refused.
    client.offer(ToClient::Inputs(vec![
        delivery(0, 7, "in2"),
        delivery(0, 8, "in2"),
    ]));
    assert_eq!(client.reads().len(), 2);
    assert!(client.outbox.take_settled().is_empty());
}

// Order, packet ids and room

#[test]
fn while_an_id_is_in_use_its_stream_waits_and_the_others_go_on() {
    let mut client = Client::all_inputs();
    let deliveries = vec![
        delivery(0, 5, "in1"),
        delivery(0, 4_101, "in1"),
        delivery(0, 4_102, "in1"),
        delivery(1, 9, "in2"),
    ];
    client.offer(ToClient::Inputs(deliveries));
    client.offer(ToClient::Inputs(vec![
        delivery(0, 4_103, "in1"),
        delivery(1, 10, "in2"),
    ]));
    let bodies = |client: &mut Client| -> Vec<String> {
        let text = |p: Publish| String::from_utf8(p.payload.to_vec()).unwrap();
        client.reads().into_iter().map(text).collect()
    };
    assert_eq!(bodies(&mut client), ["5", "9", "10"]);
    client.acknowledges(4_097 + 9);
    assert!(bodies(&mut client).is_empty());
    client.acknowledges(6);
    assert_eq!(bodies(&mut client), ["4101", "4102", "4103"]);
}

#[test]
fn a_delivery_that_is_on_its_way_is_not_sent_again() {
    let mut client = Client::all_inputs();
    client.offer(ToClient::Inputs(vec![delivery(0, 5, "in1")]));
    client.offer(ToClient::Inputs(vec![
        delivery(0, 5, "in1"),
        delivery(0, 6, "in1"),
    ]));
    assert_eq!(client.reads().len(), 2);
    client.acknowledges(6);
    assert_eq!(client.outbox.take_settled(), [(token(0, 5), Done)]);
}

#[test]
fn nothing_is_taken_while_the_client_does_not_read() {
    let mut client = Client::all_inputs();
    let large = |number| Delivery {
        message: Arc::new(Message {
            body: vec![7; 100_000].into(),
            ..Message::default()
        }),
        ..delivery(0, number, "in1")
    };
    for number in 0..10 {
        client.offer(ToClient::Inputs(
            (0..4).map(|i| large(number * 4 + i)).collect(),
        ));
    }
    assert!(!client.peer.machine.has_room());
    assert!(client.peer.machine.outstanding() <= 6);
    assert_eq!(
        client.hub.max_capacity() - client.hub.capacity(),
        8,
        "two events were taken"
    );
    let mut read = 0;
    loop {
        let now = client.reads().len();
        if now == 0 {
            break;
        }
        read += now;
        client.pump();
    }
    assert_eq!(read, 40);
}

#[test]
fn what_waits_for_ids_is_bounded() {
    let mut client = Client::all_inputs();
    client.offer(ToClient::Inputs(vec![delivery(0, 0, "in1")]));
    for number in 1..=WAITING_MAX as u64 + 10 {
        client.offer(ToClient::Inputs(vec![delivery(0, number * 4_096, "in1")]));
    }
    assert!(!client.outbox.wants_events());
    assert_eq!(client.hub.max_capacity() - client.hub.capacity(), 10);
    client.acknowledges(1);
    assert!(client.reads().len() == 2);
    assert_eq!(client.hub.max_capacity() - client.hub.capacity(), 9);
}

#[tokio::test]
async fn a_place_that_was_given_away_is_noticed() {
    let mut client = Client::all_inputs();
    client.hub.try_send(ToClient::Inputs(Vec::new())).unwrap();
    assert_eq!(client.outbox.next().await, Ok(()));
    assert_eq!(client.outbox.next().await, Ok(()), "it is not taken twice");
    let Client { outbox, hub, .. } = &mut client;
    drop(std::mem::replace(hub, mpsc::channel(1).0));
    outbox.settle_refused();
    client.pump();
    assert_eq!(client.outbox.next().await, Err(Replaced));
}

#[test]
fn nothing_can_be_offered_to_a_connection_that_has_ended() {
    let mut client = Client::all_inputs();
    client.outbox.close();
    let offered = client.hub.try_send(ToClient::Inputs(Vec::new()));
    assert!(matches!(offered, Err(mpsc::error::TrySendError::Closed(_))));
}

//! The head with all services behind it, the upstream away: what a client subscribes to reaches
//! it, before and after it reconnects, and what it acknowledges is settled (spec/mqtt.md 5, 6, 12;
//! vectors 6 and 14 of section 11).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::{BoxFuture, ClientInfo, Connectivity, Needs, Upstream, UpstreamError};
use edgehub_proto::identity::Identity;
use mqttbytes::v4::{Packet, Publish};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::test_head::{Client, Head, TWIN, telemetry};
use super::test_packets::{ack, publish1, unsubscribe};
use crate::hub::{ServiceConfig, ServiceParts};
use crate::methods::NoMethods;
use crate::routing::Router;
use crate::test_support::id;
use crate::twin::TwinConfig;

const INPUTS: &str = "devices/edge1/modules/modA/#";

/// An upstream that is away, and what it was told that clients need.
#[derive(Debug)]
struct Away {
    connectivity: watch::Sender<Connectivity>,
    needs: Mutex<Vec<(Identity, Needs)>>,
}

impl Upstream for Away {
    fn describe(&self, _: &Identity, _: &ClientInfo) {}

    fn need(&self, identity: &Identity, needs: Needs) {
        self.needs.lock().push((identity.clone(), needs));
    }

    fn twin(&self, _: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>> {
        let away = UpstreamError::Unavailable("away".to_owned());
        Box::pin(std::future::ready(Err(away)))
    }

    fn report(&self, _: &Identity, _: Bytes) -> BoxFuture<Result<Option<u64>, UpstreamError>> {
        let away = UpstreamError::Unavailable("away".to_owned());
        Box::pin(std::future::ready(Err(away)))
    }

    fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.connectivity.subscribe()
    }
}

/// A head whose hub routes every message into these inputs of the module.
fn head(inputs: &[&str]) -> (Head, Arc<Away>) {
    let head = Head::new();
    let hub = &head.hub.hub;
    let route = |input: &&str| {
        let sink = format!(r#"BrokeredEndpoint("/modules/modA/inputs/{input}")"#);
        ((*input).to_owned(), format!("FROM /messages/* INTO {sink}"))
    };
    let routes: Vec<_> = inputs.iter().map(route).collect();
    let (router, bad) = Router::new(&routes, "edge1", None, hub.store()).unwrap();
    assert!(bad.is_empty());
    hub.set_router(router);
    let away = Arc::new(Away {
        connectivity: watch::Sender::new(Connectivity::Disconnected),
        needs: Mutex::default(),
    });
    hub.start_services(ServiceParts {
        upstream: Arc::clone(&away) as _,
        own_methods: Arc::new(NoMethods),
        config: ServiceConfig {
            twins: TwinConfig::default(),
            window: 16,
            own_twin: false,
        },
        tasks: TaskTracker::new(),
        stop: CancellationToken::new(),
    })
    .unwrap();
    (head, away)
}

impl Away {
    /// What the identity needs, as it was said last.
    fn needs(&self, identity: &str) -> Option<Needs> {
        let needs = self.needs.lock();
        let mut of = needs.iter().rev().filter(|(who, _)| *who == id(identity));
        of.next().map(|(_, needs)| *needs)
    }
}

/// A leaf sends messages with these bodies and is told that they are stored.
async fn send(head: &Head, bodies: &[&str]) {
    let (mut leaf, _) = head.connect("leaf0", true).await;
    for body in bodies {
        leaf.send(&publish1(&telemetry("leaf0"), 1, body.as_bytes()))
            .await;
        assert!(matches!(leaf.next().await, Some(Packet::PubAck(_))));
    }
    leaf.disconnect().await;
}

async fn publish(client: &mut Client) -> Publish {
    match client.next().await {
        Some(Packet::Publish(publish)) => publish,
        other => panic!("{other:?}"),
    }
}

/// Waits until so many messages are in the queues.
async fn stored(head: &Head, expected: u64) {
    let count = || head.hub.hub.store().stats().queued;
    let reached = async {
        while count() != expected {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let patience = Duration::from_secs(20);
    let outcome = tokio::time::timeout(patience, reached).await;
    assert!(outcome.is_ok(), "{} instead of {expected}", count());
}

// Requests

#[tokio::test]
async fn vector_6_twin_requests_are_answered_while_the_upstream_is_away() {
    let (head, _) = head(&[]);
    let (mut client, _) = head.connect("leaf0", false).await;
    assert!(client.subscribe(TWIN).await);
    let get = publish1("$iothub/twin/GET/?$rid=7%2F", 5, b" ");
    client.send(&get).await;
    assert!(matches!(client.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 5));
    let response = publish(&mut client).await;
    assert_eq!(response.topic, "$iothub/twin/res/200/?$rid=7%2F");
    assert_eq!(
        (response.qos as u8, response.dup, response.retain),
        (0, false, false)
    );
    let twin: serde_json::Value = serde_json::from_slice(&response.payload).unwrap();
    assert!(twin["desired"]["$version"].is_u64(), "{twin}");
    assert!(twin["reported"].is_object(), "{twin}");

    let reported = "$iothub/twin/PATCH/properties/reported/?$rid=8";
    client
        .send(&publish1(reported, 6, br#"{"fw":"1.2"}"#))
        .await;
    assert!(matches!(client.next().await, Some(Packet::PubAck(ack)) if ack.pkid == 6));
    let response = publish(&mut client).await;
    assert_eq!(response.topic, "$iothub/twin/res/204/?$rid=8");
    assert!(response.payload.is_empty());
    client
        .send(&publish1("$iothub/twin/GET/?$rid=9", 7, b""))
        .await;
    client.next().await;
    let response = publish(&mut client).await;
    let twin: serde_json::Value = serde_json::from_slice(&response.payload).unwrap();
    assert_eq!(twin["reported"]["fw"], "1.2");
    client.disconnect().await;
}

#[tokio::test]
async fn what_a_client_is_subscribed_to_is_asked_for_upstream_before_it_says_a_word() {
    let (head, away) = head(&[]);
    let methods = "$iothub/methods/POST/#";
    let (mut client, _) = head.connect("leaf0", false).await;
    assert_eq!(away.needs("leaf0"), Some(Needs::default()));
    assert!(client.subscribe(methods).await);
    assert!(
        client
            .subscribe("$iothub/twin/PATCH/properties/desired/#")
            .await
    );
    client.ping().await;
    let both = Needs {
        methods: true,
        desired: true,
        cloud_to_device: false,
    };
    assert_eq!(away.needs("leaf0"), Some(both));
    client.send(&unsubscribe(3, &[methods])).await;
    client.next().await;
    client.ping().await;
    let desired = Needs {
        desired: true,
        ..Needs::default()
    };
    assert_eq!(away.needs("leaf0"), Some(desired));
    client.vanish().await;

    away.needs.lock().clear();
    let (client, session_present) = head.connect("leaf0", false).await;
    assert!(session_present);
    assert_eq!(away.needs("leaf0"), Some(desired), "no packet but CONNECT");
    client.disconnect().await;
    let (client, _) = head.connect("leaf0", true).await;
    assert_eq!(
        away.needs("leaf0"),
        Some(Needs::default()),
        "a clean session"
    );
    client.disconnect().await;
}

// Inputs

#[tokio::test]
async fn vector_14_an_unacknowledged_input_message_is_sent_again_with_dup_and_its_id() {
    let (head, _) = head(&["in1"]);
    let (mut module, _) = head.connect("edge1/modA", false).await;
    assert!(module.subscribe(INPUTS).await);
    send(&head, &["one", "two"]).await;
    let first = publish(&mut module).await;
    assert_eq!(
        first.topic,
        "devices/edge1/modules/modA/inputs/in1/%24.cdid=leaf0"
    );
    assert_eq!(
        (first.qos as u8, first.dup, &first.payload[..]),
        (1, false, &b"one"[..])
    );
    let second = publish(&mut module).await;
    assert_ne!(first.pkid, second.pkid);
    // The second is acknowledged, the first withheld.
    module.send(&ack(0x40, second.pkid)).await;
    module.ping().await;
    stored(&head, 1).await;
    module.vanish().await;

    let (mut module, session_present) = head.connect("edge1/modA", false).await;
    assert!(session_present);
    let again = publish(&mut module).await;
    assert_eq!(
        (again.dup, again.pkid, &again.payload[..]),
        (true, first.pkid, &b"one"[..])
    );
    module.send(&ack(0x40, again.pkid)).await;
    stored(&head, 0).await;
    module.ping().await;
    module.disconnect().await;
}

#[tokio::test]
async fn an_input_is_served_from_its_beginning_once_it_is_subscribed_to() {
    let (head, _) = head(&["in1", "in2"]);
    let (mut module, _) = head.connect("edge1/modA", false).await;
    assert!(
        module
            .subscribe("devices/edge1/modules/modA/inputs/in1/#")
            .await
    );
    send(&head, &["one", "two", "three"]).await;
    for _ in 0..3 {
        let publish = publish(&mut module).await;
        assert!(publish.topic.contains("/inputs/in1/"), "{}", publish.topic);
        module.send(&ack(0x40, publish.pkid)).await;
    }
    stored(&head, 3).await;
    assert!(
        module
            .subscribe("devices/edge1/modules/modA/inputs/in2/#")
            .await
    );
    for body in ["one", "two", "three"] {
        let publish = publish(&mut module).await;
        assert!(publish.topic.contains("/inputs/in2/"), "{}", publish.topic);
        assert_eq!(
            (publish.dup, &publish.payload[..]),
            (false, body.as_bytes())
        );
        module.send(&ack(0x40, publish.pkid)).await;
    }
    stored(&head, 0).await;
    module.disconnect().await;
}

#[tokio::test]
async fn a_delivery_of_qos_0_is_settled_when_it_is_written() {
    let (head, _) = head(&["in1"]);
    let (mut module, _) = head.connect("edge1/modA", false).await;
    module
        .send(&super::test_packets::subscribe(1, &[(INPUTS, 0)]))
        .await;
    module.next().await;
    send(&head, &["one"]).await;
    assert_eq!(publish(&mut module).await.qos as u8, 0);
    stored(&head, 0).await;
    module.disconnect().await;
}

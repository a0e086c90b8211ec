//! The bridge against a server that shares no code with it: fe2o3-amqp's acceptor with a `$cbs` node
//! and nodes that take telemetry.

use std::collections::BTreeMap;

use fe2o3_amqp::acceptor::{
    ConnectionAcceptor, LinkAcceptor, LinkEndpoint, ListenerSessionHandle, SessionAcceptor,
};
use fe2o3_amqp::{Receiver, Sender};
use fe2o3_amqp_types::messaging::{ApplicationProperties, Body, Message, MessageId, Properties};
use parking_lot::Mutex;
use serde_amqp::Value;

use super::tests::Hub;
use super::*;
use crate::fake_parent::FakeParent;
use crate::test_support::eventually;

const BATCH: u32 = 0x8001_3700;

#[derive(Default)]
struct Seen {
    names: Vec<String>,
    /// Bodies by address of the link.
    bodies: BTreeMap<String, Vec<String>>,
    batches: usize,
}

type Ledger = Arc<Mutex<Seen>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn telemetry_reaches_an_independent_server() {
    let parent = FakeParent::new();
    let ledger = Ledger::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let seen = Arc::clone(&ledger);
    let serve = move |stream| {
        let seen = Arc::clone(&seen);
        async move {
            let acceptor = ConnectionAcceptor::builder()
                .container_id("independent")
                .channel_max(100)
                .build();
            let Ok(mut connection) = acceptor.accept(stream).await else {
                return;
            };
            let mut sessions = tokio::task::JoinSet::new();
            let acceptor = SessionAcceptor::new();
            while let Ok(session) = acceptor.accept(&mut connection).await {
                sessions.spawn(serve_session(session, Arc::clone(&seen)));
            }
        }
    };
    let _serving = parent.serve_tls(ports.0, serve).await;
    let hub = Hub::start(&parent, ports, |config| {
        config.protocol = Protocol::Amqp;
        config.amqp_port = ports.0;
    });
    hub.append("leaf1", 0..1500).await;
    hub.append("edge2/$edgeHub", 0..2).await;
    eventually("delivery", || hub.queue.length() == 0).await;
    hub.stop().await;
    let seen = ledger.lock();
    let host = parent.address;
    let own = format!("{host}/devices/edge2/modules/%24edgeHub");
    assert_eq!(seen.names.first(), Some(&own));
    assert!(seen.names.contains(&format!("{host}/devices/leaf1")));
    let address = format!("amqps://{host}/devices/leaf1/messages/events");
    let expected: Vec<String> = (0..1500).map(|number| number.to_string()).collect();
    assert_eq!(seen.bodies[&address], expected);
    assert!(seen.batches > 10, "{}", seen.batches);
}

async fn serve_session(mut session: ListenerSessionHandle, seen: Ledger) {
    let mut links = tokio::task::JoinSet::new();
    let (mut requests, mut responses) = (None, None);
    let acceptor = LinkAcceptor::new();
    while let Ok(link) = acceptor.accept(&mut session).await {
        match link {
            LinkEndpoint::Sender(sender) => responses = Some(sender),
            LinkEndpoint::Receiver(receiver) => {
                let target = receiver.target().as_ref();
                let address = target.and_then(|target| target.address.clone());
                match address.as_deref() {
                    Some("$cbs") => requests = Some(receiver),
                    other => {
                        let address = other.unwrap_or_default().to_owned();
                        links.spawn(serve_telemetry(receiver, address, Arc::clone(&seen)));
                    }
                }
            }
        }
        if requests.is_some() && responses.is_some() {
            let (requests, responses) = (requests.take().unwrap(), responses.take().unwrap());
            links.spawn(serve_tokens(requests, responses, Arc::clone(&seen)));
        }
    }
}

async fn serve_tokens(mut requests: Receiver, mut responses: Sender, seen: Ledger) {
    while let Ok(delivery) = requests.recv::<Body<Value>>().await {
        requests.accept(&delivery).await.unwrap();
        let message = delivery.message();
        let application = message.application_properties.as_ref().unwrap();
        let name = application.0.get("name").unwrap();
        let name = String::try_from(name.clone()).unwrap();
        seen.lock().names.push(name);
        let id = message.properties.as_ref().unwrap().message_id.clone();
        let properties = Properties::builder()
            .correlation_id(id.unwrap_or(MessageId::Ulong(0)))
            .build();
        let status = ApplicationProperties::builder()
            .insert("status-code", 202_i32)
            .insert("status-description", "Accepted")
            .build();
        let answer = Message::builder()
            .properties(properties)
            .application_properties(status)
            .value(())
            .build();
        responses.send(answer).await.unwrap();
    }
}

async fn serve_telemetry(mut receiver: Receiver, address: String, seen: Ledger) {
    while let Ok(delivery) = receiver.recv::<Body<Value>>().await {
        let Body::Data(sections) = delivery.body() else {
            panic!("{:?}", delivery.body())
        };
        let bodies: Vec<String> = if *delivery.message_format() == Some(BATCH) {
            seen.lock().batches += 1;
            sections.iter().map(|section| text_of(&section.0)).collect()
        } else {
            sections
                .iter()
                .map(|section| String::from_utf8(section.0.to_vec()).unwrap())
                .collect()
        };
        seen.lock()
            .bodies
            .entry(address.clone())
            .or_default()
            .extend(bodies);
        receiver.accept(&delivery).await.unwrap();
    }
}

/// The body of a message within a batch, by the other decoder.
fn text_of(bytes: &[u8]) -> String {
    use fe2o3_amqp_types::messaging::message::__private::Deserializable;
    let message: Deserializable<Message<Body<Value>>> = serde_amqp::from_slice(bytes).unwrap();
    match message.0.body {
        Body::Data(sections) => {
            let bytes: Vec<u8> = sections.iter().flat_map(|one| one.0.to_vec()).collect();
            String::from_utf8(bytes).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

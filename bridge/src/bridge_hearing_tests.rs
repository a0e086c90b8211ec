//! What the bridge hears and asks, against a fake parent over real sockets and TLS.

use std::collections::BTreeSet;

use bytes::Bytes;
use edgehub_proto::hub::{CloudToDeviceOutcome, MethodResult, Needs};
use edgehub_proto::{auth_chain::AuthChain, username::MqttUserName};
use tokio::time::Instant;

use super::tests::{Hub, leaf};
use super::*;
use crate::fake_parent::{FakeParent, TWIN};
use crate::lanes::Backoff;
use crate::test_support::{Heard, eventually, id};

const METHODS: Needs = Needs {
    desired: false,
    methods: true,
    cloud_to_device: false,
};
const ALL: Needs = Needs {
    desired: true,
    methods: true,
    cloud_to_device: true,
};

async fn ports(parent: &FakeParent) -> (u16, u16) {
    (parent.free_port().await, parent.free_port().await)
}

/// The hub's own identity: its twin, its changes and its methods, under the chain of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hub_itself_is_heard_like_everybody() {
    let parent = FakeParent::new();
    let ports = ports(&parent).await;
    let _mqtt = parent.serve_mqtt(ports.0).await;
    let hub = Hub::start(&parent, ports, |_| {});
    let (own, name) = (id("edge2/$edgeHub"), "edge2/$edgeHub");
    let upstream = hub.bridge.upstream();
    upstream.need(&own, ALL);
    assert_eq!(hub.downstream.established().await, own);
    assert_eq!(
        upstream.twin(&own).await,
        Ok(Bytes::from_static(TWIN.as_bytes()))
    );
    let patch = Bytes::from_static(br#"{"schemaVersion":"1.0"}"#);
    assert_eq!(upstream.report(&own, patch).await, Ok(Some(2)));
    let desired = "$iothub/twin/PATCH/properties/desired/?$version=2";
    parent.publish(name, desired, r#"{"routes":{},"$version":2}"#);
    assert_eq!(
        hub.downstream.desired().await,
        r#"{"routes":{},"$version":2}"#
    );
    parent.publish(
        name,
        "$iothub/methods/POST/RefreshDeviceScopeIdentityCache/?$rid=r",
        "{}",
    );
    let call = hub.downstream.method().await;
    assert_eq!(call.name, "RefreshDeviceScopeIdentityCache");
    let payload = Bytes::from_static(b"null");
    call.reply
        .send(MethodResult {
            status: 200,
            payload,
        })
        .unwrap();
    let answer = (
        name.to_owned(),
        "$iothub/methods/res/200/?$rid=r".to_owned(),
        "null".to_owned(),
    );
    eventually("answer", || parent.seen.lock().publishes.contains(&answer)).await;
    hub.stop().await;
    let seen = parent.seen.lock();
    assert_eq!(seen.connects.len(), 1, "one connection for all of it");
    let user = MqttUserName::parse(&seen.connects[0].user_name).unwrap();
    let chain = AuthChain::parse("edge2/$edgeHub;edge2").unwrap();
    assert_eq!((user.identity, user.auth_chain), (own, Some(chain)));
}

/// A message that nobody settles comes again over the next connection, marked as such, until it is
/// settled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_not_settled_comes_again() {
    let parent = FakeParent::new();
    let ports = ports(&parent).await;
    let _mqtt = parent.serve_mqtt(ports.0).await;
    let hub = Hub::start(&parent, ports, |_| {});
    hub.bridge.upstream().need(&id("leaf1"), ALL);
    hub.downstream.established().await;
    parent.send_to_device("leaf1", 7, "hello");
    for round in 0..3 {
        let delivery = loop {
            match hub.downstream.next().await.1 {
                Heard::CloudToDevice(delivery) => break delivery,
                Heard::Established => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(delivery.message.body, "hello");
        assert_eq!(delivery.redelivered, round > 0);
        if round == 2 {
            delivery
                .settle
                .send(CloudToDeviceOutcome::Completed)
                .unwrap();
        }
    }
    eventually("PUBACK", || parent.seen.lock().messages.is_empty()).await;
    hub.stop().await;
    assert_eq!(parent.seen.lock().connects.len(), 3);
}

/// The parent restarts: everybody is connected and subscribed again by itself, at the cost of one
/// CONNECT and one SUBSCRIBE each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_is_back_after_a_restart_of_the_parent() {
    const CLIENTS: usize = 200;
    let parent = FakeParent::new();
    let ports = ports(&parent).await;
    let serving = parent.serve_mqtt(ports.0).await;
    let hub = Hub::start(&parent, ports, |config| {
        config.lanes.backoff = Backoff::default();
    });
    let names: BTreeSet<String> = (0..CLIENTS).map(|number| format!("leaf{number}")).collect();
    let records = names.iter().map(|name| leaf(name)).collect();
    hub.scope
        .apply(edgehub_auth::scope_cache::ScopeChange::Upsert(records));
    let upstream = hub.bridge.upstream();
    for name in &names {
        upstream.need(&id(name), METHODS);
    }
    let mut established = BTreeSet::new();
    while established.len() < CLIENTS {
        established.insert(hub.downstream.established().await.as_str().to_owned());
    }
    assert_eq!(established, names);

    serving.stop().await;
    eventually("the loss", || hub.bridge.lane_counts().borrow().ready == 0).await;
    let mut connectivity = hub.bridge.connectivity();
    let gone = connectivity.wait_for(|state| *state == Connectivity::Disconnected);
    gone.await.unwrap();
    {
        let mut seen = parent.seen.lock();
        seen.connects.clear();
        seen.subscribes.clear();
    }
    let _serving = parent.serve_mqtt(ports.0).await;
    let returned = Instant::now();
    let mut established = BTreeSet::new();
    let mut first = None;
    while established.len() < CLIENTS {
        established.insert(hub.downstream.established().await.as_str().to_owned());
        first.get_or_insert_with(|| returned.elapsed());
    }
    let (first, all) = (first.unwrap(), returned.elapsed());
    println!("first after {first:?}, all after {all:?}");
    // Fifty at once and fifty per second; twice that on a machine that is busy otherwise.
    assert!(all - first < Duration::from_secs(10), "{first:?}, {all:?}");
    {
        let seen = parent.seen.lock();
        assert_eq!(
            (seen.connects.len(), seen.subscribes.len()),
            (CLIENTS, CLIENTS)
        );
        let filters = seen.subscribes.iter().map(|(_, filters)| filters.len());
        assert_eq!(filters.sum::<usize>(), CLIENTS);
    }
    for name in &names {
        parent.publish(name, "$iothub/methods/POST/m/?$rid=1", "");
    }
    for _ in &names {
        hub.downstream.method().await;
    }
    hub.stop().await;
}

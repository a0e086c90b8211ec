//! The whole bridge against a fake parent, over real sockets and TLS.

use edgehub_auth::scope_cache::ScopeChange;
use edgehub_auth::scope_tree::ServiceIdentity;
use edgehub_proto::{auth_chain::AuthChain, clock::SystemClock, username::MqttUserName};
use edgehub_storage::Queue;

use super::*;
use crate::fake_parent::FakeParent;
use crate::lanes::Backoff;
use crate::test_support::{FakeDownstream, TestStore, eventually, id};

pub(super) struct Hub {
    pub(super) bridge: Bridge,
    pub(super) downstream: Arc<FakeDownstream>,
    pub(super) scope: Arc<ScopeCache>,
    pub(super) queue: Queue,
    store: TestStore,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl Hub {
    /// edge2 below the fake parent, with leaf1 below it.
    pub(super) fn start(
        parent: &FakeParent,
        ports: (u16, u16),
        change: impl FnOnce(&mut BridgeConfig),
    ) -> Self {
        Self::start_with(TestStore::new(), parent, ports, change)
    }

    fn start_with(
        store: TestStore,
        parent: &FakeParent,
        (mqtt_port, https_port): (u16, u16),
        change: impl FnOnce(&mut BridgeConfig),
    ) -> Self {
        let mut config = BridgeConfig::new(parent.address.to_string(), id("edge2"));
        config.protocol = Protocol::Mqtt;
        config.mqtt_port = mqtt_port;
        config.https_port = https_port;
        config.product_info = "EdgeHub/1 test".to_owned();
        config.lanes.backoff = Backoff {
            base: Duration::from_millis(10),
            short_max: Duration::from_millis(100),
            ..Backoff::default()
        };
        change(&mut config);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let tokens = TokenSource::new(
            "a2V5",
            "hub.example",
            "edge2",
            "$edgeHub",
            Arc::clone(&clock),
        );
        let queue = store.queue(0);
        let downstream = Arc::new(FakeDownstream::default());
        let scope = ScopeCache::new(&id("edge2"));
        scope.apply(ScopeChange::Upsert(vec![leaf("leaf1")]));
        scope.apply(ScopeChange::Upsert(vec![own_device()]));
        let deps = BridgeDeps {
            store: store.store.clone(),
            queues: vec![queue.clone()],
            scope: Arc::clone(&scope),
            tokens: Arc::new(tokens.unwrap()),
            tls: Arc::clone(&parent.client_tls),
            clock,
            downstream: Arc::clone(&downstream) as _,
            infos: vec![(
                id("leaf1"),
                ClientInfo {
                    product_info: Some("sensor/3".into()),
                    model_id: Some("dtmi:test:leaf;1".into()),
                },
            )],
        };
        let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
        let bridge = Bridge::start(config, deps, &tasks, &cancel).unwrap();
        Self {
            bridge,
            downstream,
            scope,
            queue,
            store,
            tasks,
            cancel,
        }
    }

    pub(super) async fn append(&self, sender: &str, bodies: std::ops::Range<usize>) {
        let messages = bodies.map(|number| (id(sender), number.to_string()));
        self.store.append(&self.queue, messages, None).await;
    }

    pub(super) async fn stop(self) -> TestStore {
        self.cancel.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.store
    }
}

fn own_device() -> ServiceIdentity {
    record("edge2", true)
}

pub(super) fn leaf(name: &str) -> ServiceIdentity {
    record(name, false)
}

fn record(name: &str, is_edge: bool) -> ServiceIdentity {
    let scope = "ms-azure-iot-edge://edge2-1".to_owned();
    ServiceIdentity {
        identity: id(name),
        generation_id: "1".to_owned(),
        status: edgehub_auth::scope_tree::Status::Enabled,
        is_edge,
        device_scope: Some(scope.clone()),
        parent_scopes: if is_edge { Vec::new() } else { vec![scope] },
        authentication: edgehub_auth::scope_tree::Authentication::None,
    }
}

const PAGE: &str = r#"{"devices":[
    {"deviceId":"edge2","generationId":"1","status":"enabled","capabilities":{"iotEdge":true},
     "deviceScope":"ms-azure-iot-edge://edge2-1","parentScopes":[]},
    {"deviceId":"leaf1","generationId":"1","status":"enabled","capabilities":{"iotEdge":false},
     "deviceScope":"ms-azure-iot-edge://edge2-1","parentScopes":["ms-azure-iot-edge://edge2-1"],
     "authentication":{"symmetricKey":{"primaryKey":"cA==","secondaryKey":"cw=="},"type":"sas"}}],
    "modules":[],"continuationLink":null}"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_flows_when_the_parent_comes_up_with_the_right_names() {
    let parent = FakeParent::new();
    parent.seen.lock().answer = (200, PAGE.to_owned());
    let ports = (parent.free_port().await, parent.free_port().await);
    let hub = Hub::start(&parent, ports, |config| {
        config.local_address = Some("127.0.0.3".parse().unwrap());
    });
    hub.append("leaf1", 0..500).await;
    hub.append("edge2/$edgeHub", 0..3).await;
    let mut connectivity = hub.bridge.connectivity();
    assert_eq!(*connectivity.borrow(), Connectivity::Disconnected);
    let _mqtt = parent.serve_mqtt(ports.0).await;
    connectivity
        .wait_for(|state| *state == Connectivity::Connected)
        .await
        .unwrap();
    eventually("delivery", || hub.queue.length() == 0).await;
    // Published at the end of the turn whose settle this was.
    eventually("counts", || {
        let counts = *hub.bridge.lane_counts().borrow();
        (counts.ready, counts.bytes) == (2, 0)
    })
    .await;
    hub.stop().await;

    let seen = parent.seen.lock();
    let of = |client: &str| -> Vec<(String, String)> {
        seen.publishes
            .iter()
            .filter(|(id, ..)| id == client)
            .map(|(_, topic, body)| (topic.clone(), body.clone()))
            .collect()
    };
    let expected: Vec<(String, String)> = (0..500)
        .map(|number| {
            (
                "devices/leaf1/messages/events/".to_owned(),
                number.to_string(),
            )
        })
        .collect();
    assert_eq!(of("leaf1"), expected);
    let topic = "devices/edge2/modules/$edgeHub/messages/events/";
    assert_eq!(of("edge2/$edgeHub")[2], (topic.to_owned(), "2".to_owned()));
    for connected in &seen.connects {
        let name = MqttUserName::parse(&connected.user_name).unwrap();
        let host = format!("{}/", parent.address);
        assert!(connected.user_name.starts_with(&host), "the connected host");
        assert_eq!(name.identity.as_str(), connected.client_id);
        assert_eq!(name.api_version, "2020-09-30");
        let (product, model) = match connected.client_id.as_str() {
            "leaf1" => ("sensor/3 EdgeHub/1 test", Some("dtmi:test:leaf;1")),
            _ => ("EdgeHub/1 test", None),
        };
        assert_eq!(name.client_type.as_deref(), Some(product));
        assert_eq!(name.model_id.as_deref(), model);
        let chain = format!("{};edge2", connected.client_id);
        assert_eq!(name.auth_chain, Some(AuthChain::parse(&chain).unwrap()));
        let sr = "SharedAccessSignature sr=hub.example%2Fdevices%2Fedge2%2Fmodules%2F%2524edgeHub&";
        assert!(
            connected.password.starts_with(sr),
            "our own token, for the hub's host"
        );
        assert_eq!(connected.peer.to_string(), "127.0.0.3");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_reordered_when_connections_break() {
    let parent = FakeParent::new();
    let ports = (parent.free_port().await, parent.free_port().await);
    let hub = Hub::start(&parent, ports, |_| {});
    for round in 0..8 {
        let arrived = parent.seen.lock().publishes.len();
        let serving = parent.serve_mqtt(ports.0).await;
        hub.append("leaf1", round * 200..(round + 1) * 200).await;
        // Break it in the middle: something has arrived, not everything needs to have.
        eventually("traffic", || parent.seen.lock().publishes.len() > arrived).await;
        serving.stop().await;
    }
    let _serving = parent.serve_mqtt(ports.0).await;
    eventually("delivery", || hub.queue.length() == 0).await;
    hub.stop().await;
    let seen = parent.seen.lock();
    let numbers: Vec<usize> = seen
        .publishes
        .iter()
        .map(|(_, _, body)| body.parse().unwrap())
        .collect();
    // Each number's first arrival is in order; a repetition goes back at most a window.
    let mut next = 0;
    for number in &numbers {
        assert!(*number <= next, "{number} came before {next}");
        assert!(next - number <= 64, "{number} came again after {next}");
        next = next.max(number + 1);
    }
    assert_eq!(next, 1600);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_is_given_up_and_tried_again() {
    let parent = FakeParent::new();
    parent.seen.lock().is_black_hole = true;
    let ports = (parent.free_port().await, parent.free_port().await);
    let _serving = parent.serve_mqtt(ports.0).await;
    let hub = Hub::start(&parent, ports, |config| {
        config.connect_timeout = Duration::from_millis(100);
    });
    hub.append("leaf1", 0..10).await;
    eventually("attempt", || {
        hub.bridge.lane_counts().borrow().sessions == 1
    })
    .await;
    eventually("end of it", || {
        hub.bridge.lane_counts().borrow().sessions == 0
    })
    .await;
    parent.seen.lock().is_black_hole = false;
    eventually("delivery", || hub.queue.length() == 0).await;
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_not_trusted_drops_nothing() {
    let parent = FakeParent::new();
    let stranger = FakeParent::at(parent.address);
    let ports = (parent.free_port().await, parent.free_port().await);
    let serving = stranger.serve_mqtt(ports.0).await;
    let hub = Hub::start(&parent, ports, |_| {});
    hub.append("leaf1", 0..10).await;
    eventually("attempts", || {
        hub.bridge.lane_counts().borrow().sessions > 0
    })
    .await;
    eventually("failure", || {
        hub.bridge.lane_counts().borrow().sessions == 0
    })
    .await;
    assert_eq!(hub.queue.length(), 10);
    assert!(
        stranger.seen.lock().connects.is_empty(),
        "no token for a stranger"
    );
    serving.stop().await;
    let _serving = parent.serve_mqtt(ports.0).await;
    eventually("delivery", || hub.queue.length() == 0).await;
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scope_is_fetched_over_a_kept_connection_and_survives_a_restart_offline() {
    let parent = FakeParent::new();
    parent.seen.lock().answer = (200, PAGE.to_owned());
    let ports = (parent.free_port().await, parent.free_port().await);
    let serving = parent.serve_https(ports.1).await;
    let hub = Hub::start(&parent, ports, |_| {});
    eventually("walk", || hub.scope.is_initialised()).await;
    let refresh = hub.bridge.identity_refresh();
    let outcome = refresh.refresh(&id("leaf1"), "edge2").await;
    assert_eq!(
        outcome,
        edgehub_auth::authenticator::RefreshOutcome::Refreshed
    );
    let outcome = refresh.refresh(&id("ghost"), "edge2").await;
    assert_eq!(
        outcome,
        edgehub_auth::authenticator::RefreshOutcome::NotFound
    );
    {
        let seen = parent.seen.lock();
        let base = "/devices/edge2/modules/$edgeHub";
        let version = "api-version=2020-06-30-preview";
        let (path, authorization, body) = &seen.requests[0];
        assert_eq!(
            *path,
            format!("{base}/devicesAndModulesInTargetDeviceScope?{version}")
        );
        assert!(
            authorization.contains("%252524edgeHub&"),
            "the triple-encoded form"
        );
        assert_eq!(*body, r#"{"pageSize":100,"authChain":"edge2"}"#);
        let (path, _, body) = &seen.requests[1];
        assert_eq!(
            *path,
            format!("{base}/getDeviceAndModuleOnBehalfOf?{version}")
        );
        assert_eq!(*body, r#"{"targetDeviceId":"leaf1","authChain":"edge2"}"#);
        assert_eq!(seen.https_connections, 1);
    }
    let store = hub.stop().await;
    serving.stop().await;

    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let tokens = TokenSource::new("a2V5", "h", "edge2", "$edgeHub", Arc::clone(&clock));
    let scope = ScopeCache::new(&id("edge2"));
    let deps = BridgeDeps {
        store: store.store.clone(),
        queues: Vec::new(),
        scope: Arc::clone(&scope),
        tokens: Arc::new(tokens.unwrap()),
        tls: Arc::clone(&parent.client_tls),
        clock,
        downstream: Arc::new(FakeDownstream::default()),
        infos: Vec::new(),
    };
    let (tasks, cancel) = (TaskTracker::new(), CancellationToken::new());
    let config = BridgeConfig::new("127.0.0.1", id("edge2"));
    Bridge::start(config, deps, &tasks, &cancel).unwrap();
    assert!(scope.is_initialised(), "at once");
    let record = scope.current().get(&id("leaf1")).cloned().unwrap();
    assert!(format!("{record:?}").contains("SymmetricKey"));
    cancel.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_identity_waits_and_its_neighbours_do_not() {
    let parent = FakeParent::new();
    parent.seen.lock().refused = vec![("leaf1".to_owned(), 5)];
    let ports = (parent.free_port().await, parent.free_port().await);
    let _mqtt = parent.serve_mqtt(ports.0).await;
    let hub = Hub::start(&parent, ports, |_| {});
    hub.scope.apply(ScopeChange::Upsert(vec![leaf("leaf2")]));
    hub.append("leaf1", 0..10).await;
    hub.append("leaf2", 0..10).await;
    eventually("leaf2", || hub.queue.length() == 10).await;
    eventually("retries of leaf1", || {
        let seen = parent.seen.lock();
        seen.connects
            .iter()
            .filter(|connected| connected.client_id == "leaf1")
            .count()
            > 2
    })
    .await;
    parent.seen.lock().refused.clear();
    eventually("leaf1", || hub.queue.length() == 0).await;
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scope_client_survives_dead_connections_and_endless_answers() {
    use edgehub_auth::authenticator::RefreshOutcome;
    let parent = FakeParent::new();
    parent.seen.lock().answer = (200, PAGE.to_owned());
    let ports = (parent.free_port().await, parent.free_port().await);
    let serving = parent.serve_https(ports.1).await;
    let hub = Hub::start(&parent, ports, |_| {});
    eventually("walk", || hub.scope.is_initialised()).await;
    let refresh = hub.bridge.identity_refresh();
    serving.stop().await;
    let serving = parent.serve_https(ports.1).await;
    assert_eq!(
        refresh.refresh(&id("leaf1"), "edge2").await,
        RefreshOutcome::Refreshed
    );
    parent.seen.lock().answer.1 = " ".repeat(limits::HTTP_BODY_BYTES_MAX + 1);
    assert_eq!(
        refresh.refresh(&id("ghost"), "edge2").await,
        RefreshOutcome::Unavailable
    );
    assert!(hub.scope.current().get(&id("leaf1")).is_some());
    hub.stop().await;
    serving.stop().await;
}

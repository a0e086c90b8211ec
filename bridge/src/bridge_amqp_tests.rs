//! The whole bridge over AMQP, over real sockets, TLS and WebSockets, against the server engine.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::BytesMut;
use edgehub_amqp::connection::Config;
use edgehub_auth::scope_cache::ScopeChange;
use edgehub_proto::hub::{Needs, UpstreamError};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::tests::{Hub, leaf};
use super::*;
use crate::amqp::rig::{Parent, Verdict};
use crate::fake_parent::{FakeParent, Serving};
use crate::test_support::{eventually, id};

/// Every connection that was made, in order, with what became of it.
#[derive(Clone, Default)]
struct Connections(Arc<Mutex<Vec<Arc<Mutex<Parent>>>>>);

impl Connections {
    fn count(&self) -> usize {
        self.0.lock().len()
    }

    /// Bodies of an identity over all connections.
    fn ledger(&self, identity: &str) -> Vec<String> {
        let connections = self.0.lock();
        let ledgers = connections.iter().map(|one| one.lock().ledger(identity));
        ledgers.flatten().collect()
    }

    fn last(&self) -> Arc<Mutex<Parent>> {
        Arc::clone(self.0.lock().last().unwrap())
    }

    /// Serves AMQP on a stream.
    async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, mut stream: S) {
        let parent = Parent::new(Config::new("parent"), now());
        let parent = Arc::new(Mutex::new(parent));
        self.0.lock().push(Arc::clone(&parent));
        let mut input = BytesMut::new();
        loop {
            let output = {
                let mut parent = parent.lock();
                parent.handle();
                let mut output = BytesMut::new();
                while let Some(bytes) = parent.connection.output() {
                    output.extend_from_slice(&bytes);
                }
                output
            };
            if stream.write_all(&output).await.is_err() || stream.flush().await.is_err() {
                return;
            }
            if parent.lock().connection.is_closed() {
                return;
            }
            let tick = tokio::time::sleep(Duration::from_millis(20));
            tokio::select! {
                read = stream.read_buf(&mut input) => match read {
                    Ok(1..) => parent.lock().connection.receive(&mut input, now()),
                    Ok(0) | Err(_) => return,
                },
                () = tick => parent.lock().connection.expired(now()),
            }
        }
    }

    async fn on_port(&self, parent: &FakeParent, port: u16) -> Serving {
        let this = self.clone();
        let serve = move |stream| {
            let this = this.clone();
            async move { this.serve(stream).await }
        };
        parent.serve_tls(port, serve).await
    }

    /// In WebSockets.
    async fn on_web_socket(&self, parent: &FakeParent, port: u16) -> Serving {
        let this = self.clone();
        let serve = move |stream| {
            let this = this.clone();
            async move {
                if let Some(stream) = upgrade(stream).await {
                    this.serve(stream).await;
                }
            }
        };
        parent.serve_tls(port, serve).await
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The server's half of an upgrade.
async fn upgrade<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
) -> Option<edgehub_ws::ByteStream<S>> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(stream.read_u8().await.ok()?);
    }
    let request = String::from_utf8(request).unwrap();
    let header = |name: &str| {
        let line = request.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        });
        line.map(str::to_owned)
    };
    let key = header("sec-websocket-key")?;
    assert_eq!(header("sec-websocket-protocol").unwrap(), "AMQPWSB10");
    let accept = edgehub_ws::accept_key(key.as_bytes());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
         sec-websocket-accept: {accept}\r\nsec-websocket-protocol: AMQPWSB10\r\n\r\n"
    );
    stream.write_all(answer.as_bytes()).await.ok()?;
    Some(edgehub_ws::ByteStream::server(stream).await)
}

/// A hub that speaks AMQP; `ports` are AMQP's and HTTPS's.
fn hub(parent: &FakeParent, ports: (u16, u16), protocol: Protocol) -> Hub {
    Hub::start(parent, ports, move |config| {
        config.protocol = protocol;
        config.amqp_port = ports.0;
    })
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_flows_over_one_connection_when_the_parent_comes_up() {
    let parent = FakeParent::new();
    let connections = Connections::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let hub = hub(&parent, ports, Protocol::Amqp);
    hub.scope.apply(ScopeChange::Upsert(vec![leaf("leaf2")]));
    hub.append("leaf1", 0..2000).await;
    hub.append("leaf2", 0..2000).await;
    hub.append("edge2/$edgeHub", 0..3).await;
    let mut connectivity = hub.bridge.connectivity();
    let _serving = connections.on_port(&parent, ports.0).await;
    connectivity
        .wait_for(|state| *state == Connectivity::Connected)
        .await
        .unwrap();
    eventually("delivery", || hub.queue.length() == 0).await;
    assert_eq!(connections.count(), 1);
    for (identity, count) in [("leaf1", 2000), ("leaf2", 2000), ("edge2/$edgeHub", 3)] {
        assert_eq!(
            connections.ledger(identity),
            numbers(0..count),
            "{identity}"
        );
    }
    let begin = now();
    hub.stop().await;
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "{:?}",
        begin.elapsed()
    );
    let closed = connections.last().lock().closed.clone();
    assert!(closed.is_some(), "closed in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_reordered_when_connections_break() {
    let parent = FakeParent::new();
    let connections = Connections::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let hub = hub(&parent, ports, Protocol::Amqp);
    for round in 0..8 {
        let arrived = connections.ledger("leaf1").len();
        let serving = connections.on_port(&parent, ports.0).await;
        hub.append("leaf1", round * 500..(round + 1) * 500).await;
        // Break it in the middle: something has arrived, not everything needs to have.
        eventually("traffic", || connections.ledger("leaf1").len() > arrived).await;
        serving.stop().await;
    }
    let _serving = connections.on_port(&parent, ports.0).await;
    eventually("delivery", || hub.queue.length() == 0).await;
    hub.stop().await;
    // Each number's first arrival is in order; a repetition goes back at most a window.
    let mut next = 0;
    for number in connections.ledger("leaf1") {
        let number: usize = number.parse().unwrap();
        assert!(number <= next, "{number} came before {next}");
        assert!(next - number <= limits::AMQP_WINDOW_DEFAULT);
        next = next.max(number + 1);
    }
    assert_eq!(next, 4000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_socket_is_used_when_it_is_set_and_when_nothing_else_leads_there() {
    for protocol in [Protocol::AmqpWs, Protocol::AmqpOrWs] {
        let parent = FakeParent::new();
        let connections = Connections::default();
        let ports = (parent.free_port().await, parent.free_port().await);
        let _serving = connections.on_web_socket(&parent, ports.1).await;
        let hub = hub(&parent, ports, protocol);
        hub.append("leaf1", 0..500).await;
        eventually("delivery", || hub.queue.length() == 0).await;
        assert_eq!(connections.ledger("leaf1"), numbers(0..500));
        hub.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_own_port_is_preferred_and_a_set_protocol_is_not_left() {
    let parent = FakeParent::new();
    let (own, web) = (Connections::default(), Connections::default());
    let ports = (parent.free_port().await, parent.free_port().await);
    let serving = own.on_port(&parent, ports.0).await;
    let _web = web.on_web_socket(&parent, ports.1).await;
    let unset = hub(&parent, ports, Protocol::AmqpOrWs);
    unset.append("leaf1", 0..100).await;
    eventually("delivery", || unset.queue.length() == 0).await;
    assert_eq!(own.ledger("leaf1").len(), 100);
    unset.stop().await;
    serving.stop().await;
    // From now on whoever comes there is sent away.
    let dials = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&dials);
    let send_away = move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move { drop(stream) }
    };
    let _closed = parent.serve_tls(ports.0, send_away).await;
    let set = hub(&parent, ports, Protocol::Amqp);
    set.append("leaf1", 0..100).await;
    eventually("three dials", || dials.load(Ordering::Relaxed) >= 3).await;
    assert_eq!(web.count(), 0);
    assert_eq!(set.queue.length(), 100);
    set.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_identities_share_one_connection_and_come_back_after_a_break() {
    let parent = FakeParent::new();
    let connections = Connections::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let serving = connections.on_port(&parent, ports.0).await;
    let hub = Hub::start(&parent, ports, |config| {
        config.protocol = Protocol::Amqp;
        config.amqp_port = ports.0;
        config.lanes.connects_per_second = 1000.0;
        config.lanes.connects_burst = 1000;
    });
    let names: Vec<String> = (0..300).map(|number| format!("dev{number}")).collect();
    let records = names.iter().map(|name| leaf(name)).collect();
    hub.scope.apply(ScopeChange::Upsert(records));
    for name in &names {
        hub.append(name, 0..10).await;
    }
    eventually("delivery", || hub.queue.length() == 0).await;
    assert_eq!(connections.count(), 1);
    serving.stop().await;
    for name in &names {
        hub.append(name, 10..20).await;
    }
    let _serving = connections.on_port(&parent, ports.0).await;
    eventually("delivery after the break", || hub.queue.length() == 0).await;
    for name in &names {
        assert_eq!(connections.ledger(name), numbers(0..20), "{name}");
    }
    assert_eq!(connections.count(), 2);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_identity_waits_and_its_neighbours_do_not() {
    let parent = FakeParent::new();
    let connections = Connections::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let _serving = connections.on_port(&parent, ports.0).await;
    let hub = hub(&parent, ports, Protocol::Amqp);
    hub.scope.apply(ScopeChange::Upsert(vec![leaf("leaf2")]));
    hub.append("leaf2", 0..10).await;
    eventually("leaf2", || hub.queue.length() == 0).await;
    let refuse = Some(("messages/events", "amqp:unauthorized-access"));
    connections.last().lock().manner("leaf1").refuse = refuse;
    hub.append("leaf1", 0..10).await;
    hub.append("leaf2", 10..20).await;
    eventually("leaf2 again", || hub.queue.length() == 10).await;
    let attaches = || {
        let last = connections.last();
        let last = last.lock();
        let of_leaf1 = last
            .attaches
            .iter()
            .filter(|(identity, _)| identity == "leaf1");
        of_leaf1.count()
    };
    eventually("retries of leaf1", || attaches() > 2).await;
    connections.last().lock().manner("leaf1").refuse = None;
    eventually("leaf1", || hub.queue.length() == 0).await;
    assert_eq!(connections.ledger("leaf1"), numbers(0..10));
    assert_eq!(connections.count(), 1);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twins_are_asked_and_needs_are_heard_again_after_a_break() {
    let parent = FakeParent::new();
    let connections = Connections::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let serving = connections.on_port(&parent, ports.0).await;
    let hub = hub(&parent, ports, Protocol::Amqp);
    let all = Needs {
        desired: true,
        methods: true,
        cloud_to_device: true,
    };
    hub.bridge.upstream().need(&id("leaf1"), all);
    assert_eq!(hub.downstream.established().await, id("leaf1"));
    let twin = hub.bridge.upstream().twin(&id("leaf1")).await.unwrap();
    assert_eq!(&twin[..], b"{\"desired\":{}}");
    let patch = bytes::Bytes::from_static(b"{\"a\":1}");
    let version = hub.bridge.upstream().report(&id("leaf1"), patch).await;
    assert_eq!(version, Ok(Some(7)));
    connections.last().lock().manner("leaf1").twin = Some(404);
    let refused = hub.bridge.upstream().twin(&id("leaf1")).await;
    assert_eq!(refused, Err(UpstreamError::Refused { status: 404 }));
    serving.stop().await;
    let _serving = connections.on_port(&parent, ports.0).await;
    assert_eq!(hub.downstream.established().await, id("leaf1"));
    let tails = connections.last().lock().tails("leaf1");
    assert_eq!(tails.len(), 4, "{tails:?}");
    hub.bridge.upstream().need(&id("leaf1"), Needs::default());
    eventually("links to go", || {
        connections.last().lock().tails("leaf1") == ["messages/events"]
    })
    .await;
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_throttle_of_one_holds_up_nobody_else_and_ends() {
    let parent = FakeParent::new();
    let connections = Connections::default();
    let ports = (parent.free_port().await, parent.free_port().await);
    let _serving = connections.on_port(&parent, ports.0).await;
    let hub = hub(&parent, ports, Protocol::Amqp);
    hub.scope.apply(ScopeChange::Upsert(vec![leaf("leaf2")]));
    hub.append("leaf2", 0..1).await;
    eventually("connection", || hub.queue.length() == 0).await;
    let throttled = Verdict::Reject("com.microsoft:device-container-throttled");
    connections.last().lock().manner("leaf1").always = throttled;
    hub.append("leaf1", 0..300).await;
    hub.append("leaf2", 1..1000).await;
    eventually("leaf2", || hub.queue.length() == 300).await;
    assert_eq!(connections.ledger("leaf2"), numbers(0..1000));
    connections.last().lock().manner("leaf1").always = Verdict::Accept;
    eventually("leaf1", || hub.queue.length() == 0).await;
    assert_eq!(connections.ledger("leaf1"), numbers(0..300));
    hub.stop().await;
}

//! The matrix of SDKs, protocols, kinds of client and layers: what every cell does, and what must come
//! of it (acceptance 2 of the MQTT and of the AMQP issue). The service side is Microsoft's SDKs too.

use std::sync::Arc;
use std::time::Duration;

use edgehub_lab::{DeviceSpec, Lab, LabBuilder};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::PATIENCE;
use crate::agent::{Agent, Protocol, Sdk};
use crate::service::{DESIRED, METHODS, Service};
use crate::service_sdk::{Outgoing, ServiceSdk, StartAt, Transport};

/// A kind of client, with a name that is part of its ids.
pub type Kind = (&'static str, Sdk, Protocol);

/// The kinds of client of one run. Each module's output is routed to the input of the next one's,
/// the last one's to that of the first.
pub type Kinds = &'static [Kind];

/// The hubs, top first.
pub const LAYERS: [&str; 3] = ["edge1", "edge2", "edge3"];
/// What connects to the IoT Hub itself.
pub const DIRECT: &str = "direct";
/// The shortest time that a caller can give a method.
const RESPONSE_SECS: u64 = 5;
/// Of a call that may come before the subscription.
const CONNECT_SECS: u64 = 60;
/// What the service SDK throws when a method is not answered in time.
const NO_ANSWER: [&str; 2] = ["GatewayTimeoutError", "504101"];
/// How often a twin is looked at while somebody waits for a change of it.
const POLL: Duration = Duration::from_millis(50);

/// A hierarchy in which every cell of the matrix has an identity of its own.
#[must_use]
pub fn hierarchy(kinds: Kinds) -> LabBuilder {
    let mut builder = LabBuilder::new().layers(LAYERS.len());
    for layer in LAYERS {
        for (index, (kind, ..)) in kinds.iter().enumerate() {
            let next = kinds[(index + 1) % kinds.len()].0;
            let route = format!(
                "FROM /messages/modules/{kind}/outputs/out1 \
                 INTO BrokeredEndpoint(\"/modules/{next}/inputs/in1\")"
            );
            builder = builder
                .leaf(leaf_at(layer, kind), layer)
                .module(layer, *kind)
                .env(layer, &format!("routes__{kind}"), &route);
        }
    }
    builder
}

/// An IoT Hub with an identity for every kind.
#[must_use]
pub fn alone(kinds: Kinds) -> LabBuilder {
    let mut builder = LabBuilder::new();
    for (kind, ..) in kinds {
        let mut device = DeviceSpec::new(leaf_at(DIRECT, kind), None);
        device.modules.push("m".to_owned());
        builder = builder.device(device);
    }
    builder
}

fn leaf_at(layer: &str, kind: &str) -> String {
    format!("{layer}-{kind}")
}

/// One client: where it is, and who.
#[derive(Clone, Debug)]
struct Cell {
    layer: &'static str,
    kind: Kind,
    is_module: bool,
}

impl Cell {
    fn id(&self) -> String {
        let (kind, ..) = self.kind;
        match (self.layer, self.is_module) {
            (DIRECT, true) => format!("{}/m", leaf_at(DIRECT, kind)),
            (layer, true) => format!("{layer}/{kind}"),
            (layer, false) => leaf_at(layer, kind),
        }
    }

    fn start(&self, lab: &Lab) -> Agent {
        let (_, sdk, protocol) = self.kind;
        let gateway = Some(self.layer).filter(|layer| *layer != DIRECT);
        Agent::start(lab, sdk, protocol, &self.id(), gateway, None)
    }

    /// What every cell of its SDK has to give, wherever it is.
    fn expected(&self) -> Value {
        let unknown = match self.kind.1 {
            // The agent's one handler is asked.
            Sdk::Python => json!({"status": 501, "payload": {"unknown": "nobody"}}),
            // The SDK has handlers by name, and answers nothing where there is none.
            Sdk::Node => json!(NO_ANSWER),
        };
        let mut expected = json!({
            "telemetry": {"body": "21", "properties": {"room": "a b/c"}},
            "twin": {"desired": {"color": "blue", "nested": {"n": 1}}},
            "reported": {"color": "blue", "list": [1, 2], "count": 3},
            "desired": {"color": "red"},
            "answered": {"status": 200, "payload": {"echo": {"x": [1, "two", null]}}},
            "unanswered": NO_ANSWER,
            "unknown": unknown,
        });
        if !self.is_module {
            let message = json!({"body": "to you", "message_id": self.message_id(),
                "properties": {"p": "1 & 2"}, "outcome": "Success"});
            expected["c2d"] = message;
        }
        expected
    }

    /// Of its cloud-to-device message, which the feedback names.
    fn message_id(&self) -> String {
        format!("to {}", self.id())
    }

    /// Everything that a client can do, and what came of it.
    async fn live(&self, lab: &Lab, sdk: &ServiceSdk, agent: &Agent) -> Value {
        let (id, service) = (self.id(), Service::of(lab));
        let mut seen = json!({});
        agent.must("connect", Value::Null).await;

        let message = json!({"body": "21", "properties": {"room": "a b/c"}});
        agent.must("send", message).await;
        seen["telemetry"] = telemetry(lab, sdk, &id).await;

        let first = json!({"color": "blue", "nested": {"n": 1}});
        let version = desire(sdk, &id, &first).await;
        let twin = agent.must("get_twin", Value::Null).await;
        let mut desired = twin["desired"].clone();
        assert_eq!(desired["$version"], version, "{id}: {twin}");
        strip(&mut desired);
        seen["twin"] = json!({ "desired": desired });

        let patch = json!({"patch": {"color": "blue", "list": [1, 2], "count": 3}});
        agent.must("patch_reported", patch).await;
        seen["reported"] = reported(sdk, &id, |reported| reported["count"] == json!(3)).await;
        strip(&mut seen["reported"]);

        agent.must("watch_desired", Value::Null).await;
        service.subscribed(&id, DESIRED).await;
        let version = desire(sdk, &id, &json!({"color": "red"})).await;
        let event = agent
            .event("desired", |event| event["patch"]["color"] == json!("red"))
            .await;
        seen["desired"] = event["patch"].clone();
        assert_eq!(seen["desired"]["$version"], version, "{id}: {event}");
        strip(&mut seen["desired"]);

        agent.must("answer_methods", Value::Null).await;
        let payload = json!({"x": [1, "two", null]});
        // The first one may come before the subscription: it waits for it.
        let call =
            |name: &'static str| sdk.invoke(&id, name, &payload, CONNECT_SECS, RESPONSE_SECS);
        seen["answered"] = outcome(call("echo").await);
        service.subscribed(&id, METHODS).await;
        let (unanswered, unknown) = tokio::join!(call("unanswered"), call("nobody"));
        seen["unanswered"] = outcome(unanswered);
        seen["unknown"] = outcome(unknown);
        if !self.is_module {
            seen["c2d"] = self.receive(sdk, agent).await;
        }
        seen
    }

    async fn receive(&self, sdk: &ServiceSdk, agent: &Agent) -> Value {
        let id = self.id();
        agent.must("watch_c2d", Value::Null).await;
        let message = Outgoing {
            body: "to you".to_owned(),
            message_id: self.message_id(),
            ack: Some("full"),
            time_to_live: None,
            properties: vec![("p".to_owned(), "1 & 2".to_owned())],
        };
        let sent = sdk.send(&id, &message).await;
        sent.unwrap_or_else(|error| panic!("{id}: {error}"));
        let mut event = agent.event("c2d", |_| true).await;
        let feedback = sdk.feedback(&message.message_id).await;
        assert_eq!(feedback.device_id, id);
        event["outcome"] = json!(feedback.status_code);
        if let Some(properties) = event["properties"].as_object_mut() {
            // Node over MQTT knows no such member, and shows what it does not know as a property.
            properties.retain(|name, value| name != "iothub-ack" || value != "full");
        }
        let event = event.as_object_mut().expect("an object");
        event.remove("event");
        event.remove("input");
        Value::Object(event.clone())
    }
}

/// A result of a method as the operator's program sees it: of an error its name, and the IoT Hub's
/// code in its text.
fn outcome(result: Result<Value, String>) -> Value {
    result.unwrap_or_else(|error| {
        let name = error.split(':').next().unwrap_or_default();
        let code = error.split("errorCode").nth(1).unwrap_or_default();
        let code: String = code
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        json!([name, code])
    })
}

/// Changes desired properties; their new version.
async fn desire(sdk: &ServiceSdk, id: &str, desired: &Value) -> Value {
    let patch = json!({"properties": {"desired": desired}});
    let twin = sdk.update_twin(id, &patch, "*").await;
    let twin = twin.unwrap_or_else(|error| panic!("{id}: {error}"));
    twin["properties"]["desired"]["$version"].clone()
}

/// Reported properties, as soon as they fit.
async fn reported(sdk: &ServiceSdk, id: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let twin = sdk.twin(id).await;
        let twin = twin.unwrap_or_else(|error| panic!("{id}: {error}"));
        let reported = &twin["properties"]["reported"];
        if fits(reported) {
            return reported.clone();
        }
        assert!(Instant::now() < deadline, "{id}: no reported patch: {twin}");
        sleep(POLL).await;
    }
}

/// Without what the hub adds.
fn strip(section: &mut Value) {
    if let Some(section) = section.as_object_mut() {
        section.retain(|name, _| !name.starts_with('$'));
    }
}

/// The one message of this sender, as a reader of the event hub gets it.
async fn telemetry(lab: &Lab, sdk: &ServiceSdk, id: &str) -> Value {
    let (device, module) = match id.split_once('/') {
        Some((device, module)) => (device, json!(module)),
        None => (id, Value::Null),
    };
    let event = sdk.agent().event("telemetry", |event| {
        let system = &event["system"];
        system["iothub-connection-device-id"] == json!(device)
            && system["iothub-connection-module-id"] == module
    });
    let event = event.await;
    let entries = lab.ledger().entries_of(id).expect("the ledger is readable");
    assert_eq!(entries.len(), 1, "{id}");
    json!({
        // The SDK has read what is JSON.
        "body": event["body"].as_str().map_or_else(|| event["body"].to_string(), str::to_owned),
        "properties": event["properties"],
    })
}

/// The service side of a lab: it reads all telemetry from the beginning, and feedback.
async fn service_sdk(lab: &Lab) -> ServiceSdk {
    let sdk = ServiceSdk::start(lab, Transport::Amqp);
    let partitions = sdk.partition_ids().await.expect("partitions");
    for partition in partitions {
        let reads = sdk.read(&partition, &partition, StartAt::Earliest).await;
        reads.expect("a reader");
    }
    sdk.watch_feedback().await.expect("feedback");
    sdk
}

/// All four kinds as leaves or as modules of one layer, at once: each does everything and gives
/// what it gives everywhere. Modules of an edge then send to one another, round in a circle.
///
/// # Panics
/// When a cell does not give what it must.
pub async fn round(
    lab: &Arc<Lab>,
    sdk: &Arc<ServiceSdk>,
    kinds: Kinds,
    layer: &'static str,
    is_module: bool,
) {
    let begun = Instant::now();
    let mut lives = JoinSet::new();
    for (kind, spec) in kinds.iter().enumerate() {
        let cell = Cell {
            layer,
            kind: *spec,
            is_module,
        };
        let (lab, sdk) = (Arc::clone(lab), Arc::clone(sdk));
        lives.spawn(async move {
            let agent = cell.start(&lab);
            let seen = cell.live(&lab, &sdk, &agent).await;
            assert_eq!(seen, cell.expected(), "{} at {layer}", agent.name());
            (kind, agent)
        });
    }
    let mut agents = lives.join_all().await;
    agents.sort_by_key(|(kind, _)| *kind);
    if is_module && layer != DIRECT {
        for (_, agent) in &agents {
            agent.must("watch_inputs", json!({})).await;
        }
        for (kind, agent) in &agents {
            let next = &agents[(kind + 1) % kinds.len()].1;
            let body = format!("out of {kind}");
            let message = json!({"body": body, "output": "out1", "properties": {"k": "v w"}});
            agent.must("send", message).await;
            let event = next.event("input", |event| event["body"] == json!(body));
            let mut event = event.await;
            // Python shows the hub's own stamps as if they were the sender's.
            strip(&mut event["properties"]);
            assert_eq!(event["input"], json!("in1"), "{}: {event}", next.name());
            assert_eq!(event["properties"], json!({"k": "v w"}), "{}", next.name());
        }
    }
    println!("{layer}, modules: {is_module}: {:?}", begun.elapsed());
}

/// Every layer, leaves and modules, in one hierarchy.
///
/// # Panics
/// When the lab does not start, or a cell does not give what it must.
pub async fn everywhere(builder: LabBuilder, kinds: Kinds) {
    let lab = Arc::new(builder.start().await.expect("the lab starts"));
    let sdk = Arc::new(service_sdk(&lab).await);
    for layer in LAYERS {
        for is_module in [false, true] {
            round(&lab, &sdk, kinds, layer, is_module).await;
        }
    }
    end(lab).await;
}

/// The same without a hub in between.
///
/// # Panics
/// As [`everywhere`].
pub async fn at_the_hub_itself(kinds: Kinds) {
    let lab = Arc::new(alone(kinds).start().await.expect("the lab starts"));
    let sdk = Arc::new(service_sdk(&lab).await);
    for is_module in [false, true] {
        round(&lab, &sdk, kinds, DIRECT, is_module).await;
    }
    end(lab).await;
}

async fn end(lab: Arc<Lab>) {
    let lab = Arc::into_inner(lab).expect("nobody uses the lab any more");
    lab.shutdown().await.expect("the lab ends");
}

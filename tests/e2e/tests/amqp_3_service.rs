//! Acceptance 3 of the AMQP side: Microsoft's service SDK and Event Hubs SDK, unmodified, drive the
//! IoT Hub emulator, with Microsoft's device SDK at the other end.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

use std::time::Duration;

use edgehub_lab::{DeviceSpec, Lab, LabBuilder};
use edgehub_tests::PATIENCE;
use edgehub_tests::agent::{Agent, Protocol, Sdk};
use edgehub_tests::service::{DESIRED, METHODS, Service};
use edgehub_tests::service_sdk::{Event, Outgoing, ServiceSdk, StartAt, Transport};
use serde_json::{Value, json};
use tokio::time::Instant;

/// Messages of a device that the IoT Hub keeps, and deliveries of one before it gives up.
const QUEUE_MAX: usize = 50;
const DELIVERIES_MAX: usize = 10;
/// How long an event that comes at once may take, before another one is sent.
const A_MOMENT: Duration = Duration::from_millis(500);

/// The emulator and devices that talk to it, without a hub in between.
async fn start(devices: &[&str]) -> Lab {
    let builder = devices.iter().fold(LabBuilder::new(), |builder, device| {
        builder.device(DeviceSpec {
            modules: vec!["modA".to_owned()],
            ..DeviceSpec::new(*device, None)
        })
    });
    builder.start().await.expect("the lab starts")
}

async fn connected(lab: &Lab, id: &str, protocol: Protocol) -> Agent {
    let agent = Agent::start(lab, Sdk::Node, protocol, id, None, None);
    agent.must("connect", Value::Null).await;
    agent
}

/// Whether the SDK threw this kind of error.
fn threw<T: std::fmt::Debug>(result: Result<T, String>, kind: &str) {
    let error = result.expect_err(kind);
    assert!(error.starts_with(kind), "{kind}: {error}");
}

/// Devices and modules are created, listed, changed, found and deleted, one by one and many at
/// once; etags that do not match and things that are missing are the SDK's own errors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_the_service_sdk_manages_the_registry() {
    let lab = start(&["leaf1"]).await;
    let sdk = ServiceSdk::start(&lab, Transport::Amqp);
    let fresh = json!({ "deviceId": "fresh" });
    let created = sdk.create_device(&fresh).await.expect("a device");
    assert_eq!(created["authentication"]["type"], "sas");
    threw(sdk.create_device(&fresh).await, "DeviceAlreadyExistsError");
    threw(sdk.device("nobody").await, "DeviceNotFoundError");
    threw(
        sdk.update_device(&json!({ "deviceId": "nobody" })).await,
        "DeviceNotFoundError",
    );

    let many: Vec<Value> = (0..5)
        .map(|n| json!({ "deviceId": format!("b{n}") }))
        .collect();
    let added = sdk.add_devices(&many).await.expect("many devices");
    assert_eq!(added["isSuccessful"], true);
    let again = sdk.add_devices(&many[..1]).await.expect_err("they exist");
    assert!(again.contains("DeviceAlreadyExists"), "{again}");
    let listed = sdk.devices().await.expect("all devices");
    let (mut bulk, others): (Vec<Value>, Vec<Value>) = listed.into_iter().partition(|device| {
        device["deviceId"]
            .as_str()
            .is_some_and(|id| id.starts_with('b'))
    });
    assert_eq!((bulk.len(), others.len()), (5, 2));
    for device in &mut bulk {
        device["status"] = json!("disabled");
    }
    sdk.update_devices(&bulk, false).await.expect("etags match");
    let stale = sdk.update_devices(&bulk, false).await.expect_err("stale");
    assert!(stale.contains("PreconditionFailed"), "{stale}");
    let counts = sdk.statistics().await.expect("counts");
    assert_eq!(
        (&counts["totalDeviceCount"], &counts["disabledDeviceCount"]),
        (&json!(7), &json!(5))
    );
    let disabled = "SELECT deviceId FROM devices WHERE status = 'disabled'";
    let pages = sdk.query(disabled, 2).await.expect("pages");
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 1]);
    assert_eq!(pages.concat()[4], json!({ "deviceId": "b4" }));
    threw(sdk.query("SELECT * FROM jobs", 1).await, "ArgumentError");
    sdk.remove_devices(&bulk, true).await.expect("all go");

    let module = json!({ "deviceId": "fresh", "moduleId": "m1" });
    let mut module = sdk.add_module(&module).await.expect("a module");
    module["managedBy"] = json!("somebody");
    sdk.update_module(&module, false).await.expect("its etag");
    threw(sdk.update_module(&module, false).await, "InvalidEtagError");
    threw(sdk.remove_module(&module).await, "InvalidEtagError");
    let module = sdk.module("fresh/m1").await.expect("the module");
    assert_eq!(module["managedBy"], "somebody");
    let modules = sdk.modules("fresh").await.expect("all");
    assert_eq!(modules, std::slice::from_ref(&module));
    sdk.remove_module(&module).await.expect("as it was got");
    assert!(sdk.module("fresh/m1").await.is_err());

    let edge = json!({ "deviceId": "edge9", "capabilities": { "iotEdge": true } });
    sdk.create_device(&edge).await.expect("an edge device");
    let content = json!({ "modulesContent": { "modB": { "properties.desired": { "rate": 5 } } } });
    sdk.apply_configuration("edge9", &content)
        .await
        .expect("a deployment");
    let twin = sdk
        .twin("edge9/modB")
        .await
        .expect("of a module made by it");
    assert_eq!(twin["properties"]["desired"]["rate"], 5);

    sdk.delete_device("fresh").await.expect("it is there");
    threw(sdk.delete_device("fresh").await, "DeviceNotFoundError");
    lab.shutdown().await.expect("the lab ends");
}

/// A disabled device is disconnected and not let in; its messages wait; enabled, it is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_a_disabled_device_is_out_until_it_is_enabled() {
    let lab = start(&["leaf1"]).await;
    let sdk = ServiceSdk::start(&lab, Transport::Amqp);
    let leaf = connected(&lab, "leaf1", Protocol::Amqp).await;
    // A device is connected once it has a link.
    leaf.must("send", json!({ "body": "here" })).await;
    let mut device = sdk.device("leaf1").await.expect("the device");
    assert_eq!(device["connectionState"], "Connected");
    device["status"] = json!("disabled");
    let device = sdk.update_device(&device).await.expect("disabled");
    assert_eq!(device["status"], "disabled");
    leaf.event("disconnected", |_| true).await;
    drop(leaf);
    let other = Agent::start(&lab, Sdk::Node, Protocol::Mqtt, "leaf1", None, None);
    let refused = other.call("connect", Value::Null).await;
    threw(refused, "UnauthorizedError");
    drop(other);
    let mut device = sdk.device("leaf1").await.expect("the device");
    assert_eq!(device["connectionState"], "Disconnected");
    device["status"] = json!("enabled");
    sdk.update_device(&device).await.expect("enabled");
    let leaf = connected(&lab, "leaf1", Protocol::Amqp).await;
    leaf.must("send", json!({ "body": "back" })).await;
    lab.shutdown().await.expect("the lab ends");
}

/// Desired properties reach the device, reported ones the service; methods are answered by a
/// device and by a module, and fail as the IoT Hub's do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_the_service_sdk_drives_twins_and_methods() {
    let lab = start(&["leaf1"]).await;
    let (sdk, service) = (ServiceSdk::start(&lab, Transport::Amqp), Service::of(&lab));
    let offline = sdk.invoke("leaf1", "echo", &Value::Null, 0, 5).await;
    threw(offline, "Error: Not found");
    threw(
        sdk.invoke("nobody", "echo", &Value::Null, 0, 5).await,
        "DeviceNotFoundError",
    );
    for (id, protocol) in [("leaf1", Protocol::Amqp), ("leaf1/modA", Protocol::AmqpWs)] {
        let client = connected(&lab, id, protocol).await;
        client.must("watch_desired", Value::Null).await;
        service.subscribed(id, DESIRED).await;
        let twin = sdk.twin(id).await.expect("a twin");
        let etag = twin["etag"].as_str().expect("an etag");
        let patch = json!({ "tags": { "site": "A" },
            "properties": { "desired": { "rate": { "value": 5 } } } });
        let changed = sdk.update_twin(id, &patch, etag).await.expect("its etag");
        assert_eq!(changed["tags"], json!({ "site": "A" }));
        threw(sdk.update_twin(id, &patch, etag).await, "InvalidEtagError");
        let notice = client
            .event("desired", |event| {
                event["patch"]["rate"] == json!({ "value": 5 })
            })
            .await;
        assert_eq!(
            notice["patch"]["$version"],
            changed["properties"]["desired"]["$version"]
        );
        let report = json!({ "patch": { "state": { "ok": true } } });
        client.must("patch_reported", report).await;
        let twin = sdk.twin(id).await.expect("a twin");
        assert_eq!(
            twin["properties"]["reported"]["state"],
            json!({ "ok": true })
        );

        client.must("answer_methods", Value::Null).await;
        service.subscribed(id, METHODS).await;
        let payload = json!({ "a": [1, "b", null] });
        let answer = sdk.invoke(id, "echo", &payload, 5, 30).await;
        assert_eq!(
            answer.expect("an answer"),
            json!({ "status": 200, "payload": { "echo": payload } })
        );
        let found = "SELECT COUNT() AS n FROM devices WHERE connectionState = 'Connected' \
            AND tags.site = 'A' AND properties.reported.state.ok = true";
        if id == "leaf1" {
            let pages = sdk.query(found, 10).await.expect("a count");
            assert_eq!(pages, [[json!({ "n": 1 })]]);
        }
    }
    lab.shutdown().await.expect("the lab ends");
}

fn message(id: &str) -> Outgoing {
    Outgoing {
        body: format!("body of {id}"),
        message_id: id.to_owned(),
        ack: Some("full"),
        time_to_live: None,
        properties: vec![("color".to_owned(), "blue & green".to_owned())],
    }
}

async fn messages_with_feedback(lab: &Lab, transport: Transport, protocol: Protocol) {
    let sdk = ServiceSdk::start(lab, transport);
    sdk.open().await.expect("it connects");
    sdk.watch_feedback().await.expect("feedback");
    let name = |what: &str| format!("{transport:?}-{what}");
    let feedback = async |device: &str, what: &str, status: &str| {
        let feedback = sdk.feedback(&name(what)).await;
        assert_eq!(
            (feedback.device_id.as_str(), feedback.status_code.as_str()),
            (device, status),
            "{feedback:?}"
        );
        let registered = sdk.device(device).await.expect("the device");
        assert_eq!(registered["generationId"], feedback.device_generation_id);
    };

    // Who takes the message, who refuses it, who gives it back until the IoT Hub gives up.
    for (device, settle, status) in [
        ("taker", "complete", "Success"),
        ("refuser", "reject", "Rejected"),
        ("returner", "abandon", "DeliveryCountExceeded"),
    ] {
        let client = connected(lab, device, protocol).await;
        client.must("watch_c2d", json!({ "settle": settle })).await;
        let id = name(device);
        sdk.send(device, &message(&id)).await.expect("accepted");
        let arrived = client.event("c2d", |_| true).await;
        assert_eq!(
            (&arrived["body"], &arrived["message_id"]),
            (&json!(format!("body of {id}")), &json!(id))
        );
        assert_eq!(arrived["properties"]["color"], "blue & green");
        feedback(device, device, status).await;
        if settle == "abandon" {
            let again = client.events("c2d").await.len();
            assert_eq!(again + 1, DELIVERIES_MAX, "deliveries");
        }
    }

    // Nobody is there: it expires, or is purged.
    let brief = Outgoing {
        time_to_live: Some(Duration::from_millis(1_500)),
        ..message(&name("brief"))
    };
    sdk.send("absent", &brief).await.expect("accepted");
    feedback("absent", "brief", "Expired").await;
    sdk.send("absent", &message(&name("purged")))
        .await
        .expect("accepted");
    let purged = lab.control("DELETE", "/c2d/absent", None).await;
    assert_eq!(purged.expect("a purge"), json!({ "purged": 1 }));
    feedback("absent", "purged", "Purged").await;

    // Without `ack` there is no feedback; what is sent after it has one.
    let quiet = Outgoing {
        ack: None,
        ..message(&name("quiet"))
    };
    let client = connected(lab, "taker", protocol).await;
    client.must("watch_c2d", Value::Null).await;
    sdk.send("taker", &quiet).await.expect("accepted");
    client
        .event("c2d", |event| event["message_id"] == name("quiet"))
        .await;
    sdk.send("taker", &message(&name("last")))
        .await
        .expect("accepted");
    feedback("taker", "last", "Success").await;
    let left = sdk.agent().events("feedback").await;
    assert_eq!(left, Vec::<Value>::new());

    // What the IoT Hub does not take.
    threw(
        sdk.send("nobody", &message("lost")).await,
        "DeviceNotFoundError",
    );
    for number in 0..QUEUE_MAX {
        let id = name(&format!("queued-{number}"));
        let result = sdk.send("absent", &message(&id)).await;
        result.unwrap_or_else(|error| panic!("{id}: {error}"));
    }
    threw(
        sdk.send("absent", &message("one-more")).await,
        "DeviceMaximumQueueDepthExceededError",
    );
    let purged = lab.control("DELETE", "/c2d/absent", None).await;
    assert_eq!(purged.expect("a purge"), json!({ "purged": QUEUE_MAX }));
    sdk.close().await.expect("it closes");
}

/// What became of a message is told to who sent it, whatever became of it: over AMQP and over
/// AMQP in a WebSocket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_messages_to_devices_have_feedback() {
    let lab = start(&["taker", "refuser", "returner", "absent"]).await;
    for (transport, protocol) in [
        (Transport::Amqp, Protocol::AmqpWs),
        (Transport::AmqpWs, Protocol::Amqp),
    ] {
        messages_with_feedback(&lab, transport, protocol).await;
    }
    lab.shutdown().await.expect("the lab ends");
}

async fn read(sdk: &ServiceSdk, reader: &str, from: StartAt, count: usize) -> Vec<Event> {
    sdk.read(reader, "0", from).await.expect("a reader");
    let mut events = Vec::with_capacity(count);
    for _ in 0..count {
        events.push(sdk.next_event(reader).await);
    }
    events
}

fn sequences(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.sequence).collect()
}

/// What devices sent is read from the start, from a sequence number, from a time and from the end
/// on, with the stamps of the IoT Hub.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_amqp_3_events_are_read_from_a_start_position() {
    let lab = start(&["leaf1", "leaf2"]).await;
    let sdk = ServiceSdk::start(&lab, Transport::Amqp);
    let empty = sdk.partition("0").await.expect("the partition");
    assert_eq!(empty["isEmpty"], true, "{empty}");
    let module = connected(&lab, "leaf1/modA", Protocol::Mqtt).await;
    let leaf = connected(&lab, "leaf2", Protocol::Amqp).await;
    for number in 0..6 {
        let sender = if number % 2 == 0 { &leaf } else { &module };
        let body = json!({ "number": number }).to_string();
        let properties = json!({ "color": "blue & green" });
        let id = format!("m{number}");
        let arguments = json!({ "body": body, "properties": properties, "message_id": id });
        sender.must("send", arguments).await;
    }

    assert_eq!(sdk.partition_ids().await.expect("the ids"), ["0"]);
    let partition = sdk.partition("0").await.expect("the partition");
    assert_eq!(
        (
            &partition["beginningSequenceNumber"],
            &partition["lastEnqueuedSequenceNumber"],
            &partition["isEmpty"]
        ),
        (&json!(0), &json!(5), &json!(false)),
        "{partition}"
    );

    let all = read(&sdk, "earliest", StartAt::Earliest, 6).await;
    assert_eq!(sequences(&all), [0, 1, 2, 3, 4, 5]);
    for (number, event) in all.iter().enumerate() {
        assert_eq!(event.body, json!({ "number": number }));
        assert_eq!(event.message_id, Some(json!(format!("m{number}"))));
        assert_eq!(event.properties["color"], "blue & green");
        let (device, module) = if number % 2 == 0 {
            ("leaf2", Value::Null)
        } else {
            ("leaf1", json!("modA"))
        };
        assert_eq!(event.partition_key.as_deref(), Some(device));
        let stamp = |name: &str| event.system.get(name).cloned().unwrap_or_default();
        assert_eq!(stamp("iothub-connection-device-id"), device);
        assert_eq!(stamp("iothub-connection-module-id"), module);
        assert_eq!(stamp("iothub-message-source"), "Telemetry");
        assert!(stamp("iothub-connection-auth-generation-id").is_string());
        let method = stamp("iothub-connection-auth-method");
        let method = method.as_str().expect("an authentication");
        assert!(method.contains(r#""type":"sas""#), "{method}");
    }

    let at = |number, inclusive| StartAt::Sequence { number, inclusive };
    let from = read(&sdk, "inclusive", at(3, true), 3).await;
    assert_eq!(sequences(&from), [3, 4, 5]);
    let behind = read(&sdk, "exclusive", at(3, false), 2).await;
    assert_eq!(sequences(&behind), [4, 5]);
    let time = all[2].enqueued_ms;
    let later: Vec<u64> = all
        .iter()
        .filter(|event| event.enqueued_ms > time)
        .map(|event| event.sequence)
        .collect();
    let after = read(&sdk, "time", StartAt::EnqueuedAfter(time), later.len()).await;
    assert_eq!(sequences(&after), later);

    // A reader does not say when it is there: something is sent until it gets it.
    sdk.read("latest", "0", StartAt::Latest)
        .await
        .expect("a reader");
    let deadline = Instant::now() + PATIENCE;
    let first = loop {
        assert!(Instant::now() < deadline, "the latest never come");
        leaf.must("send", json!({ "body": "1" })).await;
        if let Ok(event) = sdk.next_event_within(A_MOMENT, "latest").await {
            break event;
        }
    };
    assert!(first.sequence > 5, "{first:?}");
    // A reader that was ahead gets the same.
    let next = sdk.next_event("earliest").await;
    assert_eq!(next.sequence, 6);
    for reader in ["earliest", "inclusive", "exclusive", "time", "latest"] {
        sdk.stop_reading(reader).await.expect("it ends");
    }
    lab.shutdown().await.expect("the lab ends");
}

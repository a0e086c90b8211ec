//! Acceptance 6 of the walking skeleton: the hierarchy is the security boundary, on the wire.
//!
//! Every refusal has its control: the same request without the one thing that is wrong with it is
//! granted, before all refusals and after them. The hierarchy, seen from `edge1`, which is asked:
//!
//! ```text
//! edge1                     edge10 (beside edge1)
//! ├─ edge1/modA             └─ leaf10
//! ├─ leaf1
//! ├─ edge2
//! │  ├─ edge2/modB
//! │  ├─ leaf2
//! │  └─ edge3
//! │     └─ leaf3
//! ├─ edge20 (a sibling of edge2, whose name begins alike)
//! │  ├─ edge20/modB
//! │  └─ leaf20
//! └─ edge-off (disabled)
//!    └─ leaf-off
//! ```

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "these are the tests"
)]

use std::collections::BTreeMap;

use edgehub_lab::{DeviceSpec, HUB, Lab, LabBuilder};
use edgehub_tests::https::Request;
use edgehub_tests::mqtt::{Door, Hello, code, publish, telemetry};
use edgehub_tests::token::Token;
use edgehub_tests::{only_these_arrive, registry};
use mqttbytes::QoS;
use serde_json::{Value, json};

const API_VERSION: &str = "api-version=2020-06-30-preview";

async fn lab() -> Lab {
    let device = |id: &str, parent: Option<&str>| DeviceSpec::new(id, parent);
    // The IoT Hub gives every edge device an agent; named here, the lab knows its keys, too.
    let edge = |id: &str, parent: Option<&str>, modules: &[&str]| DeviceSpec {
        iot_edge: true,
        modules: [&["$edgeAgent"], modules]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect(),
        ..device(id, parent)
    };
    let lab = LabBuilder::new()
        .layers(2)
        .module("edge1", "$edgeAgent")
        .module("edge1", "modA")
        .leaf("leaf1", "edge1")
        .module("edge2", "$edgeAgent")
        .module("edge2", "modB")
        .leaf("leaf2", "edge2")
        .device(edge("edge3", Some("edge2"), &[]))
        .device(device("leaf3", Some("edge3")))
        .device(edge("edge20", Some("edge1"), &["modB"]))
        .device(device("leaf20", Some("edge20")))
        .device(DeviceSpec {
            enabled: false,
            ..edge("edge-off", Some("edge1"), &[])
        })
        .device(device("leaf-off", Some("edge-off")))
        .device(edge("edge10", None, &[]))
        .device(device("leaf10", Some("edge10")))
        // Each doubt is put to the IoT Hub again: refusals must hold without any rate limit.
        .env("edge1", "DeviceScopeCacheRefreshDelaySecs", "0")
        .env("edge2", "DeviceScopeCacheRefreshDelaySecs", "0");
    lab.start().await.expect("the lab starts")
}

/// Chains along which the IoT Hub has put somebody below an edge device; the first element is let
/// in when the `$edgeHub` of the last one asks.
const RIGHTFUL: [&str; 8] = [
    "leaf2;edge2",
    "edge2/modB;edge2",
    "edge2/$edgeHub;edge2",
    "leaf3;edge3;edge2",
    // A descendant may skip layers.
    "leaf3;edge3",
    "leaf20;edge20",
    "edge20/modB;edge20",
    "edge3;edge2",
];

/// At a hub with two child hubs, whoever connects on behalf of somebody who is not below it, or
/// without the key of its own `$edgeHub`, is refused: siblings, children that speak for their
/// parent, names that begin alike, forged chains, other modules' and devices' keys, and everybody
/// below a disabled edge device. Who is below it is let in, before and after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_6_connect_on_behalf_of_others_needs_the_right_actor() {
    let lab = lab().await;
    let door = Door::of(&lab, "edge1");
    let mut sent: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    admit_the_rightful(&lab, &door, &mut sent, "before").await;

    let wrong = [wrong_actors(&lab), wrong_tokens(&lab)].concat();
    for (what, hello) in &wrong {
        assert_eq!(door.refused(hello).await, code::NOT_AUTHORIZED, "{what}");
    }
    for (what, chain) in [
        ("a hundred elements", hundred()),
        ("no id", "leaf2;ed+ge2".to_owned()),
    ] {
        let hello = Hello::chained(&lab, &chain).with(&Token::of(&lab, "edge2/$edgeHub"));
        assert_eq!(door.refused(&hello).await, code::USER_NAME, "{what}");
    }
    // The hub's own parent is a stranger here, whoever is below it.
    let below = Door::of(&lab, "edge2");
    below.admitted(&Hello::on_behalf(&lab, "leaf3;edge3")).await;
    for chain in [
        "leaf2;edge2;edge1",
        "leaf3;edge3;edge2;edge1",
        "leaf1;edge1",
        "edge1/modA;edge1",
    ] {
        let refusal = below.refused(&Hello::on_behalf(&lab, chain)).await;
        assert_eq!(refusal, code::NOT_AUTHORIZED, "{chain} at edge2");
    }

    println!("{} connections were refused", wrong.len());
    // A session is its target's alone, also when the actor could open the other one.
    for (chain, topic) in [
        ("leaf2;edge2", telemetry("leaf3")),
        ("leaf2;edge2", telemetry("edge2/modB")),
        ("leaf2;edge2", telemetry("edge2/$edgeHub")),
        ("edge2/$edgeHub;edge2", telemetry("leaf2")),
    ] {
        let client = door.admitted(&Hello::on_behalf(&lab, chain)).await;
        client
            .expect_close_after(&publish(&topic, QoS::AtLeastOnce, 1, b"forged"))
            .await;
    }

    admit_the_rightful(&lab, &door, &mut sent, "after").await;
    for (id, bodies) in &sent {
        only_these_arrive(&lab, id, bodies).await;
    }
    let count: usize = sent.values().map(Vec::len).sum();
    assert_eq!(
        lab.ledger().count().expect("the ledger"),
        count as u64,
        "nothing of anybody else"
    );

    // Nothing but its being disabled kept edge-off and what is below it out.
    registry::set_status(&lab, "edge-off", "enabled").await;
    door.admitted(&Hello::on_behalf(&lab, "leaf-off;edge-off"))
        .await;
    door.admitted(&Hello::of(&lab, "leaf-off")).await;
    assert_nothing_secret_is_logged(&lab);
    lab.shutdown().await.expect("the lab ends");
}

async fn admit_the_rightful(
    lab: &Lab,
    door: &Door,
    sent: &mut BTreeMap<&str, Vec<String>>,
    when: &str,
) {
    let own = ["leaf1", "edge1/modA", "leaf3"];
    let own = own.map(|id| (id, Hello::of(lab, id)));
    for (chain, hello) in RIGHTFUL
        .map(|chain| (chain, Hello::on_behalf(lab, chain)))
        .into_iter()
        .chain(own)
    {
        let mut client = door.admitted(&hello).await;
        let target = chain.split(';').next().unwrap_or_default();
        if target.contains('$') || target == "edge3" {
            continue;
        }
        let body = format!("{chain} {when}");
        client.publish(&telemetry(target), &body, 1).await;
        sent.entry(target).or_default().push(body);
    }
}

/// Who is not below the last element, which presents the token of its own `$edgeHub`.
fn wrong_actors(lab: &Lab) -> Vec<(String, Hello)> {
    let chains = [
        ("a sibling", "leaf2;edge20"),
        ("a sibling of an ancestor", "leaf3;edge20"),
        ("a sibling of an ancestor", "leaf3;edge3;edge20"),
        ("a sibling's hub", "edge2/$edgeHub;edge20"),
        ("a sibling's module", "edge2/modB;edge20"),
        ("a sibling itself", "edge2;edge20"),
        ("the other way round", "leaf20;edge2"),
        ("the other way round", "edge20;edge2"),
        ("the other way round", "edge20/$edgeHub;edge2"),
        ("a child for its parent's leaf", "leaf1;edge2"),
        ("a child for its parent's module", "edge1/modA;edge2"),
        ("a child for its parent", "edge1;edge2"),
        ("a child for its parent's hub", "edge1/$edgeHub;edge2"),
        ("a grandchild for its grandparent's leaf", "leaf2;edge3"),
        ("a child for its parent's module", "edge2/modB;edge3"),
        ("beside the hub, its name begins alike", "leaf1;edge10"),
        ("beside the hub, its own leaf", "leaf10;edge10"),
        ("for who is beside the hub", "leaf10;edge2"),
        ("for who is beside the hub", "edge10/$edgeHub;edge2"),
        ("a lie in the middle", "leaf2;edge2;edge20"),
        ("a lie in the middle", "leaf20;edge20;edge2"),
        ("a lie in the middle", "leaf1;edge1;edge2"),
        ("the target twice", "leaf20;leaf2;edge2"),
        ("below a disabled edge device", "leaf-off;edge-off"),
        ("a disabled edge device's hub", "edge-off/$edgeHub;edge-off"),
        ("a disabled edge device for a stranger", "leaf2;edge-off"),
    ];
    let mut wrong: Vec<_> = chains
        .into_iter()
        .map(|(what, chain)| (format!("{what}: {chain}"), Hello::on_behalf(lab, chain)))
        .collect();

    let hub2 = Token::of(lab, "edge2/$edgeHub");
    for (what, client_id, chain) in [
        ("the chain is another's", "leaf20", "leaf2;edge2"),
        ("the chain is another's", "leaf1", "leaf2;edge2"),
        ("the chain is another's", "edge2/$edgeHub", "leaf2;edge2"),
        ("a module acts", "leaf2", "leaf2;edge2/$edgeHub"),
        ("a module acts", "leaf2", "leaf2;edge2;edge2/modB"),
    ] {
        let chained = Hello::chained(lab, chain);
        let user_name = chained.user_name.replacen(
            &format!("/{}/?", chain.split(';').next().unwrap_or_default()),
            &format!("/{client_id}/?"),
            1,
        );
        let hello = Hello {
            client_id: client_id.to_owned(),
            user_name,
            ..chained
        };
        wrong.push((
            format!("{what}: {client_id} with {chain}"),
            hello.with(&hub2),
        ));
    }
    // A leaf is no edge device, whatever it presents.
    for owner in ["leaf1", "leaf2"] {
        let hello = Hello::chained(lab, "leaf2;leaf1").with(&Token::of(lab, owner));
        wrong.push((format!("a leaf acts with the key of {owner}"), hello));
    }
    for id in ["leaf-off", "edge-off", "edge-off/$edgeHub"] {
        wrong.push((format!("disabled: {id} itself"), Hello::of(lab, id)));
    }
    wrong
}

/// `edge2` would be right, but presents something else than the token of its `$edgeHub`.
fn wrong_tokens(lab: &Lab) -> Vec<(String, Hello)> {
    let of = |id: &str| Token::of(lab, id);
    let hub = "edge2/$edgeHub";
    let tokens = [
        ("another module's token", of("edge2/modB")),
        ("another module's key", of("edge2/modB").naming(hub)),
        ("the device's token", of("edge2")),
        ("the device's key", of("edge2").naming(hub)),
        ("the target's own token", of("leaf2")),
        ("the target's key", of("leaf2").naming(hub)),
        ("the sibling's token", of("edge20/$edgeHub")),
        ("the sibling's key", of("edge20/$edgeHub").naming(hub)),
        ("the parent's token", of("edge1/$edgeHub")),
        ("the parent's key", of("edge1/$edgeHub").naming(hub)),
        ("the child's token", of("edge3/$edgeHub")),
        ("named after another module", of(hub).naming("edge2/modB")),
        (
            "named after a device that begins alike",
            of(hub).naming("edge20"),
        ),
        (
            "named after a hub that begins alike",
            of(hub).naming("edge20/$edgeHub"),
        ),
        ("for another IoT Hub", of(hub).for_host("other.example")),
        ("expired", of(hub).expired()),
    ];
    let chain = "leaf2;edge2";
    let none = ("no token".to_owned(), Hello::chained(lab, chain));
    let hello =
        |(what, token): (&str, Token)| (what.to_owned(), Hello::chained(lab, chain).with(&token));
    tokens.into_iter().map(hello).chain([none]).collect()
}

fn hundred() -> String {
    let mut chain = vec!["leaf2"];
    chain.resize(99, "edge2");
    chain.push("edge2");
    chain.join(";")
}

/// Both scope calls at the same hub: a child hub learns everything at and below it, with keys.
/// Whoever is no `$edgeHub`, has no or a wrong token, lets the chain end with somebody else or
/// asks for what is not below it is told nothing, and no key is in any answer to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accept_skeleton_6_scope_calls_tell_nobody_about_others() {
    let lab = lab().await;
    grant_the_rightful(&lab).await;
    let wrong = [wrong_callers(&lab), wrong_questions(&lab)].concat();
    for (what, status, request) in &wrong {
        let answer = request.send(&lab, "edge1").await;
        assert_eq!(
            answer.status, *status,
            "{what}: {request:?}\n{}",
            answer.text
        );
        assert_eq!(keys_in(&lab, &answer.text), [""; 0], "{what}");
        assert!(!answer.text.contains("Key\""), "{what}: {}", answer.text);
        if *status != 404 {
            assert!(
                answer.json()["ErrorMessage"].is_string(),
                "{what}: {}",
                answer.text
            );
        }
    }
    println!("{} calls were refused", wrong.len());
    // Nobody has lost anything by what others asked about it.
    grant_the_rightful(&lab).await;
    assert_nothing_secret_is_logged(&lab);
    lab.shutdown().await.expect("the lab ends");
}

/// `devicesAndModulesInTargetDeviceScope`, without a token yet.
fn scope_call(actor: &str, chain: &str) -> Request {
    let path = format!(
        "/devices/{actor}/modules/$edgeHub/devicesAndModulesInTargetDeviceScope?{API_VERSION}"
    );
    Request::json(
        "POST",
        path,
        &json!({ "pageSize": 100, "authChain": chain }),
    )
}

/// `getDeviceAndModuleOnBehalfOf` about `device` or `device/module`, without a token yet.
fn identity_call(actor: &str, target: &str, chain: &str) -> Request {
    let path =
        format!("/devices/{actor}/modules/$edgeHub/getDeviceAndModuleOnBehalfOf?{API_VERSION}");
    let mut body = json!({ "targetDeviceId": target, "authChain": chain });
    if let Some((device, module)) = target.split_once('/') {
        body["targetDeviceId"] = Value::from(device);
        body["targetModuleId"] = Value::from(module);
    }
    Request::json("POST", path, &body)
}

fn with_token(lab: &Lab, request: Request, owner: &str) -> Request {
    request.with("Authorization", Token::of(lab, owner).text())
}

/// What edge2 and edge20 may know they are told, keys included, and nothing else.
async fn grant_the_rightful(lab: &Lab) {
    let edge2 = [
        "edge2",
        "edge2/$edgeAgent",
        "edge2/$edgeHub",
        "edge2/modB",
        "edge3",
        "leaf2",
    ];
    let edge3 = ["edge3", "edge3/$edgeAgent", "edge3/$edgeHub", "leaf3"];
    let edge20 = [
        "edge20",
        "edge20/$edgeAgent",
        "edge20/$edgeHub",
        "edge20/modB",
        "leaf20",
    ];
    let scopes = [
        ("edge2", "edge2", edge2.as_slice()),
        ("edge2", "edge3;edge2", &edge3),
        ("edge3", "edge3", &edge3),
        ("edge20", "edge20", &edge20),
    ];
    for (actor, chain, expected) in scopes {
        let call = with_token(lab, scope_call(actor, chain), &format!("{actor}/$edgeHub"));
        let answer = call.send(lab, "edge1").await;
        assert_eq!(answer.status, 200, "{actor} asks {chain}: {}", answer.text);
        assert_eq!(
            told(&answer.json()),
            sorted(expected),
            "{actor} asks {chain}"
        );
        assert_eq!(
            keys_in(lab, &answer.text),
            sorted(expected),
            "{actor} asks {chain}: keys"
        );
    }
    for (actor, chain, targets) in [
        ("edge2", "edge2", edge2.as_slice()),
        ("edge2", "edge2", &edge3),
        ("edge2", "edge3;edge2", &edge3),
        ("edge20", "edge20", &edge20),
    ] {
        for target in targets {
            let call = identity_call(actor, target, chain);
            let call = with_token(lab, call, &format!("{actor}/$edgeHub"));
            let answer = call.send(lab, "edge1").await;
            assert_eq!(
                answer.status, 200,
                "{actor} asks about {target}: {}",
                answer.text
            );
            let device = target.split('/').next().unwrap_or_default();
            let expected = if device == *target {
                vec![*target]
            } else {
                vec![device, *target]
            };
            assert_eq!(
                told(&answer.json()),
                sorted(&expected),
                "{actor} asks about {target}"
            );
            assert_eq!(
                keys_in(lab, &answer.text),
                sorted(&expected),
                "{target}: keys"
            );
        }
    }
    // Whom nobody here knows, as what is below a disabled edge device: an answer, and empty.
    for target in ["nobody", "edge2/nothing", "leaf-off", "leaf10"] {
        let call = identity_call("edge2", target, "edge2");
        let answer = with_token(lab, call, "edge2/$edgeHub")
            .send(lab, "edge1")
            .await;
        assert_eq!(answer.status, 200, "{target}: {}", answer.text);
        assert_eq!(told(&answer.json()), [""; 0], "{target}");
    }
}

/// Callers that may not call at all, each with both calls and questions that edge2 may ask.
fn wrong_callers(lab: &Lab) -> Vec<(String, u16, Request)> {
    let of = |id: &str| Token::of(lab, id);
    let hub = "edge2/$edgeHub";
    let tokens = [
        ("garbage", "SharedAccessSignature nonsense".to_owned()),
        ("empty", String::new()),
        ("another scheme", "Basic ZWRnZTI6c2VjcmV0".to_owned()),
        ("another module's token", of("edge2/modB").text()),
        ("another module's key", of("edge2/modB").naming(hub).text()),
        ("the device's token", of("edge2").text()),
        ("the device's key", of("edge2").naming(hub).text()),
        ("the sibling's token", of("edge20/$edgeHub").text()),
        (
            "the sibling's key",
            of("edge20/$edgeHub").naming(hub).text(),
        ),
        ("the child's token", of("edge3/$edgeHub").text()),
        ("the parent's token", of("edge1/$edgeHub").text()),
        (
            "named after one that begins alike",
            of(hub).naming("edge20/$edgeHub").text(),
        ),
        (
            "for another IoT Hub",
            of(hub).for_host("other.example").text(),
        ),
        ("expired", of(hub).expired().text()),
    ];
    let mut wrong = Vec::new();
    for call in [
        scope_call("edge2", "edge2"),
        identity_call("edge2", "leaf2", "edge2"),
    ] {
        wrong.push(("no token".to_owned(), 401, call.clone()));
        for (what, token) in &tokens {
            wrong.push((
                (*what).to_owned(),
                401,
                call.clone().with("Authorization", token),
            ));
        }
        let twice = with_token(lab, with_token(lab, call.clone(), hub), hub);
        wrong.push(("two tokens".to_owned(), 401, twice));
        // The path names who calls.
        for module in ["modB", "$edgeAgent", "edgeHub", "$edgehub"] {
            let path = call.path.replace("/$edgeHub/", &format!("/{module}/"));
            let other = Request {
                path,
                ..call.clone()
            };
            for owner in ["edge2/modB", hub] {
                let what = format!("{module} calls with the token of {owner}");
                wrong.push((what, 401, with_token(lab, other.clone(), owner)));
            }
        }
        for device in ["edge20", "edge1", "edge3", "edge10", "leaf2", "nobody"] {
            let path = call
                .path
                .replace("/devices/edge2/", &format!("/devices/{device}/"));
            let other = Request {
                path,
                ..call.clone()
            };
            let what = format!("edge2 calls in the name of {device}");
            wrong.push((what, 401, with_token(lab, other.clone(), hub)));
            if device == "edge20" || device == "edge3" {
                // With its own token; then the chain ends with somebody else.
                let owner = format!("{device}/$edgeHub");
                let what = format!("{device} calls with edge2's chain");
                wrong.push((what, 401, with_token(lab, other, &owner)));
            }
        }
        let path = call.path.replace("/devices/", "/twins/");
        let other = Request { path, ..call };
        wrong.push((
            "a path that is not there".to_owned(),
            404,
            with_token(lab, other, hub),
        ));
    }
    let of_off = [
        scope_call("edge-off", "edge-off"),
        identity_call("edge-off", "leaf-off", "edge-off"),
    ];
    for call in of_off {
        let call = with_token(lab, call, "edge-off/$edgeHub");
        wrong.push(("a disabled edge device calls".to_owned(), 401, call));
    }
    for call in [
        scope_call("edge10", "edge10"),
        identity_call("edge10", "leaf10", "edge10"),
    ] {
        let call = with_token(lab, call, "edge10/$edgeHub");
        wrong.push(("one that is beside us calls".to_owned(), 401, call));
    }
    wrong
}

/// Questions that edge2 may not ask, with its right token.
fn wrong_questions(lab: &Lab) -> Vec<(String, u16, Request)> {
    let mut wrong = Vec::new();
    // Chains that are refused whatever is asked: by their end, their start or their form.
    let chains = [
        ("ends with the sibling", "edge3;edge20", 401),
        ("ends with the sibling", "edge20", 401),
        ("ends with the parent", "edge2;edge1", 401),
        ("ends with a module", "edge2;edge2/$edgeHub", 401),
        ("begins with the sibling", "edge20;edge2", 401),
        ("begins with the sibling's leaf", "leaf20;edge2", 401),
        ("begins with the parent", "edge1;edge2", 401),
        ("begins with the parent's leaf", "leaf1;edge2", 401),
        ("begins beside us", "edge10;edge2", 401),
        ("begins with a disabled sibling", "edge-off;edge2", 401),
        ("begins with nobody", "nobody;edge2", 401),
        ("begins with a module", "edge2/modB;edge2", 400),
        ("is empty", "", 400),
        ("is nothing but separators", ";;", 400),
        ("has no ids", "ed+ge2;edge2", 400),
        ("has a hundred elements", &hundred(), 400),
    ];
    for (what, chain, status) in chains {
        let calls = [
            scope_call("edge2", chain),
            identity_call("edge2", "leaf2", chain),
            identity_call("edge2", "leaf20", chain),
        ];
        for call in calls {
            wrong.push((format!("the chain {what}: {chain:.40}"), status, call));
        }
    }
    for (originator, target) in [
        ("edge2", "leaf20"),
        ("edge2", "edge20"),
        ("edge2", "edge20/$edgeHub"),
        ("edge2", "edge20/modB"),
        ("edge2", "leaf1"),
        ("edge2", "edge1"),
        ("edge2", "edge1/modA"),
        ("edge2", "edge1/$edgeHub"),
        ("edge2", "edge-off"),
        // The originator is below the caller, and the target below the caller, but not below it.
        ("edge3;edge2", "leaf2"),
        ("edge3;edge2", "edge2"),
        ("edge3;edge2", "edge2/modB"),
        ("edge3;edge2", "leaf20"),
        ("leaf2;edge2", "leaf3"),
    ] {
        let call = identity_call("edge2", target, originator);
        wrong.push((format!("{originator} asks about {target}"), 401, call));
    }
    let bodies = [
        ("not JSON", "authChain=edge2"),
        ("an empty object", "{}"),
        ("a list", "[]"),
        ("nothing", ""),
        ("no chain", r#"{"targetDeviceId":"leaf2","pageSize":10}"#),
        (
            "a chain of another type",
            r#"{"targetDeviceId":"leaf2","authChain":["edge2"]}"#,
        ),
    ];
    for (what, body) in bodies {
        for call in [
            scope_call("edge2", "edge2"),
            identity_call("edge2", "leaf2", "edge2"),
        ] {
            let call = Request {
                body: body.as_bytes().to_vec(),
                ..call
            };
            wrong.push((format!("the body is {what}"), 400, call));
        }
    }
    let senseless = ["le+af2", "leaf2/mo+dB", ""];
    for target in senseless {
        let call = identity_call("edge2", target, "edge2");
        wrong.push((format!("asks about '{target}'"), 400, call));
    }
    let hub = "edge2/$edgeHub";
    wrong
        .into_iter()
        .map(|(what, status, call)| (what, status, with_token(lab, call, hub)))
        .collect()
}

/// Ids of the devices and modules that an answer is about, sorted.
fn told(answer: &Value) -> Vec<String> {
    let list = |name: &str| answer[name].as_array().expect("a list").clone();
    let text = |value: &Value| value.as_str().expect("an id").to_owned();
    let mut ids: Vec<String> = list("devices")
        .iter()
        .map(|device| text(&device["deviceId"]))
        .collect();
    ids.extend(list("modules").iter().map(|module| {
        format!(
            "{}/{}",
            text(&module["deviceId"]),
            text(&module["moduleId"])
        )
    }));
    ids.sort();
    ids
}

/// Whose keys, primary or secondary, are in a text, sorted.
fn keys_in(lab: &Lab, text: &str) -> Vec<String> {
    let mut owners = Vec::new();
    let mut look = |id: String| {
        let seed = lab.seed();
        let keys = [seed.primary_key(&id), seed.secondary_key(&id)];
        if keys
            .into_iter()
            .any(|key| text.contains(key.expect("everybody has keys")))
        {
            owners.push(id);
        }
    };
    for device in &lab.seed().devices {
        look(device.device_id.clone());
        for module in &device.modules {
            look(format!("{}/{}", device.device_id, module.module_id));
        }
    }
    owners.sort();
    owners
}

fn sorted(ids: &[&str]) -> Vec<String> {
    let mut ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
    ids.sort();
    ids
}

fn assert_nothing_secret_is_logged(lab: &Lab) {
    for host in [HUB, "edge1", "edge2"] {
        let log = lab.log(host).expect("a log");
        assert_eq!(keys_in(lab, &log), [""; 0], "keys in the log of {host}");
        assert!(
            !log.contains("SharedAccessSignature sr="),
            "a token in the log of {host}"
        );
    }
    // The log does say who was refused and why.
    let log = lab.log("edge1").expect("a log");
    assert!(log.contains("Refused"), "refusals are logged");
}

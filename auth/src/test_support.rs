//! Records, keys and tokens for the tests of this crate.
//!
//! The scope of most tests, seen by the hub on `edge1`:
//! ```text
//! edge1            (edge1/$edgeHub, edge1/modA)
//! ├─ leaf0
//! ├─ edge2         (edge2/$edgeHub, edge2/modA)
//! │  ├─ leaf1      (leaf1/modB)
//! │  └─ edge3      (edge3/$edgeHub)
//! │     └─ leaf2
//! └─ edge10        (edge10/$edgeHub)
//!    └─ leaf10
//! ```
//! `edge10` is a sibling of `edge2`, and its name has that of our own device as a prefix.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use edgehub_proto::identity::Identity;

use crate::sas_signer;
use crate::scope_tree::{Authentication, KeyMaterial, ScopeTree, ServiceIdentity, Status};

pub(crate) const HUB_HOST: &str = "contoso.azure-devices.net";
pub(crate) const OWN_HOST: &str = "gateway.local";
/// 2026-08-21, in seconds.
pub(crate) const NOW_S: u64 = 1_787_300_000;
pub(crate) const NOW_MS: u64 = NOW_S * 1000;

pub(crate) fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

pub(crate) fn scope_of(device: &str) -> String {
    format!("ms-azure-iot-edge://{device}-637500000000000001")
}

pub(crate) fn primary_key(identity: &str) -> String {
    STANDARD.encode(format!("primary key of {identity}"))
}

pub(crate) fn secondary_key(identity: &str) -> String {
    STANDARD.encode(format!("secondary key of {identity}"))
}

pub(crate) fn symmetric(primary: &str, secondary: &str) -> Authentication {
    Authentication::SymmetricKey {
        primary: KeyMaterial::new(primary),
        secondary: KeyMaterial::new(secondary),
    }
}

fn record(identity: &str) -> ServiceIdentity {
    ServiceIdentity {
        identity: id(identity),
        generation_id: "637500000000000001".to_owned(),
        status: Status::Enabled,
        is_edge: false,
        device_scope: None,
        parent_scopes: Vec::new(),
        authentication: symmetric(&primary_key(identity), &secondary_key(identity)),
    }
}

pub(crate) fn module(identity: &str) -> ServiceIdentity {
    assert!(id(identity).is_module());
    record(identity)
}

pub(crate) fn leaf(device: &str, parent: &str) -> ServiceIdentity {
    ServiceIdentity {
        device_scope: Some(scope_of(parent)),
        parent_scopes: vec![scope_of(parent)],
        ..record(device)
    }
}

pub(crate) fn edge(device: &str, parent: Option<&str>) -> ServiceIdentity {
    ServiceIdentity {
        is_edge: true,
        device_scope: Some(scope_of(device)),
        parent_scopes: parent.map(scope_of).into_iter().collect(),
        ..record(device)
    }
}

pub(crate) fn disabled(record: ServiceIdentity) -> ServiceIdentity {
    ServiceIdentity {
        status: Status::Disabled,
        ..record
    }
}

/// See the module's documentation.
pub(crate) fn sample_scope() -> Vec<ServiceIdentity> {
    vec![
        edge("edge1", None),
        module("edge1/$edgeHub"),
        module("edge1/modA"),
        leaf("leaf0", "edge1"),
        edge("edge2", Some("edge1")),
        module("edge2/$edgeHub"),
        module("edge2/modA"),
        leaf("leaf1", "edge2"),
        module("leaf1/modB"),
        edge("edge3", Some("edge2")),
        module("edge3/$edgeHub"),
        leaf("leaf2", "edge3"),
        edge("edge10", Some("edge1")),
        module("edge10/$edgeHub"),
        leaf("leaf10", "edge10"),
    ]
}

pub(crate) fn tree_of(records: Vec<ServiceIdentity>) -> ScopeTree {
    let applied = ScopeTree::new(&id("edge1")).with(records);
    assert!(applied.rejected.is_empty(), "{:?}", applied.rejected);
    applied.tree
}

pub(crate) fn sample_tree() -> ScopeTree {
    tree_of(sample_scope())
}

pub(crate) fn chain_text(tree: &ScopeTree, identity: &str) -> Option<String> {
    tree.auth_chain(&id(identity))
        .map(|chain| chain.to_string())
}

/// Percent-encodes everything but letters, digits, `-`, `_` and `.`.
pub(crate) fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// The audience of `identity` at `host`, decoded.
pub(crate) fn audience(host: &str, identity: &str) -> String {
    match identity.split_once('/') {
        None => format!("{host}/devices/{identity}"),
        Some((device, module)) => format!("{host}/devices/{device}/modules/{module}"),
    }
}

/// A token with exactly this `sr` and `se`, signed with `key`.
pub(crate) fn raw_token(sr: &str, se: &str, key: &str) -> String {
    let signature = sas_signer::sign(key, &format!("{sr}\n{se}")).unwrap();
    format!(
        "SharedAccessSignature sr={sr}&sig={}&se={se}",
        encode(&signature)
    )
}

/// What an SDK makes: the audience of `identity` at the hub, encoded once, valid for an hour.
pub(crate) fn token_for(identity: &str, key: &str) -> String {
    raw_token(
        &encode(&audience(HUB_HOST, identity)),
        &(NOW_S + 3600).to_string(),
        key,
    )
}

/// A good token of `identity`, made with its own primary key.
pub(crate) fn token_of(identity: &str) -> String {
    token_for(identity, &primary_key(identity))
}

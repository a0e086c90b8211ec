//! What the end-to-end tests share: clients that say exactly what a test wants said, and runners
//! of programs that are not ours.
//!
//! Everything here stands outside of the hub: its own MQTT codec ([`mqtt`]), its own HTTP
//! ([`https`]) and WebSocket ([`websocket`]), tokens made by the lab ([`token`]), Debian's and
//! Microsoft's clients as child processes ([`program`], [`python`], [`agent`]), the operator
//! ([`service`], or with an SDK [`service_sdk`]). A helper that cannot do its part panics with the
//! reason: its caller is a test.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "these are parts of tests: a failure is a panic that says why"
)]

pub mod agent;
pub mod amqp;
pub mod amqp_sender;
pub mod bystander;
pub mod crash;
pub mod https;
pub mod matrix;
pub mod mqtt;
pub mod packets;
pub mod program;
pub mod proton;
pub mod python;
pub mod registry;
pub mod service;
pub mod service_sdk;
pub mod tls;
pub mod token;
pub mod websocket;

use std::path::{Path, PathBuf};
use std::time::Duration;

use edgehub_lab::{Acknowledged, Lab};

/// How long anything may take that happens at once when all is well: two busy cores, debug builds.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The checkout.
#[must_use]
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .expect("tests/e2e is two levels below the checkout")
        .to_owned()
}

/// Waits until exactly these messages of `id` (their bodies, in order) are at the IoT Hub, and
/// nothing else of it.
///
/// Messages that must *not* arrive are excluded by what follows them: one sender's messages
/// arrive in order, so give the body of a message that it sent later as the last one.
pub async fn only_these_arrive<B: AsRef<[u8]>>(lab: &Lab, id: &str, bodies: &[B]) {
    let log: Vec<Acknowledged> = (1..)
        .zip(bodies)
        .map(|(number, body)| Acknowledged::new(number, body.as_ref()))
        .collect();
    let last = log.last().expect("a message to wait for").sha256.clone();
    let ledger = lab.ledger();
    let there = ledger.wait_until(PATIENCE, |arrivals| {
        arrivals
            .iter()
            .any(|arrival| arrival.is_from(id) && arrival.sha256 == last)
    });
    there
        .await
        .unwrap_or_else(|error| panic!("the last message of {id}: {error:#}"));
    let entries = ledger.entries_of(id).expect("the ledger is readable");
    let arrived: Vec<_> = entries
        .iter()
        .map(|entry| String::from_utf8_lossy(&entry.body().expect("a body")).into_owned())
        .collect();
    let wanted: Vec<_> = bodies
        .iter()
        .map(|body| String::from_utf8_lossy(body.as_ref()).into_owned())
        .collect();
    assert_eq!(arrived, wanted, "what arrived from {id}");
}

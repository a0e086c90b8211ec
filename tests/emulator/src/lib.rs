//! An IoT Hub in one process, for tests: device side over MQTT and AMQP with telemetry, twins,
//! direct methods and cloud-to-device messages, service side over HTTPS and AMQP with registry,
//! queries, scope calls, methods, messages and feedback, and a ledger of everything that devices
//! sent, which Event Hubs clients read (spec/upstream.md Part B).
//!
//! Its semantics share no code with our hub, because a shared mistake would be invisible. Of ours
//! it has the engine of AMQP and the framing of WebSockets, which know nothing of IoT Hub; its MQTT
//! codec is another one, and other AMQP clients judge the engine. It is strict on request:
//! whatever is not documented for IoT Hub is refused, with a log line that says why.
//!
//! Not here yet: X.509, jobs and automatic configurations.
//!
//! Read first: [`Emulator`], then the list of the control API in `control/mod.rs`.

#![allow(
    clippy::disallowed_methods,
    reason = "this process is not the hub: it has a clock of its own, `clock::HubClock`"
)]

mod amqp;
mod api_version;
mod authorize;
mod c2d;
mod clock;
mod connections;
mod control;
mod counters;
mod emulator;
mod faults;
mod https;
mod hub;
mod identity;
mod ids;
mod journal;
mod ledger;
mod limits;
mod listener;
mod methods;
mod mqtt;
mod port;
mod query;
mod registry;
mod sas;
mod sessions;
mod tls;
mod twin;

pub use emulator::{Emulator, Options};

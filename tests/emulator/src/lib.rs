//! An IoT Hub in one process, for tests: MQTT device side, identity registry, scope calls, and a
//! ledger of everything that devices sent (spec/upstream.md Part B, the part that the walking
//! skeleton needs).
//!
//! Its semantics share no code with our hub, because a shared mistake would be invisible: this
//! crate depends on none of ours, and its MQTT codec is another one. It is strict on request:
//! whatever is not documented for IoT Hub is refused, with a log line that says why.
//!
//! Not here yet: twins, methods, C2D, AMQP, WebSockets, X.509, the service side.
//!
//! Read first: [`Emulator`], then the list of the control API in `control/mod.rs`.

#![allow(
    clippy::disallowed_methods,
    reason = "this process is not the hub: it has a clock of its own, `clock::HubClock`"
)]

mod api_version;
mod authorize;
mod clock;
mod connections;
mod control;
mod emulator;
mod faults;
mod https;
mod hub;
mod identity;
mod ledger;
mod limits;
mod listener;
mod mqtt;
mod port;
mod registry;
mod sas;
mod tls;

pub use emulator::{Emulator, Options};

//! The emulator from outside: real TLS sockets on loopback, a raw MQTT client, raw HTTP.
//!
//! Each rule of strict mode has a test that trips it, next to a check that the same client without
//! the fault is admitted, so that nothing else can be the reason.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "helpers of tests: a failure here is a failed test"
)]

mod c2d;
mod c2d_redelivery;
mod clients;
mod common;
mod configuration;
mod control;
mod ledger;
mod methods;
mod process;
mod registry;
mod restart;
mod scope;
mod sessions;
mod strict_chain;
mod strict_connect;
mod strict_iothub;
mod strict_publish;
mod twin_device;
mod twin_rest;
mod websocket;

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

mod amqp_cbs;
mod amqp_device;
mod amqp_restart;
mod amqp_service;
mod amqp_telemetry;
mod bulk;
mod c2d;
mod c2d_redelivery;
mod clients;
mod common;
mod configuration;
mod control;
mod faults;
mod ledger;
mod methods;
mod process;
mod query;
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

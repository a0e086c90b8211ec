//! What serves children: protocol heads, routing, sessions, configuration, metrics and logs.
//!
//! A head ([`mqtt`], [`http`]) turns frames into calls on [`hub::Hub`] and nothing else. The hub
//! knows who is connected and what a message is worth: [`routing`] says which queues it goes to,
//! `edgehub-storage` makes it last. This crate speaks to nobody upstream; that is the bridge's
//! part, and only the binary knows both.
//!
//! Read first [`hub`] (what all heads share), then [`mqtt::machine`] (a protocol without I/O) and
//! [`mqtt::connection`] (the same on a byte stream).
//!
//! # Features
//! `faults` opens a Unix socket through which tests make commits slow, stuck or failing and move
//! the clock. A release build with it does not compile.

#[cfg(all(feature = "faults", not(debug_assertions)))]
compile_error!("the feature `faults` is for tests: a release build must not have it");

mod admission;
pub mod amqp;
pub mod c2d;
pub mod config;
pub mod delivery;
pub mod edge_hub;
#[cfg(feature = "faults")]
pub mod faults;
pub mod http;
pub mod hub;
pub mod methods;
pub mod mqtt;
pub mod readiness;
pub mod routing;
pub mod session;
pub mod telemetry;
pub mod twin;

#[cfg(test)]
mod test_support;

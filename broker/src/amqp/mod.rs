//! The AMQP head: 5671, and WebSockets on 443 (spec/amqp.md).
//!
//! One task serves one connection, whatever number of identities it carries. The engine
//! (`edgehub_amqp`) knows frames; `head` knows what links are for, without a socket; `connection`
//! moves bytes, and runs what takes time.

mod cbs;
mod client;
mod condition;
pub mod connection;
mod head;
pub mod limits;
mod links;
pub mod listener;
mod message;
mod telemetry;
mod tokens;
mod transport;
mod twin;

#[cfg(test)]
mod identity_tests;
#[cfg(test)]
mod services_tests;
#[cfg(test)]
mod test_head;

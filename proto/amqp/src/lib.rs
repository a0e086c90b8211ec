//! AMQP 1.0 without sockets: what arrives is bytes, what leaves is bytes.
//!
//! [`connection::Connection`] is the server's side of a connection as a state machine; beneath it
//! are the layouts: protocol header ([`header`]), frame header ([`frame`]), performatives
//! ([`performative`]), SASL ([`sasl`]). Beside it stand the parts of a message ([`message`]),
//! the type system ([`value`]) and requests to a node that keeps tokens ([`cbs`]). There is no I/O
//! and no clock here, and no function trusts a length before it was checked. Nothing here knows
//! what links are good for.
//!
//! Source: OASIS AMQP 1.0; spec/amqp.md.

#![deny(missing_docs)]

pub mod cbs;
pub mod connection;
pub mod frame;
pub mod fuzz;
pub mod header;
pub mod limits;
pub mod message;
pub mod performative;
pub mod sasl;
pub mod value;

#[cfg(test)]
mod vectors;

//! AMQP 1.0: the device side (spec/upstream.md B5), the service side (B8) and the reader of the
//! Event-Hubs-compatible end point (B8.2).
//!
//! The protocol engine is the workspace's own crate; what links are good for is decided here. A
//! connection works in turns: read what is there, handle all of it, write the telemetry of each
//! identity to the ledger, then settle. So an accepted disposition follows storage, and the cost
//! of a turn is shared by its messages.
//!
//! One connection serves many identities. Each is a *presence*: it has its own fence, session and
//! outbox, so it is replaced, disabled or expires without the others.

mod address;
mod attach;
mod client;
mod device;
mod error;
mod events;
mod message;
mod presence;
mod selector;
mod server;
mod service;
mod telemetry;
mod tokens;

pub(crate) use server::{serve, serve_over};

//! What goes up and comes down: the client side towards IoT Hub or the parent's hub.
//!
//! Start with [`Bridge::start`]. Inside, [`lanes`] decides (pure), [`transport`] is the seam to the
//! upstream protocols, which are [`amqp`] and [`mqtt`], the pump carries out, and [`scope`] keeps our
//! copy of the hierarchy. Nothing here serves children: broker and bridge do not see each other. What
//! they say to each other is [`edgehub_proto::hub`]: the broker asks through [`Bridge::upstream`],
//! and what arrives goes to the `Downstream` that the bridge was started with.
//!
//! # Promises
//!
//! - A message leaves the store only when the upstream has acknowledged it, its time to live is
//!   over, or a named rule with positive evidence gave it up; each is counted.
//! - Order is kept per sender and priority, also when messages are sent again.
//! - One sender's trouble delays no other. Memory is bounded whatever the backlog ([`limits`]).
//! - An identity with needs is connected and subscribed again by itself after every fault, and is
//!   announced each time, so that what was missed can be fetched.
//! - A cloud-to-device message is acknowledged upstream only when it is settled below.
//! - Nothing here ends the process: every failure of the upstream is waited out.

#![deny(missing_docs)]

pub mod amqp;
mod bridge;
mod bucket;
pub mod client_infos;
mod connectivity;
mod counters;
mod dial;
#[cfg(test)]
mod fake_parent;
mod judge;
pub mod lanes;
pub mod limits;
pub mod mqtt;
pub mod proxy;
mod pump;
pub mod scope;
#[cfg(test)]
mod test_support;
pub mod transport;
mod upstream;

pub use bridge::{Bridge, BridgeConfig, BridgeDeps, BridgeError, Protocol};
pub use dial::{ByteIo, Carrier, DialError, Dialer};

//! The hub as a client of itself: its own twin as the source of configuration, what it reports, and
//! its own methods.
//!
//! [`desired`] reads the configuration, [`clients`] keeps the list of connected clients; both are
//! pure. [`EdgeHub`] is the task that applies the one and reports the other.
//!
//! # Where this behaviour comes from
//! spec/core.md 3.3 to 3.5 and 8.4, design.md D2 and D13. Unlike the reference a wrong document
//! never ends the process: the configuration in force stays, and the twin says why.

pub mod clients;
pub mod desired;
pub mod methods;
#[cfg(test)]
mod refresh_tests;
mod service;

pub use clients::Presence;
pub use service::{ConfigSource, Configured, EdgeHub, EdgeHubParts};

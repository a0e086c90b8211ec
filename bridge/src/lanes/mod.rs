//! Lanes: one way per sender through which its stored messages go upstream.
//!
//! A lane has its own connection (or link), window, back-off and place in the queues, so a sender
//! that fails, is slow or was removed delays nobody else. This module decides; it knows no protocol,
//! no socket and no store. The pump (`crate::pump`) carries out what it decides through a
//! [`crate::transport::Transport`].
//!
//! A lane exists while its identity has something to send, needs to hear something, waits for the
//! answer to a request or has a session; it connects only for one of the first three. What does not fit into memory stays in the store: the lane is then *behind*
//! from an offset and is served by shared scans until it has caught up with the main reader.
//!
//! Start with [`Scheduler`] and [`CloseCause`]. Behaviour: upstream.md A6 and A14, design.md 6.

mod actions;
mod backoff;
mod cause;
mod config;
#[cfg(test)]
mod consistency;
mod intake;
mod lane;
mod message;
mod needs;
mod queue;
mod renewal;
mod requests;
mod row;
mod scheduler;
mod sending;
mod session;
mod sessions;
mod settling;
mod table;

pub use actions::{Action, LaneCounts, Link, Report, Verdict};
pub use backoff::Backoff;
pub use cause::CloseCause;
pub use config::LaneConfig;
pub use message::{Discarded, Disposition, DropReason, Entry, Outcome, Outgoing, Settled};
pub use queue::ReadFilter;
pub use requests::{RequestFault, RequestId};
pub use scheduler::{Now, QueueStart, Scheduler};
pub use session::SessionId;

#[cfg(test)]
mod crowd_tests;
#[cfg(test)]
mod model_checks;
#[cfg(test)]
mod model_needs;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod needs_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod request_tests;
#[cfg(test)]
mod scenario_tests;

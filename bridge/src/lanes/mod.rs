//! Lanes: one way per sender through which its stored messages go upstream.
//!
//! A lane has its own connection (or link), window, back-off and place in the queues, so a sender
//! that fails, is slow or was removed delays nobody else. This module decides; it knows no protocol,
//! no socket and no store. The pump (`crate::pump`) carries out what it decides through a
//! [`crate::transport::Transport`].
//!
//! A lane exists while its sender has something to send or a session; it connects only when it has
//! something to send. What does not fit into memory stays in the store: the lane is then *behind*
//! from an offset and is served by shared scans until it has caught up with the main reader.
//!
//! Start with [`Scheduler`] and [`CloseCause`]. Behaviour: upstream.md A6 and A14, design.md 6.

mod backoff;
mod cause;
mod config;
mod intake;
mod lane;
mod message;
mod queue;
mod renewal;
mod scheduler;
mod sending;
mod session;
mod sessions;
mod table;

pub use backoff::Backoff;
pub use cause::CloseCause;
pub use config::LaneConfig;
pub use message::{Discarded, Disposition, DropReason, Entry, Outcome, Outgoing, Settled};
pub use queue::ReadFilter;
pub use scheduler::{Action, LaneCounts, Link, Now, QueueStart, Report, Scheduler, Verdict};
pub use session::SessionId;

#[cfg(test)]
mod crowd_tests;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod scenario_tests;

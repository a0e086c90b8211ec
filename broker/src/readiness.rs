//! Whether this hub serves children yet, and if not, why.
//!
//! The process keeps the one sender of a `tokio::sync::watch` channel; `/readyz` and whoever
//! else is interested holds a receiver. The hub never exits because something is not there yet
//! (design.md I9, D13): it says here what it waits for.

use std::fmt;

/// The state of the hub as an operator asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// The heads are not open; the text says what is missing, for a person.
    Starting(String),
    /// Children can connect.
    Ready,
}

impl Readiness {
    /// Not ready, because of `reason`.
    #[must_use]
    pub fn starting(reason: impl Into<String>) -> Self {
        Self::Starting(reason.into())
    }

    /// Whether children can connect.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting(reason) => f.write_str(reason),
            Self::Ready => f.write_str("ready"),
        }
    }
}

//! Twins of everybody below this hub, and the hub's own.
//!
//! A twin lives upstream. Here a copy is kept, so that clients get it while the upstream is away,
//! and everything that they report meanwhile, until the upstream has it. [`TwinService`] is what
//! heads and the bridge talk to; it knows identities, not connections.
//!
//! Read first `sync` (all decisions about one identity) and `patch` (the algebra under them);
//! then `worker` (the same with a store and an upstream) and `service` (all identities).
//!
//! # Invariants
//! - A report is answered once it is in the store, online as offline, and stays there until the
//!   upstream confirmed it or refused it for good.
//! - Per identity everything happens in the order in which it was asked for: whoever calls the
//!   service has its place in the order when the call returns, before any await.
//! - Between two events no twin is in memory; what waits is bounded ([`limits`]).
//!
//! Where this comes from: spec/core.md 5 and 10 item 16, spec/mqtt.md 5.1 to 5.3.

mod document;
mod drafts;
mod inbox;
mod json;
pub mod limits;
mod metrics;
mod notification;
mod outcome;
mod pace;
mod patch;
mod service;
mod sync;
mod validate;
mod worker;

#[cfg(test)]
mod test_support;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::clock::Clock;
use edgehub_proto::hub::{BoxFuture, Upstream};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;
use edgehub_storage::{Store, StoreError};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::hub::Outlet;

pub use service::TwinService;
pub use validate::InvalidPatch;

/// What the twins are made of.
#[derive(Debug)]
pub struct TwinParts {
    /// Where twins live.
    pub upstream: Arc<dyn Upstream>,
    /// The way to connected clients.
    pub outlet: Arc<dyn Outlet>,
    /// Who routes the messages that tell of changes.
    pub changes: Arc<dyn TwinChanges>,
    /// Where copies last.
    pub store: Store,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// `{device}/$edgeHub`.
    pub own_identity: Identity,
    /// What an operator can set.
    pub config: TwinConfig,
    /// Where spawned work is counted.
    pub tasks: TaskTracker,
    /// Ends it.
    pub stop: CancellationToken,
}

/// What an operator can set.
#[derive(Clone, Copy, Debug)]
pub struct TwinConfig {
    /// `EncryptTwinStore`, true.
    pub sealed: bool,
    /// `MinTwinSyncPeriodSecs`, 120 s: between two fetches of one twin that no client asked for
    /// and no gap made necessary.
    pub sync_period: Duration,
    /// `ReportedPropertiesSyncFrequencySecs`, 5 s: between two patches of one twin to the
    /// upstream. The first goes at once.
    pub report_period: Duration,
}

impl Default for TwinConfig {
    fn default() -> Self {
        Self {
            sealed: true,
            sync_period: Duration::from_secs(120),
            report_period: Duration::from_secs(5),
        }
    }
}

/// Takes the messages that tell of reported properties (spec/core.md 1.3), for routing.
pub trait TwinChanges: Send + Sync + fmt::Debug {
    /// `reporter` reported something. `message` is complete; its source path is
    /// [`SourcePath::twin_change`](crate::routing::SourcePath::twin_change), and its sender is
    /// this hub's own identity: it goes upstream as `$edgeHub`.
    ///
    /// The report is answered when the future is done, so that a client that reports faster than
    /// the store takes is slowed down. Called in the order of the reports of each reporter. A
    /// message that cannot be stored is the implementer's to drop and count: the report counts.
    fn changed(&self, reporter: &Identity, message: Message) -> BoxFuture<()>;
}

/// The answer to a client that asks for its twin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinReply {
    /// 200, or an error.
    pub status: u16,
    /// The twin, or a JSON error.
    pub body: Bytes,
}

/// The desired properties of the hub's own twin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredDocument {
    /// Their version.
    pub version: u64,
    /// All of them as a JSON object, `$version` included.
    pub json: Bytes,
}

/// Why a report was not taken. [`TwinService::refusal`] has the answer for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TwinError {
    /// It breaks the rules for reported properties.
    #[error(transparent)]
    Invalid(#[from] InvalidPatch),
    /// The identity left the scope.
    #[error("The identity is not in this hub's scope")]
    Gone,
    /// Too many requests of this client, or of all clients, wait.
    #[error("Too many twin requests wait")]
    Busy,
    /// More changes wait for the upstream than are kept.
    #[error("Too many deleted properties wait until the upstream can be reached")]
    TooMuchUnsynced,
    /// The store did not take it, or the twin cannot be read.
    #[error("The twin cannot be stored")]
    NotStored,
    /// The hub is ending.
    #[error("The hub is stopping")]
    Stopping,
}

impl TwinError {
    /// The HTTP-like status for the client.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::Invalid(_) => 400,
            Self::Gone => 404,
            Self::Busy | Self::TooMuchUnsynced => 429,
            Self::NotStored => 500,
            Self::Stopping => 503,
        }
    }
}

impl From<StoreError> for TwinError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Closed => Self::Stopping,
            _ => Self::NotStored,
        }
    }
}

#[cfg(test)]
mod fakes;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod service_desired_tests;
#[cfg(test)]
mod service_tests;
#[cfg(test)]
mod sync_desired_tests;
#[cfg(test)]
mod sync_rig;
#[cfg(test)]
mod sync_tests;

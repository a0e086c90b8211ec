//! What is handed to the writer, and how it reports back.
//!
//! The batch is the unit (design.md section 4): a connection hands over all messages of a turn
//! at once and is woken once for each commit that took some of them, however many there were.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use smallvec::SmallVec;
use tokio::sync::Notify;

use crate::limits::APPEND_OVERHEAD_BYTES;
use crate::queue::{Queue, QueueState};

/// Messages of one connection that are committed together, all or none.
#[derive(Debug)]
pub struct AppendBatch {
    /// The messages, in order.
    pub appends: Vec<Append>,
    /// Who hears of the commit.
    pub ticket: CommitTicket,
}

impl AppendBatch {
    /// What the batch costs of the intake.
    pub(crate) fn cost(&self) -> usize {
        self.message_bytes()
            .saturating_add(self.appends.len() * APPEND_OVERHEAD_BYTES)
    }

    pub(crate) fn message_bytes(&self) -> usize {
        self.appends.iter().map(|append| append.message.len()).sum()
    }
}

/// One message and the queues that get it.
#[derive(Clone, Debug)]
pub struct Append {
    /// Who sent it.
    pub sender: Identity,
    /// `edgehub_proto::stored::encode_message`.
    pub message: Bytes,
    /// When it was accepted, Unix ms.
    pub enqueued_ms: u64,
    /// The queues; none is allowed: the ticket then completes without storing anything.
    pub targets: SmallVec<[Target; 2]>,
}

/// One queue that gets a message.
#[derive(Clone, Debug)]
pub struct Target {
    /// The queue.
    pub queue: Queue,
    /// When the message is worth nothing any more there, Unix ms; `None` = never.
    pub expires_at_ms: Option<u64>,
}

/// A batch that was handed over. It holds no handle of the store: otherwise the last one might
/// be dropped by the writer itself, which cannot wait for its own end.
#[derive(Debug)]
pub(crate) struct TakenBatch {
    pub(crate) appends: Vec<TakenAppend>,
    pub(crate) ticket: CommitTicket,
}

/// One message of a [`TakenBatch`].
#[derive(Debug)]
pub(crate) struct TakenAppend {
    pub(crate) sender: Identity,
    pub(crate) message: Bytes,
    pub(crate) enqueued_ms: u64,
    /// Queue, and when the message expires there, Unix ms.
    pub(crate) targets: SmallVec<[(Arc<QueueState>, Option<u64>); 2]>,
}

impl From<AppendBatch> for TakenBatch {
    fn from(batch: AppendBatch) -> Self {
        let appends = batch.appends.into_iter().map(|append| TakenAppend {
            sender: append.sender,
            message: append.message,
            enqueued_ms: append.enqueued_ms,
            targets: append
                .targets
                .into_iter()
                .map(|target| (target.queue.state, target.expires_at_ms))
                .collect(),
        });
        Self {
            appends: appends.collect(),
            ticket: batch.ticket,
        }
    }
}

/// A position in one connection's sequence of messages.
#[derive(Clone, Debug)]
pub struct CommitTicket {
    /// The connection's progress.
    pub progress: Arc<CommitProgress>,
    /// Number of the batch's last message; the connection's first message is 1.
    pub sequence: u64,
}

/// How far the messages of one connection are committed.
///
/// One connection owns it and waits on it; the writer thread moves it. Once failed it stays
/// failed and nothing later of this connection is stored: a connection whose earlier message
/// was lost must never hear of a later sequence, because that acknowledges the lost one too.
#[derive(Debug, Default)]
pub struct CommitProgress {
    committed: AtomicU64,
    failed: AtomicBool,
    /// Number of the commit that woke the connection last; only the writer uses it.
    woken_by: AtomicU64,
    notify: Notify,
}

impl CommitProgress {
    /// Nothing is committed yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Every message up to this sequence is committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether a commit failed: messages above [`Self::committed`] are not stored and never
    /// will be. The connection has to be closed, so that its client sends them again.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Waits for the next change. A change since the last return is not missed; two changes may
    /// be reported as one. For one waiter.
    ///
    /// # Cancel safety
    /// Safe: a change that is not reported to this call is reported to the next.
    pub async fn changed(&self) {
        self.notify.notified().await;
    }

    pub(crate) fn advance(&self, sequence: u64) {
        self.committed.fetch_max(sequence, Ordering::AcqRel);
    }

    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }

    /// Wakes the connection unless this commit has done so already.
    pub(crate) fn wake_once(&self, commit: u64) {
        if self.woken_by.swap(commit, Ordering::Relaxed) != commit {
            self.notify.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_before_the_wait_is_not_missed() {
        let progress = CommitProgress::new();
        progress.advance(3);
        progress.advance(2);
        progress.wake_once(1);
        progress.changed().await;
        assert_eq!(progress.committed(), 3);
        assert!(!progress.failed());
    }

    #[tokio::test]
    async fn one_commit_wakes_once() {
        let progress = CommitProgress::new();
        progress.wake_once(1);
        progress.changed().await;
        progress.wake_once(1);
        let again = tokio::time::timeout(std::time::Duration::ZERO, progress.changed()).await;
        assert!(again.is_err(), "the same commit woke twice");
        progress.wake_once(2);
        progress.changed().await;
    }
}

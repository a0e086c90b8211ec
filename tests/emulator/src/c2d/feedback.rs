//! Feedback: what became of messages whose senders asked for it (spec/upstream.md B8).
//!
//! Records wait for a receiver of the service side. It gets them in batches, each under a lock
//! token; what it does not complete within the lock's time goes out again. Records are in the
//! journal from the step that makes them to their completion.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::queue::{LockToken, Outcome, Settled};
use crate::journal::{Change, Journal, JournalError};
use crate::limits::{C2D_LOCK_MS, FEEDBACK_BATCH_MAX, FEEDBACK_MAX};

const PREFIX: &str = "feedback/";

/// What became of one message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FeedbackRecord {
    pub(crate) device: String,
    pub(crate) message_id: String,
    pub(crate) outcome: Outcome,
    pub(crate) settled_ms: u64,
}

impl FeedbackRecord {
    pub(super) fn new(device: &str, settled: Settled) -> Self {
        Self {
            device: device.to_owned(),
            message_id: settled.message_id,
            outcome: settled.outcome,
            settled_ms: settled.settled_ms,
        }
    }

    /// `statusCode` and `description` of the record.
    pub(crate) fn status(&self) -> (&'static str, &'static str) {
        match self.outcome {
            Outcome::Completed => ("Success", "Success"),
            Outcome::DeadLettered => ("DeliveryCountExceeded", "The delivery count is exceeded"),
            Outcome::Expired => ("Expired", "The message expired"),
            Outcome::Purged => ("Purged", "The message was purged"),
            Outcome::Rejected => ("Rejected", "The device rejected the message"),
        }
    }
}

#[derive(Debug)]
struct Waiting {
    record: FeedbackRecord,
    lock: Option<(LockToken, u64)>,
}

#[derive(Debug, Default)]
struct Records {
    waiting: BTreeMap<u64, Waiting>,
    last: u64,
}

/// Records for the service side, under the next receiver that asks.
pub(crate) struct Feedback {
    records: Mutex<Records>,
    journal: Arc<Journal>,
    /// Changes when there may be something to deliver.
    changed: watch::Sender<u64>,
}

impl Feedback {
    pub(super) fn open(journal: Arc<Journal>) -> Result<Self, JournalError> {
        let mut records = Records::default();
        for (key, record) in journal.load(PREFIX)? {
            let Ok(sequence) = key.parse() else { continue };
            records.last = records.last.max(sequence);
            records
                .waiting
                .insert(sequence, Waiting { record, lock: None });
        }
        Ok(Self {
            records: Mutex::new(records),
            journal,
            changed: watch::Sender::new(0),
        })
    }

    /// Enters records, with one write together with `changes`. Of too many the oldest are dropped.
    pub(super) fn write(
        &self,
        mut changes: Vec<Change>,
        records: Vec<FeedbackRecord>,
    ) -> Result<(), JournalError> {
        if records.is_empty() {
            return self.journal.write(&changes);
        }
        let mut table = self.records.lock();
        let too_many = (table.waiting.len() + records.len()).saturating_sub(FEEDBACK_MAX);
        let dropped: Vec<u64> = table.waiting.keys().take(too_many).copied().collect();
        for sequence in &dropped {
            changes.push(Change::delete(key(*sequence))?);
        }
        for (at, record) in (table.last + 1..).zip(&records) {
            changes.push(Change::put(key(at), record)?);
        }
        self.journal.write(&changes)?;
        for sequence in dropped {
            table.waiting.remove(&sequence);
        }
        for record in records {
            table.last += 1;
            let sequence = table.last;
            table
                .waiting
                .insert(sequence, Waiting { record, lock: None });
        }
        drop(table);
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// The next batch, locked under `token`; none when nothing waits.
    pub(crate) fn take(&self, token: LockToken, now_ms: u64) -> Vec<FeedbackRecord> {
        let mut table = self.records.lock();
        let until_ms = now_ms.saturating_add(C2D_LOCK_MS);
        let free = table.waiting.values_mut().filter(|waiting| {
            let lock = waiting.lock;
            lock.is_none_or(|(_, until_ms)| until_ms <= now_ms)
        });
        let batch = free.take(FEEDBACK_BATCH_MAX).map(|waiting| {
            waiting.lock = Some((token, until_ms));
            waiting.record.clone()
        });
        batch.collect()
    }

    /// The receiver is done with a batch, or gives it back. False when its lock has run out.
    pub(crate) fn settle(
        &self,
        token: LockToken,
        is_done: bool,
        now_ms: u64,
    ) -> Result<bool, JournalError> {
        let mut table = self.records.lock();
        let locked = table.waiting.iter().filter(|(_, waiting)| {
            let lock = waiting.lock;
            lock.is_some_and(|(own, until_ms)| own == token && until_ms > now_ms)
        });
        let locked: Vec<u64> = locked.map(|(sequence, _)| *sequence).collect();
        if is_done {
            let changes: Result<Vec<_>, _> =
                locked.iter().map(|at| Change::delete(key(*at))).collect();
            self.journal.write(&changes?)?;
        }
        for sequence in &locked {
            if is_done {
                table.waiting.remove(sequence);
            } else if let Some(waiting) = table.waiting.get_mut(sequence) {
                waiting.lock = None;
            }
        }
        drop(table);
        self.changed.send_modify(|count| *count += 1);
        Ok(!locked.is_empty())
    }

    /// Ends locks that have run out, and tells so; returns when the next one does.
    pub(crate) fn tick(&self, now_ms: u64) -> Option<u64> {
        let mut table = self.records.lock();
        let (mut is_back, mut next_ms) = (false, None::<u64>);
        for waiting in table.waiting.values_mut() {
            match waiting.lock {
                Some((_, until_ms)) if until_ms <= now_ms => {
                    waiting.lock = None;
                    is_back = true;
                }
                Some((_, until_ms)) => {
                    next_ms = Some(next_ms.map_or(until_ms, |next_ms| next_ms.min(until_ms)));
                }
                None => {}
            }
        }
        drop(table);
        if is_back {
            self.changed.send_modify(|count| *count += 1);
        }
        next_ms
    }

    /// Changes when there may be something to deliver.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

fn key(sequence: u64) -> String {
    format!("{PREFIX}{sequence}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: usize) -> FeedbackRecord {
        FeedbackRecord {
            device: "leaf1".to_owned(),
            message_id: format!("m{id}"),
            outcome: Outcome::Completed,
            settled_ms: 7,
        }
    }

    fn write(feedback: &Feedback, count: usize) {
        feedback
            .write(Vec::new(), (0..count).map(record).collect())
            .unwrap();
    }

    #[test]
    fn batches_are_locked_completed_and_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let open = || Feedback::open(Arc::new(Journal::open(Some(&path)).unwrap())).unwrap();
        let feedback = open();
        write(&feedback, FEEDBACK_BATCH_MAX + 1);
        let (one, two) = ([1; 16], [2; 16]);
        assert_eq!(feedback.take(one, 0).len(), FEEDBACK_BATCH_MAX);
        assert_eq!(feedback.tick(0), Some(C2D_LOCK_MS));
        let last = feedback.take(two, 0);
        assert_eq!(last, [record(FEEDBACK_BATCH_MAX)]);
        assert_eq!(feedback.take([3; 16], 0), []);
        assert!(feedback.settle(one, true, 1).unwrap());
        assert!(!feedback.settle(one, true, 1).unwrap(), "settled once");
        assert!(feedback.settle(two, false, 1).unwrap());
        assert_eq!(feedback.take(one, 1), last, "given back");
        assert_eq!(feedback.tick(1 + C2D_LOCK_MS), None);
        assert_eq!(feedback.take(two, 1 + C2D_LOCK_MS), last, "lock lost");
        assert!(!feedback.settle(one, true, 1 + C2D_LOCK_MS).unwrap());
        assert_eq!(open().take(one, 0), last, "in the journal");
    }

    #[test]
    fn records_are_bounded() {
        let feedback = Feedback::open(Arc::new(Journal::open(None).unwrap())).unwrap();
        write(&feedback, FEEDBACK_MAX);
        write(&feedback, 2);
        assert_eq!(feedback.records.lock().waiting.len(), FEEDBACK_MAX);
        assert_eq!(feedback.take([1; 16], 0).first(), Some(&record(2)));
    }
}

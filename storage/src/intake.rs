//! What waits for the writer: one queue, bounded by bytes, with room of its own for what gives
//! space back.
//!
//! A waiting item costs permits until its commit is over, so the bound covers what the writer
//! has already taken.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{Semaphore, TryAcquireError, oneshot};

use crate::append::{AppendBatch, TakenBatch};
use crate::error::{StoreClosed, StoreError, TryAppendError};
use crate::layout::Cf;
use crate::limits::CONTROL_INTAKE;
use crate::queue::{QueueId, QueueState, Settled};

/// One thing for the writer to do.
#[derive(Debug)]
pub(crate) enum Item {
    Append(TakenBatch, u32),
    Settle(SettleItem, u32),
    Write(WriteItem, u32),
    /// A new queue; committed apart.
    Create(CreateItem),
    /// Answered once everything before it is committed.
    Flush(oneshot::Sender<Result<(), StoreError>>),
}

#[derive(Debug)]
pub(crate) struct SettleItem {
    pub(crate) queue: Arc<QueueState>,
    pub(crate) settled: Vec<Settled>,
    /// Hears how many of them were unsettled, after the commit.
    pub(crate) reply: Option<oneshot::Sender<u64>>,
}

#[derive(Debug)]
pub(crate) struct WriteItem {
    pub(crate) ops: Vec<RawOp>,
    pub(crate) reply: oneshot::Sender<Result<(), StoreError>>,
}

/// A change of a value as it is stored; `None` = delete.
#[derive(Debug)]
pub(crate) struct RawOp {
    pub(crate) cf: Cf,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Vec<u8>>,
}

#[derive(Debug)]
pub(crate) struct CreateItem {
    pub(crate) id: QueueId,
    pub(crate) reply: SyncSender<Result<Arc<QueueState>, StoreError>>,
}

/// What [`Intake::wait`] came back with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    Items,
    TimedOut,
    /// Closed, and everything that was handed over has been taken.
    Closed,
}

/// The waiting items.
#[derive(Debug)]
pub(crate) struct Intake {
    state: Mutex<State>,
    ready: Condvar,
    append_bytes: Semaphore,
    append_bytes_max: usize,
    control: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    items: VecDeque<Item>,
    closed: bool,
}

impl Intake {
    pub(crate) fn new(append_bytes_max: usize) -> Self {
        let append_bytes_max = append_bytes_max.clamp(1, u32::MAX as usize);
        Self {
            state: Mutex::default(),
            ready: Condvar::new(),
            append_bytes: Semaphore::new(append_bytes_max),
            append_bytes_max,
            control: Semaphore::new(CONTROL_INTAKE),
        }
    }

    /// Waits for room. Nothing is handed over unless it returns `Ok`.
    pub(crate) async fn append(&self, batch: AppendBatch) -> Result<(), StoreClosed> {
        let cost = clamp(batch.cost(), self.append_bytes_max);
        self.append_bytes
            .acquire_many(cost)
            .await
            .map_err(|_| StoreClosed)?
            .forget();
        self.push(Item::Append(batch.into(), cost))
    }

    pub(crate) fn try_append(&self, batch: AppendBatch) -> Result<(), TryAppendError> {
        let cost = clamp(batch.cost(), self.append_bytes_max);
        match self.append_bytes.try_acquire_many(cost) {
            Ok(permit) => permit.forget(),
            Err(TryAcquireError::NoPermits) => return Err(TryAppendError::Full(batch)),
            Err(TryAcquireError::Closed) => return Err(TryAppendError::Closed),
        }
        self.push(Item::Append(batch.into(), cost))
            .map_err(|StoreClosed| TryAppendError::Closed)
    }

    pub(crate) async fn settle(&self, item: SettleItem) -> Result<(), StoreClosed> {
        let cost = self.control_room(item.settled.len()).await?;
        self.push(Item::Settle(item, cost))
    }

    pub(crate) async fn write(&self, item: WriteItem) -> Result<(), StoreClosed> {
        let bytes = |op: &RawOp| op.key.len() + op.value.as_ref().map_or(0, Vec::len);
        let kib = item.ops.iter().map(|op| 1 + bytes(op) / 1024).sum();
        let cost = self.control_room(kib).await?;
        self.push(Item::Write(item, cost))
    }

    async fn control_room(&self, cost: usize) -> Result<u32, StoreClosed> {
        let cost = clamp(cost, CONTROL_INTAKE);
        self.control
            .acquire_many(cost)
            .await
            .map_err(|_| StoreClosed)?
            .forget();
        Ok(cost)
    }

    pub(crate) fn push(&self, item: Item) -> Result<(), StoreClosed> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(StoreClosed);
        }
        state.items.push_back(item);
        drop(state);
        self.ready.notify_one();
        Ok(())
    }

    /// Nothing more is taken; what was handed over is still committed.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.ready.notify_one();
        self.append_bytes.close();
        self.control.close();
    }

    /// Moves all that waits into `taken`; blocks when that is nothing.
    pub(crate) fn wait(&self, taken: &mut VecDeque<Item>, timeout: Option<Duration>) -> Waited {
        let mut state = self.state.lock();
        while state.items.is_empty() {
            if state.closed {
                return Waited::Closed;
            }
            match timeout {
                None => self.ready.wait(&mut state),
                Some(timeout) => {
                    if self.ready.wait_for(&mut state, timeout).timed_out()
                        && state.items.is_empty()
                    {
                        return if state.closed {
                            Waited::Closed
                        } else {
                            Waited::TimedOut
                        };
                    }
                }
            }
        }
        taken.append(&mut state.items);
        Waited::Items
    }

    /// Moves what has come meanwhile into `taken`.
    pub(crate) fn take_more(&self, taken: &mut VecDeque<Item>) {
        taken.append(&mut self.state.lock().items);
    }

    /// Gives room back after a commit.
    pub(crate) fn release(&self, append_cost: usize, control_cost: usize) {
        self.append_bytes.add_permits(append_cost);
        self.control.add_permits(control_cost);
    }

    /// Bytes of appends that wait.
    pub(crate) fn append_bytes(&self) -> usize {
        self.append_bytes_max
            .saturating_sub(self.append_bytes.available_permits())
    }
}

/// At least 1, so that nothing is free; at most everything, so that anything can pass alone.
fn clamp(cost: usize, max: usize) -> u32 {
    u32::try_from(cost.clamp(1, max)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::append::{CommitProgress, CommitTicket};

    fn batch() -> AppendBatch {
        let ticket = CommitTicket {
            progress: CommitProgress::new(),
            sequence: 1,
        };
        AppendBatch {
            appends: Vec::new(),
            ticket,
        }
    }

    #[tokio::test]
    async fn appends_wait_for_room_and_settles_do_not() {
        let intake = Intake::new(2);
        intake.append(batch()).await.unwrap();
        intake.try_append(batch()).unwrap();
        assert!(matches!(
            intake.try_append(batch()),
            Err(TryAppendError::Full(_))
        ));
        assert_eq!(intake.append_bytes(), 2);
        let queue = Arc::new(QueueState::new(
            QueueId {
                endpoint: "q".into(),
                priority: 0,
            },
            0,
        ));
        let settle = SettleItem {
            queue,
            settled: Vec::new(),
            reply: None,
        };
        intake.settle(settle).await.unwrap();
        let mut taken = VecDeque::new();
        assert_eq!(intake.wait(&mut taken, None), Waited::Items);
        assert_eq!(taken.len(), 3);
        assert!(
            intake.try_append(batch()).is_err(),
            "taken is not committed"
        );
        intake.release(2, 1);
        intake.try_append(batch()).unwrap();
    }

    #[tokio::test]
    async fn closing_keeps_what_was_handed_over_and_refuses_the_rest() {
        let intake = Arc::new(Intake::new(1));
        intake.append(batch()).await.unwrap();
        let waiting = tokio::spawn({
            let intake = Arc::clone(&intake);
            async move { intake.append(batch()).await }
        });
        tokio::task::yield_now().await;
        intake.close();
        assert_eq!(waiting.await.unwrap(), Err(StoreClosed));
        assert!(matches!(
            intake.try_append(batch()),
            Err(TryAppendError::Closed)
        ));
        let mut taken = VecDeque::new();
        assert_eq!(intake.wait(&mut taken, None), Waited::Items);
        assert_eq!(intake.wait(&mut taken, None), Waited::Closed);
        assert_eq!(taken.len(), 1);
    }

    #[test]
    fn waiting_ends_with_the_time() {
        let intake = Intake::new(1);
        let mut taken = VecDeque::new();
        assert_eq!(
            intake.wait(&mut taken, Some(Duration::from_millis(1))),
            Waited::TimedOut
        );
    }
}

//! The pump's work with the store and with the scope: reads, settles, questions about identities.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use edgehub_auth::authenticator::RefreshOutcome;
use edgehub_proto::identity::Identity;
use edgehub_storage::{ReadBatch, ReadLimit, SenderFilter, Settled, StoreError};
use tokio::task::{self, JoinError};
use tracing::{debug, error, warn};

use super::Pump;
use crate::lanes::ReadFilter;

/// What a job brought.
pub(super) enum Done {
    Checked(Identity, RefreshOutcome),
    Read(Result<ReadBatch, StoreError>),
    Settled(Result<u64, StoreError>),
}

/// What a job is for, kept here in case it dies.
pub(super) enum Job {
    Check,
    Read(usize),
    Settle(usize, Vec<Settled>),
}

type ReadFuture = Pin<Box<dyn Future<Output = Result<ReadBatch, StoreError>> + Send>>;

impl Pump {
    pub(super) fn read(&mut self, index: usize, from: u64, filter: ReadFilter) -> bool {
        let Some(queue) = self.parts.queues.get(index).cloned() else {
            return false;
        };
        let config = &self.parts.config;
        let limit = ReadLimit {
            entries: config.read_entries,
            bytes: config.read_bytes,
            scan: config.read_scan,
        };
        let filter: Option<SenderFilter> = (!filter.is_open())
            .then(|| Arc::new(move |offset, sender: &str| filter.admits(offset, sender)) as _);
        let mut read: ReadFuture = Box::pin(async move { queue.read(from, limit, filter).await });
        // What is in memory comes without waiting; a task is only made for the disk.
        match read.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => {
                self.take_read(index, result);
                true
            }
            Poll::Pending => {
                self.start(Job::Read(index), async move { Done::Read(read.await) });
                false
            }
        }
    }

    pub(super) fn settle(&mut self, index: usize, settled: Vec<Settled>) {
        let Some(queue) = self.parts.queues.get(index).cloned() else {
            return;
        };
        let list = settled.clone();
        let job = async move { Done::Settled(queue.settle_committed(list).await) };
        self.start(Job::Settle(index, settled), job);
    }

    pub(super) fn check(&mut self, identity: Identity) {
        let refresh = Arc::clone(&self.parts.judge.refresh);
        let own_device = self.parts.judge.own_device.clone();
        let job = async move {
            let outcome = refresh.refresh(&identity, own_device.device_id()).await;
            Done::Checked(identity, outcome)
        };
        self.start(Job::Check, job);
    }

    fn start(&mut self, purpose: Job, job: impl Future<Output = Done> + Send + 'static) {
        let id = self.jobs.spawn(job).id();
        self.job_purposes.insert(id, purpose);
    }

    pub(super) fn take_job(&mut self, done: Result<(task::Id, Done), JoinError>) {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let purpose = self.job_purposes.remove(&id);
        let now = self.now();
        match (purpose, done) {
            (Some(Job::Check), Ok((_, Done::Checked(identity, outcome)))) => {
                self.judge(&identity, Some(outcome));
            }
            (Some(Job::Read(queue)), Ok((_, Done::Read(result)))) => self.take_read(queue, result),
            (Some(Job::Settle(queue, settled)), Ok((_, Done::Settled(Ok(_))))) => {
                self.scheduler.settled(queue, &settled);
            }
            (Some(Job::Settle(queue, settled)), Ok((_, Done::Settled(Err(error))))) => {
                warn!(%error, "messages cannot be settled now");
                self.scheduler.settle_failed(queue, settled, now);
            }
            // A panic in the store or the scope client: what it was for is tried again.
            (purpose, done) => {
                error!(error = ?done.err(), "a job of the upstream pump died");
                match purpose {
                    Some(Job::Read(queue)) => self.scheduler.read_failed(queue, now),
                    Some(Job::Settle(queue, settled)) => {
                        self.scheduler.settle_failed(queue, settled, now);
                    }
                    Some(Job::Check) | None => {}
                }
            }
        }
    }

    fn take_read(&mut self, queue: usize, result: Result<ReadBatch, StoreError>) {
        let now = self.now();
        match result {
            Ok(batch) => self
                .scheduler
                .read_done(queue, batch.entries, batch.next, now),
            Err(error) => {
                warn!(%error, "the upstream queue cannot be read now");
                self.scheduler.read_failed(queue, now);
            }
        }
    }

    /// The scope has changed: perhaps doubtful identities are back, or proven to be gone.
    pub(super) fn judge_again(&mut self) {
        for identity in self.scheduler.doubtful() {
            self.judge(&identity, None);
        }
    }

    fn judge(&mut self, identity: &Identity, outcome: Option<RefreshOutcome>) {
        let verdict = self.parts.judge.verdict(identity, outcome);
        if self.scheduler.identity_checked(identity, verdict) {
            warn!(%identity, "removed or disabled upstream: its queued messages are dropped");
        } else {
            debug!(%identity, ?outcome, ?verdict, "identity checked");
        }
    }
}

//! Carries out what the lanes decide: reads and settles queues, opens sessions, hands messages
//! over, asks about identities.
//!
//! One task for the whole endpoint. Each turn takes everything that has happened, lets the
//! [`Scheduler`] decide once, and starts what it wants; nothing here waits for a store or a socket.
//!
//! # Ordering
//!
//! At most one read and one settle per queue are under way; a settle ends with its commit. A read
//! that began before that may bring what was settled: the lanes know and leave it out.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use edgehub_auth::authenticator::RefreshOutcome;
use edgehub_proto::{clock::Clock, identity::Identity};
use edgehub_storage::{Queue, ReadBatch, ReadLimit, SenderFilter, Settled, StoreError};
use tokio::sync::{Notify, mpsc, mpsc::error::TrySendError, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error, warn};

use crate::{
    bucket::TokenBucket,
    connectivity::ConnectivityMonitor,
    counters,
    judge::Judge,
    lanes::{
        Action, CloseCause, LaneConfig, LaneCounts, Now, QueueStart, ReadFilter, Report, Scheduler,
        SessionId, Verdict,
    },
    limits,
    transport::{Command, OpenRequest, SessionEvent, Transport},
};

/// How often sessions are looked after and gauges are set.
const LOOK_AFTER_EVERY: Duration = Duration::from_secs(5);

/// How long open sessions may take to finish at a shutdown, and how long all of it may take: less
/// than the process waits for its tasks, half of the 8 s of design.md section 4.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
const STOP_TIMEOUT: Duration = Duration::from_millis(3500);

/// What the pump works with.
pub(crate) struct PumpParts {
    pub(crate) config: LaneConfig,
    /// Queues of the upstream endpoint.
    pub(crate) queues: Vec<Queue>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) monitor: ConnectivityMonitor,
    pub(crate) judge: Judge,
    pub(crate) counts: watch::Sender<LaneCounts>,
}

/// What a job brought.
enum Done {
    Checked(Identity, RefreshOutcome),
    Read(Result<ReadBatch, StoreError>),
    Settled(Result<u64, StoreError>),
}

/// What a job is for, kept here in case it dies.
enum Job {
    Check,
    Read(usize),
    Settle(usize, Vec<Settled>),
}

type ReadFuture = Pin<Box<dyn Future<Output = Result<ReadBatch, StoreError>> + Send>>;

pub(crate) struct Pump {
    parts: PumpParts,
    scheduler: Scheduler,
    sessions: HashMap<SessionId, Session>,
    events: mpsc::Receiver<SessionEvent>,
    events_sender: mpsc::Sender<SessionEvent>,
    jobs: JoinSet<Done>,
    job_purposes: HashMap<task::Id, Job>,
    /// Notified when a queue has grown.
    grown: Arc<Notify>,
    look_after_at: Instant,
    /// Bounds log lines about failing lanes.
    failure_log: TokenBucket,
}

struct Session {
    commands: mpsc::Sender<Command>,
    /// The task did not listen any more when sessions were last looked after.
    is_suspect: bool,
}

impl Pump {
    /// Makes a pump whose helpers run in `tasks` until `cancel`.
    pub(crate) fn new(
        mut parts: PumpParts,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Self {
        parts.queues.sort_by_key(|queue| queue.id().priority);
        let starts: Vec<QueueStart> = parts
            .queues
            .iter()
            .map(|queue| QueueStart {
                priority: queue.id().priority,
                mark: queue.mark(),
                next_offset: queue.next_offset(),
            })
            .collect();
        let now = now(parts.clock.as_ref());
        let scheduler = Scheduler::new(parts.config.clone(), &starts, now);
        let (events_sender, events) = mpsc::channel(limits::SESSION_EVENTS_MAX);
        let grown = Arc::new(Notify::new());
        for queue in &parts.queues {
            tasks.spawn(watch_queue(
                queue.subscribe(),
                Arc::clone(&grown),
                cancel.clone(),
            ));
        }
        Self {
            parts,
            scheduler,
            sessions: HashMap::new(),
            events,
            events_sender,
            jobs: JoinSet::new(),
            job_purposes: HashMap::new(),
            grown,
            look_after_at: Instant::now(),
            failure_log: TokenBucket::new(1.0, 10, now.instant),
        }
    }

    /// Runs until cancelled and then until what is in flight is settled, for a few seconds at most.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut scope = self.parts.judge.scope.subscribe();
        let mut events = Vec::new();
        let mut stop_at = None;
        loop {
            let wakeup = self.turn();
            let is_over = stop_at.is_some_and(|at| {
                (self.scheduler.is_stopped() && self.jobs.is_empty()) || Instant::now() >= at
            });
            if is_over {
                return;
            }
            let wakeup = stop_at.map_or(wakeup, |at: Instant| wakeup.min(at));
            tokio::select! {
                _ = self.events.recv_many(&mut events, limits::SESSION_EVENTS_MAX) => {
                    for event in events.drain(..) {
                        self.take_event(event);
                    }
                }
                Some(done) = self.jobs.join_next_with_id() => self.take_job(done),
                () = self.grown.notified() => {}
                Ok(()) = scope.changed() => self.judge_again(),
                () = sleep_until(wakeup) => {}
                () = cancel.cancelled(), if stop_at.is_none() => {
                    let now = Instant::now();
                    stop_at = Some(now + STOP_TIMEOUT);
                    self.scheduler.stop((now + DRAIN_TIMEOUT).into_std());
                }
            }
            while let Some(done) = self.jobs.try_join_next_with_id() {
                self.take_job(done);
            }
        }
    }

    /// Lets the scheduler decide and carries it out. Gives the time of the next turn.
    fn turn(&mut self) -> Instant {
        let mut actions = Vec::new();
        // A read that memory answers at once makes another decision possible.
        for _ in 0..limits::READS_PER_TURN {
            for (index, queue) in self.parts.queues.iter().enumerate() {
                self.scheduler.queue_grew(index, queue.next_offset());
            }
            let now = self.now();
            self.scheduler.turn(now, &mut actions);
            let mut has_read = false;
            for action in actions.drain(..) {
                has_read |= self.carry_out(action);
            }
            if !has_read {
                break;
            }
        }
        let counts = self.scheduler.counts();
        self.parts
            .monitor
            .lanes(self.scheduler.link(), counts.ready);
        self.parts
            .counts
            .send_if_modified(|old| std::mem::replace(old, counts) != counts);
        self.look_after_sessions(counts);
        let wakeup = self
            .scheduler
            .next_wakeup(self.now())
            .map(Instant::from_std);
        wakeup.map_or(self.look_after_at, |at| at.min(self.look_after_at))
    }

    /// Tells whether a read was answered at once.
    fn carry_out(&mut self, action: Action) -> bool {
        match action {
            Action::Close { session } => self.tell(session, Command::Close),
            Action::Discarded(list) => {
                for discarded in list {
                    counters::count_discarded(&self.parts.queues, &discarded);
                }
            }
            Action::Open { session, identity } => self.open(session, identity),
            Action::Read {
                queue,
                from,
                filter,
            } => return self.read(queue, from, filter),
            Action::Refresh { identity } => self.check(identity),
            Action::Report(report) => self.report(report),
            Action::Send { session, batch } => self.tell(session, Command::Send(batch)),
            Action::Settle { queue, settled } => self.settle(queue, settled),
        }
        false
    }

    fn open(&mut self, session: SessionId, identity: Identity) {
        // One batch per message in the window, and the request to close.
        let (commands, receiver) = mpsc::channel(self.parts.config.window + 1);
        self.sessions.insert(
            session,
            Session {
                commands,
                is_suspect: false,
            },
        );
        let events = self.events_sender.clone();
        let request = OpenRequest {
            session,
            identity,
            commands: receiver,
            events,
        };
        self.parts.transport.open(request);
    }

    fn tell(&mut self, session: SessionId, command: Command) {
        let Some(open) = self.sessions.get(&session) else {
            return;
        };
        match open.commands.try_send(command) {
            Ok(()) => {}
            // It has ended: its close event is on the way.
            Err(TrySendError::Closed(_)) => debug!(%session, "session does not listen"),
            // More than the window, which the lanes do not do. It ends with what it has, and
            // everything unanswered is sent again.
            Err(TrySendError::Full(_)) => {
                error!(%session, "session is overrun");
                self.sessions.remove(&session);
            }
        }
    }

    fn read(&mut self, index: usize, from: u64, filter: ReadFilter) -> bool {
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

    fn settle(&mut self, index: usize, settled: Vec<Settled>) {
        let Some(queue) = self.parts.queues.get(index).cloned() else {
            return;
        };
        let list = settled.clone();
        let job = async move { Done::Settled(queue.settle_committed(list).await) };
        self.start(Job::Settle(index, settled), job);
    }

    fn check(&mut self, identity: Identity) {
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

    fn take_job(&mut self, done: Result<(task::Id, Done), JoinError>) {
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

    fn take_event(&mut self, event: SessionEvent) {
        let now = self.now();
        match event {
            SessionEvent::Closed { session, cause } => {
                self.sessions.remove(&session);
                self.scheduler.closed(session, &cause, now);
            }
            SessionEvent::Disposed {
                session,
                dispositions,
            } => {
                self.scheduler.disposed(session, &dispositions);
            }
            SessionEvent::Opened {
                session,
                expires_at_ms,
            } => {
                self.scheduler.opened(session, expires_at_ms, now);
            }
        }
    }

    /// The scope has changed: perhaps doubtful identities are back, or proven to be gone.
    fn judge_again(&mut self) {
        for identity in self.scheduler.doubtful() {
            self.judge(&identity, None);
        }
    }

    fn judge(&mut self, identity: &Identity, outcome: Option<RefreshOutcome>) {
        let verdict = self.parts.judge.verdict(identity, outcome);
        if verdict == Verdict::Gone {
            warn!(%identity, "removed or disabled upstream: its queued messages are dropped");
        } else {
            debug!(%identity, ?outcome, ?verdict, "identity checked");
        }
        self.scheduler.identity_checked(identity, verdict);
    }

    fn report(&mut self, report: Report) {
        match report {
            Report::Failed {
                identity,
                cause,
                failures,
                retry_in,
            } => {
                let now = Instant::now().into_std();
                if self.failure_log.take(now) {
                    warn!(%identity, %cause, failures, ?retry_in, "upstream lane failed");
                } else {
                    debug!(%identity, %cause, failures, ?retry_in, "upstream lane failed");
                }
            }
            Report::SuspectMessage {
                identity,
                priority,
                offset,
                times,
            } => {
                warn!(
                    %identity, priority, offset, times,
                    "the same message ends the connection again and again; it is kept and retried"
                );
                let from = identity.as_str().to_owned();
                metrics::counter!("edgehub_upstream_suspect_messages_total", "from" => from)
                    .increment(1);
            }
        }
    }

    /// Finds sessions whose task died without a word, and sets the gauges.
    fn look_after_sessions(&mut self, counts: LaneCounts) {
        if Instant::now() < self.look_after_at {
            return;
        }
        self.look_after_at = Instant::now() + LOOK_AFTER_EVERY;
        let mut dead = Vec::new();
        for (id, session) in &mut self.sessions {
            // Closed once may mean that the close event is on the way.
            if session.commands.is_closed() && std::mem::replace(&mut session.is_suspect, true) {
                dead.push(*id);
            }
        }
        let now = self.now();
        for session in dead {
            error!(%session, "an upstream session's task died");
            self.sessions.remove(&session);
            self.scheduler
                .closed(session, &CloseCause::Local("task died".into()), now);
        }
        if counts.lanes >= self.parts.config.lanes_max {
            warn!(
                lanes = counts.lanes,
                "too many senders wait: no further ones are looked at"
            );
        }
        metrics::gauge!("edgehub_upstream_lanes").set(counts.lanes as f64);
        metrics::gauge!("edgehub_upstream_connections").set(counts.sessions as f64);
        metrics::gauge!("edgehub_upstream_buffered_bytes").set(counts.bytes as f64);
    }

    fn now(&self) -> Now {
        now(self.parts.clock.as_ref())
    }
}

/// Monotonic time is the runtime's, which its timers use; the wall clock is ours.
fn now(clock: &dyn Clock) -> Now {
    Now {
        instant: Instant::now().into_std(),
        unix_ms: clock.unix_ms(),
    }
}

/// Tells the pump that a queue has grown. Several commits may become one notice.
async fn watch_queue(
    mut next_offset: watch::Receiver<u64>,
    grown: Arc<Notify>,
    cancel: CancellationToken,
) {
    loop {
        tokio::select! {
            changed = next_offset.changed() => {
                if changed.is_err() {
                    return;
                }
                grown.notify_one();
            }
            () = cancel.cancelled() => return,
        }
    }
}

#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;

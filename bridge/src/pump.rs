//! Carries out what the lanes decide: reads and settles queues, opens sessions, hands messages and
//! requests over, asks about identities.
//!
//! One task for the whole endpoint. Each turn takes everything that has happened, lets the
//! [`Scheduler`] decide once, and starts what it wants; nothing here waits for a store or a socket.
//!
//! # Ordering
//!
//! At most one read and one settle per queue are under way; a settle ends with its commit. A read
//! that began before that may bring what was settled: the lanes know and leave it out.

mod asked;
mod jobs;
mod reports;

use std::{collections::HashMap, sync::Arc, time::Duration};

use edgehub_proto::{clock::Clock, hub::Needs, identity::Identity};
use edgehub_storage::Queue;
use tokio::sync::{Notify, mpsc, mpsc::error::TrySendError, watch};
use tokio::task::{self, JoinSet};
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error};

use self::{
    asked::Pending,
    jobs::{Done, Job},
};

use crate::{
    bucket::TokenBucket,
    connectivity::ConnectivityMonitor,
    counters,
    judge::Judge,
    lanes::{Action, LaneConfig, LaneCounts, Now, QueueStart, RequestId, Scheduler, SessionId},
    limits,
    transport::{Command, OpenRequest, SessionEvent, Transport},
    upstream::Asked,
};

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
    /// Where the broker asks.
    pub(crate) asked: Asked,
}

pub(crate) struct Pump {
    parts: PumpParts,
    scheduler: Scheduler,
    sessions: HashMap<SessionId, Session>,
    events: mpsc::Receiver<SessionEvent>,
    events_sender: mpsc::Sender<SessionEvent>,
    jobs: JoinSet<Done>,
    job_purposes: HashMap<task::Id, Job>,
    pending: HashMap<RequestId, Pending>,
    next_request: u64,
    /// Notified when a queue has grown.
    grown: Arc<Notify>,
    look_after_at: Instant,
    /// Bounds log lines about failing lanes.
    failure_log: TokenBucket,
}

struct Session {
    commands: mpsc::Sender<Command>,
    needs: watch::Sender<Needs>,
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
            pending: HashMap::new(),
            next_request: 0,
            grown,
            look_after_at: Instant::now(),
            failure_log: TokenBucket::new(1.0, 10, now.instant),
        }
    }

    /// Runs until cancelled and then until what is in flight is settled, for a few seconds at most.
    pub(crate) async fn run(mut self, cancel: CancellationToken) {
        let mut scope = self.parts.judge.scope.subscribe();
        let (mut events, mut requests) = (Vec::new(), Vec::new());
        let wishes = Arc::clone(&self.parts.asked.wishes);
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
                // Zero when nobody can ask any more.
                1.. = self.parts.asked.requests.recv_many(&mut requests, limits::REQUESTS_MAX) => {
                    // What an identity needs was stated before what it asks now.
                    self.take_wishes();
                    for asking in requests.drain(..) {
                        self.take_request(asking);
                    }
                }
                () = wishes.changed() => self.take_wishes(),
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
            // After the look at the queues: what a client said before it sent a message of these
            // counts for the message.
            self.take_renewals();
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
            Action::Fail { request, fault } => self.fail(request, fault),
            Action::Needs { session, needs } => {
                if let Some(open) = self.sessions.get(&session) {
                    open.needs.send_replace(needs);
                }
            }
            Action::Open {
                session,
                identity,
                needs,
            } => self.open(session, identity, needs),
            Action::Read {
                queue,
                from,
                filter,
            } => return self.read(queue, from, filter),
            Action::Refresh { identity } => self.check(identity),
            Action::Report(report) => self.report(report),
            Action::Request { session, requests } => self.make_requests(session, requests),
            Action::Send { session, batch } => self.tell(session, Command::Send(batch)),
            Action::Settle { queue, settled } => self.settle(queue, settled),
        }
        false
    }

    fn open(&mut self, session: SessionId, identity: Identity, needs: Needs) {
        // One batch per message in the window, one per request, and the wish to close.
        let room = self.parts.config.window + self.parts.config.lane_requests_max + 1;
        let (commands, receiver) = mpsc::channel(room);
        let (needs, needs_receiver) = watch::channel(needs);
        self.sessions.insert(
            session,
            Session {
                commands,
                needs,
                is_suspect: false,
            },
        );
        let events = self.events_sender.clone();
        let request = OpenRequest {
            session,
            identity,
            needs: needs_receiver,
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

    fn take_event(&mut self, event: SessionEvent) {
        let now = self.now();
        match event {
            SessionEvent::Answered { request, answer } => self.take_answer(request, answer),
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
            SessionEvent::Engaged { session, engaged } => {
                self.scheduler.engaged(session, engaged);
            }
            SessionEvent::Opened {
                session,
                expires_at_ms,
            } => {
                self.scheduler.opened(session, expires_at_ms, now);
            }
        }
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
#[path = "pump_asked_tests.rs"]
mod asked_tests;
#[cfg(test)]
#[path = "pump_world.rs"]
mod test_world;
#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;

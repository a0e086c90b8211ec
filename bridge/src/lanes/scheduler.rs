//! The scheduler: all decisions about lanes, without a socket, a store or a clock.
//!
//! # Use
//!
//! Feed it what happened (`opened`, `closed`, `disposed`, `queue_grew`, `read_done`, `settled`,
//! `identity_checked`), then call [`Scheduler::turn`] once and carry out the [`Action`]s that it
//! gives. Call it again at [`Scheduler::next_wakeup`] at the latest. Each turn gathers all that is
//! possible at that moment: one send per lane, one settle per queue.
//!
//! # Invariants
//!
//! - Within one queue a sender's messages are handed to its session in ascending offsets. After a
//!   session ended, the next one starts with the oldest unsettled message.
//! - A message of a lower priority goes out only when everything of a higher priority that is
//!   stored for the same sender has been handed over.
//! - Memory is bounded by [`LaneConfig`], whatever the backlog: what does not fit stays in the
//!   store, and the lane remembers from which offset on.
//! - A lane's failures, slowness or size delay no other lane.
//! - Every message ends in exactly one settle.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use edgehub_proto::identity::Identity;
use rand::{SeedableRng, rngs::StdRng};

use super::{
    cause::CloseCause,
    config::LaneConfig,
    lane::LaneState,
    message::{Discarded, Outgoing, Settled},
    queue::{QueueState, ReadFilter},
    session::SessionId,
    table::{LaneKey, LaneTable},
};
use crate::bucket::TokenBucket;

/// The time of an input: monotonic for durations, wall clock for expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic time.
    pub instant: Instant,
    /// Unix milliseconds.
    pub unix_ms: u64,
}

/// A queue at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStart {
    /// Its priority: lower numbers go first.
    pub priority: u32,
    /// Everything below is settled.
    pub mark: u64,
    /// Next offset that the store will give.
    pub next_offset: u64,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Ask the session to end. Its close event follows.
    Close {
        /// Which session.
        session: SessionId,
    },
    /// These messages were given up and will be settled: count them.
    Discarded(Vec<Discarded>),
    /// Open a session. [`Scheduler::opened`] or [`Scheduler::closed`] answers.
    Open {
        /// Number of the new session.
        session: SessionId,
        /// For whom.
        identity: Identity,
    },
    /// Read from a queue. [`Scheduler::read_done`] or [`Scheduler::read_failed`] answers.
    Read {
        /// Index of the queue.
        queue: usize,
        /// First offset.
        from: u64,
        /// Which entries are wanted.
        filter: ReadFilter,
    },
    /// Ask the upstream about an identity. [`Scheduler::identity_checked`] answers.
    Refresh {
        /// Whose existence is in doubt.
        identity: Identity,
    },
    /// Something that a person may want to know.
    Report(Report),
    /// Hand messages to an open session.
    Send {
        /// Which session.
        session: SessionId,
        /// In order of tokens.
        batch: Vec<Outgoing>,
    },
    /// Settle messages. [`Scheduler::settled`] or [`Scheduler::settle_failed`] answers.
    Settle {
        /// Index of the queue.
        queue: usize,
        /// What and how.
        settled: Vec<Settled>,
    },
}

/// News for log and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A lane failed and will try again.
    Failed {
        /// Whose lane.
        identity: Identity,
        /// Why.
        cause: CloseCause,
        /// Failures in a row.
        failures: u32,
        /// When it tries again at the latest.
        retry_in: Duration,
    },
    /// The same message has been at the head of a session that broke many times in a row, while
    /// other senders' messages passed.
    SuspectMessage {
        /// Whose message.
        identity: Identity,
        /// Priority of its queue.
        priority: u32,
        /// Its offset.
        offset: u64,
        /// How often in a row.
        times: u32,
    },
}

/// What our own view of the scope says about a doubtful identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Proven to be removed or disabled: its messages are dropped.
    Gone,
    /// It is there: try again now.
    Retry,
    /// Not known: keep trying with back-off.
    Unknown,
}

/// Whether the upstream can be reached, as far as the lanes know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Nothing was tried yet.
    Unknown,
    /// It answered last.
    Up,
    /// The last attempts were not answered and no session is open.
    Down,
}

/// Numbers for status and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneCounts {
    /// Lanes in memory.
    pub lanes: usize,
    /// Open sessions.
    pub ready: usize,
    /// Sessions in all, opening and closing ones included.
    pub sessions: usize,
    /// Bytes of messages in memory.
    pub bytes: usize,
}

/// All lanes of one endpoint.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: LaneConfig,
    pub(super) rng: StdRng,
    pub(super) lanes: LaneTable,
    pub(super) queues: Vec<QueueState>,
    /// Lanes in the row for a connection. May hold keys of lanes that wait no more.
    pub(super) waiting: VecDeque<LaneKey>,
    pub(super) connects: TokenBucket,
    /// Lanes to look at in this turn.
    pub(super) dirty: Vec<LaneKey>,
    /// Lanes whose sending waits for a read of a higher priority or for settles.
    pub(super) blocked: Vec<LaneKey>,
    pub(super) discarded: Vec<Discarded>,
    pub(super) out: Vec<Action>,
    pub(super) link: Link,
    /// A link failure happened since back-offs were last cut short.
    pub(super) trouble: bool,
    /// Open sessions that nobody asked to close.
    pub(super) ready: usize,
    /// Cost of all messages in memory.
    pub(super) bytes: usize,
    /// Messages that the upstream accepted.
    pub(super) accepted: u64,
    pub(super) next_session: u64,
    pub(super) next_scan_turn: u64,
    pub(super) maintain_at: Instant,
    pub(super) room_check_at: Instant,
    pub(super) stopping: bool,
}

/// How often credentials are looked at, and how often room is sought when all connections are used.
const MAINTAIN_EVERY: Duration = Duration::from_secs(2);
pub(super) const ROOM_CHECK_EVERY: Duration = Duration::from_millis(250);

impl Scheduler {
    /// Makes a scheduler for queues in any order of priority; indices in actions and events are
    /// positions in `queues`, which must be sorted by ascending priority number.
    #[must_use]
    pub fn new(config: LaneConfig, queues: &[QueueStart], now: Now) -> Self {
        let connects = TokenBucket::new(
            config.connects_per_second,
            config.connects_burst,
            now.instant,
        );
        Self {
            rng: StdRng::seed_from_u64(config.seed),
            config,
            lanes: LaneTable::default(),
            queues: queues
                .iter()
                .map(|queue| QueueState::new(queue.priority, queue.mark, queue.next_offset))
                .collect(),
            waiting: VecDeque::new(),
            connects,
            dirty: Vec::new(),
            blocked: Vec::new(),
            discarded: Vec::new(),
            out: Vec::new(),
            link: Link::Unknown,
            trouble: false,
            ready: 0,
            bytes: 0,
            accepted: 0,
            next_session: 0,
            next_scan_turn: 0,
            maintain_at: now.instant,
            room_check_at: now.instant,
            stopping: false,
        }
    }

    /// Does everything that is possible at `now`, appending what is to be carried out.
    pub fn turn(&mut self, now: Now, actions: &mut Vec<Action>) {
        self.fire_timers(now);
        self.renew_sessions(now);
        self.open_sessions(now);
        self.look_at_dirty_lanes(now);
        self.start_reads(now);
        self.start_settles(now);
        if !self.discarded.is_empty() {
            self.out
                .push(Action::Discarded(std::mem::take(&mut self.discarded)));
        }
        actions.append(&mut self.out);
    }

    /// When [`Scheduler::turn`] is due at the latest; none when only an event can change anything.
    #[must_use]
    pub fn next_wakeup(&self, now: Now) -> Option<Instant> {
        let retries = self
            .queues
            .iter()
            .flat_map(|queue| [queue.read_retry_at, queue.settle_retry_at])
            .flatten();
        let connect = (!self.waiting.is_empty() && !self.stopping).then(|| {
            if self.lanes.sessions() < self.config.connections_max {
                self.connects.next_at(now.instant)
            } else {
                self.room_check_at
            }
        });
        let maintain = (self.ready > 0).then_some(self.maintain_at);
        self.lanes
            .next_timer()
            .into_iter()
            .chain(connect)
            .chain(maintain)
            .chain(retries)
            .min()
    }

    /// Whether the upstream can be reached, as far as the lanes know.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link
    }

    /// Numbers for status and gauges.
    #[must_use]
    pub fn counts(&self) -> LaneCounts {
        LaneCounts {
            lanes: self.lanes.len(),
            ready: self.ready,
            sessions: self.lanes.sessions(),
            bytes: self.bytes,
        }
    }

    /// Sessions that have not closed, for the caller's check that none of them died silently.
    pub fn sessions(&self) -> impl Iterator<Item = SessionId> {
        self.lanes.session_ids()
    }

    /// Identities that are refused or being dropped: judge them again when the scope changes.
    #[must_use]
    pub fn doubtful(&self) -> Vec<Identity> {
        self.lanes
            .iter()
            .filter(|(_, lane)| lane.is_doubtful())
            .map(|(_, lane)| lane.sender.clone())
            .collect()
    }

    /// Starts no more sessions and no more sends; sessions close when what is in flight is settled
    /// or at `deadline`.
    pub fn stop(&mut self, deadline: Instant) {
        self.stopping = true;
        for key in self.lanes.session_keys() {
            self.drain(key, deadline);
        }
    }

    /// Every session has closed and every settle was given out and answered.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopping
            && self.lanes.sessions() == 0
            && self
                .queues
                .iter()
                .all(|queue| !queue.settling && queue.to_settle.is_empty())
    }

    /// The store settled `settled` of the queue at `queue`.
    pub fn settled(&mut self, queue: usize, settled: &[Settled]) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        state.confirm(settled);
        state.settling = false;
        self.unblock();
    }

    /// The store could not settle: tried again a second later.
    pub fn settle_failed(&mut self, queue: usize, mut settled: Vec<Settled>, now: Now) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        settled.append(&mut state.to_settle);
        state.to_settle = settled;
        state.settling = false;
        state.settle_retry_at = Some(now.instant + Duration::from_secs(1));
    }

    fn start_settles(&mut self, now: Now) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if queue.settle_retry_at.is_some_and(|at| at > now.instant) {
                continue;
            }
            queue.settle_retry_at = None;
            if !queue.settling && !queue.to_settle.is_empty() {
                queue.settling = true;
                let settled = std::mem::take(&mut queue.to_settle);
                self.out.push(Action::Settle {
                    queue: index,
                    settled,
                });
            }
        }
    }

    fn fire_timers(&mut self, now: Now) {
        while let Some(key) = self.lanes.pop_timer(now.instant) {
            let Some(lane) = self.lanes.get(key) else {
                continue;
            };
            match lane.state {
                LaneState::BackOff { .. } => self.wait(key),
                // Idle for long, or out of patience with what is in flight.
                LaneState::Ready(_) => self.close(key),
                LaneState::Closing(_)
                | LaneState::Dropping
                | LaneState::Opening(_)
                | LaneState::Waiting => {}
            }
        }
    }

    fn renew_sessions(&mut self, now: Now) {
        if self.ready == 0 || now.instant < self.maintain_at {
            return;
        }
        self.maintain_at = now.instant + MAINTAIN_EVERY;
        for key in self.lanes.session_keys() {
            let Some(lane) = self.lanes.get(key) else {
                continue;
            };
            if let LaneState::Ready(ready) = lane.state
                && ready.drain_until.is_none()
                && ready.renew_at_ms.is_some_and(|at| at <= now.unix_ms)
            {
                self.drain(key, now.instant + self.config.drain_timeout);
            }
        }
    }

    /// Puts the lane into the list of lanes to look at in this turn.
    pub(super) fn touch(&mut self, key: LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key)
            && !lane.dirty
        {
            lane.dirty = true;
            self.dirty.push(key);
        }
    }

    /// Looks again at the lanes that waited for something shared.
    pub(super) fn unblock(&mut self) {
        for key in std::mem::take(&mut self.blocked) {
            self.touch(key);
        }
    }
}

#[cfg(test)]
impl Scheduler {
    /// Compares every running total with a recount.
    pub(super) fn check_consistency(&self) {
        let mut bytes = 0;
        let mut ready = 0;
        for (key, lane) in self.lanes.iter() {
            let buffers = lane.parts.iter().flat_map(|part| &part.buffer);
            let buffered: usize = buffers.clone().map(super::message::cost_of).sum();
            let flying: usize = lane
                .in_flight
                .iter()
                .filter(|sent| !sent.settled)
                .map(|sent| sent.cost)
                .sum();
            assert_eq!(lane.bytes, buffered + flying, "{lane:?}");
            assert_eq!(lane.buffered, buffers.count(), "{lane:?}");
            assert!(lane.buffered <= self.config.lane_entries_max);
            bytes += lane.bytes;
            ready += usize::from(matches!(lane.state, LaneState::Ready(_)));
            let mut higher_is_behind = false;
            for (part, queue) in lane.parts.iter().zip(&self.queues) {
                assert!(!higher_is_behind || part.buffer.is_empty(), "{lane:?}");
                higher_is_behind |= part.behind_from.is_some();
                if let Some(turn) = part.scan_turn {
                    assert!(queue.wants.contains(&(turn, key)));
                }
                let offsets: Vec<u64> = part.buffer.iter().map(|entry| entry.offset).collect();
                assert!(offsets.is_sorted_by(|a, b| a < b));
            }
        }
        assert_eq!((self.bytes, self.ready), (bytes, ready));
    }
}

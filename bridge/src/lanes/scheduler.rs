//! The scheduler: all decisions about lanes, without a socket, a store or a clock.
//!
//! # Use
//!
//! Feed it what happened (`opened`, `closed`, `disposed`, `answered`, `queue_grew`, `read_done`,
//! `settled`, `identity_checked`) and what is wanted (`need`, `request`), then call [`Scheduler::turn`] once and carry out the [`Action`]s that it
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
//! - A lane with needs has a session, opens one or waits for its turn to: it never rests.
//! - Every request ends in exactly one answer or [`Action::Fail`], by its deadline at the latest.
//! - Every message ends in exactly one settle.

use std::time::{Duration, Instant};

use edgehub_proto::identity::Identity;
use rand::{SeedableRng, rngs::StdRng};

use super::{
    actions::{Action, LaneCounts, Link},
    config::LaneConfig,
    lane::{Lane, LaneState, Ready},
    message::Discarded,
    queue::QueueState,
    requests::{RequestFault, RequestTable},
    row::Row,
    session::SessionId,
    table::{LaneKey, LaneTable},
};
use crate::{bucket::TokenBucket, limits};

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

/// All lanes of one endpoint.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) config: LaneConfig,
    pub(super) rng: StdRng,
    pub(super) lanes: LaneTable,
    pub(super) queues: Vec<QueueState>,
    /// Lanes in the row for a connection.
    pub(super) row: Row,
    pub(super) connects: TokenBucket,
    /// Limits connects further while the link is down.
    pub(super) probes: TokenBucket,
    pub(super) requests: RequestTable,
    /// Lanes with needs.
    pub(super) needy: usize,
    /// Lanes to look at in this turn.
    pub(super) dirty: Vec<LaneKey>,
    /// Lanes whose sending waits for a read of a higher priority or for settles.
    pub(super) blocked: Vec<LaneKey>,
    pub(super) discarded: Vec<Discarded>,
    pub(super) out: Vec<Action>,
    pub(super) link: Link,
    /// A link failure happened since back-offs were last cut short.
    pub(super) trouble: bool,
    /// A session opened after that: to be followed up in the next turn.
    pub(super) has_recovered: bool,
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
            row: Row::default(),
            connects,
            probes: TokenBucket::new(limits::PROBES_PER_SECOND, limits::PROBES_BURST, now.instant),
            requests: RequestTable::default(),
            needy: 0,
            dirty: Vec::new(),
            blocked: Vec::new(),
            discarded: Vec::new(),
            out: Vec::new(),
            link: Link::Unknown,
            trouble: false,
            has_recovered: false,
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
        self.recover(now);
        self.fire_timers(now);
        self.expire_requests(now);
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
        let connect = (!self.row.is_empty() && !self.stopping).then(|| {
            if self.lanes.sessions() >= self.config.connections_max {
                self.room_check_at
            } else if self.link == Link::Down {
                let probe = self.probes.next_at(now.instant);
                probe.max(self.connects.next_at(now.instant))
            } else {
                self.connects.next_at(now.instant)
            }
        });
        let maintain = (self.ready > 0).then_some(self.maintain_at);
        self.lanes
            .next_timer()
            .into_iter()
            .chain(connect)
            .chain(maintain)
            .chain(self.requests.next_deadline())
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
        for key in self.lanes.keys() {
            self.fail_waiting(key, RequestFault::Stopping, None);
        }
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

    fn fire_timers(&mut self, now: Now) {
        while let Some(key) = self.lanes.pop_timer(now.instant) {
            let Some(lane) = self.lanes.get(key) else {
                continue;
            };
            match lane.state {
                LaneState::BackOff { is_over, .. } => self.end_back_off(key, is_over, now),
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
            let LaneState::Ready(Ready {
                renewal,
                drain_until: None,
                ..
            }) = lane.state
            else {
                continue;
            };
            let is_over = renewal.is_some_and(|at| at.is_due(now.unix_ms, lane.engaged));
            if is_over || lane.is_stale(now.instant) {
                self.drain(key, now.instant + self.config.drain_timeout);
            }
        }
    }

    /// Makes a lane that waits for a connection. The caller gives it a reason to be.
    pub(super) fn new_lane(&mut self, sender: Identity) -> LaneKey {
        let key = self.lanes.insert(Lane::new(sender, self.queues.len()));
        self.enter_row(key);
        self.touch(key);
        key
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

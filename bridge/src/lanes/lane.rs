//! One sender's lane.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use edgehub_proto::{hub::Needs, identity::Identity};

use super::{message::Entry, renewal::Renewal, requests::RequestId, session::SessionId};

/// What a lane is doing.
///
/// A lane without work, without needs and without a session does not exist: there is no idle
/// state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaneState {
    /// Waits for its next attempt; the timer holds the time.
    BackOff {
        /// The wait ends when another lane gets through after an outage.
        cut_short: bool,
        /// The identity is in doubt: the wait ends when the scope changes.
        refused: bool,
        /// The wait is over and nobody wants the lane: its failures are remembered for a while, and
        /// it connects when somebody does.
        is_over: bool,
    },
    /// We asked for the session's end and wait for it.
    Closing(SessionId),
    /// The sender is gone: everything of it is settled as dropped. With needs that are still
    /// stated the lane stays here without work, for the case that the sender comes back.
    Dropping,
    /// A session is being opened.
    Opening(SessionId),
    /// Messages may be sent.
    Ready(Ready),
    /// In the row for a connection, at the lane's `place`.
    Waiting,
}

/// An open session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) session: SessionId,
    pub(super) opened_at: Instant,
    /// Since when there has been nothing to send.
    pub(super) idle_since: Option<Instant>,
    /// When the session's credential is to be renewed.
    pub(super) renewal: Option<Renewal>,
    /// Set while nothing new is sent so that the session can be closed; when that gives up waiting.
    pub(super) drain_until: Option<Instant>,
}

/// A lane's messages of one queue.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// Read and waiting, ascending offsets.
    pub(super) buffer: VecDeque<Entry>,
    /// The lane's messages from this offset on are not in `buffer` (nor in flight): a catch-up scan
    /// has to read them. None: the queue's main reader brings them.
    pub(super) behind_from: Option<u64>,
    /// Cost of the message at `behind_from` if it did not fit; 0 when not known.
    pub(super) needs: usize,
    /// Messages below were sent at least once.
    pub(super) sent_below: u64,
    /// Key in the queue's row of lanes that want a scan.
    pub(super) scan_turn: Option<u64>,
}

/// A message that was handed to the session.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub(super) queue: usize,
    pub(super) offset: u64,
    pub(super) shared: Option<u64>,
    pub(super) cost: usize,
    pub(super) settled: bool,
}

/// The message at the head of a lane when its session broke, and how often in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeadFault {
    pub(super) queue: usize,
    pub(super) offset: u64,
    pub(super) count: u32,
    /// The scheduler's count of accepted messages at the first fault: tells whether others pass.
    pub(super) accepted_before: u64,
}

/// One identity's lane.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) sender: Identity,
    pub(super) state: LaneState,
    /// Place in the row for a connection, while waiting.
    pub(super) place: Option<u64>,
    /// What the identity wants to hear.
    pub(super) needs: Needs,
    /// It had needs and has none now: the connection is kept for a short while only.
    pub(super) released: bool,
    /// Requests that no session was given, in the order in which they came.
    pub(super) waiting_requests: VecDeque<RequestId>,
    /// Requests that the session was given and that are not answered.
    pub(super) sent_requests: Vec<RequestId>,
    /// The session has handed something down whose answer it waits for.
    pub(super) engaged: bool,
    /// One part per queue, in the queues' order: highest priority first.
    pub(super) parts: Vec<Part>,
    /// Handed to the session, ascending tokens without a gap.
    pub(super) in_flight: VecDeque<InFlight>,
    /// Token of the first of `in_flight`.
    pub(super) front_token: u64,
    /// Entries in all buffers.
    pub(super) buffered: usize,
    /// Cost of everything in the buffers and in flight.
    pub(super) bytes: usize,
    /// Failures in a row.
    pub(super) failures: u32,
    /// When the row began.
    pub(super) failing_since: Option<Instant>,
    /// The upstream was asked about the identity in this row of failures.
    pub(super) refreshed: bool,
    /// Sessions in a row that ended early to hand messages back. What is accepted meanwhile does
    /// not count: the lane would spin between the two.
    pub(super) handbacks: u32,
    /// When the present attempt to connect began.
    pub(super) opening_since: Option<Instant>,
    /// When an attempt was last given up because the link had come back meanwhile.
    pub(super) redialed_at: Option<Instant>,
    /// From when on the session is to be replaced because what it says of the identity is old.
    pub(super) renew_from: Option<Instant>,
    /// The last of those times.
    pub(super) renewed_at: Option<Instant>,
    pub(super) head_fault: Option<HeadFault>,
    /// Key in the scheduler's timers.
    pub(super) timer: Option<Instant>,
    /// Already in the scheduler's list of lanes to look at.
    pub(super) dirty: bool,
}

/// How long a session that says what is not so any more is kept for an answer from below.
const STALE_MAX: Duration = Duration::from_secs(30);

impl Lane {
    /// Whether the open session is to be replaced because what it says of the identity is old.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        self.renew_from
            .is_some_and(|from| now >= if self.engaged { from + STALE_MAX } else { from })
    }

    pub(super) fn new(sender: Identity, queues: usize) -> Self {
        Self {
            sender,
            state: LaneState::Waiting,
            place: None,
            needs: Needs::default(),
            released: false,
            waiting_requests: VecDeque::new(),
            sent_requests: Vec::new(),
            engaged: false,
            parts: (0..queues).map(|_| Part::default()).collect(),
            in_flight: VecDeque::new(),
            front_token: 0,
            buffered: 0,
            bytes: 0,
            failures: 0,
            failing_since: None,
            refreshed: false,
            handbacks: 0,
            opening_since: None,
            redialed_at: None,
            renew_from: None,
            renewed_at: None,
            head_fault: None,
            timer: None,
            dirty: false,
        }
    }

    pub(super) fn session(&self) -> Option<SessionId> {
        match self.state {
            LaneState::Opening(session) | LaneState::Closing(session) => Some(session),
            LaneState::Ready(ready) => Some(ready.session),
            LaneState::BackOff { .. } | LaneState::Dropping | LaneState::Waiting => None,
        }
    }

    /// Its identity is refused or being dropped: the state of the link does not help it.
    pub(super) fn is_doubtful(&self) -> bool {
        matches!(
            self.state,
            LaneState::Dropping | LaneState::BackOff { refused: true, .. }
        )
    }

    /// A session is open and nobody asked for its end.
    pub(super) fn may_send(&self) -> bool {
        matches!(self.state, LaneState::Ready(ready) if ready.drain_until.is_none())
    }

    /// There are messages that were not handed to a session.
    pub(super) fn has_waiting(&self) -> bool {
        self.buffered > 0 || self.parts.iter().any(|part| part.behind_from.is_some())
    }

    pub(super) fn has_work(&self) -> bool {
        self.has_waiting() || !self.in_flight.is_empty()
    }

    /// Nothing of the lane may be forgotten.
    pub(super) fn is_wanted(&self) -> bool {
        self.has_work() || self.needs.any() || self.has_requests()
    }

    /// It connects, or will by itself.
    pub(super) fn is_probing(&self) -> bool {
        match self.state {
            LaneState::BackOff { is_over, .. } => !is_over,
            LaneState::Opening(_) | LaneState::Waiting => true,
            LaneState::Closing(_) | LaneState::Dropping | LaneState::Ready(_) => false,
        }
    }

    pub(super) fn has_requests(&self) -> bool {
        !self.waiting_requests.is_empty() || !self.sent_requests.is_empty()
    }

    /// Index of the first queue with something waiting: the lane's place in a turn.
    pub(super) fn head_queue(&self) -> usize {
        self.parts
            .iter()
            .position(|part| !part.buffer.is_empty() || part.behind_from.is_some())
            .unwrap_or(usize::MAX)
    }

    /// Gives up buffers and the window: everything unsettled is behind from its oldest message on,
    /// so that it is read and sent again in order. Returns the cost that became free.
    pub(super) fn rewind(&mut self) -> usize {
        for sent in self.in_flight.drain(..).filter(|sent| !sent.settled) {
            if let Some(part) = self.parts.get_mut(sent.queue) {
                part.fall_behind(sent.offset);
            }
        }
        for part in &mut self.parts {
            if let Some(first) = part.buffer.front() {
                let first = first.offset;
                part.fall_behind(first);
            }
            part.buffer = VecDeque::new();
        }
        self.buffered = 0;
        std::mem::take(&mut self.bytes)
    }

    /// The oldest message in flight that is not settled.
    pub(super) fn oldest_in_flight(&self) -> Option<&InFlight> {
        self.in_flight.iter().find(|sent| !sent.settled)
    }

    /// How long the row of failures has lasted.
    pub(super) fn failing_for(&self, now: Instant) -> Duration {
        self.failing_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub(super) fn forget_failures(&mut self) {
        self.failures = 0;
        self.failing_since = None;
        self.refreshed = false;
    }
}

impl Part {
    /// Everything from `offset` on has to be read by a scan.
    pub(super) fn fall_behind(&mut self, offset: u64) {
        self.needs = 0;
        self.behind_from = Some(self.behind_from.map_or(offset, |from| from.min(offset)));
    }
}

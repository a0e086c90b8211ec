//! Requests of identities to the upstream (twins) on their way into a session.
//!
//! The scheduler knows their names, deadlines and lanes; what they ask and who waits for the answer
//! is the pump's. A request is sent once: when its session ends before the answer, it has failed.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use edgehub_proto::identity::Identity;

use super::{
    actions::{Action, Link},
    lane::LaneState,
    scheduler::{Now, Scheduler},
    table::LaneKey,
};
use crate::limits;

/// Names one request. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub(crate) u64);

/// Why a request has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestFault {
    /// Its identity is proven to be removed or disabled.
    Gone,
    /// Its session ended.
    Lost,
    /// The hub stops.
    Stopping,
    /// Its time is over.
    TimedOut,
    /// Too many requests wait already.
    TooMany,
    /// The upstream cannot be reached now.
    Unreachable,
}

/// All requests that are not over.
#[derive(Debug, Default)]
pub(super) struct RequestTable {
    by_id: HashMap<RequestId, Pending>,
    deadlines: BTreeSet<(Instant, RequestId)>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    lane: LaneKey,
    deadline: Instant,
}

impl RequestTable {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    #[cfg(test)]
    pub(super) fn lane_of(&self, request: RequestId) -> Option<LaneKey> {
        self.by_id.get(&request).map(|pending| pending.lane)
    }

    fn insert(&mut self, request: RequestId, lane: LaneKey, deadline: Instant) {
        self.by_id.insert(request, Pending { lane, deadline });
        self.deadlines.insert((deadline, request));
    }

    fn remove(&mut self, request: RequestId) -> Option<LaneKey> {
        let pending = self.by_id.remove(&request)?;
        self.deadlines.remove(&(pending.deadline, request));
        Some(pending.lane)
    }

    fn deadline(&self, request: RequestId) -> Option<Instant> {
        self.by_id.get(&request).map(|pending| pending.deadline)
    }
}

impl Scheduler {
    /// A request of `identity` that is worth an answer until `deadline`. Opens a session if the
    /// identity has none, but fails at once when the upstream is known not to be there.
    pub fn request(
        &mut self,
        identity: &Identity,
        request: RequestId,
        deadline: Instant,
        now: Now,
    ) {
        if let Some(fault) = self.refusal(identity, deadline, now) {
            self.out.push(Action::Fail { request, fault });
            return;
        }
        let key = self
            .lanes
            .find(identity)
            .unwrap_or_else(|| self.new_lane(identity.clone()));
        self.requests.insert(request, key, deadline);
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.waiting_requests.push_back(request);
        }
        self.touch(key);
    }

    /// The session answered, or the answer is not wanted any more.
    pub fn answered(&mut self, request: RequestId) {
        if let Some(key) = self.requests.remove(request) {
            self.detach(key, request);
        }
    }

    /// Why the request cannot be taken.
    fn refusal(&self, identity: &Identity, deadline: Instant, now: Now) -> Option<RequestFault> {
        if self.stopping {
            return Some(RequestFault::Stopping);
        }
        if self.requests.len() >= self.config.requests_max {
            return Some(RequestFault::TooMany);
        }
        // Others try already. If nobody does, this request does.
        let is_hopeless = || self.link == Link::Down && self.is_probing();
        let Some(lane) = self
            .lanes
            .find(identity)
            .and_then(|key| self.lanes.get(key))
        else {
            return is_hopeless().then_some(RequestFault::Unreachable);
        };
        let pending = lane.waiting_requests.len() + lane.sent_requests.len();
        if pending >= self.config.lane_requests_max {
            return Some(RequestFault::TooMany);
        }
        match lane.state {
            LaneState::Dropping => Some(RequestFault::Gone),
            LaneState::BackOff { is_over: true, .. } => {
                is_hopeless().then_some(RequestFault::Unreachable)
            }
            LaneState::BackOff { .. } => {
                let comes_in_time = lane.timer.unwrap_or(now.instant) < deadline;
                (self.link != Link::Up || !comes_in_time).then_some(RequestFault::Unreachable)
            }
            // Behind that many probes it would not connect in time to be of use.
            LaneState::Waiting => {
                let is_hopeless = self.link == Link::Down && self.row.len() > limits::PROBE_LANES;
                is_hopeless.then_some(RequestFault::Unreachable)
            }
            LaneState::Closing(_) | LaneState::Opening(_) | LaneState::Ready(_) => None,
        }
    }

    fn is_probing(&self) -> bool {
        self.lanes.iter().any(|(_, lane)| lane.is_probing())
    }

    /// Hands waiting requests to the lane's open session.
    pub(super) fn send_requests(&mut self, key: LaneKey) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        if lane.waiting_requests.is_empty() || !lane.may_send() {
            return;
        }
        let Some(session) = lane.session() else {
            return;
        };
        let requests: Vec<RequestId> = lane.waiting_requests.drain(..).collect();
        lane.sent_requests.extend(&requests);
        self.out.push(Action::Request { session, requests });
    }

    /// Fails the requests whose time is over.
    pub(super) fn expire_requests(&mut self, now: Now) {
        while let Some((at, request)) = self.requests.deadlines.first().copied()
            && at <= now.instant
        {
            if let Some(key) = self.requests.remove(request) {
                self.detach(key, request);
            }
            self.out.push(Action::Fail {
                request,
                fault: RequestFault::TimedOut,
            });
        }
    }

    /// Fails the lane's requests that no session was given; those that are worth an answer after
    /// `keep_after` stay.
    pub(super) fn fail_waiting(
        &mut self,
        key: LaneKey,
        fault: RequestFault,
        keep_after: Option<Instant>,
    ) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let mut kept = std::collections::VecDeque::new();
        for request in std::mem::take(&mut lane.waiting_requests) {
            let deadline = self.requests.deadline(request);
            if keep_after.is_some_and(|after| deadline > Some(after)) {
                kept.push_back(request);
                continue;
            }
            self.requests.remove(request);
            self.out.push(Action::Fail { request, fault });
        }
        lane.waiting_requests = kept;
    }

    /// The lane's session has ended: what it was given has no answer.
    pub(super) fn fail_sent(&mut self, key: LaneKey) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        for request in std::mem::take(&mut lane.sent_requests) {
            self.requests.remove(request);
            self.out.push(Action::Fail {
                request,
                fault: RequestFault::Lost,
            });
        }
    }

    /// The link is down: what waits for a lane that backs off would wait in vain.
    pub(super) fn fail_hopeless(&mut self) {
        let hopeless: Vec<LaneKey> = self
            .lanes
            .iter()
            .filter(|(_, lane)| {
                matches!(lane.state, LaneState::BackOff { .. }) && !lane.waiting_requests.is_empty()
            })
            .map(|(key, _)| key)
            .collect();
        for key in hopeless {
            self.fail_waiting(key, RequestFault::Unreachable, None);
        }
    }

    fn detach(&mut self, key: LaneKey, request: RequestId) {
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.waiting_requests.retain(|other| *other != request);
            lane.sent_requests.retain(|other| *other != request);
        }
        self.touch(key);
    }
}

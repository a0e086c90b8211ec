//! Opening and closing sessions, failures and back-off, doubtful identities.

use std::time::{Duration, Instant};

use edgehub_proto::identity::Identity;

use super::{
    actions::{Action, Link, Report, Verdict},
    cause::{CloseCause, LinkEvidence},
    lane::{HeadFault, Lane, LaneState, Ready},
    renewal::Renewal,
    requests::RequestFault,
    scheduler::{Now, ROOM_CHECK_EVERY, Scheduler},
    session::SessionId,
    table::LaneKey,
};
use crate::limits;

/// A session that lasted this long has proven that the lane works: its failures are forgotten. One
/// whose messages are accepted has proven it at once.
const PROVEN_AFTER: Duration = Duration::from_secs(30);

/// The same for a lane that hands messages back: they came, were not settled, and came again.
const HANDBACK_PROVEN_AFTER: Duration = Duration::from_secs(60);

/// How long a lane that nobody wants is remembered after its back-off.
const REMEMBER_FAILURES: Duration = Duration::from_secs(30);

/// An attempt to connect that is older than this when the link comes back waits for what the outage
/// swallowed, perhaps for many seconds: a new one gets through at once.
const REDIAL_AFTER: Duration = Duration::from_secs(1);

/// No lane's attempt is given up for that reason twice within this time, or a flapping neighbour
/// could keep a slow handshake from ever ending.
const REDIAL_EVERY: Duration = Duration::from_secs(30);

impl Scheduler {
    /// The session is open; its credential is good until `expires_at_ms`.
    pub fn opened(&mut self, session: SessionId, expires_at_ms: Option<u64>, now: Now) {
        self.link = Link::Up;
        self.has_recovered |= std::mem::take(&mut self.trouble);
        let Some(key) = self.lanes.find_session(session) else {
            return;
        };
        let renewal = expires_at_ms.map(|at| Renewal::new(now.unix_ms, at, &mut self.rng));
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        // A lane that is closing meanwhile (shutdown) stays so.
        if lane.state == LaneState::Opening(session) {
            lane.front_token = 0;
            lane.engaged = false;
            if lane.head_fault.is_none() {
                // The outage is over; how often in a row it failed counts until the lane is proven.
                lane.failing_since = None;
            }
            lane.state = LaneState::Ready(Ready {
                session,
                opened_at: now.instant,
                idle_since: None,
                renewal,
                drain_until: None,
            });
            if lane.renew_from.is_some() {
                self.maintain_at = now.instant;
            }
            self.ready += 1;
            self.touch(key);
        }
    }

    /// The session ended. Events of sessions that are over already are ignored.
    pub fn closed(&mut self, session: SessionId, cause: &CloseCause, now: Now) {
        let Some(key) = self.lanes.unbind(session) else {
            return;
        };
        let reaction = cause.reaction();
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        if let LaneState::Ready(ready) = lane.state {
            self.ready = self.ready.saturating_sub(1);
            let lasted = now.instant.saturating_duration_since(ready.opened_at);
            if lasted >= PROVEN_AFTER {
                lane.forget_failures();
            }
            if lasted >= HANDBACK_PROVEN_AFTER {
                lane.handbacks = 0;
            }
        }
        lane.engaged = false;
        if reaction.hands_back {
            lane.handbacks = lane.handbacks.saturating_add(1);
        }
        self.note_link(reaction.link);
        self.fail_sent(key);
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let head = lane
            .oldest_in_flight()
            .map(|sent| (sent.queue, sent.offset));
        if reaction.failure || head.is_some() {
            self.bytes = self.bytes.saturating_sub(lane.rewind());
        } else {
            lane.in_flight.clear();
        }
        self.forget_scans(key);
        if !reaction.failure {
            self.wait(key);
            return;
        }
        if self.link != Link::Up {
            self.fail_waiting(key, RequestFault::Unreachable, None);
        }
        // Also when nobody wants the lane any more: who comes and goes, or asks again and again,
        // must not connect as often.
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        lane.failures = lane.failures.saturating_add(1);
        lane.failing_since.get_or_insert(now.instant);
        if reaction.suspect_head
            && let Some((queue, offset)) = head
        {
            self.note_head_fault(key, queue, offset);
        }
        self.back_off(key, cause, now);
    }

    /// The answer to [`Action::Refresh`], and what the scope says of [`Scheduler::doubtful`]
    /// identities when it changes. Tells whether the identity's messages are dropped from now on.
    pub fn identity_checked(&mut self, identity: &Identity, verdict: Verdict) -> bool {
        let Some(key) = self.lanes.find(identity) else {
            return false;
        };
        let Some(lane) = self.lanes.get_mut(key) else {
            return false;
        };
        let was_dropping = lane.state == LaneState::Dropping;
        let doubtful = lane.is_doubtful();
        match verdict {
            Verdict::Retry if doubtful => {
                self.forget_scans(key);
                self.wait(key);
            }
            Verdict::Gone if doubtful => {
                lane.state = LaneState::Dropping;
                self.lanes.set_timer(key, None);
                self.fail_waiting(key, RequestFault::Gone, None);
                self.touch(key);
                return !was_dropping;
            }
            // Not known, or too late, because the lane tries again already: the next refusal asks
            // again.
            Verdict::Gone | Verdict::Retry | Verdict::Unknown => lane.refreshed = false,
        }
        false
    }

    /// Opens sessions for waiting lanes as far as rate and number allow.
    pub(super) fn open_sessions(&mut self, now: Now) {
        while !self.stopping {
            let Some(key) = self.row.first() else {
                return;
            };
            if !self.lanes.get(key).is_some_and(Lane::is_wanted) {
                self.remove_lane(key);
                continue;
            }
            if self.lanes.sessions() >= self.config.connections_max {
                self.make_room(now);
                return;
            }
            if !self.may_connect(now) {
                return;
            }
            self.leave_row(key);
            let session = SessionId(self.next_session);
            self.next_session += 1;
            if let Some(lane) = self.lanes.get_mut(key) {
                lane.state = LaneState::Opening(session);
                lane.opening_since = Some(now.instant);
                lane.renew_from = None;
                let (identity, needs) = (lane.sender.clone(), lane.needs);
                self.lanes.bind(session, key);
                self.out.push(Action::Open {
                    session,
                    identity,
                    needs,
                });
            }
        }
    }

    /// Takes a place in the rate of connects. While the link is down a few attempts find its
    /// return as soon as many would.
    fn may_connect(&mut self, now: Now) -> bool {
        if self.link != Link::Down {
            return self.connects.take(now.instant);
        }
        self.connects.next_at(now.instant) <= now.instant
            && self.probes.take(now.instant)
            && self.connects.take(now.instant)
    }

    /// Stops sending on the lane's session and closes it when nothing is in flight, or at
    /// `deadline`.
    pub(super) fn drain(&mut self, key: LaneKey, deadline: Instant) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        match &mut lane.state {
            LaneState::Opening(session) => {
                let session = *session;
                lane.state = LaneState::Closing(session);
                self.out.push(Action::Close { session });
            }
            LaneState::Ready(ready) => {
                ready.drain_until = Some(deadline);
                self.forget_scans(key);
                self.lanes.set_timer(key, Some(deadline));
                self.touch(key);
            }
            LaneState::BackOff { .. }
            | LaneState::Closing(_)
            | LaneState::Dropping
            | LaneState::Waiting => {}
        }
    }

    /// Asks for the end of the lane's open session.
    pub(super) fn close(&mut self, key: LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key)
            && let LaneState::Ready(ready) = lane.state
        {
            lane.state = LaneState::Closing(ready.session);
            self.ready = self.ready.saturating_sub(1);
            self.out.push(Action::Close {
                session: ready.session,
            });
            self.forget_scans(key);
            self.lanes.set_timer(key, None);
        }
    }

    /// All connections are used and others wait: idle ones that nobody needs go first, then those
    /// that have had theirs the longest, if for longer than the lease, and of these the ones with
    /// needs last.
    fn make_room(&mut self, now: Now) {
        if now.instant < self.room_check_at {
            return;
        }
        self.room_check_at = now.instant + ROOM_CHECK_EVERY;
        let mut idle = Vec::new();
        let mut busy = Vec::new();
        let mut leaving = 0_usize;
        for key in self.lanes.session_keys() {
            match self.lanes.get(key).map(|lane| lane.state) {
                Some(
                    LaneState::Closing(_)
                    | LaneState::Ready(Ready {
                        drain_until: Some(_),
                        ..
                    }),
                ) => leaving += 1,
                Some(LaneState::Ready(Ready {
                    idle_since: Some(since),
                    ..
                })) => {
                    idle.push((since, key));
                }
                Some(LaneState::Ready(Ready { opened_at, .. }))
                    if now.instant.saturating_duration_since(opened_at) >= self.config.lease =>
                {
                    let is_needed = self.lanes.get(key).is_some_and(|lane| lane.needs.any());
                    busy.push((is_needed, opened_at, key));
                }
                _ => {}
            }
        }
        let wanted = self.row.len().saturating_sub(leaving);
        idle.sort_unstable();
        busy.sort_unstable();
        let spare = wanted.saturating_sub(idle.len());
        for (_, key) in idle.into_iter().take(wanted) {
            self.close(key);
        }
        for (_, _, key) in busy.into_iter().take(spare) {
            self.drain(key, now.instant + self.config.drain_timeout);
        }
    }

    fn back_off(&mut self, key: LaneKey, cause: &CloseCause, now: Now) {
        let reaction = cause.reaction();
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let failing_for = lane.failing_for(now.instant);
        // The first time at once; a consumer that never settles must not make the lane spin.
        let handbacks = lane.handbacks.saturating_mul(2).saturating_sub(1);
        let steps = lane.failures.max(handbacks);
        let delay = self.config.backoff.delay(steps, failing_for, &mut self.rng);
        lane.state = LaneState::BackOff {
            cut_short: reaction.cut_short,
            refused: reaction.refresh,
            is_over: false,
        };
        let identity = lane.sender.clone();
        if reaction.refresh && !std::mem::replace(&mut lane.refreshed, true) {
            self.out.push(Action::Refresh {
                identity: identity.clone(),
            });
        }
        let failures = lane.failures;
        self.lanes.set_timer(key, Some(now.instant + delay));
        self.fail_waiting(key, RequestFault::Unreachable, Some(now.instant + delay));
        self.out.push(Action::Report(Report::Failed {
            identity,
            cause: cause.clone(),
            failures,
            retry_in: delay,
        }));
    }

    /// The lane may connect again. If nobody wants it, it is remembered for a while and forgotten
    /// then: who comes and goes must not start with the shortest wait each time.
    pub(super) fn end_back_off(&mut self, key: LaneKey, was_over: bool, now: Now) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        match &mut lane.state {
            LaneState::BackOff { is_over, .. } if !was_over => *is_over = true,
            _ => {
                self.wait(key);
                return;
            }
        }
        if lane.is_wanted() {
            self.wait(key);
        } else {
            self.lanes
                .set_timer(key, Some(now.instant + REMEMBER_FAILURES));
        }
    }

    fn note_head_fault(&mut self, key: LaneKey, queue: usize, offset: u64) {
        let accepted = self.accepted;
        let alone = self.lanes.len() == 1;
        let priority = self.queues.get(queue).map_or(0, |state| state.priority);
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let fault = match lane.head_fault {
            Some(fault) if (fault.queue, fault.offset) == (queue, offset) => HeadFault {
                count: fault.count.saturating_add(1),
                ..fault
            },
            _ => HeadFault {
                queue,
                offset,
                count: 1,
                accepted_before: accepted,
            },
        };
        lane.head_fault = Some(fault);
        let others_pass = alone || accepted > fault.accepted_before;
        if fault.count.is_multiple_of(limits::SUSPECT_REPORT_AFTER) && others_pass {
            let identity = lane.sender.clone();
            let times = fault.count;
            let report = Report::SuspectMessage {
                identity,
                priority,
                offset,
                times,
            };
            self.out.push(Action::Report(report));
        }
    }

    fn note_link(&mut self, evidence: LinkEvidence) {
        match evidence {
            LinkEvidence::Answered => self.link = Link::Up,
            LinkEvidence::Neutral => {}
            LinkEvidence::Silent => {
                self.trouble = true;
                if self.ready == 0 && self.link != Link::Down {
                    self.link = Link::Down;
                    self.fail_hopeless();
                }
            }
        }
    }

    /// The upstream is back: nobody waits for what only an outage was the reason for.
    pub(super) fn recover(&mut self, now: Now) {
        if std::mem::take(&mut self.has_recovered) && !self.stopping {
            self.redial(now);
            self.cut_short();
        }
    }

    /// Gives up what began to connect while it was away, so that it connects anew. Without this a
    /// lane could wait until the retransmission of its first packet, or until its time-out.
    fn redial(&mut self, now: Now) {
        for key in self.lanes.session_keys() {
            let Some(lane) = self.lanes.get_mut(key) else {
                continue;
            };
            let LaneState::Opening(session) = lane.state else {
                continue;
            };
            let since =
                |at: Option<Instant>| at.map(|at| now.instant.saturating_duration_since(at));
            let is_old = since(lane.opening_since).is_some_and(|age| age >= REDIAL_AFTER);
            let was_redialed = since(lane.redialed_at).is_some_and(|age| age < REDIAL_EVERY);
            if is_old && !was_redialed {
                lane.redialed_at = Some(now.instant);
                lane.state = LaneState::Closing(session);
                self.out.push(Action::Close { session });
            }
        }
    }

    /// Ends back-offs that only the outage was the reason for, those of lanes with needs first. The
    /// rate limit of connects staggers them.
    fn cut_short(&mut self) {
        let mut ended: Vec<(bool, Option<Instant>, LaneKey)> = self
            .lanes
            .iter()
            .filter(|(_, lane)| {
                matches!(
                    lane.state,
                    LaneState::BackOff {
                        cut_short: true,
                        is_over: false,
                        ..
                    }
                )
            })
            .map(|(key, lane)| (!lane.needs.any(), lane.timer, key))
            .collect();
        ended.sort_unstable();
        for (_, _, key) in ended {
            self.wait(key);
        }
    }
}

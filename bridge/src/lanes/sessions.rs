//! Opening and closing sessions, failures and back-off, doubtful identities.

use std::time::Instant;

use edgehub_proto::identity::Identity;

use super::{
    cause::{CloseCause, LinkEvidence},
    lane::{HeadFault, LaneState, Ready},
    renewal,
    scheduler::{Action, Link, Now, ROOM_CHECK_EVERY, Report, Scheduler, Verdict},
    session::SessionId,
    table::LaneKey,
};
use crate::limits;

impl Scheduler {
    /// The session is open; its credential is good until `expires_at_ms`.
    pub fn opened(&mut self, session: SessionId, expires_at_ms: Option<u64>, now: Now) {
        self.link = Link::Up;
        if std::mem::take(&mut self.trouble) {
            self.cut_short();
        }
        let Some(key) = self.lanes.find_session(session) else {
            return;
        };
        let renew_at_ms =
            expires_at_ms.map(|at| renewal::renew_at_ms(now.unix_ms, at, &mut self.rng));
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        // A lane that is closing meanwhile (shutdown) stays so.
        if lane.state == LaneState::Opening(session) {
            lane.front_token = 0;
            lane.state = LaneState::Ready(Ready {
                session,
                opened_at: now.instant,
                idle_since: None,
                renew_at_ms,
                drain_until: None,
            });
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
        if matches!(lane.state, LaneState::Ready(_)) {
            self.ready = self.ready.saturating_sub(1);
        }
        match reaction.link {
            LinkEvidence::Answered => self.link = Link::Up,
            LinkEvidence::Neutral => {}
            LinkEvidence::Silent => {
                self.trouble = true;
                if self.ready == 0 {
                    self.link = Link::Down;
                }
            }
        }
        let head = lane
            .oldest_in_flight()
            .map(|sent| (sent.queue, sent.offset));
        if reaction.failure || head.is_some() {
            self.bytes = self.bytes.saturating_sub(lane.rewind());
        } else {
            lane.in_flight.clear();
        }
        self.forget_scans(key);
        self.lanes.set_timer(key, None);
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        if !lane.has_waiting() {
            self.lanes.remove(key);
            return;
        }
        if !reaction.failure {
            self.wait(key);
            return;
        }
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
    /// identities when it changes.
    pub fn identity_checked(&mut self, identity: &Identity, verdict: Verdict) {
        let Some(key) = self.lanes.find(identity) else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let doubtful = lane.is_doubtful();
        match verdict {
            Verdict::Retry if doubtful => {
                self.forget_scans(key);
                self.wait(key);
            }
            Verdict::Gone if doubtful => {
                lane.state = LaneState::Dropping;
                self.lanes.set_timer(key, None);
                self.touch(key);
            }
            // Not known, or too late, because the lane tries again already: the next refusal asks
            // again.
            Verdict::Gone | Verdict::Retry | Verdict::Unknown => lane.refreshed = false,
        }
    }

    /// Opens sessions for waiting lanes as far as rate and number allow.
    pub(super) fn open_sessions(&mut self, now: Now) {
        while !self.stopping {
            let Some(key) = self.waiting.front().copied() else {
                return;
            };
            let is_waiting = self
                .lanes
                .get(key)
                .is_some_and(|lane| lane.state == LaneState::Waiting);
            if !is_waiting {
                self.waiting.pop_front();
                continue;
            }
            if self.lanes.sessions() >= self.config.connections_max {
                self.make_room(now);
                return;
            }
            if !self.connects.take(now.instant) {
                return;
            }
            self.waiting.pop_front();
            let session = SessionId(self.next_session);
            self.next_session += 1;
            if let Some(lane) = self.lanes.get_mut(key) {
                lane.state = LaneState::Opening(session);
                let identity = lane.sender.clone();
                self.lanes.bind(session, key);
                self.out.push(Action::Open { session, identity });
            }
        }
    }

    /// Puts a lane without a session into the row for a connection.
    pub(super) fn wait(&mut self, key: LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key) {
            lane.state = LaneState::Waiting;
            self.waiting.push_back(key);
        }
        self.lanes.set_timer(key, None);
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

    /// All connections are used and others wait: idle ones go first, then those that have had
    /// theirs the longest, if for longer than the lease.
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
                    busy.push((opened_at, key));
                }
                _ => {}
            }
        }
        let wanted = self.waiting.len().saturating_sub(leaving);
        idle.sort_unstable();
        busy.sort_unstable();
        let spare = wanted.saturating_sub(idle.len());
        for (_, key) in idle.into_iter().take(wanted) {
            self.close(key);
        }
        for (_, key) in busy.into_iter().take(spare) {
            self.drain(key, now.instant + self.config.drain_timeout);
        }
    }

    fn back_off(&mut self, key: LaneKey, cause: &CloseCause, now: Now) {
        let reaction = cause.reaction();
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let failing_for = lane.failing_for(now.instant);
        let delay = self
            .config
            .backoff
            .delay(lane.failures, failing_for, &mut self.rng);
        lane.state = LaneState::BackOff {
            cut_short: reaction.cut_short,
            refused: reaction.refresh,
        };
        let identity = lane.sender.clone();
        if reaction.refresh && !std::mem::replace(&mut lane.refreshed, true) {
            self.out.push(Action::Refresh {
                identity: identity.clone(),
            });
        }
        let failures = lane.failures;
        self.lanes.set_timer(key, Some(now.instant + delay));
        self.out.push(Action::Report(Report::Failed {
            identity,
            cause: cause.clone(),
            failures,
            retry_in: delay,
        }));
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

    /// The upstream is back: lanes that wait because of the outage need not wait any longer. The
    /// rate limit of connects staggers them.
    fn cut_short(&mut self) {
        let mut ended: Vec<(Option<Instant>, LaneKey)> = self
            .lanes
            .iter()
            .filter(|(_, lane)| {
                matches!(
                    lane.state,
                    LaneState::BackOff {
                        cut_short: true,
                        ..
                    }
                )
            })
            .map(|(key, lane)| (lane.timer, key))
            .collect();
        ended.sort_unstable();
        for (_, key) in ended {
            self.wait(key);
        }
    }
}

//! From the lanes to their sessions and back: what goes out in a turn, what an answer settles.

use super::{
    actions::Action,
    intake::discard,
    lane::{InFlight, Lane, LaneState},
    message::{Disposition, DropReason, Outcome, Outgoing, Settled, cost_of, is_expired},
    scheduler::{Now, Scheduler},
    session::SessionId,
    table::LaneKey,
};
use crate::limits;

impl Scheduler {
    /// The session tells what became of messages, in any order.
    pub fn disposed(&mut self, session: SessionId, dispositions: &[(u64, Disposition)]) {
        let Some(key) = self.lanes.find_session(session) else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        for (token, disposition) in dispositions {
            let index = token
                .checked_sub(lane.front_token)
                .and_then(|n| usize::try_from(n).ok());
            let Some(sent) = index.and_then(|index| lane.in_flight.get_mut(index)) else {
                continue;
            };
            if std::mem::replace(&mut sent.settled, true) {
                continue;
            }
            let sent = *sent;
            lane.bytes = lane.bytes.saturating_sub(sent.cost);
            self.bytes = self.bytes.saturating_sub(sent.cost);
            let outcome = match disposition {
                Disposition::Accepted => {
                    self.accepted += 1;
                    Outcome::Done
                }
                Disposition::Unsendable(reason) => reason.outcome(),
            };
            let head_passed = lane
                .head_fault
                .is_some_and(|fault| (fault.queue, fault.offset) == (sent.queue, sent.offset));
            if head_passed {
                lane.head_fault = None;
            }
            lane.forget_failures();
            if let Some(queue) = self.queues.get_mut(sent.queue) {
                queue.settle(Settled {
                    offset: sent.offset,
                    shared: sent.shared,
                    outcome,
                });
            }
        }
        while lane.in_flight.front().is_some_and(|sent| sent.settled) {
            lane.in_flight.pop_front();
            lane.front_token += 1;
        }
        self.touch(key);
    }

    /// Sends what can be sent and brings timers and rows of every lane that changed up to date.
    pub(super) fn look_at_dirty_lanes(&mut self, now: Now) {
        let mut dirty = std::mem::take(&mut self.dirty);
        if self.queues.len() > 1 {
            // Among lanes, the higher priority goes first too.
            dirty.sort_by_cached_key(|key| {
                self.lanes.get(*key).map_or(usize::MAX, Lane::head_queue)
            });
        }
        for key in dirty {
            if let Some(lane) = self.lanes.get_mut(key) {
                lane.dirty = false;
                self.send_requests(key);
                self.send(key, now);
                self.follow_up(key, now);
            }
        }
    }

    /// Fills the lane's window.
    fn send(&mut self, key: LaneKey, now: Now) {
        // The main readers stand still then: to wait for them would be for ever.
        let is_full = self.is_full();
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let LaneState::Ready(ready) = lane.state else {
            return;
        };
        if ready.drain_until.is_some() {
            return;
        }
        let is_suspect = lane
            .head_fault
            .is_some_and(|fault| fault.count >= limits::SUSPECT_ALONE_AFTER);
        let window = if is_suspect { 1 } else { self.config.window };
        let mut batch = Vec::new();
        while lane.in_flight.len() < window {
            let mut chosen = None;
            // A lane that is behind in one queue holds nothing of lower ones (see `make_way`).
            for (index, (part, state)) in lane.parts.iter().zip(&self.queues).enumerate() {
                if !part.buffer.is_empty() {
                    if state.unconfirmed.len() >= self.config.unconfirmed_max {
                        self.blocked.push(key);
                    } else {
                        chosen = Some(index);
                    }
                    break;
                }
                if !state.is_read() && !is_full {
                    let lower_waits = lane
                        .parts
                        .iter()
                        .skip(index + 1)
                        .any(|part| !part.buffer.is_empty());
                    if lower_waits {
                        self.blocked.push(key);
                        break;
                    }
                }
            }
            let Some(index) = chosen else { break };
            let Some(part) = lane.parts.get_mut(index) else {
                break;
            };
            let Some(state) = self.queues.get_mut(index) else {
                break;
            };
            let Some(entry) = part.buffer.pop_front() else {
                break;
            };
            let cost = cost_of(&entry);
            lane.buffered = lane.buffered.saturating_sub(1);
            if is_expired(&entry, now.unix_ms) {
                lane.bytes = lane.bytes.saturating_sub(cost);
                self.bytes = self.bytes.saturating_sub(cost);
                discard(state, &mut self.discarded, entry, DropReason::TtlExpiry);
                continue;
            }
            let token = lane.front_token + lane.in_flight.len() as u64;
            lane.in_flight.push_back(InFlight {
                queue: index,
                offset: entry.offset,
                shared: entry.shared,
                cost,
                settled: false,
            });
            let resend = entry.offset < part.sent_below;
            part.sent_below = part.sent_below.max(entry.offset + 1);
            batch.push(Outgoing {
                token,
                priority: state.priority,
                resend,
                entry,
            });
        }
        if !batch.is_empty() {
            self.out.push(Action::Send {
                session: ready.session,
                batch,
            });
        }
    }

    /// What follows from a lane's new situation: scans, idle timer, the end of a drain or of the
    /// lane.
    fn follow_up(&mut self, key: LaneKey, now: Now) {
        for queue in 0..self.queues.len() {
            let turn = self.next_scan_turn;
            self.next_scan_turn += 1;
            self.want_scan(queue, key, turn);
        }
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let is_wanted = lane.is_wanted();
        if lane.has_work() {
            lane.released = false;
        }
        let patience = if lane.released {
            self.config.release_after.min(self.config.idle_close)
        } else {
            self.config.idle_close
        };
        let nothing_in_flight = lane.in_flight.is_empty() && lane.sent_requests.is_empty();
        match &mut lane.state {
            LaneState::Ready(ready) if ready.drain_until.is_some() => {
                if nothing_in_flight {
                    self.close(key);
                }
            }
            LaneState::Ready(ready) if is_wanted => {
                ready.idle_since = None;
                self.lanes.set_timer(key, None);
            }
            LaneState::Ready(ready) => {
                if ready.idle_since.is_none() {
                    ready.idle_since = Some(now.instant);
                    self.lanes.set_timer(key, Some(now.instant + patience));
                }
            }
            LaneState::BackOff { is_over: true, .. } if is_wanted => self.wait(key),
            LaneState::Dropping | LaneState::Waiting if !is_wanted => self.remove_lane(key),
            LaneState::BackOff { .. }
            | LaneState::Closing(_)
            | LaneState::Dropping
            | LaneState::Opening(_)
            | LaneState::Waiting => {}
        }
    }
}

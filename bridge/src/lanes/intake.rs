//! From the queues into the lanes: what to read next, and where each entry goes.
//!
//! Each queue has one main reader, which goes through it once, and catch-up scans for lanes that
//! had no room (or no connection) when the main reader passed. One scan serves all lanes that want
//! one and are at or behind its start; the lane that has waited longest decides where it starts.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use edgehub_proto::identity::Identity;

use super::{
    actions::{Action, Link},
    lane::LaneState,
    message::{Discarded, DropReason, Entry, Settled, cost_of},
    queue::{QueueState, ReadFilter, Reading, SenderKey},
    scheduler::{Now, Scheduler},
    table::LaneKey,
};
use crate::limits;

/// Where a lane was when a scan that serves it began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Participant {
    key: LaneKey,
    /// Its place in the row.
    turn: u64,
    /// The offset that it wants next; moves as entries come.
    expects: u64,
    /// `expects` at the start of the scan.
    began_at: u64,
}

/// Pause after a read that failed or brought nothing new although the store has more.
const READ_RETRY: Duration = Duration::from_millis(200);

impl Scheduler {
    /// The store has committed up to `next_offset` of a queue.
    pub fn queue_grew(&mut self, queue: usize, next_offset: u64) {
        if let Some(state) = self.queues.get_mut(queue) {
            state.tail = state.tail.max(next_offset);
        }
    }

    /// A read brought `entries`; the store goes on at `next`.
    pub fn read_done(&mut self, queue: usize, entries: Vec<Entry>, next: u64, now: Now) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        match state.reading.take() {
            None => {}
            Some(Reading::Main) => {
                state.main_turn = false;
                if next <= state.next && state.next < state.tail {
                    state.read_retry_at = Some(now.instant + READ_RETRY);
                }
                for entry in entries {
                    self.offer_new(queue, entry);
                }
                let Some(state) = self.queues.get_mut(queue) else {
                    return;
                };
                state.next = state.next.max(next);
                state.tail = state.tail.max(next);
                if state.next >= state.tail || self.is_full() {
                    self.unblock();
                }
            }
            Some(Reading::Scan(participants)) => {
                state.main_turn = true;
                let moved = participants.values().map(|one| one.began_at).min();
                if moved.is_some_and(|from| next <= from) {
                    state.read_retry_at = Some(now.instant + READ_RETRY);
                }
                self.scanned(queue, participants, entries, next);
            }
        }
        self.end_read(queue);
    }

    fn end_read(&mut self, queue: usize) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        if !state.confirmed_late.is_empty() {
            state.read_ended();
            self.unblock();
        }
    }

    /// A read failed: tried again a little later.
    pub fn read_failed(&mut self, queue: usize, now: Now) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        state.read_retry_at = Some(now.instant + READ_RETRY);
        if let Some(Reading::Scan(participants)) = state.reading.take() {
            for one in participants.into_values() {
                self.want_scan(queue, one.key, one.turn);
            }
        }
        self.end_read(queue);
    }

    /// Starts a read of each queue that has something to read and none under way.
    pub(super) fn start_reads(&mut self, now: Now) {
        for queue in 0..self.queues.len() {
            let main_paused = self.is_main_reader_paused();
            let Some(state) = self.queues.get_mut(queue) else {
                return;
            };
            if state.read_retry_at.is_some_and(|at| at <= now.instant) {
                state.read_retry_at = None;
            }
            if self.stopping
                || state.reading.is_some()
                || state.read_retry_at.is_some()
                || state.unconfirmed.len() >= self.config.unconfirmed_max
            {
                continue;
            }
            let wants_main = state.next < state.tail && !main_paused;
            let wants_scan = !state.wants.is_empty();
            let main_turn = state.main_turn;
            let read = if wants_main && (main_turn || !wants_scan) {
                self.main_read(queue)
            } else if wants_scan {
                self.scan_read(queue)
            } else {
                None
            };
            self.out.extend(read);
        }
    }

    /// With the link down, more lanes would only mean more lanes that have fallen behind. Lanes
    /// whose identity is in doubt are no probes: they may never try the link.
    fn is_main_reader_paused(&self) -> bool {
        let hopeless = self.link != Link::Up
            && self.ready == 0
            && self.lanes.len() >= limits::PROBE_LANES.min(self.config.lanes_max)
            && self.has_probes();
        hopeless || self.is_full()
    }

    /// No further lane may be made for messages, so the main readers stand still. Lanes that only
    /// listen are as many as clients are connected, which others bound.
    pub(super) fn is_full(&self) -> bool {
        self.lanes.len().saturating_sub(self.needy) >= self.config.lanes_max
    }

    /// Enough lanes connect by themselves.
    fn has_probes(&self) -> bool {
        let enough = limits::PROBE_LANES.min(self.config.lanes_max);
        let probes = self
            .lanes
            .iter()
            .filter(|(_, lane)| lane.is_probing() && !lane.is_doubtful());
        probes.take(enough).count() >= enough
    }

    fn main_read(&mut self, queue: usize) -> Option<Action> {
        let state = self.queues.get_mut(queue)?;
        let skip = state.skip.get_or_insert_with(|| {
            let behind = self.lanes.iter().filter(|(_, lane)| {
                lane.parts
                    .get(queue)
                    .is_some_and(|part| part.behind_from.is_some())
            });
            Arc::new(
                behind
                    .map(|(_, lane)| SenderKey(lane.sender.clone()))
                    .collect::<HashSet<_>>(),
            )
        });
        let filter = ReadFilter::all_but(skip.clone());
        state.reading = Some(Reading::Main);
        Some(Action::Read {
            queue,
            from: state.next,
            filter,
        })
    }

    fn scan_read(&mut self, queue: usize) -> Option<Action> {
        let state = self.queues.get_mut(queue)?;
        let mut participants = HashMap::new();
        let mut wanted = HashMap::new();
        let mut from = None;
        for (turn, key) in std::mem::take(&mut state.wants) {
            let Some(lane) = self.lanes.get_mut(key) else {
                continue;
            };
            let sender = lane.sender.clone();
            let Some(part) = lane.parts.get_mut(queue) else {
                continue;
            };
            part.scan_turn = None;
            let Some(expects) = part.behind_from else {
                continue;
            };
            // The first in the row decides where the scan starts; lanes further behind wait for
            // one of the next, which they will lead.
            if expects >= *from.get_or_insert(expects) {
                wanted.insert(SenderKey(sender.clone()), expects);
                let one = Participant {
                    key,
                    turn,
                    expects,
                    began_at: expects,
                };
                participants.insert(sender, one);
            } else {
                part.scan_turn = Some(turn);
                state.wants.insert((turn, key));
            }
        }
        let from = from?;
        state.reading = Some(Reading::Scan(participants));
        Some(Action::Read {
            queue,
            from,
            filter: ReadFilter::only(wanted, state.next),
        })
    }

    /// The main reader brought an entry.
    fn offer_new(&mut self, queue: usize, entry: Entry) {
        let key = self
            .lanes
            .find(&entry.sender)
            .unwrap_or_else(|| self.new_lane(entry.sender.clone()));
        let admits = self.admits(key, queue, cost_of(&entry))
            || (self.make_way(key, queue) && self.admits(key, queue, cost_of(&entry)));
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let is_dropping = lane.state == LaneState::Dropping;
        let Some(part) = lane.parts.get_mut(queue) else {
            return;
        };
        if part.behind_from.is_some() || state.unconfirmed.contains(&entry.offset) {
            return;
        }
        if is_dropping {
            discard(
                state,
                &mut self.discarded,
                entry,
                DropReason::DeviceInvalidState,
            );
        } else if admits {
            let cost = cost_of(&entry);
            part.buffer.push_back(entry);
            lane.buffered += 1;
            lane.bytes += cost;
            self.bytes += cost;
        } else {
            part.fall_behind(entry.offset);
            state.skip = None;
        }
        self.touch(key);
    }

    /// A scan brought entries.
    fn scanned(
        &mut self,
        queue: usize,
        mut participants: HashMap<Identity, Participant>,
        entries: Vec<Entry>,
        next: u64,
    ) {
        let mut left = Vec::new();
        for entry in entries {
            let Some(one) = participants.get_mut(&entry.sender) else {
                continue;
            };
            let admits = self.admits(one.key, queue, cost_of(&entry));
            let Some(state) = self.queues.get_mut(queue) else {
                return;
            };
            let Some(lane) = self.lanes.get_mut(one.key) else {
                continue;
            };
            let state_of_lane = lane.state;
            let may_send = lane.may_send();
            let Some(part) = lane.parts.get_mut(queue) else {
                continue;
            };
            if part.behind_from != Some(one.expects) {
                // The lane was rewound meanwhile: what it wants now is not what this scan looks at.
                left.extend(participants.remove(&entry.sender));
                continue;
            }
            if entry.offset < one.expects || entry.offset >= state.next {
                continue;
            }
            let after = entry.offset + 1;
            if state.unconfirmed.contains(&entry.offset) {
                // Settled by us, but the store has not heard of it.
            } else if state_of_lane == LaneState::Dropping {
                discard(
                    state,
                    &mut self.discarded,
                    entry,
                    DropReason::DeviceInvalidState,
                );
            } else if may_send && admits {
                let cost = cost_of(&entry);
                part.buffer.push_back(entry);
                lane.buffered += 1;
                lane.bytes += cost;
                self.bytes += cost;
            } else {
                part.behind_from = Some(entry.offset);
                part.needs = cost_of(&entry);
                left.extend(participants.remove(&entry.sender));
                continue;
            }
            part.behind_from = Some(after);
            part.needs = 0;
            one.expects = after;
        }
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        for one in participants.values() {
            let lane = self.lanes.get_mut(one.key);
            let Some(part) = lane.and_then(|lane| lane.parts.get_mut(queue)) else {
                continue;
            };
            if part.behind_from == Some(one.expects) {
                let from = one.expects.max(next);
                part.behind_from = (from < state.next).then_some(from);
                if part.behind_from.is_none() {
                    state.skip = None;
                }
            }
        }
        for one in participants.into_values().chain(left) {
            if one.began_at >= next {
                // The scan did not come as far as this lane, which keeps its place in the row.
                self.want_scan(queue, one.key, one.turn);
            }
            self.touch(one.key);
        }
    }

    /// Puts the lane into the row for a scan if it has use for one.
    pub(super) fn want_scan(&mut self, queue: usize, key: LaneKey, turn: u64) {
        let share = self.share();
        let Some(lane) = self.lanes.get(key) else {
            return;
        };
        let Some(part) = lane.parts.get(queue) else {
            return;
        };
        if part.behind_from.is_none() || part.scan_turn.is_some() {
            return;
        }
        // Half empty, so that a scan is worth its while, and with room for what did not fit last.
        let has_room = lane.buffered * 4 <= self.config.lane_entries_max
            && (lane.bytes * 2 <= share || lane.bytes == 0)
            && self.admits(key, queue, part.needs);
        if lane.state != LaneState::Dropping && !(lane.may_send() && has_room) {
            return;
        }
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        if let Some(Reading::Scan(participants)) = &state.reading
            && participants.contains_key(&lane.sender)
        {
            return;
        }
        let Some(part) = self
            .lanes
            .get_mut(key)
            .and_then(|lane| lane.parts.get_mut(queue))
        else {
            return;
        };
        part.scan_turn = Some(turn);
        state.wants.insert((turn, key));
    }

    /// Takes the lane out of all rows for scans; called whenever it goes back or stops sending.
    pub(super) fn forget_scans(&mut self, key: LaneKey) {
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        for (part, state) in lane.parts.iter_mut().zip(&mut self.queues) {
            if let Some(turn) = part.scan_turn.take() {
                state.wants.remove(&(turn, key));
            }
            state.skip = None;
        }
    }

    /// Bytes that one lane may hold now.
    fn share(&self) -> usize {
        let sessions = self.lanes.sessions().max(1);
        (self.config.bytes_max / sessions).min(self.config.lane_bytes_max)
    }

    /// Makes room for a message of `queue` by giving up what the lane holds of lower priorities,
    /// which could not be sent before it anyway. Tells whether there was any.
    ///
    /// Without this (and its counterpart in `admits`) a lane full of low priority would wait for
    /// the high priority that does not fit, and the other way round.
    fn make_way(&mut self, key: LaneKey, queue: usize) -> bool {
        let Some(lane) = self.lanes.get_mut(key) else {
            return false;
        };
        let before = lane.bytes;
        for (part, state) in lane.parts.iter_mut().zip(&mut self.queues).skip(queue + 1) {
            let Some(first) = part.buffer.front().map(|entry| entry.offset) else {
                continue;
            };
            part.fall_behind(first);
            state.skip = None;
            for entry in std::mem::take(&mut part.buffer) {
                lane.buffered = lane.buffered.saturating_sub(1);
                lane.bytes = lane.bytes.saturating_sub(cost_of(&entry));
            }
        }
        self.bytes = self.bytes.saturating_sub(before - lane.bytes);
        lane.bytes < before
    }

    /// Whether the lane has room for a message of this queue and cost.
    fn admits(&self, key: LaneKey, queue: usize, cost: usize) -> bool {
        let Some(lane) = self.lanes.get(key) else {
            return false;
        };
        let mut higher = lane.parts.iter().take(queue);
        let waits_for_higher = higher.any(|part| part.behind_from.is_some());
        if waits_for_higher || lane.buffered >= self.config.lane_entries_max {
            return false;
        }
        let total = self.bytes + cost;
        match lane.state {
            LaneState::BackOff { .. } | LaneState::Dropping => false,
            // Not connected yet: a little, so that the connection starts with work.
            LaneState::Waiting | LaneState::Opening(_) | LaneState::Closing(_) => {
                lane.in_flight.is_empty()
                    && lane.bytes + cost <= self.share().min(limits::PREFETCH_BYTES)
                    && total <= self.config.bytes_max / 2
            }
            // The first message always, or a few slow lanes could lock all others out.
            LaneState::Ready(_) => {
                lane.bytes == 0
                    || (lane.bytes + cost <= self.share() && total <= self.config.bytes_max)
            }
        }
    }
}

/// Settles an entry that is not sent.
pub(super) fn discard(
    state: &mut QueueState,
    discarded: &mut Vec<Discarded>,
    entry: Entry,
    reason: DropReason,
) {
    state.settle(Settled {
        offset: entry.offset,
        shared: entry.shared,
        outcome: reason.outcome(),
    });
    discarded.push(Discarded {
        priority: state.priority,
        reason,
        entry,
    });
}

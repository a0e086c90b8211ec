//! All lanes in memory.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use edgehub_proto::identity::Identity;

use super::{lane::Lane, session::SessionId};

/// Place of a lane in the table. Reused after the lane is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LaneKey(u32);

/// The lanes, by place, sender and session, and their timers.
#[derive(Debug, Default)]
pub(super) struct LaneTable {
    slots: Vec<Option<Lane>>,
    free: Vec<u32>,
    by_sender: HashMap<Identity, LaneKey>,
    by_session: HashMap<SessionId, LaneKey>,
    timers: BTreeSet<(Instant, LaneKey)>,
}

impl LaneTable {
    pub(super) fn len(&self) -> usize {
        self.by_sender.len()
    }

    /// Sessions from the request to open to the close.
    pub(super) fn sessions(&self) -> usize {
        self.by_session.len()
    }

    pub(super) fn get(&self, key: LaneKey) -> Option<&Lane> {
        self.slots.get(key.0 as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, key: LaneKey) -> Option<&mut Lane> {
        self.slots.get_mut(key.0 as usize)?.as_mut()
    }

    pub(super) fn find(&self, sender: &Identity) -> Option<LaneKey> {
        self.by_sender.get(sender).copied()
    }

    pub(super) fn find_session(&self, session: SessionId) -> Option<LaneKey> {
        self.by_session.get(&session).copied()
    }

    pub(super) fn insert(&mut self, lane: Lane) -> LaneKey {
        let sender = lane.sender.clone();
        let key = if let Some(index) = self.free.pop() {
            if let Some(slot) = self.slots.get_mut(index as usize) {
                *slot = Some(lane);
            }
            LaneKey(index)
        } else {
            self.slots.push(Some(lane));
            LaneKey(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
        };
        self.by_sender.insert(sender, key);
        key
    }

    pub(super) fn remove(&mut self, key: LaneKey) -> Option<Lane> {
        self.set_timer(key, None);
        let lane = self.slots.get_mut(key.0 as usize)?.take()?;
        self.by_sender.remove(&lane.sender);
        if let Some(session) = lane.session() {
            self.by_session.remove(&session);
        }
        self.free.push(key.0);
        Some(lane)
    }

    pub(super) fn bind(&mut self, session: SessionId, key: LaneKey) {
        self.by_session.insert(session, key);
    }

    pub(super) fn unbind(&mut self, session: SessionId) -> Option<LaneKey> {
        self.by_session.remove(&session)
    }

    /// Sets, moves or clears the lane's one timer.
    pub(super) fn set_timer(&mut self, key: LaneKey, at: Option<Instant>) {
        let Some(lane) = self.slots.get_mut(key.0 as usize).and_then(Option::as_mut) else {
            return;
        };
        if lane.timer == at {
            return;
        }
        if let Some(old) = lane.timer {
            self.timers.remove(&(old, key));
        }
        if let Some(new) = at {
            self.timers.insert((new, key));
        }
        lane.timer = at;
    }

    /// The next timer that is due, cleared.
    pub(super) fn pop_timer(&mut self, now: Instant) -> Option<LaneKey> {
        let (at, key) = *self.timers.first()?;
        if at > now {
            return None;
        }
        self.set_timer(key, None);
        Some(key)
    }

    pub(super) fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (LaneKey, &Lane)> {
        self.by_sender
            .values()
            .filter_map(|key| self.get(*key).map(|lane| (*key, lane)))
    }

    pub(super) fn keys(&self) -> Vec<LaneKey> {
        self.by_sender.values().copied().collect()
    }

    /// The keys of lanes that have a session.
    pub(super) fn session_keys(&self) -> Vec<LaneKey> {
        self.by_session.values().copied().collect()
    }

    pub(super) fn session_ids(&self) -> impl Iterator<Item = SessionId> {
        self.by_session.keys().copied()
    }
}

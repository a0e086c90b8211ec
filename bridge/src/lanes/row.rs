//! The row of lanes that wait for a connection.

use std::collections::BTreeMap;

use super::{lane::LaneState, scheduler::Scheduler, table::LaneKey};

/// Who came first is served first. A lane has one place at most and leaves it when it stops
/// waiting, so the row is never longer than there are lanes.
#[derive(Debug, Default)]
pub(super) struct Row {
    places: BTreeMap<u64, LaneKey>,
    next: u64,
}

impl Row {
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    pub(super) fn first(&self) -> Option<LaneKey> {
        self.places.values().next().copied()
    }

    #[cfg(test)]
    pub(super) fn at(&self, place: u64) -> Option<LaneKey> {
        self.places.get(&place).copied()
    }
}

impl Scheduler {
    /// Puts a lane without a session into the row for a connection, or forgets it if it has no use
    /// for one.
    pub(super) fn wait(&mut self, key: LaneKey) {
        self.lanes.set_timer(key, None);
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        if !lane.is_wanted() {
            self.remove_lane(key);
            return;
        }
        lane.state = LaneState::Waiting;
        self.enter_row(key);
    }

    /// Gives a waiting lane its place at the end of the row.
    pub(super) fn enter_row(&mut self, key: LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key)
            && lane.place.is_none()
        {
            lane.place = Some(self.row.next);
            self.row.places.insert(self.row.next, key);
            self.row.next += 1;
        }
    }

    /// Takes the lane out of the row.
    pub(super) fn leave_row(&mut self, key: LaneKey) {
        if let Some(lane) = self.lanes.get_mut(key)
            && let Some(place) = lane.place.take()
        {
            self.row.places.remove(&place);
        }
    }

    /// Forgets a lane without a session.
    pub(super) fn remove_lane(&mut self, key: LaneKey) {
        self.leave_row(key);
        self.forget_scans(key);
        self.lanes.remove(key);
    }
}

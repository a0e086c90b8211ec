//! The scheduler's running totals against a recount, for its tests.

use super::{lane::LaneState, message::cost_of, scheduler::Scheduler};

impl Scheduler {
    /// Compares every running total with a recount.
    pub(super) fn check_consistency(&self) {
        let mut bytes = 0;
        let (mut ready, mut needy, mut waiting, mut requests) = (0, 0, 0, 0);
        for (key, lane) in self.lanes.iter() {
            let buffers = lane.parts.iter().flat_map(|part| &part.buffer);
            let buffered: usize = buffers.clone().map(cost_of).sum();
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
            needy += usize::from(lane.needs.any());
            // In the row is who waits, and nobody else.
            let in_row = lane.place.and_then(|place| self.row.at(place)) == Some(key);
            assert_eq!(in_row, lane.state == LaneState::Waiting, "{lane:?}");
            waiting += usize::from(in_row);
            let is_open = matches!(lane.state, LaneState::Ready(_) | LaneState::Closing(_));
            assert!(lane.sent_requests.is_empty() || is_open, "{lane:?}");
            let pending = lane.waiting_requests.iter().chain(&lane.sent_requests);
            assert!(pending.clone().count() <= self.config.lane_requests_max);
            for request in pending {
                assert_eq!(self.requests.lane_of(*request), Some(key), "{lane:?}");
                requests += 1;
            }
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
        assert_eq!((self.needy, self.row.len()), (needy, waiting));
        assert_eq!(self.requests.len(), requests);
        assert!(requests <= self.config.requests_max);
    }
}

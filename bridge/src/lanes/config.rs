//! Limits and durations of the lanes.

use std::time::Duration;

use super::backoff::Backoff;
use crate::limits;

/// How many lanes, how much in them, how patient they are.
///
/// Memory for messages is at most `bytes_max` plus one message per connection (the first message of
/// a connected lane is always let in, so that a few slow lanes cannot starve the others), whatever
/// the backlog.
#[derive(Clone, Debug)]
pub struct LaneConfig {
    /// Unsettled messages in flight per lane.
    pub window: usize,
    /// Messages waiting in one lane. More than that stay in the store and are read again later.
    pub lane_entries_max: usize,
    /// Bytes waiting and in flight in one lane.
    pub lane_bytes_max: usize,
    /// Bytes waiting and in flight in all lanes together.
    pub bytes_max: usize,
    /// Lanes in memory. Above it the store is not read for senders that have no lane yet.
    pub lanes_max: usize,
    /// Open and opening connections.
    pub connections_max: usize,
    /// New connections per second in the long run ...
    pub connects_per_second: f64,
    /// ... and at once.
    pub connects_burst: u32,
    /// A connection that nobody needs and that has had nothing to send for this long is closed.
    pub idle_close: Duration,
    /// The same for a connection whose identity needed to hear and does not any more: its client
    /// has gone, and the upstream shows the connection as the device's.
    pub release_after: Duration,
    /// Twin requests of one identity that wait to be sent or answered.
    pub lane_requests_max: usize,
    /// Twin requests of all identities that wait to be sent or answered.
    pub requests_max: usize,
    /// With all connections in use and other lanes waiting, a busy lane keeps its connection for at
    /// least this long.
    pub lease: Duration,
    /// How long a lane that is to give its connection back may wait for what is in flight.
    pub drain_timeout: Duration,
    /// Back-off after failures.
    pub backoff: Backoff,
    /// Entries per read from a queue.
    pub read_entries: usize,
    /// Bytes per read from a queue.
    pub read_bytes: usize,
    /// Entries looked at per read, including those that the filter leaves out.
    pub read_scan: usize,
    /// Messages whose settling the store has not confirmed. At this point nothing more is sent.
    pub unconfirmed_max: usize,
    /// Seed of back-off and renewal jitter.
    pub seed: u64,
}

impl Default for LaneConfig {
    fn default() -> Self {
        Self {
            window: limits::WINDOW_DEFAULT,
            lane_entries_max: limits::LANE_ENTRIES_MAX,
            lane_bytes_max: limits::LANE_BYTES_MAX,
            bytes_max: limits::LANES_BYTES_MAX,
            lanes_max: limits::LANES_MAX,
            connections_max: limits::CONNECTIONS_MAX,
            connects_per_second: limits::CONNECTS_PER_SECOND,
            connects_burst: limits::CONNECTS_BURST,
            idle_close: Duration::from_secs(3600),
            release_after: Duration::from_secs(60),
            lane_requests_max: limits::LANE_REQUESTS_MAX,
            requests_max: limits::REQUESTS_MAX,
            lease: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(20),
            backoff: Backoff::default(),
            read_entries: limits::READ_ENTRIES,
            read_bytes: limits::READ_BYTES,
            read_scan: limits::READ_SCAN,
            unconfirmed_max: limits::UNCONFIRMED_MAX,
            seed: 0,
        }
    }
}

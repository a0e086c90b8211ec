//! Says in the log why messages are dropped, without letting a client fill the log.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::telemetry::metrics::DropReason;

/// At most one line for each reason in this time; the next one says how many it stands for.
pub const DROP_LOG_PERIOD: Duration = Duration::from_secs(10);

/// When each reason was last written, and how often it happened since.
#[derive(Debug, Default)]
pub(super) struct DropLog(Mutex<HashMap<DropReason, (Instant, u64)>>);

impl DropLog {
    /// Whether to write a line now: then how many drops it stands for, this one included.
    pub(super) fn note(&self, reason: DropReason, now: Instant) -> Option<u64> {
        let mut reasons = self.0.lock();
        let Some((written_at, unwritten)) = reasons.get_mut(&reason) else {
            reasons.insert(reason, (now, 0));
            return Some(1);
        };
        *unwritten += 1;
        if now.saturating_duration_since(*written_at) < DROP_LOG_PERIOD {
            return None;
        }
        *written_at = now;
        Some(std::mem::take(unwritten))
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::clock::{Clock, ManualClock};

    use super::*;

    #[test]
    fn each_reason_is_written_once_in_a_period_and_none_is_lost() {
        let (log, clock) = (DropLog::default(), ManualClock::new(0));
        let note = |reason| log.note(reason, clock.instant());
        assert_eq!(note(DropReason::TooLarge), Some(1));
        assert_eq!(
            note(DropReason::UnknownTopic),
            Some(1),
            "a reason of its own"
        );
        for _ in 0..5 {
            assert_eq!(note(DropReason::TooLarge), None);
        }
        clock.advance(DROP_LOG_PERIOD - Duration::from_millis(1));
        assert_eq!(note(DropReason::TooLarge), None);
        clock.advance(Duration::from_millis(1));
        assert_eq!(note(DropReason::TooLarge), Some(7));
        assert_eq!(note(DropReason::TooLarge), None);
        clock.advance(10 * DROP_LOG_PERIOD);
        assert_eq!(note(DropReason::TooLarge), Some(2));
        assert_eq!(note(DropReason::UnknownTopic), Some(1));
    }
}

//! A token bucket on a clock that is passed in.

use std::time::{Duration, Instant};

/// Lets `burst` through at once and `per_second` in the long run.
///
/// Holds three numbers; taking is O(1) and never blocks: a caller that gets nothing asks
/// [`TokenBucket::next_at`] when to come again.
#[derive(Clone, Debug)]
pub(crate) struct TokenBucket {
    /// Time that one token takes to come back.
    interval: Duration,
    /// Most that may be owed: `burst` tokens' worth of time.
    depth: Duration,
    /// When the bucket was or will be full again. Each token taken moves it by one interval.
    full_at: Instant,
}

impl TokenBucket {
    /// Makes a full bucket. Rates below one per hour and bursts below one are raised to that.
    pub(crate) fn new(per_second: f64, burst: u32, now: Instant) -> Self {
        let interval = Duration::from_secs_f64(1.0 / per_second.clamp(1.0 / 3600.0, 1e6));
        Self {
            interval,
            depth: interval * burst.max(1),
            full_at: now,
        }
    }

    /// Takes one token if there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        if self.next_at(now) > now {
            return false;
        }
        self.full_at = self.full_at.max(now) + self.interval;
        true
    }

    /// When the next token is there: `now` if it is there already.
    pub(crate) fn next_at(&self, now: Instant) -> Instant {
        // A token is there while, after taking it, the bucket refills within its depth.
        let refilled = self.full_at.max(now) + self.interval;
        refilled
            .checked_sub(self.depth)
            .map_or(now, |at| at.max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_rate_then_refill() {
        let start = tokio::time::Instant::now().into_std();
        let at = |ms| start + Duration::from_millis(ms);
        let mut bucket = TokenBucket::new(10.0, 3, start);
        assert_eq!((0..5).filter(|_| bucket.take(start)).count(), 3);
        assert_eq!(bucket.next_at(start), at(100));
        assert!(!bucket.take(at(99)));
        assert!(bucket.take(at(100)));
        assert!(!bucket.take(at(100)));
        // A second idle refills the burst and no more than it.
        assert_eq!((0..20).filter(|_| bucket.take(at(1100))).count(), 3);
        // Over ten seconds: the burst's refill and the rate.
        let taken = (1100..=11_100).filter(|ms| bucket.take(at(*ms))).count();
        assert_eq!(taken, 100);
    }
}

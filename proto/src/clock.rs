//! Time, passed in everywhere, so that tests can move it (design.md I10).

use std::fmt::Debug;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Wall time and monotonic time.
pub trait Clock: Send + Sync + Debug {
    /// Milliseconds since 1970-01-01 UTC.
    fn unix_ms(&self) -> u64;
    /// Monotonic time.
    fn instant(&self) -> Instant;
}

/// The machine's clock; its wall time can be moved for tests.
#[derive(Debug, Default)]
pub struct SystemClock {
    offset_ms: AtomicI64,
}

impl SystemClock {
    /// The machine's time.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves [`Clock::unix_ms`] by so many milliseconds; monotonic time stays.
    pub fn set_offset_ms(&self, offset_ms: i64) {
        self.offset_ms.store(offset_ms, Ordering::Relaxed);
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn unix_ms(&self) -> u64 {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        ms.saturating_add_signed(self.offset_ms.load(Ordering::Relaxed))
    }

    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn instant(&self) -> Instant {
        Instant::now()
    }
}

/// A clock that stands until it is moved.
#[derive(Debug)]
pub struct ManualClock {
    start_unix_ms: u64,
    start: Instant,
    elapsed_ns: AtomicU64,
}

impl ManualClock {
    /// Stands at `unix_ms`.
    #[must_use]
    #[expect(
        clippy::disallowed_methods,
        reason = "an arbitrary beginning of monotonic time"
    )]
    pub fn new(unix_ms: u64) -> Self {
        Self {
            start_unix_ms: unix_ms,
            start: Instant::now(),
            elapsed_ns: AtomicU64::new(0),
        }
    }

    /// Moves both times forward, 584 years at most.
    pub fn advance(&self, by: Duration) {
        let ns = u64::try_from(by.as_nanos()).unwrap_or(u64::MAX);
        // Relaxed, and not saturating: a test moves its clock from one place.
        self.elapsed_ns.fetch_add(ns, Ordering::Relaxed);
    }

    fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.elapsed_ns.load(Ordering::Relaxed))
    }
}

impl Clock for ManualClock {
    fn unix_ms(&self) -> u64 {
        let elapsed_ms = u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.start_unix_ms.saturating_add(elapsed_ms)
    }

    fn instant(&self) -> Instant {
        self.start + self.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_clock_moves_by_its_offset() {
        let clock = SystemClock::new();
        let before = clock.unix_ms();
        clock.set_offset_ms(3_600_000);
        assert!(clock.unix_ms() >= before + 3_600_000);
        clock.set_offset_ms(-3_600_000);
        assert!(clock.unix_ms() < before);
    }

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::new(1000);
        let start = clock.instant();
        clock.advance(Duration::from_millis(250));
        assert_eq!(clock.unix_ms(), 1250);
        assert_eq!(clock.instant() - start, Duration::from_millis(250));
        for _ in 0..4 {
            clock.advance(Duration::from_micros(250));
        }
        assert_eq!(clock.unix_ms(), 1251, "parts of a millisecond add up");
    }
}

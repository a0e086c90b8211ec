//! The emulator's time: the system clock plus an offset that a test can move.
//!
//! Tokens, stamps and the registry use this time. Socket time-outs do not: they measure the real
//! machine.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tokio::sync::watch;

/// Wall clock with an offset. One per emulator, shared by everything in it.
#[derive(Debug)]
pub(crate) struct HubClock {
    offset_ms: watch::Sender<i64>,
}

impl HubClock {
    pub(crate) fn new() -> Self {
        Self {
            offset_ms: watch::Sender::new(0),
        }
    }

    /// Milliseconds since 1970 in the emulator's time.
    pub(crate) fn now_ms(&self) -> u64 {
        let real_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| {
                u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
            });
        real_ms.saturating_add_signed(self.offset_ms())
    }

    pub(crate) fn offset_ms(&self) -> i64 {
        *self.offset_ms.borrow()
    }

    /// Moves the clock. Everyone who sleeps until a moment looks again.
    pub(crate) fn set_offset_ms(&self, offset_ms: i64) {
        self.offset_ms.send_replace(offset_ms);
    }

    /// Returns when the emulator's time has reached `unix_ms`, also if the clock is moved.
    ///
    /// # Cancel safety
    /// Holds no state: dropping it loses nothing.
    pub(crate) async fn sleep_until(&self, unix_ms: u64) {
        // A bound on one sleep keeps far expiries (year 2100) away from the timer's own limits.
        const SLEEP_MAX: Duration = Duration::from_secs(3_600);
        let mut moved = self.offset_ms.subscribe();
        loop {
            moved.mark_unchanged();
            let remaining = unix_ms.saturating_sub(self.now_ms());
            if remaining == 0 {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(remaining).min(SLEEP_MAX)) => {}
                _ = moved.changed() => {}
            }
        }
    }
}

/// `2026-11-24T03:26:26.123Z`, the form of every time in answers, stamps and the ledger.
pub(crate) fn utc_text(unix_ms: u64) -> String {
    const FORMAT: &[BorrowedFormatItem<'_>] =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000)
        .ok()
        .and_then(|moment| moment.format(FORMAT).ok())
        // Only a clock offset beyond the year 9999 gets here.
        .unwrap_or_else(|| "9999-12-31T23:59:59.999Z".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_decimals_and_a_z() {
        assert_eq!(utc_text(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc_text(1_767_225_600_007), "2026-01-01T00:00:00.007Z");
    }

    #[tokio::test]
    async fn moving_the_clock_wakes_a_sleeper() {
        let clock = std::sync::Arc::new(HubClock::new());
        let until = clock.now_ms() + 3_600_000;
        let sleeper = tokio::spawn({
            let clock = clock.clone();
            async move { clock.sleep_until(until).await }
        });
        clock.set_offset_ms(3_600_000);
        tokio::time::timeout(Duration::from_secs(10), sleeper)
            .await
            .unwrap()
            .unwrap();
        assert!(clock.now_ms() >= until);
    }
}

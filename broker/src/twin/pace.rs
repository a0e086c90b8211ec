//! When something may be tried again.

use std::time::Instant;

use edgehub_proto::hub::UpstreamError;

use super::limits::{REFUSED_RETRY, RETRY_MAX, RETRY_MIN};

/// The circumstances of an event.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    /// Whether the upstream can be reached.
    pub(super) online: bool,
    /// A random number around 1 by which pauses are stretched.
    pub(super) jitter: f64,
}

/// When something may be tried again.
#[derive(Debug, Default)]
pub(super) struct Pace {
    not_before: Option<Instant>,
    failures: u32,
    /// Until the upstream can be reached again: somebody will say so.
    blocked: bool,
}

impl Pace {
    /// Nothing to do until something happens.
    pub(super) fn idle() -> Self {
        Self {
            blocked: true,
            ..Self::default()
        }
    }

    /// Not before `at`.
    pub(super) fn until(at: Instant) -> Self {
        Self {
            not_before: Some(at),
            ..Self::default()
        }
    }

    /// Nothing to do until something happens; the next pause grows from the last one.
    pub(super) fn hold(&mut self) {
        self.blocked = true;
    }

    /// When it is due, if it is at all.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        (!self.blocked).then(|| self.not_before.unwrap_or(now))
    }

    /// The upstream did not do it.
    pub(super) fn failed(&mut self, error: &UpstreamError, now: Now) {
        match error {
            UpstreamError::Refused { .. } => {
                self.failures = self.failures.saturating_add(1);
                self.not_before = Some(now.instant + REFUSED_RETRY);
            }
            _ if now.online => self.pause(now),
            _ => {
                self.failures = self.failures.saturating_add(1);
                self.blocked = true;
            }
        }
    }

    /// Waits longer than the last time.
    pub(super) fn pause(&mut self, now: Now) {
        let doublings = self.failures.min(16);
        self.failures = self.failures.saturating_add(1);
        let pause = RETRY_MIN.saturating_mul(1 << doublings).min(RETRY_MAX);
        self.blocked = false;
        self.not_before = Some(now.instant + pause.mul_f64(now.jitter));
    }

    pub(super) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// A pause after failures is over; any other holds.
    pub(super) fn forget_failures(&mut self) {
        let not_before = self.not_before.filter(|_| self.failures == 0);
        *self = Self {
            not_before,
            ..Self::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use edgehub_proto::clock::{Clock, ManualClock};

    use super::*;

    fn now(clock: &ManualClock, online: bool) -> Now {
        Now {
            instant: clock.instant(),
            online,
            jitter: 1.0,
        }
    }

    #[test]
    fn pauses_double_up_to_their_limit_and_end_with_the_next_connection() {
        let clock = ManualClock::new(0);
        let unavailable = UpstreamError::Unavailable(String::new());
        let mut pace = Pace::default();
        let start = clock.instant();
        assert_eq!(pace.due(start), Some(start));
        for seconds in [1, 2, 4, 8, 16, 32, 64, 120, 120, 120] {
            pace.failed(&unavailable, now(&clock, true));
            let due = Some(start + Duration::from_secs(seconds));
            assert_eq!(pace.due(start), due);
        }
        pace.forget_failures();
        assert_eq!(pace.due(start), Some(start));
        pace.failed(&UpstreamError::Busy { status: 429 }, now(&clock, true));
        assert_eq!(pace.due(start), Some(start + Duration::from_secs(1)));
    }

    #[test]
    fn without_a_link_nothing_is_tried() {
        let clock = ManualClock::new(0);
        let mut pace = Pace::default();
        pace.failed(
            &UpstreamError::Unavailable(String::new()),
            now(&clock, false),
        );
        assert_eq!(pace.due(clock.instant()), None);
        pace.forget_failures();
        assert!(pace.due(clock.instant()).is_some());
        let refused = UpstreamError::Refused { status: 401 };
        pace.failed(&refused, now(&clock, true));
        let due = clock.instant() + Duration::from_secs(600);
        assert_eq!(pace.due(clock.instant()), Some(due));
    }

    #[test]
    fn a_pause_that_is_no_failure_stays() {
        let clock = ManualClock::new(0);
        let at = clock.instant() + Duration::from_secs(5);
        let mut pace = Pace::until(at);
        pace.forget_failures();
        assert_eq!(pace.due(clock.instant()), Some(at));
    }
}

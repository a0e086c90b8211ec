//! How long a lane waits after a failure.

use std::time::Duration;

use rand::{Rng, RngExt};

/// The back-off of one lane: quick at first, at most a few seconds during the first minutes of an
/// outage, and then growing slowly to a long pause. Each lane has its own position on it.
#[derive(Clone, Debug)]
pub struct Backoff {
    /// Delay after the first failure; it doubles with each further one.
    pub base: Duration,
    /// Longest delay while the failure is younger than [`Backoff::short_phase`].
    pub short_max: Duration,
    /// How long a failure counts as fresh.
    pub short_phase: Duration,
    /// After the short phase the longest delay doubles once per this time ...
    pub long_step: Duration,
    /// ... up to this.
    pub long_max: Duration,
    /// Share by which each delay varies, 0.0 to 1.0: 0.2 is 80 % to 120 %.
    pub jitter: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(100),
            // With the jitter below five seconds.
            short_max: Duration::from_secs(4),
            short_phase: Duration::from_secs(600),
            long_step: Duration::from_secs(120),
            long_max: Duration::from_secs(120),
            jitter: 0.2,
        }
    }
}

impl Backoff {
    /// Delay before the attempt after the `failures`-th failure (counted from 1) of a lane that has
    /// been failing for `failing_for`.
    pub fn delay(&self, failures: u32, failing_for: Duration, rng: &mut impl Rng) -> Duration {
        let doublings = failures.saturating_sub(1).min(30);
        let grown = self.base.saturating_mul(1 << doublings);
        let delay = grown.min(self.max_after(failing_for));
        let jitter = self.jitter.clamp(0.0, 1.0);
        if jitter == 0.0 {
            return delay;
        }
        delay.mul_f64(rng.random_range(1.0 - jitter..=1.0 + jitter))
    }

    fn max_after(&self, failing_for: Duration) -> Duration {
        let Some(long_for) = failing_for.checked_sub(self.short_phase) else {
            return self.short_max;
        };
        let steps = long_for.as_secs_f64() / self.long_step.as_secs_f64().max(0.001);
        let max = self.short_max.as_secs_f64() * steps.min(30.0).exp2();
        Duration::from_secs_f64(max).min(self.long_max)
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn grows_to_the_short_limit_and_after_ten_minutes_slowly_to_the_long_one() {
        let mut rng = StdRng::seed_from_u64(1);
        let backoff = Backoff {
            jitter: 0.0,
            ..Backoff::default()
        };
        let mut delay = |failures, secs| {
            backoff
                .delay(failures, Duration::from_secs(secs), &mut rng)
                .as_millis()
        };
        assert_eq!(
            [1, 2, 3, 6, 7, 100].map(|n| delay(n, 0)),
            [100, 200, 400, 3200, 4000, 4000]
        );
        assert_eq!(delay(100, 599), 4000);
        assert_eq!(delay(100, 600 + 120), 8000);
        assert_eq!(delay(100, 600 + 240), 16_000);
        assert_eq!(delay(100, 86_400), 120_000);
        assert_eq!(delay(1, 86_400), 100);
    }

    #[test]
    fn jitter_spreads_lanes_and_stays_within_its_share() {
        let mut rng = StdRng::seed_from_u64(7);
        let backoff = Backoff::default();
        let delays: Vec<u128> = (0..1000)
            .map(|_| backoff.delay(9, Duration::ZERO, &mut rng).as_millis())
            .collect();
        assert!(delays.iter().all(|ms| (3200..=4800).contains(ms)));
        assert!(delays.iter().any(|ms| *ms < 3360) && delays.iter().any(|ms| *ms > 4640));
    }
}

//! When a session is renewed because its credential runs out.

use rand::{Rng, RngExt};

/// When a session is to be replaced by one with a fresh credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Renewal {
    /// From this wall clock on, Unix milliseconds, unless something waits for an answer.
    pub(super) from_ms: u64,
    /// From this one on in any case.
    pub(super) by_ms: u64,
}

impl Renewal {
    /// For a session opened at `now_ms` with a credential that expires at `expires_at_ms`: after
    /// 50 % to 85 % of the remaining life, spread so that lanes that share a token do not reconnect
    /// at the same moment; at 95 % in any case.
    pub(super) fn new(now_ms: u64, expires_at_ms: u64, rng: &mut impl Rng) -> Self {
        let life_ms = expires_at_ms.saturating_sub(now_ms).max(LIFE_MS_MIN);
        let after_ms = rng.random_range(life_ms / 2..=life_ms / 20 * 17);
        Self {
            from_ms: now_ms.saturating_add(after_ms),
            by_ms: now_ms.saturating_add(life_ms / 20 * 19),
        }
    }

    /// Whether the session is to be replaced at `now_ms`. `is_engaged`: it has handed something
    /// down whose answer would be lost with it.
    pub(super) fn is_due(self, now_ms: u64, is_engaged: bool) -> bool {
        now_ms >= if is_engaged { self.by_ms } else { self.from_ms }
    }
}

/// A credential that is nearly over (or whose clock is wrong) must not make the lane spin.
const LIFE_MS_MIN: u64 = 20_000;

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn within_the_second_half_and_spread() {
        let mut rng = StdRng::seed_from_u64(3);
        let times: Vec<u64> = (0..1000)
            .map(|_| Renewal::new(1_000_000, 4_600_000, &mut rng).from_ms - 1_000_000)
            .collect();
        assert!(times.iter().all(|ms| (1_800_000..=3_060_000).contains(ms)));
        assert!(times.iter().any(|ms| *ms < 1_900_000) && times.iter().any(|ms| *ms > 2_960_000));
    }

    #[test]
    fn an_expired_credential_does_not_spin() {
        let mut rng = StdRng::seed_from_u64(3);
        assert!(Renewal::new(5_000_000, 1, &mut rng).from_ms >= 5_010_000);
        assert_eq!(Renewal::new(u64::MAX, 1, &mut rng).from_ms, u64::MAX);
    }

    #[test]
    fn what_waits_for_an_answer_is_waited_for_until_shortly_before_the_end() {
        let mut rng = StdRng::seed_from_u64(3);
        let renewal = Renewal::new(0, 3_600_000, &mut rng);
        assert!(!renewal.is_due(renewal.from_ms - 1, false));
        assert!(renewal.is_due(renewal.from_ms, false));
        assert!(!renewal.is_due(3_419_999, true));
        assert!(renewal.is_due(3_420_000, true));
    }
}

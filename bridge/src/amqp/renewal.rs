//! When a token on an open connection is put again.

use rand::{Rng, RngExt};

/// Waits after a renewal that failed: the first, and the longest, milliseconds.
const RETRY_BASE_MS: u64 = 5_000;
const RETRY_MAX_MS: u64 = 60_000;

/// A credential that is nearly over (or whose clock is wrong) must not be renewed in a loop.
const LIFE_MS_MIN: u64 = 20_000;

/// The renewal of one token, on the wall clock.
#[derive(Debug, Default)]
pub(super) struct Renewal {
    due_ms: Option<u64>,
    failures: u32,
}

impl Renewal {
    /// A token was put that expires then: it is put again with 15 % to 50 % of its life left, spread
    /// so that identities that share a token do not come at the same moment.
    pub(super) fn renewed(&mut self, now_ms: u64, expires_at_ms: u64, rng: &mut impl Rng) {
        let life_ms = expires_at_ms.saturating_sub(now_ms).max(LIFE_MS_MIN);
        let after_ms = rng.random_range(life_ms / 2..=life_ms / 20 * 17);
        self.due_ms = Some(now_ms.saturating_add(after_ms));
        self.failures = 0;
    }

    /// The renewal failed: tried again after a wait that grows.
    pub(super) fn failed(&mut self, now_ms: u64, rng: &mut impl Rng) {
        let grown = RETRY_BASE_MS.saturating_mul(1 << self.failures.min(10));
        self.failures = self.failures.saturating_add(1);
        let wait_ms = grown.min(RETRY_MAX_MS);
        let wait_ms = rng.random_range(wait_ms / 5 * 4..=wait_ms / 5 * 6);
        self.due_ms = Some(now_ms.saturating_add(wait_ms));
    }

    /// Whether it is due; it is under way from then on.
    pub(super) fn take_due(&mut self, now_ms: u64) -> bool {
        let is_due = self.due_ms.is_some_and(|due| now_ms >= due);
        if is_due {
            self.due_ms = None;
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn within_the_second_half_and_spread() {
        let mut rng = StdRng::seed_from_u64(3);
        let due: Vec<u64> = (0..1000)
            .map(|_| {
                let mut renewal = Renewal::default();
                renewal.renewed(1_000_000, 4_600_000, &mut rng);
                renewal.due_ms.unwrap() - 1_000_000
            })
            .collect();
        assert!(due.iter().all(|ms| (1_800_000..=3_060_000).contains(ms)));
        assert!(due.iter().any(|ms| *ms < 1_900_000) && due.iter().any(|ms| *ms > 2_960_000));
    }

    #[test]
    fn once_per_renewal_and_no_loop_after_failures_or_with_an_expired_token() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut renewal = Renewal::default();
        renewal.renewed(5_000_000, 1, &mut rng);
        assert!(!renewal.take_due(5_009_999));
        assert!(renewal.take_due(5_017_000));
        assert!(!renewal.take_due(u64::MAX), "it is under way");
        for failures in 0..40_u32 {
            renewal.failed(0, &mut rng);
            let least = (RETRY_BASE_MS << failures.min(4)).min(RETRY_MAX_MS) / 5 * 4;
            assert!(renewal.due_ms.unwrap() >= least, "{failures}");
            assert!(renewal.due_ms.unwrap() <= RETRY_MAX_MS / 5 * 6);
        }
    }
}

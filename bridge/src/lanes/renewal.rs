//! When a session is renewed because its credential runs out.

use rand::{Rng, RngExt};

/// Wall clock, in Unix milliseconds, at which a session opened at `now_ms` with a credential that
/// expires at `expires_at_ms` is to be replaced: after 50 % to 85 % of the remaining life, spread so
/// that lanes that share a token do not reconnect at the same moment.
pub(super) fn renew_at_ms(now_ms: u64, expires_at_ms: u64, rng: &mut impl Rng) -> u64 {
    let life_ms = expires_at_ms.saturating_sub(now_ms).max(LIFE_MS_MIN);
    now_ms.saturating_add(rng.random_range(life_ms / 2..=life_ms / 20 * 17))
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
            .map(|_| renew_at_ms(1_000_000, 4_600_000, &mut rng) - 1_000_000)
            .collect();
        assert!(times.iter().all(|ms| (1_800_000..=3_060_000).contains(ms)));
        assert!(times.iter().any(|ms| *ms < 1_900_000) && times.iter().any(|ms| *ms > 2_960_000));
    }

    #[test]
    fn an_expired_credential_does_not_spin() {
        let mut rng = StdRng::seed_from_u64(3);
        assert!(renew_at_ms(5_000_000, 1, &mut rng) >= 5_010_000);
        assert_eq!(renew_at_ms(u64::MAX, 1, &mut rng), u64::MAX);
    }
}

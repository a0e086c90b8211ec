//! Whether anything acknowledged was lost: a sender's own log against the hub's ledger.
//!
//! Pure: the log and the digests that arrived go in, counts come out. Messages of one sender must
//! have different bodies (a sequence number in it is enough), because a body's digest is how a
//! message is recognised.

use std::collections::{HashMap, HashSet};
use std::fmt;

use crate::sender_log::Acknowledged;

/// The outcome for one sender, or the sum of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Messages whose acknowledgement the sender saw.
    pub acknowledged: u64,
    /// How many of those are in the ledger.
    pub at_hub: u64,
    /// How many of those are not.
    pub lost: u64,
    /// Acknowledged messages whose first arrival came after that of a later one.
    pub out_of_order: u64,
    /// Arrivals of a message that had arrived before, acknowledged or not.
    pub duplicates: u64,
    /// Senders whose log shows nothing: empty, or one body under two numbers.
    pub unusable_logs: u64,
}

impl Verdict {
    /// Compares one sender's log with the digests of what the ledger has from this sender, oldest
    /// first.
    ///
    /// What arrived without having been acknowledged is allowed: the acknowledgement was still on
    /// its way when something was killed.
    #[must_use]
    pub fn of_sender<'a>(log: &[Acknowledged], arrived: impl IntoIterator<Item = &'a str>) -> Self {
        let mut sequences = HashMap::with_capacity(log.len());
        let mut unusable = log.is_empty();
        for entry in log {
            let known = sequences.insert(entry.sha256.as_str(), entry.sequence);
            // The same entry twice is only a sender that logged twice.
            unusable |= known.is_some_and(|sequence| sequence != entry.sequence);
        }
        let mut verdict = Self {
            acknowledged: sequences.len() as u64,
            unusable_logs: u64::from(unusable),
            ..Self::default()
        };
        let mut seen = HashSet::new();
        let mut highest = None;
        for digest in arrived {
            if !seen.insert(digest) {
                verdict.duplicates += 1;
                continue;
            }
            let Some(sequence) = sequences.get(digest) else {
                continue;
            };
            verdict.at_hub += 1;
            if highest.is_some_and(|highest| sequence < highest) {
                verdict.out_of_order += 1;
            } else {
                highest = Some(sequence);
            }
        }
        verdict.lost = verdict.acknowledged - verdict.at_hub;
        verdict
    }

    /// Whether nothing acknowledged was lost or overtaken, and there was something to judge.
    #[must_use]
    pub const fn passed(&self) -> bool {
        self.acknowledged > 0 && self.lost == 0 && self.out_of_order == 0 && self.unusable_logs == 0
    }
}

impl std::iter::Sum for Verdict {
    fn sum<I: Iterator<Item = Self>>(verdicts: I) -> Self {
        verdicts.fold(Self::default(), |sum, one| Self {
            acknowledged: sum.acknowledged + one.acknowledged,
            at_hub: sum.at_hub + one.at_hub,
            lost: sum.lost + one.lost,
            out_of_order: sum.out_of_order + one.out_of_order,
            duplicates: sum.duplicates + one.duplicates,
            unusable_logs: sum.unusable_logs + one.unusable_logs,
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            acknowledged,
            at_hub,
            lost,
            out_of_order,
            duplicates,
            unusable_logs,
        } = self;
        let word = if self.passed() { "PASS" } else { "FAIL" };
        write!(
            f,
            "{word}: {acknowledged} acknowledged, {at_hub} at the hub, {lost} lost, \
             {out_of_order} out of order, {duplicates} duplicates"
        )?;
        if *unusable_logs > 0 {
            write!(f, ", {unusable_logs} sender logs that show nothing")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(numbers: impl IntoIterator<Item = u64>) -> Vec<Acknowledged> {
        numbers
            .into_iter()
            .map(|n| Acknowledged::new(n, n.to_string().as_bytes()))
            .collect()
    }

    fn judge(acknowledged: &[u64], arrived: &[u64]) -> Verdict {
        let arrived = log(arrived.iter().copied());
        let arrived = arrived.iter().map(|entry| entry.sha256.as_str());
        Verdict::of_sender(&log(acknowledged.iter().copied()), arrived)
    }

    #[test]
    fn what_arrived_once_and_in_order_passes() {
        let verdict = judge(&[1, 2, 3], &[1, 2, 3]);
        let text = "PASS: 3 acknowledged, 3 at the hub, 0 lost, 0 out of order, 0 duplicates";
        assert_eq!(verdict.to_string(), text);
    }

    #[test]
    fn a_missing_message_fails() {
        let text = "FAIL: 3 acknowledged, 2 at the hub, 1 lost, 0 out of order, 0 duplicates";
        assert_eq!(judge(&[1, 2, 3], &[1, 3]).to_string(), text);
        assert!(!judge(&[1], &[]).passed());
    }

    #[test]
    fn a_swapped_message_fails() {
        let text = "FAIL: 4 acknowledged, 4 at the hub, 0 lost, 1 out of order, 0 duplicates";
        assert_eq!(judge(&[1, 2, 3, 4], &[1, 3, 2, 4]).to_string(), text);
    }

    #[test]
    fn a_doubled_message_passes_with_one_duplicate() {
        let text = "PASS: 3 acknowledged, 3 at the hub, 0 lost, 0 out of order, 1 duplicates";
        assert_eq!(judge(&[1, 2, 3], &[1, 2, 2, 3]).to_string(), text);
        // What a resend after a crash looks like: a block again, then what is new.
        let resent = judge(&[1, 2, 3, 4], &[1, 2, 3, 2, 3, 4]);
        assert!(resent.passed());
        assert_eq!(resent.duplicates, 2);
    }

    #[test]
    fn an_empty_log_fails_whatever_arrived() {
        let text = "FAIL: 0 acknowledged, 0 at the hub, 0 lost, 0 out of order, 0 duplicates, \
                    1 sender logs that show nothing";
        assert_eq!(judge(&[], &[]).to_string(), text);
        assert_eq!(judge(&[], &[1, 2]).to_string(), text);
    }

    #[test]
    fn what_was_never_acknowledged_may_arrive_and_may_not() {
        let verdict = judge(&[1, 2], &[1, 2, 3]);
        assert!(verdict.passed());
        assert_eq!((verdict.acknowledged, verdict.at_hub), (2, 2));
    }

    #[test]
    fn one_body_under_two_numbers_fails_and_one_entry_twice_does_not() {
        let mut twice = log([1]);
        twice.push(Acknowledged {
            sequence: 2,
            ..twice[0].clone()
        });
        let arrived = twice[0].sha256.clone();
        assert!(!Verdict::of_sender(&twice, [arrived.as_str()]).passed());
        assert!(judge(&[1, 2, 2], &[1, 2]).passed());
    }

    #[test]
    fn the_sum_fails_when_one_sender_fails() {
        let sum: Verdict = [judge(&[1, 2], &[1, 2]), judge(&[], &[])].into_iter().sum();
        assert_eq!((sum.acknowledged, sum.at_hub), (2, 2));
        assert!(!sum.passed());
        let sum: Verdict = [judge(&[1, 2], &[1, 2]), judge(&[1], &[1, 1])]
            .into_iter()
            .sum();
        let text = "PASS: 3 acknowledged, 3 at the hub, 0 lost, 0 out of order, 1 duplicates";
        assert_eq!(sum.to_string(), text);
    }
}

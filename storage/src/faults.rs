//! Faults on the commit path, for tests: what a slow, stuck or failing disk does.
//!
//! They act on the writer thread just before it writes, so everything behind it (waiting
//! appends, settles, values) sees what it would see of a stalled disk.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Switches of the commit path. All off at the beginning.
#[derive(Debug, Default)]
pub struct CommitFaults {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    delay: (Duration, Duration),
    fail_next: u32,
    panic_next: bool,
    held: bool,
    closing: bool,
    random: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            delay: (Duration::ZERO, Duration::ZERO),
            fail_next: 0,
            panic_next: false,
            held: false,
            closing: false,
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }
}

impl CommitFaults {
    /// Delays each commit by so much; zero ends it.
    pub fn set_delay(&self, delay: Duration) {
        self.set_delay_range(delay, delay);
    }

    /// Delays each commit by a random time, uniform between the two.
    pub fn set_delay_range(&self, min: Duration, max: Duration) {
        self.state.lock().delay = (min, max.max(min));
    }

    /// Lets the next `n` commits fail.
    pub fn fail_next(&self, n: u32) {
        self.state.lock().fail_next = n;
    }

    /// Lets the next commit panic: a fault of the writer itself.
    #[cfg(test)]
    pub(crate) fn panic_next(&self) {
        self.state.lock().panic_next = true;
    }

    /// Holds commits, or releases them.
    pub fn hold(&self, hold: bool) {
        self.state.lock().held = hold;
        self.changed.notify_all();
    }

    /// A closing store is never held.
    pub(crate) fn close(&self) {
        self.state.lock().closing = true;
        self.changed.notify_all();
    }

    /// Called by the writer before each commit; `Err` when that one is to fail.
    pub(crate) fn before_commit(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        let (min, max) = state.delay;
        let span = u64::try_from((max - min).as_micros()).unwrap_or(u64::MAX);
        let delay = min + Duration::from_micros(random(&mut state.random) % span.saturating_add(1));
        if !delay.is_zero() && !state.closing {
            drop(state);
            std::thread::sleep(delay);
            state = self.state.lock();
        }
        while state.held && !state.closing {
            self.changed.wait(&mut state);
        }
        if std::mem::take(&mut state.panic_next) {
            drop(state);
            #[expect(clippy::panic, reason = "the fault that was asked for")]
            {
                panic!("injected panic");
            }
        }
        if state.fail_next > 0 {
            state.fail_next -= 1;
            return Err("injected fault".to_owned());
        }
        Ok(())
    }
}

/// xorshift64: no quality is needed.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_fail_as_often_as_told() {
        let faults = CommitFaults::default();
        faults.fail_next(2);
        assert!(faults.before_commit().is_err());
        assert!(faults.before_commit().is_err());
        assert!(faults.before_commit().is_ok());
    }

    #[test]
    fn closing_releases_a_hold_for_good() {
        let faults = CommitFaults::default();
        faults.hold(true);
        faults.close();
        assert!(faults.before_commit().is_ok());
    }
}

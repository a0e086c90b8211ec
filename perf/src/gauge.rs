//! What the kernel says about a process and the machine.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// CPU time that a process has used so far, user and system, all threads.
///
/// # Errors
/// When there is no such process.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the server has ended")?;
    let ticks = cpu_ticks(&stat).context("/proc/<pid>/stat has another form")?;
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_nanos(ticks * 1_000_000_000 / per_second))
}

/// utime + stime: fields 14 and 15; the name, field 2, may contain anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Model and number of the processors.
pub(crate) fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or("unknown processor", |(_, model)| model.trim());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} x {model}")
}

/// A reading of the counter and the clocks, to be subtracted from a later one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    at: Instant,
    messages: u64,
    cpu: Duration,
}

/// Between two readings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) messages_per_second: f64,
    pub(crate) cpu_us_per_message: f64,
    pub(crate) cores_busy: f64,
}

impl Reading {
    pub(crate) fn take(pid: u32, messages: u64) -> Result<Self> {
        Ok(Self {
            at: Instant::now(),
            messages,
            cpu: cpu_time(pid)?,
        })
    }

    #[allow(
        clippy::cast_precision_loss,
        reason = "message counts stay far below 2^52"
    )]
    pub(crate) fn rate_since(self, earlier: Self) -> Rate {
        let seconds = self.at.duration_since(earlier.at).as_secs_f64();
        let messages = (self.messages - earlier.messages) as f64;
        let cpu = (self.cpu - earlier.cpu).as_secs_f64();
        Rate {
            messages_per_second: messages / seconds,
            cpu_us_per_message: cpu * 1e6 / messages,
            cores_busy: cpu / seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_process_does_not_shift_the_fields() {
        let stat = "7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0 1 0 100";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 (x) S 1 2"), None);
    }

    #[test]
    fn this_process_has_used_cpu_time() {
        let before = cpu_time(std::process::id()).unwrap();
        let from = Instant::now();
        while cpu_time(std::process::id()).unwrap() == before {
            assert!(
                from.elapsed() < Duration::from_secs(10),
                "the clock stands still"
            );
        }
    }

    #[test]
    fn a_rate_is_a_difference() {
        let at = Instant::now();
        let first = Reading {
            at,
            messages: 100,
            cpu: Duration::from_secs(1),
        };
        let later = Reading {
            at: at + Duration::from_secs(2),
            messages: 1100,
            cpu: Duration::from_secs(2),
        };
        let rate = later.rate_since(first);
        assert!((rate.messages_per_second - 500.0).abs() < 1e-6);
        assert!((rate.cpu_us_per_message - 1000.0).abs() < 1e-6);
        assert!((rate.cores_busy - 0.5).abs() < 1e-6);
    }
}

//! Ends a whole process group, for programs that do not end their own children.

use rustix::process::{Pid, Signal, kill_process_group};

/// A process group that is killed when this is dropped, unless its leader has ended.
#[derive(Debug)]
pub(crate) struct GroupGuard(Option<Pid>);

impl GroupGuard {
    /// The group whose leader has this id.
    pub(crate) fn of(leader: Option<u32>) -> Self {
        let leader = leader.and_then(|pid| i32::try_from(pid).ok());
        Self(leader.and_then(Pid::from_raw))
    }

    /// The leader has ended by itself: the id may be used again.
    pub(crate) fn release(mut self) {
        self.0 = None;
    }
}

impl Drop for GroupGuard {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A zombie has ended; only its parent has not asked yet.
    fn runs(pid: u32) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn a_guarded_group_ends_with_its_guard_and_a_released_one_does_not() {
        for released in [false, true] {
            let mut leader = Command::new("/bin/sh")
                .args(["-c", "sleep 1000 & echo $!; wait"])
                .stdout(Stdio::piped())
                .process_group(0)
                .spawn()
                .unwrap();
            let mut line = String::new();
            let output = leader.stdout.take().unwrap();
            BufReader::new(output).read_line(&mut line).unwrap();
            let member: u32 = line.trim().parse().unwrap();
            let guard = GroupGuard::of(Some(leader.id()));
            if released {
                guard.release();
                assert!(runs(leader.id()) && runs(member));
                drop(GroupGuard::of(Some(leader.id())));
            } else {
                drop(guard);
            }
            assert!(!leader.wait().unwrap().success());
            let deadline = Instant::now() + PATIENCE;
            while runs(member) {
                assert!(Instant::now() < deadline, "a member of the group lives on");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

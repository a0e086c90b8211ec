//! Child processes: started with a log file, stopped by process id, never left behind.
//!
//! # Invariants
//! - A [`Process`] that is dropped has been killed and reaped.
//! - When the lab itself dies without dropping anything (SIGKILL, a test runner's time-out), its
//!   [`Reaper`] kills what it started.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use parking_lot::Mutex;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

/// How often a condition that the kernel does not announce is looked at.
pub(crate) const POLL: Duration = Duration::from_millis(5);

/// A killed process is gone within this time, or something is very wrong with the machine.
const DEATH_MAX: Duration = Duration::from_secs(10);

/// Reads "+ pid" and "- pid" from the lab; when the lab is gone, kills what is left. Its own
/// signals are ignored because Ctrl-C in a terminal goes to the lab's children, too.
const REAPER_SCRIPT: &str = r#"
trap '' INT TERM HUP
left=' '
while read -r op pid; do
  case $op in
    +) left="$left$pid " ;;
    -) left="${left%% $pid *} ${left#* $pid }" ;;
  esac
done
for pid in $left; do kill -9 "$pid"; done
"#;

/// A small shell process that outlives the lab by an instant and ends what the lab left running.
///
/// It learns of the lab's death from the end of its standard input, which the kernel closes however
/// the lab dies. That works for every child, whatever it is written in, and needs no parent-death
/// signal (which is bound to a thread and needs unsafe code to set).
#[derive(Debug)]
pub struct Reaper {
    child: Child,
    stdin: Mutex<Option<ChildStdin>>,
}

impl Reaper {
    /// Starts the reaper.
    ///
    /// # Errors
    /// When `/bin/sh` cannot be started.
    pub fn start() -> Result<Arc<Self>> {
        let mut child = Command::new("/bin/sh")
            .args(["-c", REAPER_SCRIPT])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start /bin/sh")?;
        let stdin = Mutex::new(child.stdin.take());
        Ok(Arc::new(Self { child, stdin }))
    }

    fn tell(&self, op: char, pid: u32) -> Result<()> {
        let mut stdin = self.stdin.lock();
        let stdin = stdin.as_mut().context("the reaper has ended")?;
        writeln!(stdin, "{op} {pid}").context("the reaper has ended")
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.stdin.lock().take());
        let _ = self.child.wait();
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its whole environment, besides PATH, HOME and LANG.
    pub environment: Vec<(String, String)>,
    /// Where standard output and error go; appended to, so that restarts share one file.
    pub log: PathBuf,
    /// Give it a pipe as standard input, which closes when the lab ends.
    pub with_stdin: bool,
}

/// A running (or just ended) child process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    reaper: Arc<Reaper>,
    /// The reaper has been told that it has ended.
    forgotten: bool,
}

impl Process {
    /// Starts a process in its own process group: a Ctrl-C for the lab is not one for its children.
    ///
    /// # Errors
    /// When the program or the log file cannot be opened.
    pub fn start(launch: &Launch, reaper: &Arc<Reaper>) -> Result<Self> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&launch.log)
            .with_context(|| format!("cannot open {}", launch.log.display()))?;
        let mut command = Command::new(&launch.program);
        command.args(&launch.arguments).env_clear();
        for name in ["PATH", "HOME", "LANG"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        let child = command
            // Of panics only: an error's would push its text out of the end of the log.
            .env("RUST_BACKTRACE", "1")
            .env("RUST_LIB_BACKTRACE", "0")
            .envs(launch.environment.iter().map(|(name, value)| (name, value)))
            .stdin(if launch.with_stdin {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", launch.program.display()))?;
        let process = Self {
            child,
            log: launch.log.clone(),
            reaper: Arc::clone(reaper),
            forgotten: false,
        };
        process.reaper.tell('+', process.pid())?;
        Ok(process)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the kernel does not know the child any more.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            self.forget();
        }
        Ok(status)
    }

    /// Its id may be another process's from now on: the reaper must not kill that.
    fn forget(&mut self) {
        if !std::mem::replace(&mut self.forgotten, true) {
            let _ = self.reaper.tell('-', self.pid());
        }
    }

    /// Closes the pipe that it has as standard input, if it has one.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// SIGKILL, and returns when the process is gone.
    ///
    /// # Errors
    /// When it cannot be signalled or does not die.
    ///
    /// # Cancel safety
    /// The signal is sent at the first poll.
    pub async fn kill(&mut self) -> Result<ExitStatus> {
        // Not this module's `signal`: a process that has ended by itself counts as killed.
        self.child.kill()?;
        self.wait(DEATH_MAX).await
    }

    /// SIGTERM, and returns when the process has ended.
    ///
    /// # Errors
    /// When it has not ended after `patience`; it is then still running.
    ///
    /// # Cancel safety
    /// The signal is sent at the first poll.
    pub async fn terminate(&mut self, patience: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(patience).await
    }

    /// SIGSTOP, and returns when every thread has stopped.
    ///
    /// # Errors
    /// When the process has ended.
    ///
    /// # Cancel safety
    /// The signal is sent at the first poll.
    pub async fn pause(&mut self) -> Result<()> {
        self.signal(Signal::STOP)?;
        self.until_state(|state| state == 'T').await
    }

    /// SIGCONT, and returns when the process runs again.
    ///
    /// # Errors
    /// When the process has ended.
    ///
    /// # Cancel safety
    /// The signal is sent at the first poll.
    pub async fn resume(&mut self) -> Result<()> {
        self.signal(Signal::CONT)?;
        self.until_state(|state| state != 'T').await
    }

    /// Waits until the process has ended by itself.
    ///
    /// # Errors
    /// When it has not ended after `patience`.
    ///
    /// # Cancel safety
    /// Cancel safe: it only looks.
    pub async fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("process {} has not ended after {patience:?}", self.pid());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The last lines of its log, for error texts.
    #[must_use]
    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        let pid = self.pid();
        if let Some(status) = self.ended()? {
            bail!("process {pid} has ended already ({status})");
        }
        // The child is not reaped, so the id cannot belong to another process.
        let pid = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .context("no process id")?;
        Ok(kill_process(pid, signal)?)
    }

    async fn until_state(&mut self, wanted: impl Fn(char) -> bool) -> Result<()> {
        let deadline = Instant::now() + DEATH_MAX;
        loop {
            if let Some(status) = self.ended()? {
                bail!("process {} has ended ({status})", self.pid());
            }
            if thread_states(self.pid())?.into_iter().all(&wanted) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("process {} does not change its state", self.pid());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.forget();
    }
}

/// Lets this process, and the children that it starts from now on, have as many descriptors open as
/// they may: a relayed connection takes two, and the usual limit of 1,024 is soon reached.
pub(crate) fn allow_many_descriptors() {
    const WANTED: u64 = 65_536;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(WANTED, |maximum| maximum.min(WANTED));
    if current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum,
        };
        // Without it small labs work all the same.
        let _ = setrlimit(Resource::Nofile, raised);
    }
}

/// The state letter of each thread (`/proc/<pid>/task/<tid>/stat`, the field after the name).
fn thread_states(pid: u32) -> Result<Vec<char>> {
    let mut states = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while they are listed.
        let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else {
            continue;
        };
        let state = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.trim_start().chars().next());
        states.extend(state);
    }
    Ok(states)
}

/// The resident memory of a process in bytes.
///
/// # Errors
/// When there is no such process.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.context("no VmRSS: the process has ended")? * 1024)
}

/// The last lines of a log file, after the last errors that are further up: what a hub complains
/// about at its start is often the cause of what it complains about at the end.
pub(crate) fn log_tail(path: &Path) -> String {
    const LINES: usize = 15;
    const ERRORS: usize = 5;
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let (before, tail) = lines.split_at(lines.len().saturating_sub(LINES));
    let is_error = |line: &&&str| line.contains("[ERR]") || line.contains(" ERROR ");
    let mut errors: Vec<&str> = before
        .iter()
        .rev()
        .filter(is_error)
        .take(ERRORS)
        .copied()
        .collect();
    errors.reverse();
    [&errors[..], tail].concat().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn sh(folder: &Path, script: &str) -> Launch {
        Launch {
            program: PathBuf::from("/bin/sh"),
            arguments: vec!["-c".to_owned(), script.to_owned()],
            environment: vec![("GREETING".to_owned(), "hello".to_owned())],
            log: folder.join("log"),
            with_stdin: false,
        }
    }

    fn runs(pid: u32) -> bool {
        // A zombie has been killed; only its parent has not asked yet.
        thread_states(pid).is_ok_and(|states| states.iter().any(|state| *state != 'Z'))
    }

    #[tokio::test]
    async fn output_goes_to_the_log_and_a_restart_appends() {
        let folder = tempfile::tempdir().unwrap();
        let reaper = Reaper::start().unwrap();
        for _ in 0..2 {
            let launch = sh(folder.path(), "echo out $GREETING; echo err >&2; exit 3");
            let mut process = Process::start(&launch, &reaper).unwrap();
            assert_eq!(process.wait(PATIENCE).await.unwrap().code(), Some(3));
            assert!(process.log_tail().contains("out hello"));
        }
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        assert_eq!(log, "out hello\nerr\nout hello\nerr\n");
    }

    #[test]
    fn the_end_of_a_log_comes_after_its_last_errors() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut text = String::from("<3> [ERR] - the store was moved\n");
        for number in 0..20 {
            text += &format!("<4> [WRN] - {number}\n");
        }
        fs::write(&log, &text).unwrap();
        let tail = log_tail(&log);
        assert!(tail.starts_with("<3> [ERR] - the store was moved\n<4> [WRN] - 5\n"));
        assert!(tail.ends_with("- 19"));
        assert_eq!(log_tail(&folder.path().join("none")), "");
    }

    #[tokio::test]
    async fn a_process_is_paused_resumed_terminated_and_killed() {
        let folder = tempfile::tempdir().unwrap();
        let reaper = Reaper::start().unwrap();
        let launch = sh(folder.path(), "exec sleep 1000");
        let mut process = Process::start(&launch, &reaper).unwrap();
        process.pause().await.unwrap();
        assert_eq!(thread_states(process.pid()).unwrap(), ['T']);
        process.resume().await.unwrap();
        assert_ne!(thread_states(process.pid()).unwrap(), ['T']);
        process.terminate(PATIENCE).await.unwrap();
        assert!(
            process.pause().await.is_err(),
            "an ended process cannot be paused"
        );

        let mut process = Process::start(&launch, &reaper).unwrap();
        let pid = process.pid();
        assert!(resident_bytes(pid).unwrap() > 0);
        process.pause().await.unwrap();
        process.kill().await.unwrap();
        assert!(!runs(pid));
    }

    #[tokio::test]
    async fn a_process_that_ignores_sigterm_is_reported_and_dies_with_the_handle() {
        let folder = tempfile::tempdir().unwrap();
        let reaper = Reaper::start().unwrap();
        let script = "trap '' TERM; echo armed; while :; do sleep 0.1; done";
        let mut process = Process::start(&sh(folder.path(), script), &reaper).unwrap();
        while !process.log_tail().contains("armed") {
            tokio::time::sleep(POLL).await;
        }
        process
            .terminate(Duration::from_millis(300))
            .await
            .unwrap_err();
        let pid = process.pid();
        assert!(runs(pid));
        drop(process);
        assert!(!runs(pid));
    }

    #[test]
    fn the_limit_of_descriptors_is_raised_as_far_as_it_may() {
        allow_many_descriptors();
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let wanted = maximum.map_or(65_536, |maximum| maximum.min(65_536));
        assert!(current.is_none_or(|current| current >= wanted));
    }

    #[tokio::test]
    async fn what_a_dead_lab_leaves_running_is_killed_by_its_reaper() {
        let folder = tempfile::tempdir().unwrap();
        let reaper = Reaper::start().unwrap();
        let launch = sh(folder.path(), "exec sleep 1000");
        let ended = Process::start(&launch, &reaper).unwrap();
        let left = [0, 1].map(|_| Process::start(&launch, &reaper).unwrap());
        let mut bystander = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        drop(ended);
        // What the kernel does when the lab is killed: only the pipe is closed, nothing is dropped.
        drop(reaper.stdin.lock().take());
        let deadline = Instant::now() + PATIENCE;
        while left.iter().any(|process| runs(process.pid())) {
            assert!(Instant::now() < deadline, "the reaper did not kill");
            tokio::time::sleep(POLL).await;
        }
        assert!(runs(bystander.id()));
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }
}

//! Faults on command, for tests: a Unix socket that makes commits slow, stuck or failing and
//! moves the clock. Only with the feature `faults`.
//!
//! One command is one line, and each gets one reply line, `ok` or `error: …`:
//!
//! | Command | Effect |
//! |---|---|
//! | `delay-commits <us>` | every commit takes so many microseconds longer; 0 ends it |
//! | `delay-commits <min_us> <max_us>` | the same, evenly distributed for each commit |
//! | `fail-commits <n>` | the next `n` commits fail |
//! | `hold-commits` / `release-commits` | no commit happens until released |
//! | `clock-offset <ms>` | moves the wall clock, may be negative |

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::clock::SystemClock;
use edgehub_storage::Store;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes of one command, its newline included.
pub const LINE_BYTES_MAX: u64 = 256;
/// Clients at once; further ones wait.
pub const CLIENTS_MAX: usize = 16;

/// What the commands act on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Faults {
    store: Store,
    clock: Arc<SystemClock>,
}

impl Faults {
    /// Acts on the commits of `store` and on `clock`.
    #[must_use]
    pub fn new(store: Store, clock: Arc<SystemClock>) -> Self {
        Self { store, clock }
    }

    /// Takes commands on a new Unix socket at `path` until `stop` fires. A socket that an
    /// earlier, killed process left there is replaced.
    ///
    /// # Errors
    /// When the socket cannot be bound, for example because `path` is another kind of file.
    pub fn listen(
        self,
        path: &Path,
        stop: CancellationToken,
        tasks: &TaskTracker,
    ) -> io::Result<()> {
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        tracing::warn!("Faults can be injected through {}", path.display());
        let clients = tasks.clone();
        tasks.spawn(async move { self.accept(listener, stop, clients).await });
        Ok(())
    }

    async fn accept(self, listener: UnixListener, stop: CancellationToken, tasks: TaskTracker) {
        let clients = Arc::new(Semaphore::new(CLIENTS_MAX));
        loop {
            let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
            let client = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((client, _)) => client,
                    Err(error) => return tracing::error!("Faults take no more clients: {error}"),
                },
                () = stop.cancelled() => return,
            };
            let (faults, stop) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                let _permit = permit;
                tokio::select! {
                    served = faults.serve(client) => if let Err(error) = served {
                        tracing::debug!("A client of the faults socket failed: {error}");
                    },
                    () = stop.cancelled() => {}
                }
            });
        }
    }

    async fn serve(&self, client: UnixStream) -> io::Result<()> {
        let (input, mut output) = client.into_split();
        let mut input = BufReader::new(input);
        let mut line = String::new();
        loop {
            line.clear();
            if (&mut input).take(LINE_BYTES_MAX).read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if !line.ends_with('\n') {
                // Too long, or cut off: what follows cannot be told from a command.
                return output.write_all(b"error: a command is one line\n").await;
            }
            let reply = match self.obey(line.trim()) {
                Ok(()) => "ok\n".to_owned(),
                Err(error) => format!("error: {error}\n"),
            };
            output.write_all(reply.as_bytes()).await?;
        }
    }

    fn obey(&self, line: &str) -> Result<(), CommandError> {
        let command = line.parse()?;
        tracing::warn!("Fault injected: {line}");
        let faults = self.store.faults();
        match command {
            Command::DelayCommits { min, max } => faults.set_delay_range(min, max),
            Command::FailCommits(commits) => faults.fail_next(commits),
            Command::HoldCommits(hold) => faults.hold(hold),
            Command::ClockOffset(offset_ms) => self.clock.set_offset_ms(offset_ms),
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    ClockOffset(i64),
    DelayCommits { min: Duration, max: Duration },
    FailCommits(u32),
    HoldCommits(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum CommandError {
    #[error("unknown command, or wrong number of arguments")]
    Unknown,
    #[error("an argument is not a number in its range")]
    Number,
    #[error("the smaller delay comes first")]
    Range,
}

impl std::str::FromStr for Command {
    type Err = CommandError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        match (name, words.next(), words.next(), words.next()) {
            ("delay-commits", Some(delay), None, None) => {
                let delay = micros(delay)?;
                Ok(Self::DelayCommits { min: delay, max: delay })
            }
            ("delay-commits", Some(min), Some(max), None) => {
                let (min, max) = (micros(min)?, micros(max)?);
                if min > max {
                    return Err(CommandError::Range);
                }
                Ok(Self::DelayCommits { min, max })
            }
            ("fail-commits", Some(commits), None, None) => Ok(Self::FailCommits(number(commits)?)),
            ("hold-commits", None, None, None) => Ok(Self::HoldCommits(true)),
            ("release-commits", None, None, None) => Ok(Self::HoldCommits(false)),
            ("clock-offset", Some(offset_ms), None, None) => {
                Ok(Self::ClockOffset(number(offset_ms)?))
            }
            _ => Err(CommandError::Unknown),
        }
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, CommandError> {
    text.parse().map_err(|_| CommandError::Number)
}

/// Microseconds, an hour at most: no test waits longer for a commit.
fn micros(text: &str) -> Result<Duration, CommandError> {
    let delay = Duration::from_micros(number(text)?);
    if delay > Duration::from_secs(3600) { Err(CommandError::Number) } else { Ok(delay) }
}

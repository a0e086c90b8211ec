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
            let Ok(permit) = Arc::clone(&clients).acquire_owned().await else {
                return;
            };
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
            if (&mut input)
                .take(LINE_BYTES_MAX)
                .read_line(&mut line)
                .await?
                == 0
            {
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
                Ok(Self::DelayCommits {
                    min: delay,
                    max: delay,
                })
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
    if delay > Duration::from_secs(3600) {
        Err(CommandError::Number)
    } else {
        Ok(delay)
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::clock::Clock;
    use edgehub_storage::{Column, KvOp};
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::test_support::TestHub;

    #[test]
    fn commands_are_read_exactly() {
        let us = Duration::from_micros;
        for (line, command) in [
            (
                "delay-commits 150",
                Command::DelayCommits {
                    min: us(150),
                    max: us(150),
                },
            ),
            (
                "delay-commits 150 50000",
                Command::DelayCommits {
                    min: us(150),
                    max: us(50_000),
                },
            ),
            (" fail-commits  3 ", Command::FailCommits(3)),
            ("hold-commits", Command::HoldCommits(true)),
            ("release-commits", Command::HoldCommits(false)),
            ("clock-offset -3600000", Command::ClockOffset(-3_600_000)),
        ] {
            assert_eq!(line.parse(), Ok(command), "{line}");
        }
        for (line, error) in [
            ("", CommandError::Unknown),
            ("hold", CommandError::Unknown),
            ("Hold-commits", CommandError::Unknown),
            ("hold-commits 1", CommandError::Unknown),
            ("delay-commits", CommandError::Unknown),
            ("delay-commits 1 2 3", CommandError::Unknown),
            ("delay-commits -1", CommandError::Number),
            ("delay-commits 3600000001", CommandError::Number),
            ("delay-commits 18446744073709551616", CommandError::Number),
            ("delay-commits 2 1", CommandError::Range),
            ("fail-commits 4294967296", CommandError::Number),
            ("clock-offset x", CommandError::Number),
        ] {
            assert_eq!(line.parse::<Command>(), Err(error), "{line}");
        }
    }

    struct Setup {
        test: TestHub,
        clock: Arc<SystemClock>,
        path: std::path::PathBuf,
        stop: CancellationToken,
        tasks: TaskTracker,
        _folder: tempfile::TempDir,
    }

    impl Setup {
        fn new() -> Self {
            let test = TestHub::new();
            let clock = Arc::new(SystemClock::new());
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("faults.sock");
            let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
            let setup = Self {
                test,
                clock,
                path,
                stop,
                tasks,
                _folder: folder,
            };
            setup.listen().unwrap();
            setup
        }

        fn listen(&self) -> io::Result<()> {
            let faults = Faults::new(self.test.hub.store().clone(), Arc::clone(&self.clock));
            faults.listen(&self.path, self.stop.clone(), &self.tasks)
        }

        /// Sends lines on a connection of their own and returns the replies.
        async fn say(&self, lines: &str) -> String {
            let mut client = UnixStream::connect(&self.path).await.unwrap();
            client.write_all(lines.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            let mut replies = String::new();
            client.read_to_string(&mut replies).await.unwrap();
            replies
        }

        async fn write(&self) -> bool {
            let put = KvOp::Put {
                column: Column::Meta,
                key: b"k".to_vec(),
                value: b"v".to_vec(),
                sealed: false,
            };
            self.test.hub.store().write(vec![put]).await.is_ok()
        }
    }

    #[tokio::test]
    async fn commands_act_and_each_gets_one_reply() {
        let setup = Setup::new();
        let real_ms = SystemClock::new().unix_ms();
        let replies = setup
            .say("clock-offset 7200000\nnonsense\n\nfail-commits 1\n")
            .await;
        let unknown = "error: unknown command, or wrong number of arguments\n";
        assert_eq!(replies, format!("ok\n{unknown}{unknown}ok\n"));
        assert!(setup.clock.unix_ms() >= real_ms + 7_200_000);
        assert!(!setup.write().await);
        assert!(setup.write().await);
    }

    #[tokio::test]
    async fn held_commits_wait_for_their_release() {
        let setup = Setup::new();
        assert_eq!(setup.say("hold-commits\n").await, "ok\n");
        let before = setup.test.hub.store().stats().commits;
        let (written, ()) = tokio::join!(setup.write(), async {
            assert_eq!(setup.test.hub.store().stats().commits, before);
            assert_eq!(setup.say("release-commits\n").await, "ok\n");
        });
        assert!(written);
        assert_eq!(setup.test.hub.store().stats().commits, before + 1);
    }

    #[tokio::test]
    async fn a_line_is_bounded_and_clients_do_not_wait_for_one_another() {
        let setup = Setup::new();
        let _silent = UnixStream::connect(&setup.path).await.unwrap();
        let longest = usize::try_from(LINE_BYTES_MAX).unwrap() - 1;
        let padded = |length: usize| format!("{:<length$}\n", "hold-commits");
        assert_eq!(setup.say(&padded(longest)).await, "ok\n");
        let refused = setup.say(&padded(longest + 1)).await;
        assert_eq!(refused, "error: a command is one line\n");
        assert_eq!(
            setup.say("release-commits").await,
            "error: a command is one line\n"
        );
        assert_eq!(setup.say("release-commits\n").await, "ok\n");
        setup.stop.cancel();
        setup.tasks.close();
        setup.tasks.wait().await;
    }

    #[tokio::test]
    async fn a_socket_left_behind_is_replaced_and_another_file_is_not() {
        let setup = Setup::new();
        setup.listen().unwrap();
        assert_eq!(setup.say("fail-commits 0\n").await, "ok\n");
        let other = setup.path.with_extension("txt");
        std::fs::write(&other, "mine").unwrap();
        let faults = Faults::new(setup.test.hub.store().clone(), Arc::clone(&setup.clock));
        assert!(
            faults
                .listen(&other, setup.stop.clone(), &setup.tasks)
                .is_err()
        );
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "mine");
    }
}

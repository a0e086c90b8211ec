//! How `edgehub-lab kill|start|…` reach the lab in the foreground: a Unix socket in its folder.
//!
//! One request and one answer per connection, a line of JSON each. The answer comes when the state
//! that was asked for is reached.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Lab;

const SOCKET: &str = "lab.sock";

/// After an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A request is a name or two; anything longer is not from our own program.
const REQUEST_BYTES_MAX: u64 = 4096;

/// What can be asked of a running lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "command")]
pub enum Request {
    /// SIGKILL a host.
    Kill {
        /// The host.
        name: String,
    },
    /// Start a host and wait until it is ready.
    Start {
        /// The host.
        name: String,
    },
    /// SIGSTOP a host.
    Pause {
        /// The host.
        name: String,
    },
    /// SIGCONT a host.
    Resume {
        /// The host.
        name: String,
    },
    /// Reset and refuse connections between two hosts.
    Cut {
        /// One end.
        a: String,
        /// The other end.
        b: String,
    },
    /// Let them connect again.
    Heal {
        /// One end.
        a: String,
        /// The other end.
        b: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Answer {
    error: Option<String>,
}

/// Asks the lab that runs in `state_dir`, and returns when the state is reached.
///
/// # Errors
/// When no lab runs there, or it could not do it.
pub fn ask(state_dir: &Path, request: &Request) -> Result<()> {
    let folder = OpenFolder::open(state_dir)?;
    let mut stream = BlockingStream::connect(folder.socket())
        .with_context(|| format!("no lab runs in {}", state_dir.display()))?;
    writeln!(stream, "{}", serde_json::to_string(request)?)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    let answer: Answer =
        serde_json::from_str(&answer).context("the lab ended before it answered")?;
    match answer.error {
        None => Ok(()),
        Some(error) => bail!(error),
    }
}

/// Where a lab takes requests. They may come from the moment it is made, and are answered once it
/// is served: so a lab can make it before it announces itself.
#[derive(Debug)]
pub struct ControlSocket {
    folder: OpenFolder,
    listener: UnixListener,
}

impl ControlSocket {
    /// Listens in the folder of `lab`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn bind(lab: &Lab) -> Result<Self> {
        let folder = OpenFolder::open(lab.state_dir())?;
        // The lock on the folder says that nobody else listens.
        let _ = fs::remove_file(folder.socket());
        let listener = UnixListener::bind(folder.socket());
        let listener = listener.context("cannot make the control socket")?;
        Ok(Self { folder, listener })
    }

    /// Answers requests until `end`.
    ///
    /// # Cancel safety
    /// Requests under way are dropped; what they started goes on.
    pub async fn serve(self, lab: Arc<Lab>, end: CancellationToken) {
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = end.cancelled() => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (lab, end) = (Arc::clone(&lab), end.clone());
                    tasks.spawn(async move {
                        tokio::select! {
                            // A caller that goes away is no news for anybody.
                            _ = answer(&lab, stream) => {}
                            () = end.cancelled() => {}
                        }
                    });
                }
                // Out of descriptors: the next attempt may find some.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
        let _ = fs::remove_file(self.folder.socket());
        tasks.close();
        tasks.wait().await;
    }
}

async fn answer(lab: &Lab, mut stream: UnixStream) -> Result<()> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    tokio::io::BufReader::new(read.take(REQUEST_BYTES_MAX))
        .read_line(&mut line)
        .await?;
    let done = match serde_json::from_str(&line) {
        Ok(request) => perform(lab, request).await,
        Err(error) => Err(error.into()),
    };
    let answer = Answer {
        error: done.err().map(|error| format!("{error:#}")),
    };
    write
        .write_all(format!("{}\n", serde_json::to_string(&answer)?).as_bytes())
        .await?;
    Ok(())
}

async fn perform(lab: &Lab, request: Request) -> Result<()> {
    match request {
        Request::Kill { name } => lab.kill(&name).await,
        Request::Start { name } => lab.start(&name).await,
        Request::Pause { name } => lab.pause(&name).await,
        Request::Resume { name } => lab.resume(&name).await,
        Request::Cut { a, b } => lab.cut(&a, &b).await,
        Request::Heal { a, b } => lab.heal(&a, &b),
    }
}

/// An open folder: through its descriptor the socket has a short path, however long the folder's
/// own is (a Unix socket's path has at most 107 bytes).
#[derive(Debug)]
struct OpenFolder(File);

impl OpenFolder {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self(File::open(path).with_context(|| {
            format!("cannot open {}", path.display())
        })?))
    }

    fn socket(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", self.0.as_raw_fd()))
    }
}

//! Faults of the network, and inside a hub.

use std::io;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::Lab;
use crate::relay::{Link, Mode};

/// The hub's own answer to a fault command comes at once.
const FAULT_ANSWER_MAX: Duration = Duration::from_secs(10);

impl Lab {
    /// Cuts both directions between two hosts: connections are reset, new ones refused. Besides
    /// host names, `client` means everybody who is no host and `*` everybody, so
    /// `cut("*", "edge2")` isolates a whole host. Returns when the connections are gone.
    ///
    /// # Errors
    /// When there is no such host.
    ///
    /// # Cancel safety
    /// The cut is made at the first poll; cancelling gives up only the wait.
    pub async fn cut(&self, a: &str, b: &str) -> Result<()> {
        self.set_mode(a, b, Mode::Cut).await
    }

    /// Lets no byte pass between two hosts, without closing anything; see [`Mode::BlackHole`].
    ///
    /// # Errors
    /// When there is no such host.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn black_hole(&self, a: &str, b: &str) -> Result<()> {
        self.set_mode(a, b, Mode::BlackHole).await
    }

    /// Refuses new connections between two hosts; existing ones go on.
    ///
    /// # Errors
    /// When there is no such host.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn refuse(&self, a: &str, b: &str) -> Result<()> {
        self.set_mode(a, b, Mode::Refuse).await
    }

    /// Resets the existing connections between two hosts, once.
    ///
    /// # Errors
    /// When there is no such host.
    ///
    /// # Cancel safety
    /// The resets happen; cancelling gives up only the wait.
    pub async fn reset(&self, a: &str, b: &str) -> Result<()> {
        self.relay.reset(&self.links(a, b)?).await;
        Ok(())
    }

    /// Delays every byte between two hosts, in each direction.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn delay(&self, a: &str, b: &str, delay: Duration) -> Result<()> {
        self.relay.set_delay(&self.links(a, b)?, delay);
        Ok(())
    }

    /// Takes back every fault that was set with the same two names.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn heal(&self, a: &str, b: &str) -> Result<()> {
        self.relay.heal(&self.links(a, b)?);
        Ok(())
    }

    /// Takes back every fault of the network.
    pub fn heal_all(&self) {
        self.relay.heal_all();
    }

    /// How many connections there are from `source` to `target`.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn connections(&self, source: &str, target: &str) -> Result<usize> {
        let [link, _] = self.links(source, target)?;
        Ok(self.relay.connections(&link))
    }

    async fn set_mode(&self, a: &str, b: &str, mode: Mode) -> Result<()> {
        self.relay.set_mode(&self.links(a, b)?, mode).await;
        Ok(())
    }

    fn links(&self, a: &str, b: &str) -> Result<[Link; 2]> {
        ensure!(a != b, "a link has two ends, not {a} twice");
        for name in [a, b] {
            if !["client", "clients", "*"].contains(&name) {
                self.slot(name)?;
            }
        }
        Ok(Link::between(a, b))
    }

    /// Sends one command to a hub's fault socket (`hold-commits`, `delay-commits 150 50000`, …)
    /// and returns when the hub has taken it.
    ///
    /// # Errors
    /// When the hub does not run, was built without faults, or refuses the command.
    ///
    /// # Cancel safety
    /// The command may or may not have taken effect.
    pub async fn faults(&self, name: &str, command: &str) -> Result<()> {
        let slot = self.slot(name)?;
        let path = slot.faults.as_ref().context("this build has no faults")?;
        let answer = async {
            let stream = UnixStream::connect(path).await?;
            let (read, mut write) = stream.into_split();
            write.write_all(format!("{command}\n").as_bytes()).await?;
            let mut answer = String::new();
            BufReader::new(read).read_line(&mut answer).await?;
            Ok::<_, io::Error>(answer)
        };
        let answer = tokio::time::timeout(FAULT_ANSWER_MAX, answer)
            .await
            .map_err(io::Error::from)
            .flatten()
            .with_context(|| format!("{name} does not answer on {}", path.display()))?;
        ensure!(
            answer.trim() == "ok",
            "{name}: {command}: {}",
            answer.trim()
        );
        Ok(())
    }
}

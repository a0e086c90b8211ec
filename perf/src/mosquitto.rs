//! Debian's mosquitto as the peer: in memory, without logins, with the hub's certificates.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use edgehub_lab::Host;
use edgehub_lab::process::{Launch, Process, Reaper};
use tokio::net::TcpStream;

/// A start takes milliseconds.
const START_MAX: Duration = Duration::from_secs(10);

/// A running mosquitto; it ends with this value, and when this program is killed.
#[derive(Debug)]
pub(crate) struct Mosquitto {
    process: Process,
    pub(crate) address: SocketAddr,
    pub(crate) version: String,
}

impl Mosquitto {
    /// Starts one on a free port of 127.0.0.1, with the certificates of `tls` if given.
    ///
    /// # Errors
    /// When it is not installed or does not listen soon.
    pub(crate) async fn start(
        folder: &Path,
        tls: Option<&Host>,
        reaper: &Arc<Reaper>,
    ) -> Result<Self> {
        let program = find()?;
        // Free now; whoever takes it before mosquitto does makes the start fail, not the figures.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let config = folder.join("mosquitto.conf");
        fs::write(&config, configuration(address, tls))?;
        let launch = Launch {
            program: program.clone(),
            arguments: vec!["-c".to_owned(), config.to_string_lossy().into_owned()],
            environment: Vec::new(),
            log: folder.join("mosquitto.log"),
            with_stdin: false,
        };
        let mut started = Self {
            process: Process::start(&launch, reaper)?,
            address,
            version: version(&program),
        };
        started.wait_listening().await?;
        Ok(started)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    async fn wait_listening(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_MAX;
        while TcpStream::connect(self.address).await.is_err() {
            let log = self.process.log_tail();
            if let Some(status) = self.process.ended()? {
                bail!("mosquitto ended ({status}):\n{log}");
            }
            ensure!(
                Instant::now() < deadline,
                "mosquitto does not listen:\n{log}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

/// Debian puts servers where only root's PATH leads.
fn find() -> Result<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders)
        .chain([PathBuf::from("/usr/sbin")])
        .map(|folder| folder.join("mosquitto"))
        .find(|program| program.is_file())
        .context("mosquitto is not installed (apt-get install mosquitto), or use --no-peer")
}

fn version(program: &Path) -> String {
    let output = Command::new(program).arg("-h").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines()
        .next()
        .unwrap_or("mosquitto")
        .replace(" version", "")
}

fn configuration(address: SocketAddr, tls: Option<&Host>) -> String {
    let mut lines = vec![
        // As root it would become a user who cannot read the private key.
        "user root".to_owned(),
        "allow_anonymous true".to_owned(),
        "persistence false".to_owned(),
        "log_type error".to_owned(),
        "log_type warning".to_owned(),
        format!("listener {} {}", address.port(), address.ip()),
    ];
    if let Some(host) = tls {
        lines.push(format!(
            "certfile {}",
            host.folder.join("server-chain.pem").display()
        ));
        lines.push(format!(
            "keyfile {}",
            host.folder.join("server-key.pem").display()
        ));
    }
    lines.push(String::new());
    lines.join("\n")
}

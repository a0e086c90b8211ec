//! Debian's mosquitto as the peer: in memory, without logins, with the hub's certificates.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use edgehub_lab::Host;

/// A start takes milliseconds.
const START_MAX: Duration = Duration::from_secs(10);

/// A running mosquitto; it ends with this value.
#[derive(Debug)]
pub(crate) struct Mosquitto {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) version: String,
}

impl Mosquitto {
    /// Starts one on a free port of 127.0.0.1, with the certificates of `tls` if given.
    ///
    /// # Errors
    /// When it is not installed or does not listen soon.
    pub(crate) fn start(folder: &Path, tls: Option<&Host>) -> Result<Self> {
        let program = find()?;
        // Free now; whoever takes it before mosquitto does makes the start fail, not the figures.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let config = folder.join("mosquitto.conf");
        fs::write(&config, configuration(address, tls))?;
        let log = fs::File::create(folder.join("mosquitto.log"))?;
        let child = Command::new(&program)
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut started = Self {
            child,
            address,
            version: version(&program),
        };
        started.wait_listening(folder)?;
        Ok(started)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_listening(&mut self, folder: &Path) -> Result<()> {
        let deadline = Instant::now() + START_MAX;
        while std::net::TcpStream::connect(self.address).is_err() {
            let log = || fs::read_to_string(folder.join("mosquitto.log")).unwrap_or_default();
            if let Some(status) = self.child.try_wait()? {
                bail!("mosquitto ended ({status}):\n{}", log());
            }
            ensure!(
                Instant::now() < deadline,
                "mosquitto does not listen:\n{}",
                log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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

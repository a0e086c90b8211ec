//! The folder of one lab: certificates, seed, stores, logs, `lab.json`, the control socket.
//!
//! ```text
//! DIR/lab.json  lab.sock  lab.lock  network  edgehub-lab -> the running executable
//! DIR/root-ca.pem  root-ca.key.pem
//! DIR/hub/      seed.json ledger.jsonl ready log server-chain.pem server-key.pem
//! DIR/<edge>/   storage/ log server-chain.pem server-key.pem
//! ```

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::network;

/// Set to keep the folders of labs that were started without a state folder.
const KEEP: &str = "EDGEHUB_LAB_KEEP";

/// One lab's folder, locked against a second lab.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    temporary: Option<tempfile::TempDir>,
    _lock: File,
}

impl StateDir {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        // Absolute, because it goes into lab.json and the children's environment.
        let path = path.canonicalize()?;
        let lock = lock(&path)?;
        let _ = fs::remove_file(path.join("lab.json"));
        Ok(Self {
            path,
            temporary: None,
            _lock: lock,
        })
    }

    /// A folder that disappears with the lab, unless the test panics or [`KEEP`] is set.
    pub(crate) fn temporary() -> Result<Self> {
        let temporary = tempfile::Builder::new()
            .prefix("edgehub-lab-state-")
            .tempdir()?;
        let path = temporary.path().canonicalize()?;
        let lock = lock(&path)?;
        Ok(Self {
            path,
            temporary: Some(temporary),
            _lock: lock,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of one host, created if needed.
    pub(crate) fn host(&self, name: &str) -> Result<PathBuf> {
        let folder = self.path.join(name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(folder)
    }

    /// The network that the last lab in this folder had: taking it again keeps host names, and so
    /// connection strings, as they were.
    pub(crate) fn last_network(&self) -> Option<u8> {
        fs::read_to_string(self.path.join("network"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    pub(crate) fn remember_network(&self, number: u8) -> Result<()> {
        let file = self.path.join("network");
        fs::write(&file, format!("{number}\n"))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        let Some(temporary) = self.temporary.take() else {
            return;
        };
        if std::thread::panicking() || std::env::var_os(KEEP).is_some() {
            let kept = temporary.keep();
            #[allow(
                clippy::print_stderr,
                reason = "the test's output is where it is looked for"
            )]
            {
                eprintln!("the lab's logs and stores are kept in {}", kept.display());
            }
        }
    }
}

fn lock(folder: &Path) -> Result<File> {
    let file = network::open_lock(&folder.join("lab.lock"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("a lab runs in {} already", folder.display())
        }
        Err(TryLockError::Error(error)) => Err(error).context("cannot lock the state folder"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lab_per_folder_and_a_stale_lab_json_goes() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("lab.json"), "{}").unwrap();
        let state = StateDir::open(folder.path()).unwrap();
        assert!(!folder.path().join("lab.json").exists());
        assert!(StateDir::open(folder.path()).is_err());
        assert_eq!(state.last_network(), None);
        state.remember_network(47).unwrap();
        assert!(state.host("edge1").unwrap().is_dir());
        drop(state);
        assert_eq!(
            StateDir::open(folder.path()).unwrap().last_network(),
            Some(47)
        );
    }

    #[test]
    fn a_temporary_folder_disappears() {
        let state = StateDir::temporary().unwrap();
        let path = state.path().to_owned();
        assert!(path.is_dir());
        drop(state);
        assert!(!path.exists() || std::env::var_os(KEEP).is_some());
    }
}

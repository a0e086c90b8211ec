//! Host names of labs in `/etc/hosts`.
//!
//! Every line that a lab writes ends in a tag with the lab's network, its process id and that
//! process's start time, so that whoever edits the file next can tell and remove the lines of labs
//! that died without cleaning up. The file is edited under a lock of its own and written in place:
//! in containers it is a bind mount, which cannot be replaced by renaming.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::network;

const MARK: &str = "# edgehub-lab";

/// Whose lines they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The lab's network number, unique among living labs.
    pub network: u8,
    /// The lab's process id.
    pub pid: u32,
    /// When that process started, in clock ticks since boot: process ids are used again.
    pub started: u64,
}

impl Tag {
    /// The tag of a lab in this process.
    #[must_use]
    pub fn of_this_process(network: u8) -> Self {
        let pid = std::process::id();
        Self {
            network,
            pid,
            started: started_at(pid).unwrap_or(0),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let (_, tag) = line.split_once(MARK)?;
        let field = |name: &str| {
            tag.split_ascii_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        Some(Self {
            network: field("network")?.parse().ok()?,
            pid: field("pid")?.parse().ok()?,
            started: field("started")?.parse().ok()?,
        })
    }

    fn is_alive(&self) -> bool {
        started_at(self.pid) == Some(self.started)
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            network,
            pid,
            started,
        } = self;
        write!(f, "{MARK} network={network} pid={pid} started={started}")
    }
}

/// Field 22 of `/proc/<pid>/stat`; the second field may contain blanks, so count from its end.
fn started_at(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The file that resolves host names without touching the network.
#[derive(Clone, Debug)]
pub struct HostsFile {
    path: PathBuf,
}

impl HostsFile {
    /// `/etc/hosts`.
    #[must_use]
    pub fn system() -> Self {
        Self {
            path: PathBuf::from("/etc/hosts"),
        }
    }

    /// Another file, for tests.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Adds the names of the lab `tag` and removes the lines of dead labs.
    ///
    /// # Errors
    /// When the file cannot be read or written: the caller then uses addresses as names.
    pub fn publish(&self, tag: &Tag, names: &[(Ipv4Addr, String)]) -> Result<()> {
        self.edit(|text| {
            with_lines(
                &without_lines(text, |t| t == tag || !t.is_alive()),
                tag,
                names,
            )
        })
    }

    /// Removes the names of the lab `tag`, and the lines of dead labs.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn withdraw(&self, tag: &Tag) -> Result<()> {
        self.edit(|text| without_lines(text, |t| t == tag || !t.is_alive()))
    }

    fn edit(&self, change: impl FnOnce(&str) -> String) -> Result<()> {
        // Held for microseconds, so waiting for it may block.
        let lock = network::machine_lock_file("hosts")?;
        lock.lock().context("cannot lock the hosts file")?;
        let shown = self.path.display();
        let old = fs::read_to_string(&self.path).with_context(|| format!("cannot read {shown}"))?;
        let new = change(&old);
        if new == old {
            return Ok(());
        }
        write_in_place(&self.path, &new).with_context(|| format!("cannot write {shown}"))
    }
}

/// Writes without truncating first, so that no reader ever finds the file empty.
fn write_in_place(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())?;
    file.set_len(text.len() as u64)
}

fn without_lines(text: &str, remove: impl Fn(&Tag) -> bool) -> String {
    let mut kept = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if !Tag::parse(line).is_some_and(|tag| remove(&tag)) {
            kept.push_str(line);
        }
    }
    kept
}

fn with_lines(text: &str, tag: &Tag, names: &[(Ipv4Addr, String)]) -> String {
    let mut text = text.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for (address, name) in names {
        text.push_str(&format!("{address} {name} {tag}\n"));
    }
    text
}

/// Whether this machine's resolver gives exactly `address` for `name`; `/etc/hosts` may be writable
/// and still not be consulted.
pub(crate) fn resolves_to(name: &str, address: Ipv4Addr) -> bool {
    (name, 0).to_socket_addrs().is_ok_and(|found| {
        let found: Vec<IpAddr> = found.map(|a| a.ip()).collect();
        !found.is_empty() && found.iter().all(|ip| *ip == IpAddr::V4(address))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "127.0.0.1 localhost\n10.0.0.1 printer # not edgehub-lab's business\n";

    fn dead() -> Tag {
        // Process 1 lives for ever, but it did not start at tick u64::MAX.
        Tag {
            network: 77,
            pid: 1,
            started: u64::MAX,
        }
    }

    fn file(text: &str) -> (tempfile::NamedTempFile, HostsFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let hosts = HostsFile::at(file.path());
        (file, hosts)
    }

    #[test]
    fn names_are_added_and_withdrawn_and_other_lines_stay() {
        let (file, hosts) = file(OWN);
        let tag = Tag::of_this_process(40);
        assert!(tag.is_alive());
        let names = [
            (Ipv4Addr::new(127, 0, 40, 1), "hub.lab40.example".to_owned()),
            (
                Ipv4Addr::new(127, 0, 40, 2),
                "edge1.lab40.example".to_owned(),
            ),
        ];
        hosts.publish(&tag, &names).unwrap();
        hosts.publish(&tag, &names).unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(text.starts_with(OWN));
        assert_eq!(
            text.lines().count(),
            4,
            "publishing twice adds nothing twice:\n{text}"
        );
        assert!(text.contains("127.0.40.2 edge1.lab40.example # edgehub-lab network=40 pid="));
        hosts.withdraw(&tag).unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), OWN);
    }

    #[test]
    fn lines_of_dead_labs_go_and_lines_of_living_labs_stay() {
        let living = Tag::of_this_process(41);
        let start = with_lines(
            &with_lines(
                OWN,
                &dead(),
                &[(Ipv4Addr::new(127, 0, 77, 1), "old".to_owned())],
            ),
            &living,
            &[(Ipv4Addr::new(127, 0, 41, 1), "neighbour".to_owned())],
        );
        let (file, hosts) = file(&start);
        let tag = Tag::of_this_process(42);
        hosts
            .publish(&tag, &[(Ipv4Addr::new(127, 0, 42, 1), "new".to_owned())])
            .unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(!text.contains("old") && text.contains("neighbour") && text.contains("new"));
        assert!(text.starts_with(OWN));
    }

    #[test]
    fn a_last_line_without_newline_is_completed() {
        let (file, hosts) = file("127.0.0.1 localhost");
        hosts
            .publish(
                &Tag::of_this_process(43),
                &[(Ipv4Addr::LOCALHOST, "x".to_owned())],
            )
            .unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        assert!(text.starts_with("127.0.0.1 localhost\n127.0.0.1 x # edgehub-lab"));
    }

    #[test]
    fn a_file_that_may_not_be_written_is_an_error() {
        let hosts = HostsFile::at(Path::new("/nonexistent/hosts"));
        assert!(hosts.publish(&dead(), &[]).is_err());
    }

    #[test]
    fn the_resolver_is_asked_for_the_exact_address() {
        assert!(resolves_to("127.0.0.1", Ipv4Addr::LOCALHOST));
        assert!(!resolves_to("127.0.0.1", Ipv4Addr::new(127, 0, 0, 2)));
    }
}

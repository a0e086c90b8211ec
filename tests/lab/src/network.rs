//! One `127.0.N.0/24` per lab, leased under a file lock, and the ports that can be had there.
//!
//! Host number `k` (0 is the IoT Hub emulator) has two addresses: the public one, `127.0.N.(1+k)`,
//! belongs to the relay and is what everybody connects to; the private one, `127.0.N.(101+k)`, is
//! where the process really listens and from where it makes its own connections. So a connection's
//! source address tells which host made it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Hosts of one lab: the emulator and 98 hubs fit below the first private address.
pub const MAX_HOSTS: usize = 99;

/// The networks that labs use. 127.0.0.0/24 stays free for everything else on the machine.
const NETWORKS: RangeInclusive<u8> = 40..=239;

/// Where labs of all users of this machine meet: locks, and sockets whose paths must be short.
const MEETING_POINT: &str = "/tmp/edgehub-lab";

/// The ports of every host of one lab; the same on the public and on the private address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// MQTT over TLS.
    pub mqtts: u16,
    /// AMQP over TLS.
    pub amqps: u16,
    /// HTTPS: 443, or 8443 where this user may not bind 443.
    pub https: u16,
    /// `/metrics`, `/healthz`, `/readyz` of a hub.
    pub metrics: u16,
    /// The emulator's control API.
    pub control: u16,
}

impl Ports {
    /// The ports that Azure IoT Edge uses.
    pub const REAL: Self = Self {
        mqtts: 8883,
        amqps: 5671,
        https: 443,
        metrics: 9600,
        control: 9090,
    };
    /// The same without any privileged port.
    pub const UNPRIVILEGED: Self = Self {
        https: 8443,
        ..Self::REAL
    };

    fn usable_on(self, address: Ipv4Addr) -> io::Result<Self> {
        for port in [
            self.mqtts,
            self.amqps,
            self.https,
            self.metrics,
            self.control,
        ] {
            TcpListener::bind((address, port))?;
        }
        Ok(self)
    }

    /// The real ports when they are wanted and all of them can be bound on `address`, the
    /// unprivileged ones when only the privilege is missing.
    fn probe(address: Ipv4Addr, wanted: Self) -> io::Result<Self> {
        match wanted.usable_on(address) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Self::UNPRIVILEGED.usable_on(address)
            }
            other => other,
        }
    }
}

/// The right to use one network, held until it is dropped (or the process ends, however it ends).
#[derive(Debug)]
pub struct NetworkLease {
    number: u8,
    ports: Ports,
    runtime_dir: PathBuf,
    _lock: File,
}

impl NetworkLease {
    /// Takes `preferred` if it is free, otherwise the first free network, with `hosts` hosts and
    /// `ports` as far as this user may bind them.
    ///
    /// # Errors
    /// When no network is free, or its addresses cannot be bound at all (a listener on 0.0.0.0 at
    /// one of the ports blocks every network; the text names the last reason).
    pub fn take(hosts: usize, preferred: Option<u8>, ports: Ports) -> Result<Self> {
        Self::take_in(Path::new(MEETING_POINT), NETWORKS, hosts, preferred, ports)
    }

    /// As [`Self::take`], with the locks in `folder` and one of `networks`.
    fn take_in(
        folder: &Path,
        networks: RangeInclusive<u8>,
        hosts: usize,
        preferred: Option<u8>,
        ports: Ports,
    ) -> Result<Self> {
        if hosts > MAX_HOSTS {
            bail!("{hosts} hosts do not fit into one lab network ({MAX_HOSTS} do)");
        }
        open_folder(folder)?;
        let preferred = preferred.filter(|number| networks.contains(number));
        let mut last = None;
        for number in preferred.into_iter().chain(networks) {
            let Some(lock) = try_lock(&folder.join(format!("network-{number}.lock")))? else {
                continue;
            };
            match probe(number, hosts, ports)
                .and_then(|ports| Ok((ports, fresh_dir(folder, number)?)))
            {
                Ok((ports, runtime_dir)) => {
                    return Ok(Self {
                        number,
                        ports,
                        runtime_dir,
                        _lock: lock,
                    });
                }
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error).context("no lab network can be bound"),
            None => bail!("all lab networks 127.0.40.0/24 to 127.0.239.0/24 are in use"),
        }
    }

    /// The N of 127.0.N.0/24.
    #[must_use]
    pub const fn number(&self) -> u8 {
        self.number
    }

    /// The ports that every host of this lab uses.
    #[must_use]
    pub const fn ports(&self) -> Ports {
        self.ports
    }

    /// A folder with a short path for Unix sockets (their paths are limited to 107 bytes); removed
    /// with the lease.
    #[must_use]
    pub fn runtime_dir(&self) -> &Path {
        &self.runtime_dir
    }

    /// The address under which others reach host number `index`.
    #[must_use]
    pub fn public(&self, index: usize) -> Ipv4Addr {
        public(self.number, index)
    }

    /// The address on which host number `index` listens and from which it connects.
    #[must_use]
    pub fn private(&self, index: usize) -> Ipv4Addr {
        private(self.number, index)
    }
}

impl Drop for NetworkLease {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.runtime_dir);
    }
}

fn public(number: u8, index: usize) -> Ipv4Addr {
    Ipv4Addr::new(
        127,
        0,
        number,
        1 + u8::try_from(index).unwrap_or(u8::MAX - 1),
    )
}

fn private(number: u8, index: usize) -> Ipv4Addr {
    Ipv4Addr::new(
        127,
        0,
        number,
        101 + u8::try_from(index).unwrap_or(u8::MAX - 101),
    )
}

/// Checks every address, because the remains of a killed lab may still listen on some of them.
fn probe(number: u8, hosts: usize, wanted: Ports) -> Result<Ports> {
    let mut ports = None;
    for index in 0..hosts.max(1) {
        for address in [public(number, index), private(number, index)] {
            let found = match ports {
                None => Ports::probe(address, wanted),
                Some(ports) => Ports::usable_on(ports, address),
            };
            ports = Some(found.with_context(|| format!("cannot listen on {address}"))?);
        }
    }
    ports.context("a lab has at least one host")
}

/// An empty folder for a lab's sockets, without those of a lab that was killed (whose lock we have
/// now). Another user's remains cannot be removed; then the next network is taken.
fn fresh_dir(folder: &Path, number: u8) -> Result<PathBuf> {
    let path = folder.join(number.to_string());
    let removed = match fs::remove_dir_all(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    removed
        .and_then(|()| fs::create_dir(&path))
        .with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// Opens (or creates) a lock file and takes its lock; `None` when somebody else holds it.
fn try_lock(path: &Path) -> Result<Option<File>> {
    let file = open_lock(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Opens a lock file that users share: reading is enough to lock it, and creating over another
/// user's file is refused in a sticky folder (`fs.protected_regular`).
pub(crate) fn open_lock(path: &Path) -> Result<File> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other.with_context(|| format!("cannot open {}", path.display())),
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o666));
    Ok(file)
}

/// Creates a folder that all users may share, as /tmp is.
fn open_folder(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let _ = fs::set_permissions(folder, fs::Permissions::from_mode(0o1777));
    }
    Ok(())
}

/// The machine-wide lock file `name`, for what all labs share (`/etc/hosts`, the build); not
/// locked yet.
pub(crate) fn machine_lock_file(name: &str) -> Result<File> {
    let folder = Path::new(MEETING_POINT);
    open_folder(folder)?;
    open_lock(&folder.join(format!("{name}.lock")))
}

/// `address:port`, for the many places that need it.
pub(crate) fn socket(address: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(address), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Networks that real labs never take, and others in each test.
    const FIRST: RangeInclusive<u8> = 240..=244;
    const SECOND: RangeInclusive<u8> = 245..=249;

    #[test]
    fn two_labs_get_different_networks_and_a_released_one_is_free_again() {
        let folder = tempfile::tempdir().unwrap();
        let first = NetworkLease::take_in(folder.path(), FIRST, 4, None, Ports::REAL).unwrap();
        let second =
            NetworkLease::take_in(folder.path(), FIRST, 4, Some(first.number()), Ports::REAL)
                .unwrap();
        assert_ne!(first.number(), second.number());
        let number = first.number();
        assert!(first.runtime_dir().is_dir());
        let runtime_dir = first.runtime_dir().to_owned();
        drop(first);
        assert!(!runtime_dir.exists());
        let third =
            NetworkLease::take_in(folder.path(), FIRST, 4, Some(number), Ports::REAL).unwrap();
        assert_eq!(third.number(), number);
    }

    #[test]
    fn a_network_on_which_somebody_listens_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let first = NetworkLease::take_in(folder.path(), SECOND, 2, None, Ports::REAL).unwrap();
        let number = first.number();
        drop(first);
        let _squatter = TcpListener::bind((private(number, 1), Ports::REAL.mqtts)).unwrap();
        let second =
            NetworkLease::take_in(folder.path(), SECOND, 2, Some(number), Ports::REAL).unwrap();
        assert_ne!(second.number(), number);
    }

    #[test]
    fn public_and_private_addresses_do_not_overlap() {
        assert_eq!(public(40, 0), Ipv4Addr::new(127, 0, 40, 1));
        assert_eq!(public(40, MAX_HOSTS - 1), Ipv4Addr::new(127, 0, 40, 99));
        assert_eq!(private(40, 0), Ipv4Addr::new(127, 0, 40, 101));
        assert_eq!(private(40, MAX_HOSTS - 1), Ipv4Addr::new(127, 0, 40, 199));
        let folder = tempfile::tempdir().unwrap();
        assert!(
            NetworkLease::take_in(folder.path(), SECOND, MAX_HOSTS + 1, None, Ports::REAL).is_err()
        );
    }
}

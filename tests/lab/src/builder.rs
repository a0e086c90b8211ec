//! Describes a lab and starts it.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::hosts_file::{self, HostsFile, Tag};
use crate::lab::{Host, HostSlot, Lab, Names};
use crate::network::{NetworkLease, Ports};
use crate::pki::RootCa;
use crate::process::{Launch, Reaper, allow_many_descriptors};
use crate::relay::{Plane, Relay, RelayHost};
use crate::seed::Seed;
use crate::state_dir::StateDir;
use crate::topology::{AtStart, DeviceSpec, EdgeSpec, LeafSpec, ModuleSpec, StorageSync, Topology};
use crate::{Binaries, HUB, Profile, environment};

/// Describes a lab: hosts, identities, options. [`Self::start`] makes it real.
///
/// ```no_run
/// # async fn example() -> anyhow::Result<()> {
/// let lab = edgehub_lab::LabBuilder::new()
///     .layers(3)
///     .leaf("leaf1", "edge3")
///     .module("edge2", "modA")
///     .start()
///     .await?;
/// lab.kill("edge2").await?;
/// lab.start("edge2").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LabBuilder {
    topology: Topology,
    state_dir: Option<PathBuf>,
    binaries: Option<Binaries>,
    profile: Profile,
    users_seed: Option<Seed>,
    hub_at_start: AtStart,
    strict: bool,
    host_names: bool,
    ports: Ports,
    log_level: String,
    patience: Duration,
}

impl Default for LabBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl LabBuilder {
    /// A lab with an IoT Hub emulator and nothing else yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            topology: Topology::default(),
            state_dir: None,
            binaries: None,
            profile: Profile::Test,
            users_seed: None,
            hub_at_start: AtStart::Ready,
            strict: true,
            host_names: true,
            ports: Ports::REAL,
            log_level: "info".to_owned(),
            patience: Duration::from_secs(60),
        }
    }

    /// A chain of edges below what is there: `edge1` (talks to the IoT Hub), `edge2`, …
    #[must_use]
    pub fn layers(mut self, count: usize) -> Self {
        for _ in 0..count {
            let parent = self.topology.edges.last().map(|edge| edge.name.clone());
            let name = format!("edge{}", self.topology.edges.len() + 1);
            self.topology
                .edges
                .push(EdgeSpec::new(name, parent.as_deref()));
        }
        self
    }

    /// One edge with options of its own, after its parent.
    #[must_use]
    pub fn edge(mut self, edge: EdgeSpec) -> Self {
        self.topology.edges.push(edge);
        self
    }

    /// A leaf device below an edge.
    #[must_use]
    pub fn leaf(mut self, id: impl Into<String>, parent: impl Into<String>) -> Self {
        self.topology.leaves.push(LeafSpec {
            id: id.into(),
            parent: parent.into(),
        });
        self
    }

    /// `leaf1` to `leaf<count>` below an edge.
    #[must_use]
    pub fn leaves(self, count: usize, parent: &str) -> Self {
        (1..=count).fold(self, |builder, number| {
            builder.leaf(format!("leaf{number}"), parent)
        })
    }

    /// A module of an edge.
    #[must_use]
    pub fn module(mut self, edge: impl Into<String>, id: impl Into<String>) -> Self {
        self.topology.modules.push(ModuleSpec {
            id: id.into(),
            edge: edge.into(),
        });
        self
    }

    /// A further registered identity without a process.
    #[must_use]
    pub fn device(mut self, device: DeviceSpec) -> Self {
        self.topology.devices.push(device);
        self
    }

    /// An environment variable of one hub, winning over what the lab sets. It has to be called
    /// after the edge was added; an unknown name fails the start.
    #[must_use]
    pub fn env(self, edge: &str, name: &str, value: &str) -> Self {
        self.with_edge(edge, |edge| {
            edge.environment.push((name.to_owned(), value.to_owned()));
        })
    }

    /// `UpstreamProtocol` of every hub that was added before; without it a lab's hubs speak MQTT
    /// upwards. [`Self::env`] gives one hub another protocol, whichever comes last.
    #[must_use]
    pub fn upstream(mut self, protocol: &str) -> Self {
        for edge in &mut self.topology.edges {
            let setting = ("UpstreamProtocol".to_owned(), protocol.to_owned());
            edge.environment.push(setting);
        }
        self
    }

    /// `StorageSync` of one hub.
    #[must_use]
    pub fn storage_sync(self, edge: &str, sync: StorageSync) -> Self {
        self.with_edge(edge, |edge| edge.storage_sync = Some(sync))
    }

    /// Whether a host (`hub` or an edge) runs at the end of [`Self::start`].
    #[must_use]
    pub fn at_start(mut self, host: &str, at_start: AtStart) -> Self {
        if host == HUB {
            self.hub_at_start = at_start;
            return self;
        }
        self.with_edge(host, |edge| edge.at_start = at_start)
    }

    /// Keep certificates, keys, stores and logs here, and continue with what is there. Without
    /// this a temporary folder is used, which is removed unless the test panics or
    /// `EDGEHUB_LAB_KEEP` is set.
    #[must_use]
    pub fn state_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_dir = Some(path.into());
        self
    }

    /// Start these instead of building first.
    #[must_use]
    pub fn binaries(mut self, binaries: Binaries) -> Self {
        self.binaries = Some(binaries);
        self
    }

    /// What is built when no binaries were given; the test profile unless set.
    #[must_use]
    pub const fn profile(mut self, profile: Profile) -> Self {
        self.profile = profile;
        self
    }

    /// Further identities and fixed keys, in the emulator's seed format.
    #[must_use]
    pub fn seed(mut self, seed: Seed) -> Self {
        self.users_seed = Some(seed);
        self
    }

    /// Whether the emulator closes connections for what real IoT Hub would tolerate or not notice;
    /// on unless set.
    #[must_use]
    pub const fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// `false` makes addresses the host names, as happens by itself where `/etc/hosts` cannot be
    /// written.
    #[must_use]
    pub const fn host_names(mut self, wanted: bool) -> Self {
        self.host_names = wanted;
        self
    }

    /// [`Ports::UNPRIVILEGED`] even where the real ones could be had.
    #[must_use]
    pub const fn ports(mut self, ports: Ports) -> Self {
        self.ports = ports;
        self
    }

    /// `RuntimeLogLevel` of every hub; `info` unless set.
    #[must_use]
    pub fn log_level(mut self, level: &str) -> Self {
        level.clone_into(&mut self.log_level);
        self
    }

    /// How long a host may take until it is ready; one minute unless set (a debug build on a busy
    /// machine).
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Builds what is out of date, starts every host that is to run, and returns when they are
    /// ready.
    ///
    /// # Errors
    /// When the description does not fit together, no network is free, the build fails or a host
    /// does not become ready (with the end of its log).
    ///
    /// # Cancel safety
    /// Everything that was started is ended.
    pub async fn start(self) -> Result<Lab> {
        let lab = self.start_unannounced().await?;
        lab.announce()?;
        Ok(lab)
    }

    /// As [`Self::start`], without a `lab.json`: for a program that has something to do before it
    /// says that all is ready, with [`Lab::announce`].
    ///
    /// # Errors
    /// As [`Self::start`].
    ///
    /// # Cancel safety
    /// As [`Self::start`].
    pub async fn start_unannounced(self) -> Result<Lab> {
        let lab = self.prepare().await?;
        for slot in lab.slots() {
            match slot.at_start {
                AtStart::Ready => lab.start(&slot.host.name).await?,
                AtStart::Started => lab.spawn(&slot.host.name).await?,
                AtStart::Off => {}
            }
        }
        Ok(lab)
    }

    fn with_edge(mut self, name: &str, change: impl FnOnce(&mut EdgeSpec)) -> Self {
        match self
            .topology
            .edges
            .iter_mut()
            .find(|edge| edge.name == name)
        {
            Some(edge) => change(edge),
            // Kept as an edge that cannot exist, so that the check at the start names it.
            None => self
                .topology
                .edges
                .push(EdgeSpec::new(format!("{name}?"), None)),
        }
        self
    }

    /// Everything but starting processes.
    async fn prepare(self) -> Result<Lab> {
        self.topology.check()?;
        allow_many_descriptors();
        let state = match &self.state_dir {
            Some(path) => StateDir::open(path)?,
            None => StateDir::temporary()?,
        };
        let binaries = match self.binaries.clone() {
            Some(binaries) => binaries,
            None => Binaries::build(self.profile).await?,
        };
        let count = 1 + self.topology.edges.len();
        let lease = NetworkLease::take(count, state.last_network(), self.ports)?;
        state.remember_network(lease.number())?;
        let names = publish_names(&lease, &self.host_names_wanted(&lease), self.host_names);
        let hosts = self.hosts(&state, &lease, &names)?;
        let root = RootCa::open(state.path())?;
        issue_certificates(&root, &hosts)?;
        let seed = self.write_seed(&state, &hosts)?;
        let relay = listen(&hosts, lease.ports())?;
        let slots = self.slots(&binaries, &hosts, &root, &seed, &lease)?;
        Ok(Lab::new(
            slots,
            relay,
            Reaper::start()?,
            seed,
            root,
            names,
            lease,
            state,
            self.patience,
        ))
    }

    fn host_names_wanted(&self, lease: &NetworkLease) -> Vec<(std::net::Ipv4Addr, String)> {
        let edges = self.topology.edges.iter().map(|edge| edge.name.as_str());
        let all = std::iter::once(HUB).chain(edges).enumerate();
        all.map(|(index, name)| {
            (
                lease.public(index),
                format!("{name}.lab{}.example", lease.number()),
            )
        })
        .collect()
    }

    fn hosts(&self, state: &StateDir, lease: &NetworkLease, names: &Names) -> Result<Vec<Host>> {
        let edges = self
            .topology
            .edges
            .iter()
            .map(|edge| (&*edge.name, edge.parent.clone()));
        let all = std::iter::once((HUB, None)).chain(edges).enumerate();
        all.map(|(index, (name, parent))| {
            let folder = state.host(name)?;
            Ok(Host {
                name: name.to_owned(),
                parent,
                hostname: names.of(index, lease.public(index)),
                address: lease.public(index),
                private_address: lease.private(index),
                ports: lease.ports(),
                log: folder.join("log"),
                storage: (name != HUB).then(|| folder.join("storage")),
                folder,
            })
        })
        .collect()
    }

    fn write_seed(&self, state: &StateDir, hosts: &[Host]) -> Result<Seed> {
        let file = state.host(HUB)?.join("seed.json");
        let earlier = if file.exists() {
            Some(Seed::read(&file)?)
        } else {
            None
        };
        let hub = hosts.first().context("a lab has a hub")?;
        let seed = self
            .topology
            .seed(&hub.hostname, earlier.as_ref(), self.users_seed.as_ref());
        fs::write(&file, serde_json::to_string_pretty(&seed)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        Ok(seed)
    }

    fn slots(
        &self,
        binaries: &Binaries,
        hosts: &[Host],
        root: &RootCa,
        seed: &Seed,
        lease: &NetworkLease,
    ) -> Result<Vec<HostSlot>> {
        let mut slots = Vec::with_capacity(hosts.len());
        for host in hosts {
            let edge = self
                .topology
                .edges
                .iter()
                .find(|edge| edge.name == host.name);
            let (launch, at_start, faults) = match edge {
                None => {
                    let launch = environment::emulator(&binaries.emulator, host, self.strict);
                    (launch, self.hub_at_start, None)
                }
                Some(edge) => {
                    let faults = binaries
                        .with_faults
                        .then(|| lease.runtime_dir().join(format!("{}.faults", host.name)));
                    let parent = hosts.iter().find(|h| Some(&h.name) == edge.parent.as_ref());
                    let environment = environment::Hub {
                        host,
                        parent,
                        edge,
                        seed,
                        trust_bundle: root.certificate(),
                        log_level: &self.log_level,
                        faults: faults.as_deref(),
                        clients: self.topology.leaves.len()
                            + self.topology.modules.len()
                            + self.topology.edges.len(),
                    };
                    fs::create_dir_all(host.folder.join("storage"))?;
                    let launch = Launch {
                        program: binaries.edgehub.clone(),
                        arguments: Vec::new(),
                        environment: environment.variables()?,
                        log: host.log.clone(),
                        with_stdin: false,
                    };
                    (launch, edge.at_start, faults)
                }
            };
            slots.push(HostSlot::new(host.clone(), launch, at_start, faults));
        }
        Ok(slots)
    }
}

/// Writes the names into `/etc/hosts` if that is possible and has the effect.
fn publish_names(
    lease: &NetworkLease,
    names: &[(std::net::Ipv4Addr, String)],
    wanted: bool,
) -> Names {
    let tag = Tag::of_this_process(lease.number());
    let file = HostsFile::system();
    if !wanted || file.publish(&tag, names).is_err() {
        return Names::Addresses;
    }
    let published = Names::Published {
        names: names.iter().map(|(_, name)| name.clone()).collect(),
        file,
        tag,
    };
    if names
        .iter()
        .all(|(address, name)| hosts_file::resolves_to(name, *address))
    {
        published
    } else {
        Names::Addresses
    }
}

fn issue_certificates(root: &RootCa, hosts: &[Host]) -> Result<()> {
    for host in hosts {
        let addresses = [IpAddr::V4(host.address), IpAddr::V4(host.private_address)];
        let mut names = vec![];
        if host.hostname.parse::<IpAddr>().is_err() {
            names.push(host.hostname.as_str());
        }
        if host.name != HUB {
            names.push("edgeHub");
        }
        root.issue(&host.folder, &host.name, &names, &addresses)?;
    }
    Ok(())
}

fn listen(hosts: &[Host], ports: Ports) -> Result<Relay> {
    let relay_hosts = hosts.iter().map(|host| RelayHost {
        name: host.name.clone(),
        public: host.address,
        private: host.private_address,
    });
    let relay = Relay::new(relay_hosts.collect())?;
    for host in hosts {
        for port in [ports.mqtts, ports.amqps, ports.https] {
            relay.listen(&host.name, port, Plane::Data)?;
        }
        let management = if host.name == HUB {
            ports.control
        } else {
            ports.metrics
        };
        relay.listen(&host.name, management, Plane::Management)?;
    }
    Ok(relay)
}

/// The file in a host's folder that says that the emulator is ready.
pub(crate) fn ready_file(folder: &Path) -> PathBuf {
    folder.join("ready")
}

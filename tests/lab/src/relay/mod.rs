//! The network between the hosts: every public address belongs to this TCP relay.
//!
//! A connection to a public address is accepted here and continued to the host's private address.
//! Its source address says who made it (hosts bind their private address before they connect), and
//! it is kept on the second leg, so a hub sees its peers as they are. Faults apply per (source,
//! target) to data ports; management ports (metrics, the emulator's control API) are relayed but
//! never disturbed, because they are how tests watch.
//!
//! The relay has a runtime of its own: a test that keeps its own runtime busy does not slow the
//! network down.
//!
//! # Limits
//! TCP is relayed above the kernel: a refused connection is accepted first and then reset, and a
//! black-holed one is accepted and then silent. A client cannot tell the difference to a middlebox.

mod connection;
pub mod faults;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::network;
pub use faults::{Fault, FaultTable, Link, Mode, Party};

/// Connections relayed at one time; those above wait to be accepted.
const MAX_CONNECTIONS: usize = 16_384;

/// Its tasks end at their next await, which is a matter of microseconds.
const END_MAX: Duration = Duration::from_secs(5);

/// At a limit (connections, descriptors) the accept loop looks again after this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// A host as the relay knows it.
#[derive(Clone, Debug)]
pub struct RelayHost {
    /// Its name, used in [`Party::Host`].
    pub name: String,
    /// Where the relay listens for it.
    pub public: Ipv4Addr,
    /// Where it listens itself.
    pub private: Ipv4Addr,
}

/// Whether faults apply to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// What hosts and clients say to each other.
    Data,
    /// What tests and people use to watch; never disturbed.
    Management,
}

/// The relay of one lab. Dropping it closes its listeners and its connections, and waits for that.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    runtime: Option<tokio::runtime::Runtime>,
}

#[derive(Debug)]
struct Shared {
    hosts: Vec<RelayHost>,
    faults: watch::Sender<FaultTable>,
    connections: Mutex<HashMap<u64, Registered>>,
    next_id: AtomicU64,
    ended: Notify,
}

#[derive(Debug)]
struct Registered {
    link: Link,
    plane: Plane,
    reset: CancellationToken,
}

impl Relay {
    /// A relay for these hosts; it listens nowhere yet.
    ///
    /// # Errors
    /// When its runtime cannot be started.
    pub fn new(hosts: Vec<RelayHost>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("lab-relay")
            .enable_all()
            .build()
            .context("cannot start the relay's runtime")?;
        let shared = Shared {
            hosts,
            faults: watch::Sender::new(FaultTable::default()),
            connections: Mutex::default(),
            next_id: AtomicU64::new(0),
            ended: Notify::new(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            runtime: Some(runtime),
        })
    }

    /// Listens on `port` of the host's public address and forwards to the same port of its private
    /// address. Connections are accepted from the moment this returns.
    ///
    /// # Errors
    /// When there is no such host or the address cannot be bound.
    pub fn listen(&self, host: &str, port: u16, plane: Plane) -> Result<()> {
        let host = self
            .shared
            .hosts
            .iter()
            .find(|h| h.name == host)
            .context("no such host")?;
        let address = network::socket(host.public, port);
        let listener = std::net::TcpListener::bind(address)
            .with_context(|| format!("the relay cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        let runtime = self.runtime.as_ref().context("the relay has ended")?;
        let _context = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        let way = connection::Way {
            target: Party::Host(host.name.clone()),
            to: network::socket(host.private, port),
            plane,
        };
        runtime.spawn(accept(Arc::clone(&self.shared), listener, way));
        Ok(())
    }

    /// Changes how `links` behave. With [`Mode::Cut`] this returns when the connections on them
    /// are gone; everything else holds from the moment of the call.
    ///
    /// # Cancel safety
    /// The change is made at the first poll; cancelling gives up only the wait.
    pub async fn set_mode(&self, links: &[Link], mode: Mode) {
        self.change(links, |fault| fault.mode = mode);
        if mode == Mode::Cut {
            self.reset(links).await;
        }
    }

    /// Adds `delay` to every byte on `links`, in each direction.
    pub fn set_delay(&self, links: &[Link], delay: Duration) {
        self.change(links, |fault| fault.delay = delay);
    }

    /// Makes `links` harmless again. Faults on a whole host stay when only one of its links is
    /// named.
    pub fn heal(&self, links: &[Link]) {
        self.change(links, |fault| *fault = Fault::default());
    }

    /// Forgets every fault.
    pub fn heal_all(&self) {
        self.shared.faults.send_modify(FaultTable::clear);
    }

    /// Resets (RST) every connection on `links`, and returns when they are gone.
    ///
    /// # Cancel safety
    /// The connections are told at the first poll; cancelling gives up only the wait.
    pub async fn reset(&self, links: &[Link]) {
        let told = self.shared.tell_to_reset(links);
        loop {
            // Created before the table is read, so that an end in between is not missed.
            let ended = self.shared.ended.notified();
            if !told
                .iter()
                .any(|id| self.shared.connections.lock().contains_key(id))
            {
                return;
            }
            ended.await;
        }
    }

    /// How many connections are open on `link`.
    #[must_use]
    pub fn connections(&self, link: &Link) -> usize {
        let connections = self.shared.connections.lock();
        connections
            .values()
            .filter(|c| c.plane == Plane::Data && link.covers(&c.link))
            .count()
    }

    fn change(&self, links: &[Link], mut change: impl FnMut(&mut Fault)) {
        self.shared.faults.send_modify(|table| {
            for link in links {
                table.change(link, &mut change);
            }
        });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        // On a thread of its own, because in async code a runtime may not be waited for. It has to
        // be: the next lab wants the same addresses, and with them the same host names.
        let end = std::thread::spawn(move || runtime.shutdown_timeout(END_MAX));
        let _ = end.join();
    }
}

impl Shared {
    fn source(&self, address: IpAddr) -> Party {
        let host = self
            .hosts
            .iter()
            .find(|host| IpAddr::V4(host.private) == address);
        host.map_or(Party::Clients, |host| Party::Host(host.name.clone()))
    }

    fn register(&self, link: &Link, plane: Plane) -> (u64, CancellationToken) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let reset = CancellationToken::new();
        let registered = Registered {
            link: link.clone(),
            plane,
            reset: reset.clone(),
        };
        self.connections.lock().insert(id, registered);
        (id, reset)
    }

    fn forget(&self, id: u64) {
        self.connections.lock().remove(&id);
        self.ended.notify_waiters();
    }

    fn tell_to_reset(&self, links: &[Link]) -> Vec<u64> {
        let connections = self.connections.lock();
        let concerned = connections.iter().filter(|(_, connection)| {
            connection.plane == Plane::Data && links.iter().any(|l| l.covers(&connection.link))
        });
        concerned
            .map(|(id, connection)| {
                connection.reset.cancel();
                *id
            })
            .collect()
    }
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, way: connection::Way) {
    loop {
        if shared.connections.lock().len() >= MAX_CONNECTIONS {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        }
        match listener.accept().await {
            Ok((client, peer)) => {
                let link = Link::new(shared.source(peer.ip()), way.target.clone());
                let (id, reset) = shared.register(&link, way.plane);
                let (shared, way) = (Arc::clone(&shared), way.clone());
                tokio::spawn(async move {
                    let faults = connection::LinkFaults::new(&shared.faults, link, way.plane);
                    connection::run(client, peer.ip(), &way, faults, reset).await;
                    shared.forget(id);
                });
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

#[cfg(test)]
mod tests;

//! The table of open sockets: who is behind each, and how to close it.
//!
//! A closed or replaced connection is *fenced*: whatever its task still holds, the ledger takes
//! nothing from it any more. Without that, an old connection could write after the new one.
//!
//! An AMQP socket carries many identities. Each of them is a *member*: an entry of its own, with
//! its own fence, which ends without the socket. The socket itself has no identity.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::authorize::Claim;
use crate::identity::Identity;
use crate::sessions::Actor;

/// What travels in the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Amqp,
    /// AMQP in a WebSocket: began as HTTPS.
    AmqpWs,
    Https,
    Mqtt,
    /// MQTT in a WebSocket: began as HTTPS.
    MqttWs,
}

/// Why somebody else ends a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The control API.
    Killed,
    /// The registry does not admit its identity any more.
    NotAdmitted,
    /// A newer connection has its identity.
    Replaced,
}

/// Set once a connection may not write to the ledger any more.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fence(Arc<AtomicBool>);

impl Fence {
    pub(crate) fn is_closed(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn close(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One line of the connection list.
#[derive(Debug, Clone)]
pub(crate) struct ConnectionInfo {
    pub(crate) id: u64,
    pub(crate) transport: Transport,
    pub(crate) peer: SocketAddr,
    pub(crate) since_ms: u64,
    /// None until an MQTT CONNECT was accepted, and for an AMQP socket.
    pub(crate) claim: Option<Claim>,
    /// The AMQP socket that carries it; none for what is a socket itself.
    pub(crate) carrier: Option<u64>,
    /// What an AMQP client says that it is.
    pub(crate) client_version: Option<String>,
}

struct Entry {
    info: ConnectionInfo,
    end: End,
    fence: Fence,
}

/// How an entry learns of its end.
#[derive(Clone, Default)]
struct End {
    closing: CancellationToken,
    why: Arc<OnceLock<Ending>>,
    /// Of a member: wakes the socket's task.
    wake: Option<Arc<Notify>>,
}

impl Entry {
    fn end(&self, why: Ending) {
        self.fence.close();
        // The first reason stays.
        let _ = self.end.why.set(why);
        self.end.closing.cancel();
        if let Some(wake) = &self.end.wake {
            wake.notify_one();
        }
    }
}

#[derive(Default)]
struct Table {
    last_id: u64,
    open: BTreeMap<u64, Entry>,
    by_identity: HashMap<Identity, u64>,
}

/// All open sockets of one emulator.
#[derive(Default)]
pub(crate) struct Connections {
    table: Arc<Mutex<Table>>,
    /// Changes whenever a socket leaves the table.
    left: Arc<watch::Sender<u64>>,
}

impl Connections {
    /// Enters a socket that was just accepted.
    pub(crate) fn open(&self, transport: Transport, peer: SocketAddr, now_ms: u64) -> Connection {
        let info = ConnectionInfo {
            id: 0,
            transport,
            peer,
            since_ms: now_ms,
            claim: None,
            carrier: None,
            client_version: None,
        };
        enter(&self.table, &self.left, info, End::default())
    }

    pub(crate) fn list(&self) -> Vec<ConnectionInfo> {
        self.table
            .lock()
            .open
            .values()
            .map(|entry| entry.info.clone())
            .collect()
    }

    pub(crate) fn is_connected(&self, device: &str, module: Option<&str>) -> bool {
        let identity = Identity {
            device: device.to_owned(),
            module: module.map(str::to_owned),
        };
        self.table.lock().by_identity.contains_key(&identity)
    }

    /// Closes the connections whose claim `refused` objects to; returns their ids. A socket that
    /// carried them stays.
    pub(crate) fn close_where(&self, refused: impl Fn(&Claim) -> bool) -> Vec<u64> {
        let table = self.table.lock();
        let refused = |entry: &&Entry| entry.info.claim.as_ref().is_some_and(&refused);
        let doomed = table.open.values().filter(refused);
        doomed
            .map(|entry| {
                entry.end(Ending::NotAdmitted);
                entry.info.id
            })
            .collect()
    }

    /// Closes the connections that match; returns their ids at once, their sockets follow. What a
    /// socket carries ends with it, and so does a socket with the last member that it carries.
    pub(crate) fn close_matching(&self, matches: impl Fn(&ConnectionInfo) -> bool) -> Vec<u64> {
        let table = self.table.lock();
        let entries = table.open.values();
        let mut doomed: BTreeSet<u64> = entries
            .filter(|entry| matches(&entry.info))
            .map(|entry| entry.info.id)
            .collect();
        let mut survives: BTreeMap<u64, bool> = BTreeMap::new();
        for entry in table.open.values() {
            let Some(carrier) = entry.info.carrier else {
                continue;
            };
            if doomed.contains(&carrier) {
                doomed.insert(entry.info.id);
            }
            *survives.entry(carrier).or_default() |= !doomed.contains(&entry.info.id);
        }
        doomed.extend(
            survives
                .iter()
                .filter(|(_, survives)| !**survives)
                .map(|(id, _)| id),
        );
        for entry in doomed.iter().filter_map(|id| table.open.get(id)) {
            entry.end(Ending::Killed);
        }
        doomed.into_iter().collect()
    }

    /// Returns when none of these connections is in the table any more.
    pub(crate) async fn gone(&self, ids: &[u64]) {
        let mut left = self.left.subscribe();
        while ids.iter().any(|id| self.table.lock().open.contains_key(id)) {
            if left.changed().await.is_err() {
                return;
            }
        }
    }
}

/// A socket's place in the table; leaves it when dropped.
pub(crate) struct Connection {
    id: u64,
    end: End,
    fence: Fence,
    table: Arc<Mutex<Table>>,
    left: Arc<watch::Sender<u64>>,
}

impl Connection {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn fence(&self) -> &Fence {
        &self.fence
    }

    /// This connection as the one that changes something.
    pub(crate) fn actor(&self) -> Actor<'_> {
        Actor {
            connection: self.id,
            fence: &self.fence,
        }
    }

    /// What was HTTPS is a WebSocket with this in it from now on.
    pub(crate) fn upgraded(&self, transport: Transport) {
        if let Some(entry) = self.table.lock().open.get_mut(&self.id) {
            entry.info.transport = transport;
        }
    }

    /// Enters an identity that this socket carries, and makes it the connection of the identity
    /// like [`Self::identify`]. `wake` is told when somebody ends it.
    pub(crate) fn member(
        &self,
        claim: &Claim,
        now_ms: u64,
        wake: Arc<Notify>,
    ) -> (Self, Option<u64>) {
        let own = self
            .table
            .lock()
            .open
            .get(&self.id)
            .map(|entry| entry.info.clone());
        let info = ConnectionInfo {
            id: 0,
            transport: own.as_ref().map_or(Transport::Amqp, |own| own.transport),
            peer: own.map_or_else(|| ([0, 0, 0, 0], 0).into(), |own| own.peer),
            since_ms: now_ms,
            claim: None,
            carrier: Some(self.id),
            client_version: None,
        };
        let end = End {
            wake: Some(wake),
            ..End::default()
        };
        let member = enter(&self.table, &self.left, info, end);
        // A socket that was closed in between takes its members along.
        if self.fence.is_closed() {
            member.fence.close();
        }
        let old = member.identify(claim);
        (member, old)
    }

    /// What the client says that it is.
    pub(crate) fn describe(&self, client_version: &str) {
        const CHARS_MAX: usize = 500;
        if let Some(entry) = self.table.lock().open.get_mut(&self.id) {
            let text = client_version.chars().take(CHARS_MAX).collect();
            entry.info.client_version = Some(text);
        }
    }

    /// Returns when somebody wants this connection closed without ceremony.
    pub(crate) async fn closing(&self) {
        self.end.closing.cancelled().await;
    }

    /// Why somebody else has ended this connection; none while nobody has.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.end.why.get().copied()
    }

    /// Makes this the connection of its identity. The one that had it until now is fenced and
    /// told to close; its id is returned.
    pub(crate) fn identify(&self, claim: &Claim) -> Option<u64> {
        let mut table = self.table.lock();
        let replaced = table.by_identity.insert(claim.identity.clone(), self.id);
        if let Some(entry) = table.open.get_mut(&self.id) {
            entry.info.claim = Some(claim.clone());
        }
        let old = replaced
            .and_then(|id| table.open.get(&id))
            .filter(|old| old.info.id != self.id)?;
        old.end(Ending::Replaced);
        Some(old.info.id)
    }
}

/// Enters what was just accepted, under the next id.
fn enter(
    shared: &Arc<Mutex<Table>>,
    left: &Arc<watch::Sender<u64>>,
    info: ConnectionInfo,
    end: End,
) -> Connection {
    let mut table = shared.lock();
    table.last_id += 1;
    let id = table.last_id;
    let fence = Fence::default();
    let entry = Entry {
        info: ConnectionInfo { id, ..info },
        end: end.clone(),
        fence: fence.clone(),
    };
    table.open.insert(id, entry);
    Connection {
        id,
        end,
        fence,
        table: shared.clone(),
        left: left.clone(),
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        if let Some(claim) = table
            .open
            .remove(&self.id)
            .and_then(|entry| entry.info.claim)
            && table.by_identity.get(&claim.identity) == Some(&self.id)
        {
            table.by_identity.remove(&claim.identity);
        }
        drop(table);
        self.left.send_modify(|count| *count += 1);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn claim(text: &str) -> Claim {
        Claim {
            identity: Identity::parse(text).unwrap(),
            chain: None,
        }
    }

    fn open(connections: &Connections) -> Connection {
        connections.open(Transport::Mqtt, "127.0.0.1:1".parse().unwrap(), 0)
    }

    #[tokio::test]
    async fn a_second_connection_fences_and_closes_the_first() {
        let connections = Connections::default();
        let first = open(&connections);
        assert_eq!(first.identify(&claim("leaf1")), None);
        let second = open(&connections);
        assert_eq!(second.identify(&claim("leaf1")), Some(first.id()));
        assert!(first.fence().is_closed());
        timeout(PATIENCE, first.closing()).await.unwrap();
        drop(first);
        assert!(
            connections.is_connected("leaf1", None),
            "the second one is still there"
        );
        assert!(!second.fence().is_closed());
        drop(second);
        assert!(!connections.is_connected("leaf1", None));
    }

    /// One identity of a socket ends without the others; the last one takes the socket along.
    #[test]
    fn a_socket_and_what_it_carries() {
        let connections = Connections::default();
        let socket = connections.open(Transport::Amqp, "127.0.0.1:1".parse().unwrap(), 0);
        let member = |text| socket.member(&claim(text), 0, Arc::default()).0;
        let (one, two) = (member("leaf1"), member("leaf2"));
        let is = |wanted: &'static str| {
            move |info: &ConnectionInfo| {
                let claim = info.claim.as_ref();
                claim.is_some_and(|claim| claim.identity.to_string() == wanted)
            }
        };
        assert_eq!(connections.close_matching(is("leaf1")), [one.id()]);
        assert_eq!(one.ending(), Some(Ending::Killed));
        assert_eq!((two.ending(), socket.ending()), (None, None));
        drop(one);
        let newer = open(&connections);
        assert_eq!(newer.identify(&claim("leaf2")), Some(two.id()));
        assert_eq!(
            (two.ending(), socket.ending()),
            (Some(Ending::Replaced), None)
        );
        drop(two);
        let three = member("leaf3");
        assert_eq!(
            connections.close_matching(is("leaf3")),
            [socket.id(), three.id()]
        );
        assert_eq!(socket.ending(), Some(Ending::Killed));
        assert!(member("leaf4").fence().is_closed(), "too late");
    }

    #[tokio::test]
    async fn gone_waits_for_the_socket_to_leave() {
        let connections = Arc::new(Connections::default());
        let one = open(&connections);
        let ids = connections.close_matching(|_| true);
        assert_eq!(ids, [one.id()]);
        let waiter = tokio::spawn({
            let connections = connections.clone();
            async move { connections.gone(&ids).await }
        });
        drop(one);
        timeout(PATIENCE, waiter).await.unwrap().unwrap();
    }
}

//! The table of open sockets: who is behind each, and how to close it.
//!
//! A closed or replaced connection is *fenced*: whatever its task still holds, the ledger takes
//! nothing from it any more. Without that, an old connection could write after the new one.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::authorize::Claim;
use crate::identity::Identity;
use crate::sessions::Actor;

/// What travels in the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Https,
    Mqtt,
    /// MQTT in a WebSocket: began as HTTPS.
    MqttWs,
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
    /// None until an MQTT CONNECT was accepted.
    pub(crate) claim: Option<Claim>,
}

struct Entry {
    info: ConnectionInfo,
    closing: CancellationToken,
    fence: Fence,
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
        let mut table = self.table.lock();
        table.last_id += 1;
        let id = table.last_id;
        let closing = CancellationToken::new();
        let fence = Fence::default();
        let info = ConnectionInfo {
            id,
            transport,
            peer,
            since_ms: now_ms,
            claim: None,
        };
        let entry = Entry {
            info,
            closing: closing.clone(),
            fence: fence.clone(),
        };
        table.open.insert(id, entry);
        Connection {
            id,
            closing,
            fence,
            table: self.table.clone(),
            left: self.left.clone(),
        }
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

    /// Closes the connections whose claim `refused` objects to; returns their ids.
    pub(crate) fn close_where(&self, refused: impl Fn(&Claim) -> bool) -> Vec<u64> {
        self.close_matching(|info| info.claim.as_ref().is_some_and(&refused))
    }

    /// Closes the connections that match; returns their ids at once, their sockets follow.
    pub(crate) fn close_matching(&self, matches: impl Fn(&ConnectionInfo) -> bool) -> Vec<u64> {
        let table = self.table.lock();
        let doomed = table.open.values().filter(|entry| matches(&entry.info));
        doomed
            .map(|entry| {
                entry.fence.close();
                entry.closing.cancel();
                entry.info.id
            })
            .collect()
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
    closing: CancellationToken,
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

    /// What was HTTPS is MQTT in a WebSocket from now on.
    pub(crate) fn upgraded(&self) {
        if let Some(entry) = self.table.lock().open.get_mut(&self.id) {
            entry.info.transport = Transport::MqttWs;
        }
    }

    /// Returns when somebody wants this connection closed without ceremony.
    pub(crate) async fn closing(&self) {
        self.closing.cancelled().await;
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
        old.fence.close();
        old.closing.cancel();
        Some(old.info.id)
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

//! Records, tokens and whole hubs for the tests of this crate.
//!
//! The scope, seen by the hub on `edge1`:
//! ```text
//! edge1            (edge1/$edgeHub, edge1/modA)
//! ├─ leaf0
//! ├─ edge2         (edge2/$edgeHub)
//! │  ├─ leaf1      (leaf1/modB)
//! │  └─ edge3      (edge3/$edgeHub)
//! └─ edge10        (edge10/$edgeHub)
//!    └─ leaf10
//! ```

use std::io;
use std::sync::Arc;

use edgehub_auth::authenticator::{
    AudienceHosts, Authenticator, Claim, Credential, IdentityRefresh,
};
use edgehub_auth::sas_signer;
use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use edgehub_auth::scope_tree::{Authentication, KeyMaterial, ServiceIdentity, Status};
use edgehub_proto::clock::{Clock, ManualClock};
use edgehub_proto::identity::Identity;
use edgehub_proto::sas;
use edgehub_storage::{ConnectionStringWrap, Store, StoreConfig};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::hub::{Hub, HubParts};
use crate::routing::Router;

pub(crate) const HUB_HOST: &str = "h.azure-devices.net";
/// 2026-08-21.
pub(crate) const NOW_S: u64 = 1_787_300_000;

pub(crate) fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

/// A key in base64 that differs for each identity and `generation`.
pub(crate) fn key(identity: &str, generation: u32) -> String {
    // Any base64 text is a key; signing twice with a constant makes a different one for each.
    sas_signer::sign("c2VlZA==", &format!("{identity} {generation}")).unwrap()
}

fn scope(device: &str) -> String {
    format!("ms-azure-iot-edge://{device}-1")
}

pub(crate) fn module(identity: &str) -> ServiceIdentity {
    ServiceIdentity {
        identity: id(identity),
        generation_id: "1".to_owned(),
        status: Status::Enabled,
        is_edge: false,
        device_scope: None,
        parent_scopes: Vec::new(),
        authentication: Authentication::SymmetricKey {
            primary: KeyMaterial::new(&key(identity, 0)),
            secondary: None,
        },
    }
}

pub(crate) fn leaf(device: &str, parent: &str) -> ServiceIdentity {
    let parent_scopes = vec![scope(parent)];
    ServiceIdentity {
        device_scope: Some(scope(parent)),
        parent_scopes,
        ..module(device)
    }
}

pub(crate) fn edge(device: &str, parent: Option<&str>) -> ServiceIdentity {
    ServiceIdentity {
        is_edge: true,
        device_scope: Some(scope(device)),
        parent_scopes: parent.map(scope).into_iter().collect(),
        ..module(device)
    }
}

pub(crate) fn sample_scope() -> Vec<ServiceIdentity> {
    vec![
        edge("edge1", None),
        module("edge1/$edgeHub"),
        module("edge1/modA"),
        leaf("leaf0", "edge1"),
        edge("edge2", Some("edge1")),
        module("edge2/$edgeHub"),
        leaf("leaf1", "edge2"),
        module("leaf1/modB"),
        edge("edge3", Some("edge2")),
        module("edge3/$edgeHub"),
        edge("edge10", Some("edge1")),
        module("edge10/$edgeHub"),
        leaf("leaf10", "edge10"),
    ]
}

/// A scope with the sample in it, initialised.
pub(crate) fn sample_cache() -> Arc<ScopeCache> {
    let cache = ScopeCache::new(&id("edge1"));
    cache.apply(ScopeChange::Upsert(sample_scope()));
    cache.set_initialised();
    cache
}

pub(crate) fn authenticator(
    cache: &Arc<ScopeCache>,
    clock: &Arc<ManualClock>,
    refresh: Option<Arc<dyn IdentityRefresh>>,
) -> Arc<Authenticator> {
    let hosts = AudienceHosts::new(HUB_HOST, "edge1.local");
    Arc::new(Authenticator::new(
        Arc::clone(cache),
        hosts,
        Arc::clone(clock) as _,
        refresh,
    ))
}

/// A token for `identity`, signed with `key`, good until `expiry_s`.
pub(crate) fn token_with(identity: &str, key: &str, expiry_s: u64) -> String {
    let identity = id(identity);
    let audience = match identity.module_id() {
        None => format!("{HUB_HOST}/devices/{}", identity.device_id()),
        Some(module) => format!(
            "{HUB_HOST}/devices/{}/modules/{module}",
            identity.device_id()
        ),
    };
    let resource = sas::encode_resource(&audience);
    let signature = sas_signer::sign(key, &format!("{resource}\n{expiry_s}")).unwrap();
    sas::format(&resource, &signature, expiry_s)
}

/// A good token of `identity`.
pub(crate) fn token(identity: &str) -> String {
    token_with(identity, &key(identity, 0), NOW_S + 3600)
}

/// What `identity` claims when it connects by itself.
pub(crate) fn claim(identity: &str) -> Claim {
    let credential = Credential::Sas(token(identity));
    Claim {
        identity: id(identity),
        chain: None,
        credential,
    }
}

/// Tokio's clock, which a test can pause: it begins at [`NOW_S`] and moves while all tasks wait.
#[derive(Debug)]
pub(crate) struct PausedClock(tokio::time::Instant);

impl PausedClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(tokio::time::Instant::now()))
    }
}

impl Clock for PausedClock {
    fn unix_ms(&self) -> u64 {
        NOW_S * 1000 + u64::try_from(self.0.elapsed().as_millis()).unwrap()
    }

    fn instant(&self) -> std::time::Instant {
        tokio::time::Instant::now().into_std()
    }
}

/// What is logged, as text.
#[derive(Clone, Default)]
pub(crate) struct LogSink(Arc<Mutex<Vec<u8>>>);

impl LogSink {
    /// Takes up everything that this thread logs, until the guard is dropped.
    pub(crate) fn start(&self) -> tracing::subscriber::DefaultGuard {
        let writer = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }
}

impl io::Write for LogSink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A hub with a store of its own and the sample scope.
pub(crate) struct TestHub {
    pub(crate) hub: Arc<Hub>,
    pub(crate) scope: Arc<ScopeCache>,
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) _folder: TempDir,
}

impl TestHub {
    pub(crate) fn new() -> Self {
        Self::with_scope(sample_cache())
    }

    pub(crate) fn with_scope(scope: Arc<ScopeCache>) -> Self {
        Self::with_refresh(scope, None)
    }

    /// One that asks upstream about identities.
    pub(crate) fn with_refresh(
        scope: Arc<ScopeCache>,
        refresh: Option<Arc<dyn IdentityRefresh>>,
    ) -> Self {
        let clock = Arc::new(ManualClock::new(NOW_S * 1000));
        let shared: Arc<dyn Clock> = Arc::clone(&clock) as _;
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig::new(folder.path().join("edgeHub"));
        let wrap = Arc::new(ConnectionStringWrap::new(b"a key of a test"));
        let store = Store::open(config, Arc::clone(&shared), wrap)
            .unwrap()
            .store;
        let routes = [(
            "r1".to_owned(),
            "FROM /messages/* INTO $upstream".to_owned(),
        )];
        let (router, bad) = Router::new(&routes, "edge1", None, &store).unwrap();
        assert!(bad.is_empty());
        let hub = Hub::new(HubParts {
            hub_host: HUB_HOST.to_owned(),
            own_identity: id("edge1/$edgeHub"),
            clock: shared,
            scope: Arc::clone(&scope),
            hosts: AudienceHosts::new(HUB_HOST, "edge1.local"),
            authenticator: authenticator(&scope, &clock, refresh),
            router,
            store,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            connected_clients_max: 4,
        });
        Self {
            hub,
            scope,
            clock,
            _folder: folder,
        }
    }
}

impl Drop for TestHub {
    /// Closes the store and waits for it: a process that exits while RocksDB's threads work is
    /// aborted, which would fail a test that has passed.
    fn drop(&mut self) {
        let store = self.hub.store().clone();
        let close = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap();
            runtime.block_on(store.close()).unwrap();
        };
        // Not on this thread, which may be a runtime's.
        std::thread::spawn(close).join().unwrap();
    }
}

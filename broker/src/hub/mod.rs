//! What all protocol heads share: who is connected, how a claim is judged, where a message goes.
//!
//! A head translates frames into calls on [`Hub`] and nothing else; a fourth head would add no
//! line here.

mod client_infos;
mod drop_log;
mod ingest;
mod outlet;
mod registry;
mod services;

pub use drop_log::DROP_LOG_PERIOD;
pub use ingest::{Gather, Ingest, Outcome, Telemetry, Ways};
pub use outlet::{
    C2D_STREAM, Delivery, DeliveryToken, Features, INPUT_SLOTS_MAX, OUTBOX_EVENTS_MAX, OfferError,
    Outlet, Settlement, ToClient, TwinResponse,
};
pub use registry::{Registration, Registry, RegistryFull};
pub use services::{Below, NEEDS_GRACE, ServiceConfig, ServiceParts, Services, TWIN_REQUESTS_MAX};

use client_infos::ClientInfos;
pub use client_infos::{INFO_BYTES_MAX, stored_client_infos};

use std::fmt::Display;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use edgehub_auth::authenticator::{
    AudienceHosts, Authenticator, AuthnError, Claim, Principal, Verdict, verify,
};
use edgehub_auth::scope_cache::ScopeCache;
use edgehub_proto::clock::Clock;
use edgehub_proto::hub::ClientInfo;
use edgehub_proto::identity::Identity;
use edgehub_storage::{Store, StoreError};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::edge_hub::Presence;
use crate::routing::Router;
use crate::session::SessionStore;
use crate::telemetry::metrics::{self, DropReason};
use drop_log::DropLog;

/// The label of refused connections of ids that are not in scope.
pub const UNKNOWN_ID: &str = "(unknown)";
/// Between two searches for what is kept of identities that have left.
pub const FORGET_PAUSE: Duration = Duration::from_secs(60);
/// Claims that are judged again before other tasks get their turn.
const RECHECKS_PER_TURN: usize = 64;

/// Parts a hub is made of.
#[derive(Debug)]
pub struct HubParts {
    /// IoT Hub's host name.
    pub hub_host: String,
    /// `{device}/$edgeHub`.
    pub own_identity: Identity,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The device scope.
    pub scope: Arc<ScopeCache>,
    /// Hosts that tokens may name.
    pub hosts: AudienceHosts,
    /// Judges claims; made of the same `scope`, `hosts` and `clock` as this hub.
    pub authenticator: Arc<Authenticator>,
    /// Routes in force.
    pub router: Router,
    /// Where messages last.
    pub store: Store,
    /// Connections at once.
    pub connected_clients_max: usize,
    /// Owns what is spawned for clients.
    pub tasks: TaskTracker,
    /// Ends it.
    pub stop: CancellationToken,
}

/// The hub behind the heads. One per process, shared.
#[derive(Debug)]
pub struct Hub {
    hub_host: String,
    own_identity: Identity,
    clock: Arc<dyn Clock>,
    scope: Arc<ScopeCache>,
    hosts: AudienceHosts,
    authenticator: Arc<Authenticator>,
    router: ArcSwap<Router>,
    store: Store,
    registry: Arc<Registry>,
    drops: DropLog,
    sessions: SessionStore,
    presence: Presence,
    infos: ClientInfos,
    /// Held while a client's coming, going, subscribing or what it says about itself is told to the
    /// services, so that they hear of all of it in the order in which it happened. Taken before a service's lock, and
    /// that before the registry's.
    turns: Mutex<()>,
    /// Started once the bridge is there ([`Hub::start_services`]).
    services: OnceLock<Services>,
}

impl Hub {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: HubParts) -> Arc<Self> {
        let sessions = SessionStore::new(parts.store.clone(), parts.tasks, parts.stop);
        let infos = ClientInfos::new(parts.store.clone());
        Arc::new(Self {
            infos,
            hub_host: parts.hub_host,
            own_identity: parts.own_identity,
            clock: parts.clock,
            scope: parts.scope,
            hosts: parts.hosts,
            authenticator: parts.authenticator,
            router: ArcSwap::from_pointee(parts.router),
            store: parts.store,
            registry: Registry::new(parts.connected_clients_max),
            drops: DropLog::default(),
            sessions,
            presence: Presence::default(),
            turns: Mutex::new(()),
            services: OnceLock::new(),
        })
    }

    /// Starts twins, methods, cloud-to-device messages and inputs. Until then a client can send and
    /// hears nothing. Reads from the store, once.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn start_services(self: &Arc<Self>, parts: ServiceParts) -> Result<&Services, StoreError> {
        self.infos.restore()?;
        for (identity, info) in self.infos.all() {
            parts.upstream.describe(&identity, &info);
        }
        let (hub, stop) = (Arc::clone(self), parts.stop.clone());
        parts.tasks.spawn(async move { hub.infos.run(stop).await });
        let services = Services::start(self, parts)?;
        Ok(self.services.get_or_init(|| services))
    }

    /// Takes what a client says about itself, and tells the upstream when that is news.
    pub fn describe(&self, identity: &Identity, info: ClientInfo) {
        let _turn = self.turns.lock();
        if let Some(info) = self.infos.record(identity, info)
            && let Some(services) = self.services.get()
        {
            services.describe(identity, &info);
        }
    }

    /// What is known of a client.
    #[must_use]
    pub fn client_info(&self, identity: &Identity) -> ClientInfo {
        self.infos.get(identity)
    }

    /// The sessions of clients.
    #[must_use]
    pub fn sessions(&self) -> &SessionStore {
        &self.sessions
    }

    /// Who is connected, for the hub's own twin.
    #[must_use]
    pub fn presence(&self) -> &Presence {
        &self.presence
    }

    /// Judges a claim and, when it holds, registers the connection: an older one of the same
    /// identity is told to close, and its late end cannot remove this one.
    ///
    /// # Errors
    /// Why the client may not, or may not now.
    ///
    /// # Cancel safety
    /// Dropping the future registers nothing.
    pub async fn connect(
        &self,
        claim: Claim,
        options: ConnectOptions,
    ) -> Result<Connected, ConnectError> {
        let principal = match self.authenticator.authenticate(&claim).await {
            Ok(principal) => principal,
            Err(error) => {
                self.count_refusal(&claim.identity);
                return Err(ConnectError::Refused(error));
            }
        };
        if let Some(info) = options.info {
            self.describe(&claim.identity, info);
        }
        let (registration, outbox) = self
            .registry
            .register(claim.clone(), options.clean_session)?;
        // The scope may have changed after the verdict, and `watch_scope` have looked at the live
        // connections before this one was among them.
        if let Some(error) = self.revoked(&claim) {
            self.count_refusal(&claim.identity);
            return Err(ConnectError::Refused(error));
        }
        metrics::connect_succeeded(principal.identity(), &self.hub_host).increment(1);
        tracing::info!("New device connection for device {}", principal.identity());
        Ok(Connected {
            principal,
            registration,
            outbox,
        })
    }

    /// The connection is subscribed to these from now on; to be said once it is accepted, and after
    /// each change. Idempotent.
    pub fn subscribed(self: &Arc<Self>, registration: &Registration, features: Features) {
        let _turn = self.turns.lock();
        if !registration.is_live() {
            return;
        }
        let client = registration.identity();
        if let Some(clean_session) = registration.announce() {
            self.presence.connected(client, self.clock.unix_ms());
            if let Some(services) = self.services.get() {
                services.connected(client, clean_session);
            }
        }
        if !registration.set_features(features) {
            return;
        }
        if let Some(services) = self.services.get() {
            services.subscribed(client, features);
        }
    }

    /// Answers a request for the client's twin through its outbox.
    pub fn twin_get(self: &Arc<Self>, registration: &Registration, request_id: Arc<str>) {
        if let Some(services) = self.services.get() {
            let requests = registration.twin_requests();
            services.twin_get(self, registration, request_id, requests);
        }
    }

    /// Takes a patch of reported properties; answers through the outbox when there is a request id.
    pub fn twin_report(
        self: &Arc<Self>,
        registration: &Registration,
        request_id: Option<Arc<str>>,
        patch: Bytes,
    ) {
        if let Some(services) = self.services.get() {
            services.twin_report(self, registration, request_id, patch);
        }
    }

    /// Takes the client's answer to a direct method. No status: one that is no number.
    pub fn method_response(
        &self,
        registration: &Registration,
        request_id: &str,
        status: Option<i32>,
        payload: Bytes,
    ) {
        if let Some(services) = self.services.get() {
            let client = registration.identity();
            services
                .methods
                .responded(client, request_id, status, payload);
        }
    }

    /// Takes what became of deliveries. Those of a connection that was taken over count for
    /// nothing: the newer one gets them again.
    pub fn settled(&self, registration: &Registration, settled: &[(DeliveryToken, Settlement)]) {
        if let Some(services) = self.services.get()
            && registration.is_live()
        {
            services.settled(registration.identity(), settled);
        }
    }

    /// A connection that was accepted has ended: counts it and, when no newer one took its place,
    /// tells the services. To be called once its [`Registration`] is dropped.
    pub fn disconnected(self: &Arc<Self>, identity: &Identity, clean_session: bool) {
        metrics::disconnected(identity, &self.hub_host).increment(1);
        let _turn = self.turns.lock();
        if self.registry.is_announced(identity) {
            return;
        }
        self.presence.disconnected(identity, self.clock.unix_ms());
        if let Some(services) = self.services.get() {
            services.disconnected(self, identity, clean_session);
        }
    }

    /// Judges every live connection again whenever the device scope changes, until `stop`:
    /// whoever was removed, disabled or given other keys is disconnected
    /// (spec/auth-hierarchy-http.md 4.6).
    pub async fn watch_scope(self: Arc<Self>, stop: CancellationToken) {
        let mut changes = self.scope.subscribe();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
            }
            for (index, live) in self.registry.live().into_iter().enumerate() {
                if let Some(error) = self.revoked(&live.claim) {
                    let reason = error.reason();
                    tracing::info!(
                        "Closing the connection of {}: {reason}",
                        live.claim.identity
                    );
                    live.close.cancel();
                }
                if index % RECHECKS_PER_TURN == RECHECKS_PER_TURN - 1 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// Forgets what is kept for identities that have left the scope, after each change of it and at
    /// most once in [`FORGET_PAUSE`], until `stop`: an identity of the same name that comes later is
    /// somebody else (testing.md S9).
    pub async fn watch_strangers(self: Arc<Self>, stop: CancellationToken) {
        let mut changes = self.scope.subscribe();
        let work = async {
            loop {
                if self.scope.is_initialised() {
                    self.forget_strangers().await;
                }
                tokio::time::sleep(FORGET_PAUSE).await;
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Removes sessions and twins of identities that are not in the scope.
    async fn forget_strangers(&self) {
        let scope = self.scope.current();
        let strangers = Mutex::new(Vec::new());
        let keep = |identity: &Identity| {
            let is_known = *identity == self.own_identity || scope.get(identity).is_some();
            if !is_known {
                strangers.lock().push(identity.clone());
            }
            is_known
        };
        if let Err(error) = self.sessions.sweep(keep).await {
            tracing::warn!("Sessions cannot be looked through now: {error}");
            return;
        }
        let is_known =
            |identity: &Identity| *identity == self.own_identity || scope.get(identity).is_some();
        let turn = self.turns.lock();
        for identity in self.infos.retain(is_known) {
            if let Some(services) = self.services.get() {
                services.describe(&identity, &ClientInfo::default());
            }
        }
        drop(turn);
        for identity in strangers.into_inner() {
            tracing::info!("{identity} has left the device scope: its session is removed");
            if let Some(services) = self.services.get() {
                services.twins.removed(&identity);
            }
        }
    }

    /// Why a claim that held before does not hold any more; none while it does.
    ///
    /// A refusal that newer knowledge could change counts once the scope is initialised: an
    /// identity leaves the tree, or loses its way to us, only on positive evidence (design.md
    /// D12). Whoever is closed wrongly reconnects, and then upstream is asked.
    fn revoked(&self, claim: &Claim) -> Option<AuthnError> {
        // Before the snapshot, as in `Authenticator`: the safe mistake.
        let initialised = self.scope.is_initialised();
        let now_ms = self.clock.unix_ms();
        match verify(&self.scope.current(), &self.hosts, claim, now_ms) {
            Verdict::Accepted(_) => None,
            Verdict::Refused(error) => Some(error),
            Verdict::Stale(stale) => initialised.then_some(stale.error),
        }
    }

    /// Counts a refused connection under its id, if there is such an identity: a stranger
    /// chooses its name freely, and each name would be a series for ever.
    pub(crate) fn count_refusal(&self, identity: &Identity) {
        let known = self.scope.current().get(identity).is_some();
        let id = if known { identity.as_str() } else { UNKNOWN_ID };
        metrics::connect_failed(id).increment(1);
    }

    /// Settles and counts all messages whose time to live is over. Takes as long as a look at
    /// every queue that may have one.
    ///
    /// # Cancel safety
    /// Safe: what is left is found the next time.
    pub async fn expire_messages(&self) {
        let count = |sender: &Identity, output: &str| {
            metrics::messages_dropped(DropReason::TtlExpiry, sender, output).increment(1);
        };
        for queue in self.store.queues() {
            let now_ms = self.clock.unix_ms();
            match queue.expire_each(now_ms, usize::MAX, count).await {
                Ok(0) => {}
                Ok(expired) => {
                    tracing::info!("{expired} messages of {} expired", queue.id().endpoint);
                }
                Err(error) => tracing::warn!("Looking for expired messages failed: {error}"),
            }
        }
    }

    /// The device scope.
    #[must_use]
    pub fn scope(&self) -> &Arc<ScopeCache> {
        &self.scope
    }

    /// Judges claims of protocols without a connection.
    #[must_use]
    pub fn authenticator(&self) -> &Arc<Authenticator> {
        &self.authenticator
    }

    /// `{device}/$edgeHub`.
    #[must_use]
    pub fn own_identity(&self) -> &Identity {
        &self.own_identity
    }

    /// Time.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The routes in force.
    #[must_use]
    pub fn router(&self) -> Arc<Router> {
        self.router.load_full()
    }

    /// Whether `router` is the one in force.
    fn is_router(&self, router: &Arc<Router>) -> bool {
        Arc::ptr_eq(&self.router.load(), router)
    }

    /// Puts other routes into force: for every message that is taken from now on.
    pub fn set_router(&self, router: Router) {
        self.router.store(Arc::new(router));
        if let Some(services) = self.services.get() {
            services.routed(self);
        }
    }

    /// Counts a message of `sender` that is dropped, and now and then says so in the log: it was
    /// acknowledged, so its sender will not (design.md D5).
    fn dropped(&self, sender: &Identity, output: &str, reason: DropReason, why: &dyn Display) {
        metrics::messages_dropped(reason, sender, output).increment(1);
        let Some(count) = self.drops.note(reason, self.clock.instant()) else {
            return;
        };
        let label = reason.label();
        let text = format_args!(
            "Dropped a message of {sender}: {why} ({label}, {count} since the last such line)"
        );
        // Routes that leave some messages out may be meant so; the others are faults of senders.
        if reason == DropReason::NoRoute {
            tracing::debug!("{text}");
        } else {
            tracing::warn!("{text}");
        }
    }
}

/// How a client connects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectOptions {
    /// What it says about itself; none: what it said before stays.
    pub info: Option<ClientInfo>,
    /// Nothing of an earlier session counts: unsettled deliveries start anew.
    pub clean_session: bool,
}

/// A client that may speak.
#[derive(Debug)]
pub struct Connected {
    /// Proof of who it is.
    pub principal: Principal,
    /// Its place among the live connections; dropping it gives the place up.
    pub registration: Registration,
    /// What the hub tells it.
    pub outbox: mpsc::Receiver<ToClient>,
}

/// Why a client may not connect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The claim does not hold, or cannot be judged now.
    #[error(transparent)]
    Refused(#[from] AuthnError),
    /// `MaxConnectedClients` is reached.
    #[error(transparent)]
    Full(#[from] RegistryFull),
}

#[cfg(test)]
mod info_tests;
#[cfg(test)]
mod tests;

//! Keeps our copy of the scope current: the walk at start, every hour, after a reconnect and on
//! demand.

use std::{collections::HashSet, sync::Arc, time::Duration};

use edgehub_auth::{
    scope_cache::{ScopeCache, ScopeChange},
    scope_tree::{Authentication, ServiceIdentity, Status},
};
use edgehub_proto::{
    auth_chain::AuthChain, hub::Connectivity, identity::Identity, scope::ScopeResponse,
};
use edgehub_storage::{Store, StoreError};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    api::{ScopeApi, ScopeError},
    records::ScopeRecords,
    refresh::Refreshes,
    walk::{Visit, Walk, WalkResult},
};
use crate::limits;

/// How often and how patiently the upstream is asked about the scope.
#[derive(Clone, Debug)]
pub struct ScopeConfig {
    /// Time from one complete walk to the next. `DeviceScopeCacheRefreshRateSecs`.
    pub period: Duration,
    /// Least time between a complete walk and one on demand, and between two refreshes of one
    /// known identity. `DeviceScopeCacheRefreshDelaySecs`.
    pub min_interval: Duration,
    /// Pause after a walk that did not complete; doubles with each further one ...
    pub retry_min: Duration,
    /// ... up to this.
    pub retry_max: Duration,
    /// Identities asked for per page.
    pub page_size: i64,
    /// One request and its answer.
    pub request_timeout: Duration,
    /// All of one refresh of a single identity, including a walk that it waits for.
    pub refresh_timeout: Duration,
    /// How long a "not found" is remembered.
    pub negative_ttl: Duration,
    /// How long "the upstream cannot be reached" is remembered.
    pub unavailable_ttl: Duration,
    /// Seed of jitter.
    pub seed: u64,
}

impl Default for ScopeConfig {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(3600),
            min_interval: Duration::from_secs(120),
            retry_min: Duration::from_secs(1),
            retry_max: Duration::from_secs(120),
            page_size: 100,
            request_timeout: Duration::from_secs(30),
            refresh_timeout: Duration::from_secs(10),
            negative_ttl: Duration::from_secs(10),
            unavailable_ttl: Duration::from_secs(2),
            seed: 0,
        }
    }
}

/// Where the walks stand.
#[derive(Clone, Copy, Debug, Default)]
struct WalkStatus {
    /// Walks that ended.
    ended: u64,
    /// When the last one ended.
    ended_at: Option<Instant>,
    /// When the last complete one ended.
    complete_at: Option<Instant>,
    /// Whether the last one was complete.
    was_complete: bool,
}

/// What came of waiting for a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WalkWait {
    /// A complete walk ended: now, or so recently that another one is not allowed yet.
    Complete,
    /// None did.
    Incomplete,
}

/// The scope service: walks, refreshes, and the records on disk.
pub(crate) struct ScopeKeeper<A> {
    pub(super) api: A,
    pub(super) records: ScopeRecords,
    pub(super) config: ScopeConfig,
    pub(super) refreshes: Refreshes,
    own_hub: Identity,
    walks: watch::Sender<WalkStatus>,
    /// While a walk is under way: who was fetched apart meanwhile. The walk may have read the page
    /// where they belong before they were there.
    fetched: Mutex<Option<HashSet<Identity>>>,
    demand: Notify,
    rng: Mutex<StdRng>,
}

impl<A> std::fmt::Debug for ScopeKeeper<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScopeKeeper")
            .field("own_hub", &self.own_hub)
            .finish_non_exhaustive()
    }
}

impl<A: ScopeApi> ScopeKeeper<A> {
    /// Restores the scope from the store and makes sure that our own `$edgeHub` is in it, so that
    /// it can connect before the first walk. Blocks: for the start only.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    pub(crate) fn restore(
        api: A,
        cache: Arc<ScopeCache>,
        store: Store,
        own_hub: Identity,
        config: ScopeConfig,
    ) -> Result<Self, StoreError> {
        let records = ScopeRecords::new(cache, store);
        let restored = records.restore()?;
        if restored > 0 {
            info!(identities = restored, "scope restored from the store");
        }
        if records.cache().current().get(&own_hub).is_none() {
            let own = ServiceIdentity {
                identity: own_hub.clone(),
                generation_id: String::new(),
                status: Status::Enabled,
                is_edge: false,
                device_scope: None,
                parent_scopes: Vec::new(),
                authentication: Authentication::None,
            };
            records.cache().apply(ScopeChange::Upsert(vec![own]));
        }
        let (walks, _) = watch::channel(WalkStatus::default());
        let rng = Mutex::new(StdRng::seed_from_u64(config.seed));
        let refreshes = Refreshes::new();
        Ok(Self {
            api,
            records,
            config,
            refreshes,
            own_hub,
            walks,
            fetched: Mutex::new(None),
            demand: Notify::new(),
            rng,
        })
    }

    pub(crate) fn cache(&self) -> &Arc<ScopeCache> {
        self.records.cache()
    }

    /// Walks now, then whenever it is time, until cancelled.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut connectivity: watch::Receiver<Connectivity>,
        cancel: CancellationToken,
    ) {
        let mut retry = self.config.retry_min;
        loop {
            let result = tokio::select! {
                result = self.walk() => result,
                () = cancel.cancelled() => return,
            };
            let is_complete = result.failed.is_empty();
            self.note_walk_end(is_complete);
            let pause = if is_complete {
                retry = self.config.retry_min;
                self.config.period
            } else {
                let pause = retry.mul_f64(self.rng.lock().random_range(0.8..=1.2));
                retry = (retry * 2).min(self.config.retry_max);
                pause
            };
            let next = Instant::now() + pause;
            tokio::select! {
                () = self.until_due(next, &mut connectivity) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    /// Waits until a walk is due: at `next`, or earlier on demand or after a reconnect if walks are
    /// allowed then.
    async fn until_due(&self, next: Instant, connectivity: &mut watch::Receiver<Connectivity>) {
        loop {
            tokio::select! {
                () = sleep_until(next) => return,
                () = self.demand.notified() => {}
                changed = connectivity.changed() => {
                    if changed.is_err() {
                        // Nobody feeds it any more: the bridge ends.
                        sleep_until(next).await;
                        return;
                    }
                    if *connectivity.borrow_and_update() != Connectivity::Connected {
                        continue;
                    }
                }
            }
            if self.is_walk_allowed() {
                return;
            }
        }
    }

    /// Whether the whole scope was walked since the start: then what the cache lacks is not there.
    pub(crate) fn has_walked(&self) -> bool {
        self.walks.borrow().complete_at.is_some()
    }

    fn is_walk_allowed(&self) -> bool {
        let status = *self.walks.borrow();
        let pause = if status.was_complete {
            self.config.min_interval
        } else {
            self.config.retry_min
        };
        status.ended_at.is_none_or(|at| at.elapsed() >= pause)
    }

    /// Asks for a walk and waits for its end, at most until `deadline`.
    pub(super) async fn walk_on_demand(&self, deadline: Instant) -> WalkWait {
        let mut walks = self.walks.subscribe();
        let before = *walks.borrow_and_update();
        let is_recent = before
            .complete_at
            .is_some_and(|at| at.elapsed() < self.config.min_interval);
        if is_recent && before.was_complete {
            return WalkWait::Complete;
        }
        // Kept if a walk is under way; it then starts another one only if that is allowed.
        self.demand.notify_one();
        let ended = walks.wait_for(|status| status.ended > before.ended);
        match timeout_at(deadline, ended).await {
            Ok(Ok(status)) if status.was_complete => WalkWait::Complete,
            _ => WalkWait::Incomplete,
        }
    }

    /// Takes over records that were fetched apart from a walk.
    pub(super) async fn take_fetched(&self, records: Vec<ServiceIdentity>) {
        // Before they are in the cache: the walk looks there first, and here afterwards.
        if let Some(fetched) = self.fetched.lock().as_mut() {
            fetched.extend(records.iter().map(|record| record.identity.clone()));
        }
        self.records.apply(ScopeChange::Upsert(records)).await;
    }

    fn note_walk_end(&self, is_complete: bool) {
        let now = Instant::now();
        self.walks.send_modify(|status| {
            status.ended += 1;
            status.ended_at = Some(now);
            status.was_complete = is_complete;
            if is_complete {
                status.complete_at = Some(now);
            }
        });
    }

    /// One walk through the whole scope.
    async fn walk(self: &Arc<Self>) -> WalkResult {
        let own_device = self.own_hub.device_identity();
        let mut walk = Walk::new(own_device.clone());
        *self.fetched.lock() = Some(HashSet::new());
        let mut pages: JoinSet<(Visit, Result<ScopeResponse, ScopeError>)> = JoinSet::new();
        loop {
            while pages.len() < limits::SCOPE_PARALLEL_MAX
                && let Some(visit) = walk.next()
            {
                match self.cache().current().auth_chain(&visit.device) {
                    None => {
                        debug!(device = %visit.device, "scope not asked for: no usable chain");
                        walk.skipped(visit);
                    }
                    Some(chain) => {
                        let keeper = Arc::clone(self);
                        pages.spawn(async move {
                            let page = keeper.page(&chain, visit.continuation.clone()).await;
                            (visit, page)
                        });
                    }
                }
            }
            if walk.is_done() {
                break;
            }
            match pages.join_next().await {
                Some(Ok((visit, Ok(page)))) => {
                    let records = walk.page(visit, page);
                    self.records.apply(ScopeChange::Upsert(records)).await;
                }
                Some(Ok((visit, Err(error)))) => {
                    warn!(scope_of = %visit.device, %error, "scope cannot be read");
                    walk.failed(visit);
                }
                // A page's task died; its visit stays under way, which makes the walk incomplete.
                Some(Err(_)) | None => break,
            }
        }
        let tree = self.cache().current();
        walk.named(self.fetched.lock().take().unwrap_or_default());
        let result = walk.finish(&tree);
        if !result.failed.contains(&own_device) {
            self.cache().set_initialised();
        }
        self.take_over(&result).await;
        result
    }

    /// One page, with the retries of auth-hierarchy-http.md 6.3: at once, then after a pause.
    async fn page(
        &self,
        chain: &AuthChain,
        continuation: Option<String>,
    ) -> Result<ScopeResponse, ScopeError> {
        for pause_ms in [0, 1000] {
            match self.api.page(chain, continuation.clone()).await {
                Err(error) if error.is_retryable() => {
                    debug!(%error, "scope page is asked for again");
                    sleep(Duration::from_millis(pause_ms)).await;
                }
                result => return result,
            }
        }
        self.api.page(chain, continuation).await
    }

    /// Removes what is gone, and asks one by one about what the walk left in doubt.
    async fn take_over(&self, result: &WalkResult) {
        let mut gone = result.gone.clone();
        if result.failed.is_empty() {
            for identity in result.doubtful.iter().take(limits::SCOPE_DOUBTFUL_MAX) {
                if self.is_gone(identity).await {
                    gone.push(identity.clone());
                }
            }
        }
        let changes = self.records.apply(ScopeChange::Remove(gone)).await;
        let identities = self.cache().current().len();
        if result.failed.is_empty() {
            info!(identities, removed = changes.len(), "scope is current");
        } else {
            warn!(identities, failed = ?result.failed, "scope is incomplete");
        }
    }

    /// Whether the upstream answers that the identity does not exist.
    async fn is_gone(&self, identity: &Identity) -> bool {
        let parent = identity.device_identity();
        let tree = self.cache().current();
        // In the name of the edge device above the leaf that the module belongs to.
        let chain = tree.auth_chain(&parent).and_then(|chain| {
            AuthChain::new(chain.elements().get(1..).unwrap_or_default().to_vec()).ok()
        });
        let Some(chain) = chain else { return false };
        match self.api.identity(identity, &chain).await {
            Ok(answer) => super::refresh::find(answer, identity).is_none(),
            Err(_) => false,
        }
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;

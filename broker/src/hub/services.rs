//! What stands behind a connected client: twins, direct methods, cloud-to-device messages and the
//! inputs of modules, and what is asked of upstream for it.
//!
//! The services know no connections and one another hardly; this is where what happens to a client
//! is told to each of them, in one order: connected, subscribed, disconnected.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::{
    BoxFuture, ClientInfo, CloudToDevice, Connectivity, Downstream, MethodCall, Needs, Upstream,
};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;
use edgehub_proto::stored;
use edgehub_storage::{Append, AppendBatch, CommitProgress, CommitTicket, StoreError};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{
    DeliveryToken, Features, Hub, Outlet, Registration, Settlement, ToClient, TwinResponse,
};
use crate::c2d::{self, CloudToDeviceService};
use crate::delivery::{Deliveries, DeliveryParts};
use crate::methods::{MethodParts, MethodService, OwnMethods};
use crate::routing::SourcePath;
use crate::telemetry::metrics::{self, DropReason};
use crate::twin::{TwinChanges, TwinConfig, TwinParts, TwinService};

/// How long upstream goes on listening for a client that went away: a renewal of a token is a
/// disconnect and a connect (spec/mqtt.md 12.5 item 9).
pub const NEEDS_GRACE: Duration = Duration::from_secs(10);

/// Twin requests of one client under way at once; more are answered 429.
pub const TWIN_REQUESTS_MAX: usize = 64;

/// What an operator can set.
#[derive(Clone, Copy, Debug)]
pub struct ServiceConfig {
    /// Twins.
    pub twins: TwinConfig,
    /// Deliveries that a client may have unsettled (design.md D17).
    pub window: usize,
    /// Whether what the hub's own twin desires is listened for (`configSource=twin`).
    pub own_twin: bool,
}

/// Parts that [`Services`] are made of, beside the hub's own.
#[derive(Debug)]
pub struct ServiceParts {
    /// IoT Hub or the parent.
    pub upstream: Arc<dyn Upstream>,
    /// The hub's own methods.
    pub own_methods: Arc<dyn OwnMethods>,
    /// What an operator can set.
    pub config: ServiceConfig,
    /// Owns what the services spawn.
    pub tasks: TaskTracker,
    /// Ends it.
    pub stop: CancellationToken,
}

/// The services of one hub.
#[derive(Debug)]
pub struct Services {
    upstream: Arc<dyn Upstream>,
    /// Twins.
    pub twins: Arc<TwinService>,
    /// Direct methods.
    pub methods: Arc<MethodService>,
    c2d: Arc<CloudToDeviceService>,
    deliveries: Arc<Deliveries>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Services {
    /// Starts the services behind `hub`. Reads from the store, once.
    pub(super) fn start(hub: &Arc<Hub>, parts: ServiceParts) -> Result<Self, StoreError> {
        let ServiceParts {
            upstream,
            own_methods,
            config,
            tasks,
            stop,
        } = parts;
        let outlet: Arc<dyn Outlet> = Arc::clone(&hub.registry) as _;
        let twins = TwinService::start(TwinParts {
            upstream: Arc::clone(&upstream),
            outlet: Arc::clone(&outlet),
            changes: Arc::new(RoutedChanges(Arc::downgrade(hub))),
            store: hub.store.clone(),
            clock: Arc::clone(&hub.clock),
            own_identity: hub.own_identity.clone(),
            config: config.twins,
            tasks: tasks.clone(),
            stop: stop.clone(),
        })?;
        let methods = MethodService::new(MethodParts {
            own_identity: hub.own_identity.clone(),
            own_methods,
            outlet: Arc::clone(&outlet),
            clock: Arc::clone(&hub.clock),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        let c2d = CloudToDeviceService::new(
            c2d::Config {
                window: config.window,
                ..c2d::Config::default()
            },
            Arc::clone(&outlet),
            Arc::clone(&hub.clock),
            &tasks,
            stop.clone(),
        );
        let deliveries = Deliveries::new(DeliveryParts {
            own_device: hub.own_identity.device_identity(),
            window: config.window,
            outlet,
            store: hub.store.clone(),
            clock: Arc::clone(&hub.clock),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        deliveries.set_queues(hub.router().inputs());
        let own = Needs {
            desired: config.own_twin,
            methods: true,
            cloud_to_device: false,
        };
        upstream.need(&hub.own_identity, own);
        Ok(Self {
            upstream,
            twins,
            methods,
            c2d,
            deliveries,
            tasks,
            stop,
        })
    }

    /// Whether the upstream can be reached.
    #[must_use]
    pub fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.upstream.connectivity()
    }

    /// What is known of a client has changed.
    pub(super) fn describe(&self, client: &Identity, info: &ClientInfo) {
        self.upstream.describe(client, info);
    }

    /// Routes lead to other inputs.
    pub(super) fn routed(&self, hub: &Hub) {
        self.deliveries.set_queues(hub.router().inputs());
    }

    /// A connection is new, and subscribed to nothing yet.
    pub(super) fn connected(&self, client: &Identity, clean_session: bool) {
        // Calls that wait for the older connection get no answer from this one.
        self.methods.disconnected(client);
        self.c2d.connected(client, clean_session);
        self.deliveries.connected(client, clean_session);
    }

    /// A connection's subscriptions are these now.
    pub(super) fn subscribed(&self, client: &Identity, features: Features) {
        let needs = Needs {
            desired: features.desired,
            methods: features.methods,
            cloud_to_device: features.cloud_to_device,
        };
        self.upstream.need(client, needs);
        self.twins.subscribed(client, features);
        if features.methods {
            self.methods.subscribed(client);
        }
        if features.cloud_to_device {
            self.c2d.subscribed(client);
        }
        if features.inputs {
            self.deliveries.subscribed(client);
        }
    }

    /// The client's live connection ended.
    pub(super) fn disconnected(&self, hub: &Arc<Hub>, client: &Identity, clean_session: bool) {
        self.methods.disconnected(client);
        self.c2d.disconnected(client, clean_session);
        self.deliveries.disconnected(client);
        if clean_session {
            self.upstream.need(client, Needs::default());
            return;
        }
        let registry = Arc::clone(&hub.registry);
        let upstream = Arc::clone(&self.upstream);
        let client = client.clone();
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(NEEDS_GRACE) => {}
                () = stop.cancelled() => return,
            }
            registry.if_absent(&client, || upstream.need(&client, Needs::default()));
        });
    }

    pub(super) fn settled(&self, from: &Identity, settled: &[(DeliveryToken, Settlement)]) {
        if from.is_module() {
            self.deliveries.settled(from, settled);
        } else {
            self.c2d.settled(from, settled);
        }
    }

    pub(super) fn twin_get(
        &self,
        hub: &Hub,
        registration: &Registration,
        request_id: Arc<str>,
        requests: &Arc<Semaphore>,
    ) {
        let client = registration.identity().clone();
        let outlet = Arc::clone(&hub.registry);
        let answer = move |status, version, body| {
            let response = TwinResponse {
                request_id,
                status,
                version,
                body,
            };
            respond(outlet.as_ref(), &client, response);
        };
        let Ok(permit) = Arc::clone(requests).try_acquire_owned() else {
            answer(429, None, Bytes::new());
            return;
        };
        let reply = self.twins.get(registration.identity());
        self.spawn(async move {
            let reply = reply.await;
            answer(reply.status, None, reply.body);
            drop(permit);
        });
    }

    pub(super) fn twin_report(
        &self,
        hub: &Hub,
        registration: &Registration,
        request_id: Option<Arc<str>>,
        patch: Bytes,
    ) {
        // Posted here, so that reports keep their order; what does not fit is refused there.
        let reported = self.twins.report(registration.identity(), patch);
        let client = registration.identity().clone();
        let outlet = Arc::clone(&hub.registry);
        let twins = Arc::clone(&self.twins);
        self.spawn(async move {
            let (status, body) = match reported.await {
                Ok(()) => (204, Bytes::new()),
                Err(error) => {
                    let refusal = twins.refusal(&error);
                    (refusal.status, refusal.body)
                }
            };
            if let Some(request_id) = request_id {
                let response = TwinResponse {
                    request_id,
                    status,
                    version: None,
                    body,
                };
                respond(outlet.as_ref(), &client, response);
            }
        });
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = work => {}
                () = stop.cancelled() => {}
            }
        });
    }
}

/// Answers a twin request. A client that is gone, or does not read, asks again.
fn respond(outlet: &dyn Outlet, client: &Identity, response: TwinResponse) {
    if let Err(error) = outlet.offer(client, ToClient::TwinResponse(response)) {
        tracing::debug!("A twin request of {client} is not answered: {error}");
        metrics::twin_responses_dropped().increment(1);
    }
}

/// The bridge's way to a hub that is made after it.
#[derive(Debug, Default)]
pub struct Below(std::sync::OnceLock<Weak<Hub>>);

impl Below {
    /// From now on what arrives from above goes to `hub`; what came earlier was for nobody.
    pub fn attach(&self, hub: &Arc<Hub>) {
        let _ = self.0.set(Arc::downgrade(hub));
    }

    fn with(&self, act: impl FnOnce(&Services)) {
        let hub = self.0.get().and_then(Weak::upgrade);
        if let Some(services) = hub.as_ref().and_then(|hub| hub.services.get()) {
            act(services);
        }
    }
}

impl Downstream for Below {
    fn desired(&self, identity: &Identity, patch: Bytes) {
        self.with(|services| services.twins.desired(identity, patch));
    }

    fn method(&self, identity: &Identity, call: MethodCall) {
        self.with(|services| services.methods.upstream_call(identity, call));
    }

    fn cloud_to_device(&self, identity: &Identity, message: CloudToDevice) {
        self.with(|services| services.c2d.arrived(identity, message));
    }

    fn established(&self, identity: &Identity) {
        self.with(|services| {
            services.twins.established(identity);
            services.c2d.established(identity);
        });
    }
}

/// Routes the messages that tell of changed twins.
#[derive(Debug)]
struct RoutedChanges(Weak<Hub>);

impl TwinChanges for RoutedChanges {
    fn changed(&self, reporter: &Identity, message: Message) -> BoxFuture<()> {
        let Some(hub) = self.0.upgrade() else {
            return Box::pin(std::future::ready(()));
        };
        let plan = hub.router().plan_of(&SourcePath::twin_change());
        if plan.is_empty() {
            // Hardly anybody routes them: not worth a count for each report.
            return Box::pin(std::future::ready(()));
        }
        let reporter = reporter.clone();
        Box::pin(async move {
            let now_ms = hub.clock.unix_ms();
            let progress = CommitProgress::new();
            let batch = AppendBatch {
                appends: vec![Append {
                    sender: hub.own_identity.clone(),
                    message: stored::encode_message(&message),
                    enqueued_ms: now_ms,
                    targets: plan.targets(now_ms),
                }],
                ticket: CommitTicket {
                    progress: Arc::clone(&progress),
                    sequence: 1,
                },
            };
            let stored = match hub.store.append(batch).await {
                Ok(()) => {
                    while progress.committed() < 1 && !progress.failed() {
                        progress.changed().await;
                    }
                    progress.committed() >= 1
                }
                Err(_) => false,
            };
            if !stored {
                let why = "it could not be stored";
                hub.dropped(&reporter, "", DropReason::NotStored, &why);
            }
        })
    }
}

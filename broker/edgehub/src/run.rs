//! The life of the process: open what is needed, serve, stop in order.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use edgehub_auth::authenticator::{AudienceHosts, Authenticator};
use edgehub_auth::scope_cache::ScopeCache;
use edgehub_auth::tls;
use edgehub_broker::amqp;
use edgehub_broker::config::{Settings, StorageSync};
use edgehub_broker::edge_hub::methods::EdgeHubMethods;
use edgehub_broker::edge_hub::{ConfigSource, Configured, EdgeHub, EdgeHubParts};
use edgehub_broker::http::admin::Admin;
use edgehub_broker::http::limits::{ADMIN_CONNECTIONS_MAX, CONNECTIONS_MAX};
use edgehub_broker::http::methods_api::MethodsApi;
use edgehub_broker::http::scope_api::ScopeApi;
use edgehub_broker::http::websocket::WebSockets;
use edgehub_broker::http::{self, ListenerContext, Transport};
use edgehub_broker::hub::{Below, Hub, HubParts, ServiceConfig, ServiceParts, Services};
use edgehub_broker::mqtt::connection::ConnectionContext;
use edgehub_broker::mqtt::listener;
use edgehub_broker::mqtt::machine::Timing;
use edgehub_broker::readiness::Readiness;
use edgehub_broker::routing::Router;
use edgehub_broker::telemetry::metrics::{self, AckCounters, Metrics};
use edgehub_proto::clock::{Clock, SystemClock};
use edgehub_storage::{ConnectionStringWrap, Opened, Store, StoreConfig, SyncMode};
use ring::rand::SecureRandom;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::upstream;

/// Everything has to be over this long after the signal (design.md section 4).
const SHUTDOWN_MAX: Duration = Duration::from_secs(8);
/// Between two condensings of metrics.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Runs one hub until it is told to stop.
///
/// # Errors
/// When it cannot start. Nothing upstream can keep it from starting (design.md I9).
pub(crate) async fn run(settings: Settings, clock: Arc<SystemClock>) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    watch_signals(&stop)?;
    let own_device = settings.own_identity.device_id().to_owned();
    let metrics = Metrics::start(&settings.hub_host, &own_device, &instance()?)?;
    metrics::connected_clients().set(0.0);

    let store = open_store(&settings, Arc::clone(&clock) as _)?;
    let served = serve(settings, clock, metrics, &store, &tasks, &stop).await;
    if served.is_ok() {
        tracing::info!("Stopping the protocol heads...");
    }
    // Also when serving could not begin: RocksDB's threads must not race the end of the process.
    stop.cancel();
    let closed = shut_down(tasks, store).await;
    served.and(closed)
}

/// Opens the heads and serves until `stop` fires.
async fn serve(
    settings: Settings,
    clock: Arc<SystemClock>,
    metrics: Metrics,
    store: &Store,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let own_device = settings.own_identity.device_id().to_owned();
    // Routes of the twin come later; until then nothing is routed, and the heads stay shut.
    let texts: &[(String, String)] = match settings.config_source {
        ConfigSource::Local => &settings.routes,
        ConfigSource::Twin => &[],
    };
    let (router, bad) = Router::new(texts, &own_device, settings.time_to_live, store)?;
    for route in &bad {
        tracing::error!("{route}");
    }
    if settings.config_source == ConfigSource::Local {
        tracing::info!("Set the following {} route(s) in edge hub", router.len());
    }
    for (name, text) in texts {
        if bad.iter().all(|bad| bad.name != *name) {
            tracing::info!("{name}: {text}");
        }
    }

    let scope = ScopeCache::new(&settings.own_identity.device_identity());
    let below = Arc::new(Below::default());
    let bridge = upstream::start(
        &settings,
        Arc::clone(&clock) as _,
        store,
        &scope,
        Arc::clone(&below) as _,
        tasks,
        stop,
    )?;
    let hosts = AudienceHosts::new(&settings.hub_host, &settings.own_host);
    let refresh = bridge.identity_refresh();
    let authenticator = Authenticator::new(
        Arc::clone(&scope),
        hosts.clone(),
        Arc::clone(&clock) as _,
        Some(Arc::clone(&refresh)),
    );
    let hub = Hub::new(HubParts {
        hub_host: settings.hub_host.clone(),
        own_identity: settings.own_identity.clone(),
        clock: Arc::clone(&clock) as _,
        scope: Arc::clone(&scope),
        hosts,
        authenticator: Arc::new(authenticator),
        router,
        store: store.clone(),
        connected_clients_max: settings.connected_clients_max,
        tasks: tasks.clone(),
        stop: stop.clone(),
    });
    let services = hub.start_services(ServiceParts {
        upstream: bridge.upstream(),
        own_methods: Arc::new(EdgeHubMethods::new(&own_device, refresh)),
        config: ServiceConfig {
            twins: settings.twins,
            window: settings.delivery_window,
            own_twin: settings.config_source == ConfigSource::Twin,
        },
        tasks: tasks.clone(),
        stop: stop.clone(),
    })?;
    below.attach(&hub);
    let edge_hub = EdgeHub::new(EdgeHubParts {
        hub: Arc::clone(&hub),
        twins: Arc::clone(&services.twins),
        store: store.clone(),
        source: settings.config_source,
        refresh: settings.config_refresh,
        version: env!("CARGO_PKG_VERSION"),
    });
    let configured = edge_hub.configured();
    tasks.spawn(edge_hub.run(stop.clone()));

    let (ready, readiness) =
        watch::channel(Readiness::starting("the device scope is not known yet"));
    tasks.spawn(upkeep(metrics.clone(), stop.clone()));
    let admin = Admin::new(Arc::clone(&hub), metrics, readiness).router();
    let socket = bind(&settings, settings.ports.metrics)?;
    let context = http_context(Transport::Plain, ADMIN_CONNECTIONS_MAX, stop, tasks);
    tasks.spawn(http::listen(socket, admin, context));
    #[cfg(feature = "faults")]
    if let Some(path) = &settings.faults_socket {
        let faults = edgehub_broker::faults::Faults::new(store.clone(), Arc::clone(&clock));
        faults.listen(path, stop.clone(), tasks)?;
    }
    tasks.spawn(Arc::clone(&hub).watch_scope(stop.clone()));
    tasks.spawn(Arc::clone(&hub).watch_strangers(stop.clone()));
    tasks.spawn(sweep(
        Arc::clone(&hub),
        settings.cleanup_interval,
        stop.clone(),
    ));

    let usable = async {
        scope_known(&scope).await;
        configuration_known(configured, &ready).await;
    };
    tokio::select! {
        () = usable => open_heads(&settings, &hub, services, tasks, stop)?,
        () = stop.cancelled() => {}
    }
    if !stop.is_cancelled() {
        let _ = ready.send(Readiness::Ready);
        tracing::info!("Started protocol heads");
    }
    stop.cancelled().await;
    Ok(())
}

/// Condenses what metrics gather while nobody scrapes them.
async fn upkeep(metrics: Metrics, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(UPKEEP_EVERY) => metrics.upkeep(),
            () = stop.cancelled() => return,
        }
    }
}

/// Waits until the scope is restored or fetched: heads open only when somebody can be judged
/// (design.md D13).
async fn scope_known(scope: &ScopeCache) {
    let mut changes = scope.subscribe();
    // A change also comes when the cache becomes initialised without any identity.
    while !scope.is_initialised() {
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Waits until routes are in force, fetched or from an earlier run, and says meanwhile why not.
async fn configuration_known(
    mut configured: watch::Receiver<Configured>,
    ready: &watch::Sender<Readiness>,
) {
    loop {
        match &*configured.borrow_and_update() {
            Configured::Done => return,
            Configured::Waiting(reason) => {
                tracing::info!("The heads wait: {reason}");
                ready.send_replace(Readiness::starting(reason.clone()));
            }
        }
        if configured.changed().await.is_err() {
            return;
        }
    }
}

fn open_heads(
    settings: &Settings,
    hub: &Arc<Hub>,
    services: &Services,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let heads = [
        (settings.mqtt_enabled, "MQTT"),
        (settings.amqp_enabled, "AMQP"),
        (settings.https_enabled, "HTTP"),
    ];
    let names: Vec<_> = heads
        .iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| *name)
        .collect();
    tracing::info!("Starting protocol heads - ({})", names.join(", "));
    let files = &settings.certificates;
    let read = |path: &std::path::Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let tls = tls::server_config(
        &read(&files.certificate)?,
        &read(&files.private_key)?,
        settings.client_certificates,
        settings.tls_versions,
    )?;
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let acks = AckCounters::new();
    let mqtt = settings.mqtt_enabled.then(|| ConnectionContext {
        hub: Arc::clone(hub),
        timing: Timing {
            connect_max: settings.connect_arrival_max,
            keep_alive_max: settings.keep_alive_max,
        },
        acks: acks.clone(),
        stop: stop.clone(),
    });
    let amqp = settings
        .amqp_enabled
        .then(|| amqp::connection::ConnectionContext {
            hub: Arc::clone(hub),
            acks,
            stop: stop.clone(),
        });
    if let Some(context) = amqp.clone() {
        let socket = bind(settings, settings.ports.amqp)?;
        tasks.spawn(amqp::listener::listen(
            socket,
            acceptor.clone(),
            context,
            tasks.clone(),
        ));
    }
    if let Some(context) = mqtt.clone() {
        let socket = bind(settings, settings.ports.mqtt)?;
        tasks.spawn(listener::listen(
            socket,
            acceptor.clone(),
            context,
            tasks.clone(),
        ));
    }
    if settings.https_enabled {
        let socket = bind(settings, settings.ports.https)?;
        let scope = Arc::clone(hub.scope());
        let authenticator = hub.authenticator();
        let own_device = settings.own_identity.device_id();
        let methods = MethodsApi::new(
            own_device,
            Arc::clone(&scope),
            Arc::clone(authenticator),
            Arc::clone(&services.methods),
        );
        let scope = ScopeApi::new(scope, Arc::clone(authenticator));
        let sockets = WebSockets {
            mqtt,
            amqp,
            tasks: tasks.clone(),
        };
        let router = sockets.before(scope.router().merge(methods.router()));
        let context = http_context(Transport::Tls(acceptor), CONNECTIONS_MAX, stop, tasks);
        tasks.spawn(http::listen(socket, router, context));
    }
    Ok(())
}

fn http_context(
    transport: Transport,
    connections_max: usize,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> ListenerContext {
    ListenerContext {
        transport,
        connections_max,
        stop: stop.clone(),
        tasks: tasks.clone(),
    }
}

fn bind(settings: &Settings, port: u16) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(settings.listen_address, port);
    let listen = |address: SocketAddr| {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen(address)
        .or_else(|error| {
            // A machine without IPv6 cannot bind the unspecified IPv6 address.
            if address.ip().is_unspecified() && address.is_ipv6() {
                listen(SocketAddr::new(
                    std::net::Ipv4Addr::UNSPECIFIED.into(),
                    port,
                ))
            } else {
                Err(error)
            }
        })
        .with_context(|| format!("cannot listen on {address}"))
}

fn open_store(settings: &Settings, clock: Arc<dyn Clock>) -> anyhow::Result<Store> {
    let mut config = StoreConfig::new(&settings.store_path);
    config.sync = match settings.storage_sync {
        StorageSync::Os => SyncMode::Os,
        StorageSync::Disk => SyncMode::Disk,
    };
    let wrap = ConnectionStringWrap::new(settings.connection_string.key().as_bytes());
    let Opened {
        store,
        moved_aside,
        seal_problem,
        ..
    } = Store::open(config, clock, Arc::new(wrap))?;
    if let Some(moved) = moved_aside {
        tracing::error!(
            "The store did not open ({}): it was moved to {} and an empty one is used",
            moved.reason,
            moved.path.display()
        );
    }
    tracing::info!(
        "Created persistent store at {}",
        settings.store_path.display()
    );
    if let Some(problem) = seal_problem {
        tracing::error!("Sealed values of the store (scope, tokens) read as missing: {problem}");
    }
    Ok(store)
}

/// Settles and counts expired messages of all queues now and then (spec/operations.md A1.2).
async fn sweep(hub: Arc<Hub>, interval: Duration, stop: CancellationToken) {
    loop {
        let pause_and_sweep = async {
            tokio::time::sleep(interval).await;
            hub.expire_messages().await;
        };
        tokio::select! {
            () = pause_and_sweep => {}
            () = stop.cancelled() => return,
        }
    }
}

fn watch_signals(stop: &CancellationToken) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("Initiating shutdown");
        stop.cancel();
    });
    Ok(())
}

async fn shut_down(tasks: TaskTracker, store: Store) -> anyhow::Result<()> {
    tasks.close();
    if tokio::time::timeout(SHUTDOWN_MAX / 2, tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!("{} tasks did not end in time", tasks.len());
    }
    match tokio::time::timeout(SHUTDOWN_MAX / 2, store.close()).await {
        Ok(closed) => Ok(closed?),
        Err(_) => anyhow::bail!("the store did not close in time"),
    }
}

/// A new random GUID for the metrics of this run (spec/operations.md A2.2).
fn instance() -> anyhow::Result<String> {
    let mut bytes = [0u8; 16];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| anyhow::anyhow!("this machine has no randomness"))?;
    let number = (u128::from_be_bytes(bytes) & !(0xf << 76) & !(0xc << 60)) | (4 << 76) | (8 << 60);
    let hex = format!("{number:032x}");
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| hex.get(part).unwrap_or_default());
    Ok(parts.join("-"))
}

//! Starts the bridge with what the settings say.

use std::sync::Arc;

use anyhow::Context;
use edgehub_auth::sas_signer::TokenSource;
use edgehub_auth::scope_cache::ScopeCache;
use edgehub_auth::tls;
use edgehub_bridge::proxy::Proxy;
use edgehub_bridge::{Bridge, BridgeConfig, BridgeDeps, Protocol};
use edgehub_broker::config::{Settings, UpstreamProtocol};
use edgehub_broker::hub::stored_client_infos;
use edgehub_broker::routing::{DEFAULT_PRIORITY, UPSTREAM_ENDPOINT};
use edgehub_proto::clock::Clock;
use edgehub_proto::hub::Downstream;
use edgehub_proto::identity::EDGE_HUB_MODULE;
use edgehub_storage::{QueueId, Store};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long an idle lane keeps its connection when the settings say for ever.
const NEVER: std::time::Duration = std::time::Duration::from_secs(86_400 * 365);

/// Starts the bridge; the scope that was stored is in the cache when this returns.
///
/// # Errors
/// When the key, the trust bundle or the store cannot be used. That upstream is not there is
/// not an error.
pub(crate) fn start(
    settings: &Settings,
    clock: Arc<dyn Clock>,
    store: &Store,
    scope: &Arc<ScopeCache>,
    downstream: Arc<dyn Downstream>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<Bridge> {
    let own_device = settings.own_identity.device_identity();
    let tokens = TokenSource::new(
        settings.connection_string.key(),
        &settings.hub_host,
        own_device.device_id(),
        EDGE_HUB_MODULE,
        Arc::clone(&clock),
    )
    .context("the key of IotHubConnectionString cannot be used")?;
    let bundle = &settings.certificates.trust_bundle;
    let bundle =
        std::fs::read(bundle).with_context(|| format!("cannot read {}", bundle.display()))?;

    // A queue that an earlier configuration filled is drained too.
    let default = QueueId {
        endpoint: UPSTREAM_ENDPOINT.to_owned(),
        priority: DEFAULT_PRIORITY,
    };
    store.queue(&default)?;
    let mut queues = store.queues();
    queues.retain(|queue| queue.id().endpoint == UPSTREAM_ENDPOINT);

    let upstream = &settings.upstream;
    let mut config = BridgeConfig::new(&upstream.host, own_device);
    config.protocol = protocol(upstream.protocol);
    config.amqp_port = upstream.amqp_port;
    config.amqp_pool_size = upstream.pool_size;
    config.mqtt_port = upstream.mqtt_port;
    config.https_port = upstream.https_port;
    config.local_address = settings.outgoing_address();
    config.operation_timeout = upstream.operation_max;
    let proxy = Proxy::parse(&upstream.proxy.https_proxy, &upstream.proxy.no_proxy);
    config.proxy = proxy.unwrap_or_else(|error| {
        // A wrong optional setting does not end the process (design.md I9).
        tracing::error!("{error}: going on without a proxy");
        None
    });
    config.track_device_state = settings.track_device_state;
    config.lanes.idle_close = settings.upstream_idle.unwrap_or(NEVER);
    config.scope.period = settings.scope_refresh_period;
    config.scope.min_interval = settings.scope_refresh_gap;
    let deps = BridgeDeps {
        store: store.clone(),
        queues,
        scope: Arc::clone(scope),
        tokens: Arc::new(tokens),
        tls: tls::client_config(&bundle)?,
        clock,
        downstream,
        infos: stored_client_infos(store).context("the store cannot be read")?,
    };
    let via = if upstream.nested {
        "the parent"
    } else {
        "IoT Hub"
    };
    let how = config.protocol;
    tracing::info!("Upstream is {via} at {}, over {how}", upstream.host);
    Ok(Bridge::start(config, deps, tasks, stop)?)
}

fn protocol(setting: UpstreamProtocol) -> Protocol {
    match setting {
        UpstreamProtocol::Amqp => Protocol::Amqp,
        UpstreamProtocol::AmqpWs => Protocol::AmqpWs,
        UpstreamProtocol::AmqpOrWs => Protocol::AmqpOrWs,
        UpstreamProtocol::Mqtt => Protocol::Mqtt,
        UpstreamProtocol::MqttWs => Protocol::MqttWs,
    }
}

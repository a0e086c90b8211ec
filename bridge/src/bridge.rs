//! Puts the bridge together: scope service, transport, pump.

use std::{net::IpAddr, sync::Arc, time::Duration};

use edgehub_auth::{
    authenticator::IdentityRefresh, sas_signer::TokenSource, scope_cache::ScopeCache,
};
use edgehub_proto::{
    clock::Clock,
    hub::{ClientInfo, Connectivity, Downstream, Upstream},
    identity::{Identity, IdentityError},
};
use edgehub_storage::{Queue, Store, StoreError};
use tokio::sync::watch;
use tokio_rustls::rustls::ClientConfig;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::info;

use crate::{
    amqp::{AmqpConfig, AmqpDeps, AmqpTransport, Way},
    client_infos::ClientInfos,
    connectivity::ConnectivityMonitor,
    dial::{Carrier, Dialer},
    judge::Judge,
    lanes::{LaneConfig, LaneCounts},
    limits,
    mqtt::{MachineConfig, MqttTransport},
    proxy::Proxy,
    pump::{Pump, PumpParts},
    scope::{HttpClient, HttpScopeApi, ScopeConfig, ScopeKeeper, ScopeRefresh},
    transport::Transport,
    upstream::{UpstreamHandle, upstream},
};

/// How the upstream is spoken to. `UpstreamProtocol`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// AMQP on its own port.
    Amqp,
    /// AMQP in a WebSocket on the HTTPS port.
    AmqpWs,
    /// AMQP on its own port, in a WebSocket when nothing comes of that (design.md D18).
    #[default]
    AmqpOrWs,
    /// MQTT on its own port.
    Mqtt,
    /// MQTT in a WebSocket on the HTTPS port.
    MqttWs,
}

impl Protocol {
    /// Whether identities share connections.
    #[must_use]
    pub fn is_amqp(self) -> bool {
        matches!(self, Self::Amqp | Self::AmqpWs | Self::AmqpOrWs)
    }

    /// Unacknowledged messages per lane.
    const fn window(self) -> usize {
        match self {
            Self::Amqp | Self::AmqpWs | Self::AmqpOrWs => limits::AMQP_WINDOW_DEFAULT,
            Self::Mqtt | Self::MqttWs => limits::WINDOW_DEFAULT,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Amqp => "AMQP",
            Self::AmqpWs => "AMQP over WebSocket",
            Self::AmqpOrWs => "AMQP, or AMQP over WebSocket",
            Self::Mqtt => "MQTT",
            Self::MqttWs => "MQTT over WebSocket",
        })
    }
}

/// Everything that can be set. [`BridgeConfig::new`] has the defaults.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BridgeConfig {
    /// Host to connect to: the parent's (`IOTEDGE_GATEWAYHOSTNAME`) if there is one, else the hub's.
    pub upstream_host: String,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// AMQP over TLS at the upstream. `UpstreamAmqpPort`, default 5671.
    pub amqp_port: u16,
    /// AMQP connections that are opened before any takes a second identity.
    /// `IotHubConnectionPoolSize`, default 1.
    pub amqp_pool_size: usize,
    /// MQTT over TLS at the upstream. `UpstreamMqttPort`, default 8883.
    pub mqtt_port: u16,
    /// The proxy of WebSocket and HTTPS connections; AMQP and MQTT over TCP go without
    /// (upstream.md A11).
    pub proxy: Option<Proxy>,
    /// HTTPS at the upstream. `UpstreamHttpsPort`, default 443.
    pub https_port: u16,
    /// The device that this hub runs on.
    pub own_device: Identity,
    /// Address that outgoing sockets are bound to; unspecified means any. `ListenAddress`.
    pub local_address: Option<IpAddr>,
    /// `DeviceClientType` that the upstream is told.
    pub product_info: String,
    /// Name resolution, TCP connect and TLS handshake together. `CloudOperationTimeoutSecs`.
    pub connect_timeout: Duration,
    /// One twin request, from the question to the answer. `CloudOperationTimeoutSecs`.
    pub operation_timeout: Duration,
    /// Whether messages of an identity that is proven gone are dropped. `TrackDeviceState`.
    pub track_device_state: bool,
    /// Unacknowledged messages per lane; none: what suits the protocol.
    pub window: Option<usize>,
    /// Limits and durations of the lanes. Its window is overwritten by `window`, its number of
    /// sessions by the protocol's unless it is another than the default.
    pub lanes: LaneConfig,
    /// Limits and time-outs of each MQTT connection. Its window is overwritten by `window`.
    pub mqtt: MachineConfig,
    /// How the scope is kept current.
    pub scope: ScopeConfig,
}

impl BridgeConfig {
    /// Defaults for the hub on `own_device` below `upstream_host`.
    #[must_use]
    pub fn new(upstream_host: impl Into<String>, own_device: Identity) -> Self {
        Self {
            upstream_host: upstream_host.into(),
            protocol: Protocol::default(),
            amqp_port: 5671,
            amqp_pool_size: 1,
            mqtt_port: 8883,
            proxy: None,
            https_port: 443,
            own_device,
            local_address: None,
            product_info: format!("EdgeHub/{}", env!("CARGO_PKG_VERSION")),
            connect_timeout: Duration::from_secs(20),
            operation_timeout: Duration::from_secs(20),
            track_device_state: true,
            window: None,
            lanes: LaneConfig::default(),
            mqtt: MachineConfig::default(),
            scope: ScopeConfig::default(),
        }
    }
}

/// What the bridge works with.
#[derive(Debug)]
pub struct BridgeDeps {
    /// Where the scope is kept.
    pub store: Store,
    /// All queues of the endpoint `iothub`, whatever their priority.
    pub queues: Vec<Queue>,
    /// Our copy of the scope, which the bridge fills and keeps current.
    pub scope: Arc<ScopeCache>,
    /// Tokens of our own `$edgeHub`.
    pub tokens: Arc<TokenSource>,
    /// Trust for outgoing TLS.
    pub tls: Arc<ClientConfig>,
    /// Wall clock.
    pub clock: Arc<dyn Clock>,
    /// Where what arrives from upstream goes.
    pub downstream: Arc<dyn Downstream>,
    /// What clients have said about themselves in earlier runs: the first sessions are opened
    /// before anybody could tell it through [`Bridge::upstream`].
    pub infos: Vec<(Identity, ClientInfo)>,
}

/// Why the bridge does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// The own device's id leaves no room for a module.
    #[error("the own device cannot have a hub: {0}")]
    Identity(#[from] IdentityError),
    /// The stored scope cannot be read.
    #[error("the stored scope cannot be read: {0}")]
    Store(#[from] StoreError),
}

/// The running bridge. Dropping it stops nothing: the cancellation token does.
#[derive(Clone)]
pub struct Bridge {
    refresh: Arc<dyn IdentityRefresh>,
    monitor: ConnectivityMonitor,
    counts: watch::Receiver<LaneCounts>,
    upstream: Arc<UpstreamHandle>,
}

impl std::fmt::Debug for Bridge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bridge")
            .field("counts", &*self.counts.borrow())
            .finish_non_exhaustive()
    }
}

impl Bridge {
    /// Restores the scope from the store, then starts walks, lanes and connections as tasks of
    /// `tasks` on the current runtime, until `cancel`: then open sessions finish what is in flight,
    /// for a few seconds at most. Blocks while it reads the stored scope.
    ///
    /// When it returns, a scope that was stored is in the cache, so children can be authenticated.
    /// It never fails because the upstream is not there.
    ///
    /// # Errors
    ///
    /// See [`BridgeError`].
    pub fn start(
        config: BridgeConfig,
        deps: BridgeDeps,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
    ) -> Result<Self, BridgeError> {
        let BridgeDeps {
            store,
            queues,
            scope,
            tokens,
            tls,
            clock,
            downstream,
            infos: known,
        } = deps;
        let own_hub = Identity::edge_hub(config.own_device.device_id())?;
        let monitor = ConnectivityMonitor::new(own_hub.clone());
        let dialer = Dialer::new(
            &config.upstream_host,
            config.local_address,
            tls,
            config.connect_timeout,
        );
        let tunnelled = dialer.clone().through(config.proxy.clone());
        let http = HttpClient::new(
            tunnelled.clone(),
            config.https_port,
            tasks.clone(),
            cancel.clone(),
        );
        let api = HttpScopeApi::new(
            http,
            Arc::clone(&tokens),
            monitor.clone(),
            &config.own_device,
            config.scope.page_size,
            config.scope.request_timeout,
        );
        let scope_config = ScopeConfig {
            seed: seed(config.scope.seed),
            ..config.scope
        };
        let keeper = ScopeKeeper::restore(api, Arc::clone(&scope), store, own_hub, scope_config)?;
        let keeper = Arc::new(keeper);
        let refresh: Arc<dyn IdentityRefresh> = Arc::new(ScopeRefresh::new(
            Arc::clone(&keeper),
            tasks.clone(),
            cancel.clone(),
        ));
        info!(upstream = %config.upstream_host, "bridge starts over {}", config.protocol);
        let window = config.window.unwrap_or_else(|| config.protocol.window());
        let infos = Arc::new(ClientInfos::default());
        for (identity, info) in &known {
            infos.set(identity, info);
        }
        let parts = TransportParts {
            dialer,
            tunnelled,
            tokens,
            scope: Arc::clone(&scope),
            infos: Arc::clone(&infos),
            clock: Arc::clone(&clock),
            downstream,
            tasks: tasks.clone(),
            cancel: cancel.clone(),
        };
        let transport = parts.transport(&config, window)?;
        let (counts_sender, counts) = watch::channel(LaneCounts::default());
        let walked = Arc::clone(&keeper);
        let judge = Judge {
            own_device: config.own_device,
            scope,
            refresh: Arc::clone(&refresh),
            has_walked: Box::new(move || walked.has_walked()),
            track_device_state: config.track_device_state,
        };
        let connections_max = match config.lanes.connections_max {
            limits::CONNECTIONS_MAX if config.protocol.is_amqp() => limits::AMQP_SESSIONS_MAX,
            other => other,
        };
        let lanes = LaneConfig {
            window,
            connections_max,
            seed: seed(config.lanes.seed),
            ..config.lanes
        };
        let (upstream, asked) = upstream(monitor.clone(), config.operation_timeout, infos);
        let parts = PumpParts {
            config: lanes,
            queues,
            transport,
            clock,
            monitor: monitor.clone(),
            judge,
            counts: counts_sender,
            asked,
        };
        let pump = Pump::new(parts, tasks, cancel);
        tasks.spawn(pump.run(cancel.clone()));
        tasks.spawn(keeper.run(monitor.subscribe(), cancel.clone()));
        Ok(Self {
            refresh,
            monitor,
            counts,
            upstream: Arc::new(upstream),
        })
    }

    /// Fetches single identities for the authenticator.
    #[must_use]
    pub fn identity_refresh(&self) -> Arc<dyn IdentityRefresh> {
        Arc::clone(&self.refresh)
    }

    /// What the broker asks of the upstream.
    #[must_use]
    pub fn upstream(&self) -> Arc<dyn Upstream> {
        Arc::clone(&self.upstream) as _
    }

    /// Whether the upstream can be reached. Starts as disconnected.
    #[must_use]
    pub fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.monitor.subscribe()
    }

    /// Numbers of lanes, connections and bytes in memory.
    #[must_use]
    pub fn lane_counts(&self) -> watch::Receiver<LaneCounts> {
        self.counts.clone()
    }
}

/// What a transport is made of.
struct TransportParts {
    dialer: Dialer,
    /// Through the proxy, where there is one.
    tunnelled: Dialer,
    tokens: Arc<TokenSource>,
    scope: Arc<ScopeCache>,
    infos: Arc<ClientInfos>,
    clock: Arc<dyn Clock>,
    downstream: Arc<dyn Downstream>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl TransportParts {
    fn transport(
        self,
        config: &BridgeConfig,
        window: usize,
    ) -> Result<Arc<dyn Transport>, IdentityError> {
        let (own, https) = (self.dialer, self.tunnelled);
        let web_socket = |protocol| (https, config.https_port, Carrier::WebSocket(protocol));
        let amqp = |(dialer, port, carrier)| Way {
            dialer,
            port,
            carrier,
        };
        let ways = match config.protocol {
            Protocol::Amqp => vec![amqp((own, config.amqp_port, Carrier::Tls))],
            Protocol::AmqpWs => vec![amqp(web_socket(edgehub_ws::AMQP))],
            Protocol::AmqpOrWs => vec![
                amqp((own, config.amqp_port, Carrier::Tls)),
                amqp(web_socket(edgehub_ws::AMQP)),
            ],
            Protocol::Mqtt | Protocol::MqttWs => {
                let (dialer, port, carrier) = if config.protocol == Protocol::Mqtt {
                    (own, config.mqtt_port, Carrier::Tls)
                } else {
                    web_socket(edgehub_ws::MQTT)
                };
                return Ok(Arc::new(MqttTransport {
                    dialer,
                    port,
                    carrier,
                    machine: MachineConfig {
                        window,
                        ..config.mqtt.clone()
                    },
                    product_info: config.product_info.as_str().into(),
                    infos: self.infos,
                    tokens: self.tokens,
                    scope: self.scope,
                    downstream: self.downstream,
                    tasks: self.tasks,
                }));
            }
        };
        let amqp = AmqpConfig {
            ways,
            pool_size: config.amqp_pool_size,
            own_device: config.own_device.clone(),
            product_info: config.product_info.clone(),
            operation_timeout: config.operation_timeout,
        };
        let deps = AmqpDeps {
            tokens: self.tokens,
            scope: self.scope,
            infos: self.infos,
            clock: self.clock,
            downstream: self.downstream,
            tasks: self.tasks,
            cancel: self.cancel,
        };
        Ok(Arc::new(AmqpTransport::new(amqp, deps)?))
    }
}

/// A seed of zero means any.
fn seed(configured: u64) -> u64 {
    if configured == 0 {
        rand::random()
    } else {
        configured
    }
}

#[cfg(test)]
#[path = "bridge_amqp_interop_tests.rs"]
mod amqp_interop_tests;
#[cfg(test)]
#[path = "bridge_amqp_tests.rs"]
mod amqp_tests;
#[cfg(test)]
#[path = "bridge_hearing_tests.rs"]
mod hearing_tests;
#[cfg(test)]
#[path = "bridge_tests.rs"]
mod tests;

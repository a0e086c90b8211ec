//! What one edgeHub process was told to be, read once at start.
//!
//! Values that change at run time come from the module twin and are not here. Names, defaults
//! and meanings: spec/operations.md A1.2 and A1.4; ours are listed in `docs/compatibility.md`.

mod connection_string;
mod environment;

pub use connection_string::{ConnectionString, ConnectionStringError};
pub use environment::Environment;

use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use edgehub_auth::tls::TlsVersions;
use edgehub_proto::identity::Identity;

use crate::delivery::limits::{WINDOW_DEFAULT, WINDOW_MAX};
use crate::edge_hub::ConfigSource;
use crate::twin::TwinConfig;

/// Longest period that a setting may name, seconds: a year. Sums of times cannot overflow then.
const PERIOD_SECS_MAX: u64 = 86_400 * 365;
/// Largest `IotHubConnectionPoolSize`.
const POOL_SIZE_MAX: u64 = 100;

/// How hard the store holds what it commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageSync {
    /// Survives the end of the process (default).
    Os,
    /// One fsync for each group of commits: survives power loss.
    Disk,
}

/// The protocols towards IoT Hub or the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// AMQP over TLS.
    Amqp,
    /// AMQP over WebSocket, on the HTTPS port.
    AmqpWs,
    /// Unset: AMQP over TLS, over WebSocket when nothing comes of that (design.md D18).
    AmqpOrWs,
    /// MQTT over TLS.
    Mqtt,
    /// MQTT over WebSocket, on the HTTPS port.
    MqttWs,
}

/// Ports of the listeners, all on one address.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// `MqttSettings__Port`, 8883.
    pub mqtt: u16,
    /// `AmqpSettings__Port`, 5671.
    pub amqp: u16,
    /// `HttpSettings__Port`, 443.
    pub https: u16,
    /// `HttpSettings__metrics_port` or `Metrics__Listener__Port`, 9600.
    pub metrics: u16,
}

/// Where this hub sends to.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// The parent's host name when nested, else IoT Hub's.
    pub host: String,
    /// Whether `host` is a parent edgeHub.
    pub nested: bool,
    /// Protocol of the device channel.
    pub protocol: UpstreamProtocol,
    /// `UpstreamMqttPort`, 8883.
    pub mqtt_port: u16,
    /// `UpstreamAmqpPort`, 5671; for the AMQP protocols.
    pub amqp_port: u16,
    /// `UpstreamHttpsPort`, 443.
    pub https_port: u16,
    /// AMQP connections that are opened before any takes a second identity.
    /// `IotHubConnectionPoolSize`, 1.
    pub pool_size: usize,
    /// `https_proxy` as given, which may hold a password, and `no_proxy`; for WebSocket protocols
    /// and HTTPS.
    pub proxy: ProxySettings,
    /// `CloudOperationTimeoutSecs`, 20.
    pub operation_max: Duration,
}

/// What the environment says about proxies.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ProxySettings {
    /// `https_proxy`.
    pub https_proxy: String,
    /// `no_proxy`.
    pub no_proxy: String,
}

impl std::fmt::Debug for ProxySettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = if self.https_proxy.is_empty() {
            "unset"
        } else {
            "***"
        };
        f.debug_struct("ProxySettings")
            .field("https_proxy", &set)
            .field("no_proxy", &self.no_proxy)
            .finish()
    }
}

/// The files of the development form (spec/auth-hierarchy-http.md 11.1).
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    /// `EdgeHubDevServerCertificateFile`: PEM, leaf first, then its issuers.
    pub certificate: PathBuf,
    /// `EdgeHubDevServerPrivateKeyFile`: PEM.
    pub private_key: PathBuf,
    /// `EdgeHubDevTrustBundleFile`: PEM.
    pub trust_bundle: PathBuf,
}

/// Everything a hub needs to start.
#[derive(Clone, Debug)]
pub struct Settings {
    /// IoT Hub's host name: the audience of every token, at every layer.
    pub hub_host: String,
    /// This hub's own host name, `EdgeDeviceHostName`; also an accepted audience.
    pub own_host: String,
    /// `{device}/$edgeHub`.
    pub own_identity: Identity,
    /// The development form's connection string; its key signs our tokens.
    pub connection_string: ConnectionString,
    /// Server certificate, key and trust bundle.
    pub certificates: CertificateFiles,
    /// Where messages go.
    pub upstream: UpstreamSettings,
    /// `ListenAddress`: the address of every listener; unspecified means all of them.
    pub listen_address: IpAddr,
    /// The listeners' ports.
    pub ports: Ports,
    /// `MqttSettings__Enabled`.
    pub mqtt_enabled: bool,
    /// `AmqpSettings__Enabled`.
    pub amqp_enabled: bool,
    /// `HttpSettings__Enabled`.
    pub https_enabled: bool,
    /// `ClientCertAuthEnabled`: ask clients for a certificate, never require one.
    pub client_certificates: bool,
    /// `SslProtocols`, TLS 1.2 and 1.3: what every TLS listener offers.
    pub tls_versions: TlsVersions,
    /// `MqttSettings__MaxKeepAliveTimeout`, 00:29:27 (design.md D16).
    pub keep_alive_max: Duration,
    /// `MqttSettings__ConnectArrivalTimeout`, 00:01:00: from TCP accept to CONNECT.
    pub connect_arrival_max: Duration,
    /// `MaxConnectedClients`, 100.
    pub connected_clients_max: usize,
    /// `<StorageFolder>/edgeHub`.
    pub store_path: PathBuf,
    /// `StorageSync`.
    pub storage_sync: StorageSync,
    /// `ConfigSource`, `twin`: where the routes come from.
    pub config_source: ConfigSource,
    /// `ConfigRefreshFrequencySecs`, 3600: between two fetches of the hub's own twin that nothing
    /// else asked for.
    pub config_refresh: Duration,
    /// Twins: `EncryptTwinStore`, `MinTwinSyncPeriodSecs`, `ReportedPropertiesSyncFrequencySecs`.
    pub twins: TwinConfig,
    /// `MaxUnacknowledgedDeliveries`, 16: deliveries that a client may have unsettled
    /// (design.md D17); 1 is as the reference.
    pub delivery_window: usize,
    /// Name and text of each route of `routes__*`; the default route when there is none.
    pub routes: Vec<(String, String)>,
    /// Global time to live of stored messages; none = for ever.
    pub time_to_live: Option<Duration>,
    /// `MessageCleanupIntervalSecs`, at least 30 s.
    pub cleanup_interval: Duration,
    /// `DeviceScopeCacheRefreshRateSecs`.
    pub scope_refresh_period: Duration,
    /// `DeviceScopeCacheRefreshDelaySecs`.
    pub scope_refresh_gap: Duration,
    /// `CloudConnectionIdleTimeoutSecs`, none when `CloseCloudConnectionOnIdleTimeout` is false.
    pub upstream_idle: Option<Duration>,
    /// `TrackDeviceState`.
    pub track_device_state: bool,
    /// `RuntimeLogLevel` as given.
    pub log_level: String,
    /// `EDGEHUB_FAULTS`: Unix socket of the fault-injection commands (feature `faults` only).
    pub faults_socket: Option<PathBuf>,
}

/// Why a hub cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// Names every variable that is missing.
    #[error("these settings are required and missing: {}", .0.join(", "))]
    Missing(Vec<&'static str>),
    /// The connection string cannot be used.
    #[error("IotHubConnectionString: {0}")]
    ConnectionString(#[from] ConnectionStringError),
}

/// Settings, and what was wrong with the values that have a default.
#[derive(Debug)]
pub struct Loaded {
    /// The settings to run with.
    pub settings: Settings,
    /// One text for each bad value, for the log.
    pub problems: Vec<String>,
    /// One text for each thing that works and may be meant otherwise, for the log.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Reads the settings of a process.
    ///
    /// # Errors
    /// When something is missing without which the hub cannot work; all of it is named at once.
    pub fn load(mut env: Environment) -> Result<Loaded, SettingsError> {
        let mut missing = Vec::new();
        let mut required = |name: &'static str| match env.text(name) {
            Some(text) => text.to_owned(),
            None => {
                missing.push(name);
                String::new()
            }
        };
        let connection = required("IotHubConnectionString");
        let own_host = required("EdgeDeviceHostName");
        let certificates = CertificateFiles {
            certificate: required("EdgeHubDevServerCertificateFile").into(),
            private_key: required("EdgeHubDevServerPrivateKeyFile").into(),
            trust_bundle: required("EdgeHubDevTrustBundleFile").into(),
        };
        if !missing.is_empty() {
            return Err(SettingsError::Missing(missing));
        }
        let connection_string = ConnectionString::parse(&connection)?;
        let upstream = upstream(&mut env, &connection_string.host);
        let routes = routes(&mut env);
        let ttl = env.integer("StoreAndForward__TimeToLiveSecs", -1);
        let settings = Self {
            hub_host: connection_string.host.clone(),
            own_host,
            own_identity: connection_string.identity.clone(),
            connection_string,
            certificates,
            upstream,
            listen_address: env
                .address("ListenAddress")
                .unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
            ports: ports(&mut env),
            mqtt_enabled: env.flag("MqttSettings__Enabled", true),
            amqp_enabled: env.flag("AmqpSettings__Enabled", true),
            https_enabled: env.flag("HttpSettings__Enabled", true),
            client_certificates: env.flag("ClientCertAuthEnabled", true),
            tls_versions: tls_versions(&mut env),
            keep_alive_max: env.time_span(
                "MqttSettings__MaxKeepAliveTimeout",
                Duration::from_secs(1767),
            ),
            connect_arrival_max: env.time_span(
                "MqttSettings__ConnectArrivalTimeout",
                Duration::from_secs(60),
            ),
            connected_clients_max: usize::try_from(env.bounded(
                "MaxConnectedClients",
                100,
                1..=1_000_000,
            ))
            .unwrap_or(usize::MAX),
            store_path: storage_folder(&mut env).join("edgeHub"),
            storage_sync: env.choice(
                "StorageSync",
                [("os", StorageSync::Os), ("disk", StorageSync::Disk)],
            ),
            config_source: env.choice(
                "ConfigSource",
                [("twin", ConfigSource::Twin), ("local", ConfigSource::Local)],
            ),
            config_refresh: Duration::from_secs(env.bounded(
                "ConfigRefreshFrequencySecs",
                3600,
                1..=PERIOD_SECS_MAX,
            )),
            twins: twins(&mut env),
            delivery_window: usize::try_from(env.bounded(
                "MaxUnacknowledgedDeliveries",
                WINDOW_DEFAULT as u64,
                1..=WINDOW_MAX as u64,
            ))
            .unwrap_or(WINDOW_DEFAULT),
            routes,
            time_to_live: u64::try_from(ttl).ok().map(Duration::from_secs),
            cleanup_interval: Duration::from_secs(
                env.bounded("MessageCleanupIntervalSecs", 1800, 1..=PERIOD_SECS_MAX)
                    .max(30),
            ),
            scope_refresh_period: Duration::from_secs(env.bounded(
                "DeviceScopeCacheRefreshRateSecs",
                3600,
                1..=PERIOD_SECS_MAX,
            )),
            scope_refresh_gap: Duration::from_secs(env.bounded(
                "DeviceScopeCacheRefreshDelaySecs",
                120,
                0..=PERIOD_SECS_MAX,
            )),
            upstream_idle: idle(&mut env),
            track_device_state: env.flag("TrackDeviceState", true),
            log_level: env.text("RuntimeLogLevel").unwrap_or("info").to_owned(),
            faults_socket: env.text("EDGEHUB_FAULTS").map(PathBuf::from),
        };
        Ok(Loaded {
            settings,
            problems: env.take_problems(),
            warnings: env.take_warnings(),
        })
    }

    /// The address outgoing sockets bind to: the listeners' when it is a specific one.
    #[must_use]
    pub fn outgoing_address(&self) -> Option<IpAddr> {
        Some(self.listen_address).filter(|address| !address.is_unspecified())
    }
}

fn upstream(env: &mut Environment, hub_host: &str) -> UpstreamSettings {
    let protocol = protocol(env);
    let parent = env.text("IOTEDGE_GATEWAYHOSTNAME").map(str::to_owned);
    UpstreamSettings {
        nested: parent.is_some(),
        host: parent.unwrap_or_else(|| hub_host.to_owned()),
        protocol,
        mqtt_port: env.port("UpstreamMqttPort", 8883),
        amqp_port: env.port("UpstreamAmqpPort", 5671),
        https_port: env.port("UpstreamHttpsPort", 443),
        pool_size: connections(env),
        proxy: ProxySettings {
            https_proxy: env.text("https_proxy").unwrap_or_default().to_owned(),
            no_proxy: env.text("no_proxy").unwrap_or_default().to_owned(),
        },
        operation_max: Duration::from_secs(env.bounded("CloudOperationTimeoutSecs", 20, 1..=600)),
    }
}

fn twins(env: &mut Environment) -> TwinConfig {
    let default = TwinConfig::default();
    let mut seconds = |name, default: Duration| {
        Duration::from_secs(env.bounded(name, default.as_secs(), 0..=PERIOD_SECS_MAX))
    };
    TwinConfig {
        sync_period: seconds("MinTwinSyncPeriodSecs", default.sync_period),
        report_period: seconds("ReportedPropertiesSyncFrequencySecs", default.report_period),
        sealed: env.flag("EncryptTwinStore", default.sealed),
    }
}

/// The protocol of a name, in any case, or of its number in the reference. Unset, and what is none
/// of them, is AMQP with its fallback.
fn protocol(env: &mut Environment) -> UpstreamProtocol {
    const NAMES: [(&str, &str, UpstreamProtocol); 4] = [
        ("0", "Amqp", UpstreamProtocol::Amqp),
        ("1", "AmqpWs", UpstreamProtocol::AmqpWs),
        ("2", "Mqtt", UpstreamProtocol::Mqtt),
        ("3", "MqttWs", UpstreamProtocol::MqttWs),
    ];
    let Some(text) = env.text("UpstreamProtocol") else {
        return UpstreamProtocol::AmqpOrWs;
    };
    let named = NAMES
        .iter()
        .find(|(number, name, _)| text == *number || text.eq_ignore_ascii_case(name));
    let protocol = named.map(|(_, _, protocol)| *protocol);
    protocol.unwrap_or_else(|| {
        let expected = "one of Amqp, AmqpWs, Mqtt, MqttWs";
        let used = "Amqp, falling back to AmqpWs";
        env.bad("UpstreamProtocol", expected, used);
        UpstreamProtocol::AmqpOrWs
    })
}

/// `IotHubConnectionPoolSize`.
fn connections(env: &mut Environment) -> usize {
    let size = env.bounded("IotHubConnectionPoolSize", 1, 1..=POOL_SIZE_MAX);
    usize::try_from(size).unwrap_or(1)
}

fn tls_versions(env: &mut Environment) -> TlsVersions {
    let list = env.text("SslProtocols").unwrap_or_default().to_owned();
    let (versions, ignored) = TlsVersions::parse(&list);
    if !ignored.is_empty() {
        let ignored = ignored.len();
        env.warn(format!(
            "SslProtocols: {ignored} of its entries are neither tls1.2 nor tls1.3 and are ignored"
        ));
    }
    versions
}

fn ports(env: &mut Environment) -> Ports {
    let listener = env.port("Metrics__Listener__Port", 9600);
    Ports {
        mqtt: env.port("MqttSettings__Port", 8883),
        amqp: env.port("AmqpSettings__Port", 5671),
        https: env.port("HttpSettings__Port", 443),
        metrics: env.port("HttpSettings__metrics_port", listener),
    }
}

fn routes(env: &mut Environment) -> Vec<(String, String)> {
    let given: Vec<(String, String)> = env
        .section("routes")
        .into_iter()
        .filter(|(_, text)| !text.trim().is_empty())
        .map(|(name, text)| (name, text.trim().to_owned()))
        .collect();
    if given.is_empty() {
        // The route of the reference's settings file.
        return vec![("r1".to_owned(), "FROM /* INTO $upstream".to_owned())];
    }
    given
}

fn storage_folder(env: &mut Environment) -> PathBuf {
    env.text("StorageFolder")
        .map_or_else(std::env::temp_dir, PathBuf::from)
}

fn idle(env: &mut Environment) -> Option<Duration> {
    let seconds = env.bounded("CloudConnectionIdleTimeoutSecs", 3600, 1..=PERIOD_SECS_MAX);
    env.flag("CloseCloudConnectionOnIdleTimeout", true)
        .then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests;

//! What is read from which variables, and what odd values come to.

use super::*;

const KEY: &str = "cHJpbWFyeS1rZXktMDEyMzQ1Njc4OWFiY2RlZjAxMjM=";

fn minimal() -> Vec<(String, String)> {
    [
        (
            "IotHubConnectionString",
            format!("HostName=h.example;DeviceId=edge1;ModuleId=$edgeHub;SharedAccessKey={KEY}"),
        ),
        ("EdgeDeviceHostName", "edge1.example".to_owned()),
        ("EdgeHubDevServerCertificateFile", "c.pem".to_owned()),
        ("EdgeHubDevServerPrivateKeyFile", "k.pem".to_owned()),
        ("EdgeHubDevTrustBundleFile", "t.pem".to_owned()),
        ("UpstreamProtocol", "mqtt".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

fn load(extra: &[(&str, &str)]) -> Result<Loaded, SettingsError> {
    let mut variables = minimal();
    variables.retain(|(name, _)| extra.iter().all(|(other, _)| other != name));
    variables.extend(
        extra
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned())),
    );
    Settings::load(Environment::new(variables))
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let Loaded {
        settings,
        problems,
        warnings,
    } = load(&[]).unwrap();
    assert!(problems.is_empty() && warnings.is_empty());
    assert!(!format!("{settings:?}").contains(KEY));
    assert_eq!(settings.own_identity.as_str(), "edge1/$edgeHub");
    assert_eq!(settings.ports.mqtt, 8883);
    assert_eq!(settings.ports.amqp, 5671);
    assert_eq!(settings.ports.https, 443);
    assert_eq!(settings.ports.metrics, 9600);
    assert_eq!(settings.upstream.host, "h.example");
    assert_eq!(settings.upstream.mqtt_port, 8883);
    assert_eq!(settings.upstream.amqp_port, 5671);
    assert_eq!(settings.upstream.https_port, 443);
    assert!(!settings.upstream.nested);
    assert_eq!(settings.keep_alive_max, Duration::from_secs(1767));
    assert_eq!(settings.connected_clients_max, 100);
    assert_eq!(settings.time_to_live, None);
    assert_eq!(settings.routes[0].1, "FROM /* INTO $upstream");
    assert!(settings.listen_address.is_unspecified());
    assert_eq!(settings.outgoing_address(), None);
}

#[test]
fn a_gateway_host_makes_a_lower_layer() {
    let extra = [
        ("IOTEDGE_GATEWAYHOSTNAME", "edge0.example"),
        ("ListenAddress", "127.0.9.1"),
    ];
    let settings = load(&extra).unwrap().settings;
    assert_eq!(settings.upstream.host, "edge0.example");
    assert_eq!(settings.hub_host, "h.example");
    assert!(settings.upstream.nested);
    assert_eq!(
        settings.outgoing_address(),
        Some("127.0.9.1".parse().unwrap())
    );
}

#[test]
fn all_missing_settings_are_named_at_once() {
    let error = Settings::load(Environment::new([]))
        .unwrap_err()
        .to_string();
    for name in [
        "IotHubConnectionString",
        "EdgeDeviceHostName",
        "EdgeHubDevTrustBundleFile",
    ] {
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn every_upstream_protocol_has_a_name_and_a_number() {
    for (value, protocol) in [
        ("Amqp", UpstreamProtocol::Amqp),
        ("0", UpstreamProtocol::Amqp),
        ("amqpws", UpstreamProtocol::AmqpWs),
        ("1", UpstreamProtocol::AmqpWs),
        ("MQTT", UpstreamProtocol::Mqtt),
        (" mqtt ", UpstreamProtocol::Mqtt),
        ("2", UpstreamProtocol::Mqtt),
        ("MqttWs", UpstreamProtocol::MqttWs),
        ("3", UpstreamProtocol::MqttWs),
        ("", UpstreamProtocol::AmqpOrWs),
    ] {
        let loaded = load(&[("UpstreamProtocol", value)]).unwrap();
        assert_eq!(loaded.settings.upstream.protocol, protocol, "{value}");
        assert!(loaded.problems.is_empty());
    }
    let loaded = load(&[("UpstreamProtocol", "Kafka")]).unwrap();
    let protocol = loaded.settings.upstream.protocol;
    assert_eq!(protocol, UpstreamProtocol::AmqpOrWs);
    let expected = "UpstreamProtocol is \"Kafka\", which is not one of Amqp, AmqpWs, Mqtt, \
                    MqttWs; using Amqp, falling back to AmqpWs";
    assert_eq!(loaded.problems, [expected]);
}

#[test]
fn the_pool_of_amqp_connections_has_at_least_one() {
    let size = |value: &str| {
        let loaded = load(&[("IotHubConnectionPoolSize", value)]).unwrap();
        (loaded.settings.upstream.pool_size, loaded.problems.len())
    };
    assert_eq!(load(&[]).unwrap().settings.upstream.pool_size, 1);
    assert_eq!(size("4"), (4, 0));
    for odd in ["0", "-1", "x", "101"] {
        assert_eq!(size(odd), (1, 1), "{odd}");
    }
}

#[test]
fn odd_values_never_stop_the_start() {
    let odd = [
        ("MqttSettings__MaxKeepAliveTimeout", "00:00:00"),
        ("MqttSettings__ConnectArrivalTimeout", "never"),
        ("DeviceScopeCacheRefreshDelaySecs", "9223372036854775807"),
        ("DeviceScopeCacheRefreshRateSecs", "0"),
        ("MaxConnectedClients", "-1"),
        ("ListenAddress", "localhost"),
        ("SslProtocols", "ssl3,tls9"),
        ("StorageSync", "sometimes"),
    ];
    let Loaded {
        settings,
        problems,
        warnings,
    } = load(&odd).unwrap();
    assert_eq!(problems.len(), odd.len() - 1, "{problems:?}");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(settings.keep_alive_max, Duration::from_secs(1767));
    assert_eq!(settings.connect_arrival_max, Duration::from_secs(60));
    assert_eq!(settings.scope_refresh_gap, Duration::from_secs(120));
    assert_eq!(settings.scope_refresh_period, Duration::from_secs(3600));
    assert_eq!(settings.tls_versions, TlsVersions::All);
    assert_eq!(settings.storage_sync, StorageSync::Os);
}

#[test]
fn tls_versions_are_chosen() {
    let versions = |list| load(&[("SslProtocols", list)]).unwrap();
    let old = versions("TLS1.2, ssl3");
    assert_eq!(old.settings.tls_versions, TlsVersions::Tls12);
    assert!(old.problems.is_empty() && old.warnings.len() == 1);
    assert_eq!(versions("tlsv13").settings.tls_versions, TlsVersions::Tls13);
    assert_eq!(versions("").settings.tls_versions, TlsVersions::All);
}

#[test]
fn routes_keep_their_names() {
    let extra = [
        ("routes__ToCloud", " FROM /messages/* INTO $upstream "),
        ("Routes__none", "  "),
    ];
    let route = |name: &str, text: &str| (name.to_owned(), text.to_owned());
    assert_eq!(
        load(&extra).unwrap().settings.routes,
        [route("ToCloud", "FROM /messages/* INTO $upstream")]
    );
}

#[test]
fn the_metrics_port_has_an_order_of_precedence() {
    let old = [("Metrics__Listener__Port", "9700")];
    assert_eq!(load(&old).unwrap().settings.ports.metrics, 9700);
    let both = [
        ("Metrics__Listener__Port", "9700"),
        ("HttpSettings__metrics_port", "9800"),
    ];
    assert_eq!(load(&both).unwrap().settings.ports.metrics, 9800);
}

#[test]
fn the_twin_is_where_routes_come_from_unless_it_is_said() {
    let source = |value| {
        let loaded = load(&[("configSource", value)]).unwrap();
        loaded.settings.config_source
    };
    assert_eq!(source(""), ConfigSource::Twin);
    assert_eq!(source("Twin"), ConfigSource::Twin);
    assert_eq!(source("LOCAL"), ConfigSource::Local);
}

#[test]
fn a_proxy_does_not_show_its_password() {
    let loaded = load(&[
        ("HTTPS_PROXY", "http://user:secret@proxy:3128"),
        ("no_proxy", "parent.local"),
    ])
    .unwrap();
    let proxy = &loaded.settings.upstream.proxy;
    assert_eq!(proxy.https_proxy, "http://user:secret@proxy:3128");
    assert_eq!(proxy.no_proxy, "parent.local");
    assert!(!format!("{:?}", loaded.settings).contains("secret"));
}

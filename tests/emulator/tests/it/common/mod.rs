//! An emulator with a small hierarchy, and clients for it.
//!
//! ```text
//! edge1 ($edgeHub, $edgeAgent, modA)      edge10 (top as well, a prefix-named stranger)
//! ├─ leaf0                                └─ leaf10
//! ├─ off (disabled)
//! ├─ edge2 ── leaf1 (module m1), leafx (a module $edgeHub, but no edge device)
//! │   └─ edge3 (modA) ── leaf3
//! └─ sleepy (disabled edge) ── leaf4
//! lone (no parent)
//! ```

pub(crate) mod amqp;
pub(crate) mod http;
pub(crate) mod mqtt;
pub(crate) mod process;
pub(crate) mod token;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use iothub_emulator::{Emulator, Options};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tempfile::TempDir;

use http::Answer;
use token::{Token, key};

pub(crate) const HOST: &str = "hub.lab.example";

/// Longer than anything on loopback takes, even on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Files that an emulator needs, and the TLS configuration of clients that trust it.
pub(crate) struct Files {
    pub(crate) folder: TempDir,
    pub(crate) tls: Arc<ClientConfig>,
}

impl Files {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap();
        let server_key = KeyPair::generate().unwrap();
        let server = CertificateParams::new([HOST.to_owned()]).unwrap();
        let server = server.signed_by(&server_key, &root).unwrap();
        std::fs::write(folder.path().join("cert.pem"), server.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), server_key.serialize_pem()).unwrap();
        std::fs::write(folder.path().join("seed.json"), seed().to_string()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(root.der().clone()).unwrap();
        let provider = rustls::crypto::ring::default_provider().into();
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self {
            folder,
            tls: Arc::new(tls),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn seed() -> Value {
    let device = |id: &str, edge: bool, parent: Option<&str>, modules: &[&str]| {
        let modules: Vec<Value> = modules
            .iter()
            .map(|module| {
                let name = format!("{id}/{module}");
                json!({"moduleId": module, "primaryKey": key(&name), "secondaryKey": key("second")})
            })
            .collect();
        json!({"deviceId": id, "iotEdge": edge, "parent": parent, "primaryKey": key(id),
            "secondaryKey": key("second"), "modules": modules})
    };
    let hub = "$edgeHub";
    let mut devices = vec![
        device("edge1", true, None, &[hub, "$edgeAgent", "modA"]),
        device("leaf0", false, Some("edge1"), &[]),
        device("off", false, Some("edge1"), &[]),
        device("edge2", true, Some("edge1"), &[hub]),
        device("leaf1", false, Some("edge2"), &["m1"]),
        device("leafx", false, Some("edge2"), &[hub, "m1"]),
        device("edge3", true, Some("edge2"), &[hub, "modA"]),
        device("leaf3", false, Some("edge3"), &[]),
        device("sleepy", true, Some("edge1"), &[hub]),
        device("leaf4", false, Some("sleepy"), &[]),
        device("edge10", true, None, &[hub]),
        device("leaf10", false, Some("edge10"), &[]),
        device("lone", false, None, &[]),
    ];
    for disabled in [2, 8] {
        devices[disabled]["status"] = json!("disabled");
    }
    let names = [
        "iothubowner",
        "device",
        "registryRead",
        "registryReadWrite",
        "service",
    ];
    let policies: Vec<Value> = names
        .iter()
        .map(|name| json!({"name": name, "key": key(name)}))
        .collect();
    json!({"hostname": HOST, "policies": policies, "devices": devices})
}

/// A running emulator with its files.
pub(crate) struct Bed {
    pub(crate) files: Files,
    pub(crate) emulator: Emulator,
}

impl Bed {
    pub(crate) async fn strict() -> Self {
        Self::start(true).await
    }

    pub(crate) async fn lenient() -> Self {
        Self::start(false).await
    }

    async fn start(strict: bool) -> Self {
        let files = Files::new();
        let emulator = Emulator::start(Options {
            hostname: HOST.to_owned(),
            address: Ipv4Addr::LOCALHOST.into(),
            amqp_port: 0,
            mqtt_port: 0,
            https_port: 0,
            control_port: 0,
            certificate: files.path("cert.pem"),
            key: files.path("key.pem"),
            seed: files.path("seed.json"),
            ledger: None,
            strict,
        });
        let emulator = emulator.await.unwrap();
        Self { files, emulator }
    }

    pub(crate) fn amqp(&self) -> SocketAddr {
        self.emulator.amqp_address()
    }

    pub(crate) fn mqtt(&self) -> SocketAddr {
        self.emulator.mqtt_address()
    }

    /// A call of the control API that is expected to succeed.
    pub(crate) async fn control(&self, method: &str, path: &str, body: Value) -> Value {
        let answer = self.control_raw(method, path, body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
        answer.json()
    }

    pub(crate) async fn control_raw(&self, method: &str, path: &str, body: Value) -> Answer {
        http::plain(self.emulator.control_address(), method, path, &body).await
    }

    /// A call of the hub's HTTPS side.
    pub(crate) async fn https(
        &self,
        method: &str,
        path: &str,
        token: &Token,
        body: Value,
    ) -> Answer {
        let headers = [("authorization", token.text())];
        self.https_with(method, path, &headers, body).await
    }

    pub(crate) async fn https_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, String)],
        body: Value,
    ) -> Answer {
        let address = self.emulator.https_address();
        http::tls(address, &self.files.tls, method, path, headers, &body).await
    }

    /// A call of the service side with the policy for it.
    pub(crate) async fn service(&self, method: &str, path: &str, body: Value) -> Answer {
        let path = format!("{path}?api-version=2021-04-12");
        self.https(method, &path, &Token::of_policy("service"), body)
            .await
    }

    /// A call of the service side that is expected to succeed.
    pub(crate) async fn served(&self, method: &str, path: &str, body: Value) -> Value {
        let answer = self.service(method, path, body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
        answer.json()
    }

    pub(crate) async fn ledger(&self) -> Vec<Value> {
        let answer = self.control_raw("GET", "/ledger", Value::Null).await;
        lines(&answer.text())
    }

    /// Sets the hub's clock to now plus `seconds`.
    pub(crate) async fn clock(&self, seconds: i64) {
        self.control("PUT", "/clock", json!({"offset_ms": seconds * 1_000}))
            .await;
    }
}

pub(crate) fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

pub(crate) fn now_secs() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

pub(crate) fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

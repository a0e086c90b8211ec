//! TLS as a client may bring it: certificates that nobody knows, one version only.

use std::sync::Arc;

use edgehub_lab::Lab;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};

/// Versions of TLS.
pub const BOTH: &[&SupportedProtocolVersion] = &[&TLS12, &TLS13];
/// Only the older version: what the Python SDK asks for.
pub const ONLY_1_2: &[&SupportedProtocolVersion] = &[&TLS12];
/// Only the newer version.
pub const ONLY_1_3: &[&SupportedProtocolVersion] = &[&TLS13];

/// A client certificate.
#[derive(Debug)]
pub struct ClientCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Clone for ClientCertificate {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

impl ClientCertificate {
    /// Signed by itself, for this name and these further names.
    #[must_use]
    pub fn self_signed(name: &str, further: impl IntoIterator<Item = String>) -> Self {
        let names: Vec<String> = [name.to_owned()].into_iter().chain(further).collect();
        let params = CertificateParams::new(names).expect("DNS names");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self {
            chain: vec![certificate.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        }
    }

    /// With other certificates behind, which need not have to do with it.
    #[must_use]
    pub fn followed_by(mut self, others: impl IntoIterator<Item = Self>) -> Self {
        let others = others.into_iter().flat_map(|other| other.chain);
        self.chain.extend(others);
        self
    }
}

/// TLS that trusts the lab's root, in these versions, with this certificate of the client.
#[must_use]
pub fn connector(
    lab: &Lab,
    versions: &[&'static SupportedProtocolVersion],
    certificate: Option<ClientCertificate>,
) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(lab.ca_file()).expect("the lab's CA") {
        roots.add(root.expect("a certificate")).expect("a root");
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .expect("the versions are supported")
        .with_root_certificates(roots);
    let config = match certificate {
        None => builder.with_no_client_auth(),
        Some(ClientCertificate { chain, key }) => {
            // Not through the builder, which refuses certificates that no server takes.
            let key = ring::sign::any_supported_type(&key).expect("a key");
            let certified = CertifiedKey::new(chain, key);
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
    };
    TlsConnector::from(Arc::new(config))
}

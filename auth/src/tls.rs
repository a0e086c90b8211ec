//! TLS configurations: rustls with ring, for our listeners and for our calls upstream.
//!
//! Listeners present the whole certificate chain to everybody, whatever name the client asked
//! for, or none (no SNI is needed: clients use addresses, and nginx sends none). A client
//! certificate is asked for and never required; any certificate passes the handshake, and is
//! judged later with the identity (11.3). What the handshake does check, always, is that the peer
//! holds the certificate's private key.
//!
//! Calls upstream trust the certificates of the trust bundle, and nothing else. The roots of the
//! operating system, which a top layer needs for the public IoT Hub, come with the identity
//! issue; until then they belong into the bundle file.
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 11.1 (chain, key forms, trust) and 11.3 (versions, client
//! certificates).

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem};
use thiserror::Error;
use tracing::warn;

/// Why a TLS configuration cannot be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A certificate file cannot be read as PEM.
    #[error("cannot read the certificates: {0}")]
    Certificate(pem::Error),
    /// Key and certificate do not fit, or rustls takes one of them not.
    #[error("cannot use the certificate or its key: {0}")]
    Unusable(#[from] rustls::Error),
    /// The key file has no private key in a known form (PKCS#8, PKCS#1, SEC1).
    #[error("cannot read the private key: {0}")]
    Key(pem::Error),
    /// The certificate file has no certificate.
    #[error("there is no certificate in the certificate file")]
    NoCertificate,
    /// The trust bundle has no certificate that could be trusted.
    #[error("there is no usable certificate in the trust bundle")]
    NoTrustAnchor,
}

/// Protocol versions that a listener offers (`SslProtocols`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersions {
    /// TLS 1.2 and 1.3.
    #[default]
    All,
    /// Only TLS 1.2.
    Tls12,
    /// Only TLS 1.3.
    Tls13,
}

impl TlsVersions {
    /// Reads a comma separated list such as `tls1.2,tls13`, in any case. Entries that name no
    /// supported version are ignored and returned for a warning; if none is left, all versions
    /// are offered.
    pub fn parse(list: &str) -> (Self, Vec<&str>) {
        let (mut tls12, mut tls13) = (false, false);
        let mut ignored = Vec::new();
        for entry in list
            .split(',')
            .map(str::trim)
            .filter(|entry| !entry.is_empty())
        {
            match entry.to_ascii_lowercase().as_str() {
                "tls1.2" | "tls12" | "tls1_2" | "tlsv12" | "tlsv1.2" | "tlsv1_2" => tls12 = true,
                "tls1.3" | "tls13" | "tls1_3" | "tlsv13" | "tlsv1.3" | "tlsv1_3" => tls13 = true,
                _ => ignored.push(entry),
            }
        }
        let versions = match (tls12, tls13) {
            (true, false) => Self::Tls12,
            (false, true) => Self::Tls13,
            (true, true) | (false, false) => Self::All,
        };
        (versions, ignored)
    }

    fn supported(self) -> &'static [&'static SupportedProtocolVersion] {
        static TLS12: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS12];
        static TLS13: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
        match self {
            Self::All => rustls::ALL_VERSIONS,
            Self::Tls12 => &TLS12,
            Self::Tls13 => &TLS13,
        }
    }
}

/// The configuration of our listeners.
///
/// `cert_pem` has our certificate followed by its issuers, all of which are presented; `key_pem`
/// its private key. With `client_certs` a client certificate is asked for.
///
/// # Errors
/// [`TlsError`] if the files are unreadable or do not fit each other.
pub fn server_config(
    cert_pem: &[u8],
    key_pem: &[u8],
    client_certs: bool,
    versions: TlsVersions,
) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(cert_pem)?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(TlsError::Key)?;
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let builder = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions.supported())?;
    let builder = if client_certs {
        builder.with_client_cert_verifier(Arc::new(AnyClientCertificate { algorithms }))
    } else {
        builder.with_no_client_auth()
    };
    Ok(Arc::new(builder.with_single_cert(chain, key)?))
}

/// The configuration of our calls upstream: every certificate of the bundle is a trust anchor,
/// root or intermediate. Entries that cannot be one are skipped with a warning.
///
/// # Errors
/// [`TlsError`] if the bundle is unreadable or has no usable certificate.
pub fn client_config(trust_bundle_pem: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    let (_, skipped) = roots.add_parsable_certificates(certificates(trust_bundle_pem)?);
    if roots.is_empty() {
        return Err(TlsError::NoTrustAnchor);
    }
    if skipped > 0 {
        warn!(skipped, "certificates of the trust bundle cannot be used");
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Named, so that nothing depends on which provider a process has installed as its default.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(TlsError::Certificate)
}

/// Asks for a client certificate and accepts any chain; the handshake signature is verified with
/// the certificate's key. No list of authorities is sent: it could only make clients hide theirs.
#[derive(Debug)]
struct AnyClientCertificate {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for AnyClientCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;

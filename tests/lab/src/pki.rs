//! The lab's certificates: one root CA, a device CA per host below it, a server certificate each.
//!
//! The shape is that of a real deployment (spec/auth-hierarchy-http.md, certificates): the server
//! sends leaf and device CA, everybody else trusts the root alone. A server certificate names the
//! host name, the public and the private address, and `edgeHub`, which is how modules on the same
//! device call their hub.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

const ROOT_NAME: &str = "edgehub-lab root CA";

/// The root CA of one state folder. It is kept there, so that clients which trust it go on working
/// when a lab is started again with the same folder.
#[derive(Debug)]
pub struct RootCa {
    certificate: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// Where the files of one host's server certificate are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerCertificate {
    /// PEM: the server certificate, then its device CA.
    pub chain: PathBuf,
    /// PEM: the private key, PKCS#8.
    pub key: PathBuf,
}

impl RootCa {
    /// Opens the root CA in `folder`, making it first if there is none.
    ///
    /// # Errors
    /// When the folder cannot be written or holds a key that cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let certificate = folder.join("root-ca.pem");
        let key_file = folder.join("root-ca.key.pem");
        let params = ca_params(ROOT_NAME);
        if certificate.exists() && key_file.exists() {
            let key = KeyPair::from_pem(&fs::read_to_string(&key_file)?)
                .with_context(|| format!("cannot use {}", key_file.display()))?;
            // Name, key and usages are those of the stored certificate, so what this issuer signs
            // is accepted by everybody who trusts that certificate.
            return Ok(Self {
                certificate,
                issuer: Issuer::new(params, key),
            });
        }
        let key = KeyPair::generate()?;
        write_private(&key_file, &key.serialize_pem())?;
        let root = CertifiedIssuer::self_signed(params.clone(), key)?;
        fs::write(&certificate, root.pem())
            .with_context(|| format!("cannot write {}", certificate.display()))?;
        let key = KeyPair::from_pem(&fs::read_to_string(&key_file)?)?;
        Ok(Self {
            certificate,
            issuer: Issuer::new(params, key),
        })
    }

    /// PEM of the root certificate: what clients trust, and the hubs' trust bundle.
    #[must_use]
    pub fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// Makes a device CA for `name` and a server certificate below it, into `folder`.
    ///
    /// # Errors
    /// When a name is not a host name or the folder cannot be written.
    pub fn issue(
        &self,
        folder: &Path,
        name: &str,
        dns_names: &[&str],
        addresses: &[IpAddr],
    ) -> Result<ServerCertificate> {
        let device_ca = CertifiedIssuer::signed_by(
            ca_params(&format!("{name} device CA")),
            KeyPair::generate()?,
            &self.issuer,
        )?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = validity();
        params.distinguished_name = distinguished_name(dns_names.first().unwrap_or(&name));
        for dns_name in dns_names {
            params
                .subject_alt_names
                .push(SanType::DnsName((*dns_name).try_into()?));
        }
        params
            .subject_alt_names
            .extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &device_ca)?;
        let files = ServerCertificate {
            chain: folder.join("server-chain.pem"),
            key: folder.join("server-key.pem"),
        };
        fs::write(&files.chain, leaf.pem() + &device_ca.pem())
            .with_context(|| format!("cannot write {}", files.chain.display()))?;
        write_private(&files.key, &key.serialize_pem())?;
        Ok(files)
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = validity();
    params.distinguished_name = distinguished_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params.use_authority_key_identifier_extension = true;
    params
}

fn distinguished_name(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    // X.520 limits a common name to 64 characters and OpenSSL holds to it.
    name.push(
        DnType::CommonName,
        common_name.chars().take(64).collect::<String>(),
    );
    name
}

/// Long enough for tests that move a hub's clock, ending before dates become awkward in ASN.1.
fn validity() -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - Duration::days(2), now + Duration::days(3650))
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Arc;

    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

    use super::*;

    fn handshake(root: &Path, files: &ServerCertificate, name: &str) -> Result<(), rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain: Vec<_> = CertificateDer::pem_file_iter(&files.chain)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(chain.len(), 2, "leaf and device CA");
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, PrivateKeyDer::from_pem_file(&files.key).unwrap())?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(root).unwrap() {
            roots.add(certificate.unwrap())?;
        }
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name)?;
        let mut server = ServerConnection::new(Arc::new(server))?;
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut bytes.as_slice()).unwrap();
            server.process_new_packets()?;
            bytes.clear();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut bytes.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }

    fn issue(root: &RootCa, folder: &Path) -> ServerCertificate {
        let addresses = [
            Ipv4Addr::new(127, 0, 40, 2).into(),
            Ipv4Addr::new(127, 0, 40, 102).into(),
        ];
        root.issue(
            folder,
            "edge1",
            &["edge1.lab40.example", "edgeHub"],
            &addresses,
        )
        .unwrap()
    }

    #[test]
    fn clients_that_trust_the_root_accept_every_name_of_the_host_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let root = RootCa::open(folder.path()).unwrap();
        let files = issue(&root, folder.path());
        for name in [
            "edge1.lab40.example",
            "edgeHub",
            "127.0.40.2",
            "127.0.40.102",
        ] {
            handshake(root.certificate(), &files, name).unwrap();
        }
        for name in ["edge2.lab40.example", "127.0.40.3"] {
            handshake(root.certificate(), &files, name).unwrap_err();
        }
    }

    #[test]
    fn the_root_of_another_lab_is_not_accepted() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let files = issue(&RootCa::open(ours.path()).unwrap(), ours.path());
        let other = RootCa::open(theirs.path()).unwrap();
        handshake(other.certificate(), &files, "edge1.lab40.example").unwrap_err();
    }

    #[test]
    fn a_root_that_is_opened_again_signs_for_those_who_trusted_it_before() {
        let folder = tempfile::tempdir().unwrap();
        let before = fs::read({
            let root = RootCa::open(folder.path()).unwrap();
            root.certificate().to_owned()
        })
        .unwrap();
        let root = RootCa::open(folder.path()).unwrap();
        assert_eq!(fs::read(root.certificate()).unwrap(), before);
        let files = issue(&root, folder.path());
        handshake(root.certificate(), &files, "edge1.lab40.example").unwrap();
    }
}

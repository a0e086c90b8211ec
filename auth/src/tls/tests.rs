//! Whole handshakes in memory: what our configurations accept and what they do not.

use std::io::{Read, Write};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConnection, ProtocolVersion, ServerConnection};

use super::*;

const RSA_PKCS8: &str = include_str!("testdata/throwaway-rsa.pkcs8.pem");
const RSA_PKCS1: &str = include_str!("testdata/throwaway-rsa.pkcs1.pem");

/// A root, an intermediate below it, and a server certificate below that one.
struct Authority {
    root_pem: String,
    intermediate_pem: String,
    intermediate: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let root_key = KeyPair::generate().unwrap();
        let root_params = ca_params(&format!("{name} root"));
        let root_pem = root_params.self_signed(&root_key).unwrap().pem();
        let root = Issuer::new(root_params, root_key);

        let key = KeyPair::generate().unwrap();
        let params = ca_params(&format!("{name} edge CA"));
        let intermediate_pem = params.signed_by(&key, &root).unwrap().pem();
        Self {
            root_pem,
            intermediate_pem,
            intermediate: Issuer::new(params, key),
        }
    }

    /// Leaf and issuer, as the workload API returns them.
    fn server_chain(&self, key: &KeyPair) -> String {
        let names = [
            "gateway.local".to_owned(),
            "edgehub".to_owned(),
            "127.0.0.1".to_owned(),
        ];
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(key, &self.intermediate).unwrap();
        leaf.pem() + &self.intermediate_pem
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}

fn server(authority: &Authority, client_certs: bool, versions: TlsVersions) -> Arc<ServerConfig> {
    let key = KeyPair::generate().unwrap();
    let (chain, key) = (authority.server_chain(&key), key.serialize_pem());
    server_config(chain.as_bytes(), key.as_bytes(), client_certs, versions).unwrap()
}

/// A client that presents the self-signed certificate of `certificate_key` and signs with
/// `signing_key`.
fn client_with_certificate(
    authority: &Authority,
    certificate_key: &KeyPair,
    signing_key: &KeyPair,
) -> Arc<ClientConfig> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "leaf1");
    let certificate = params.self_signed(certificate_key).unwrap();
    let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
    let key = ring::sign::any_supported_type(&key.into()).unwrap();
    let certified = CertifiedKey::new(vec![certificate.der().clone()], key);

    let mut config = client_config(authority.root_pem.as_bytes()).unwrap();
    Arc::make_mut(&mut config).client_auth_cert_resolver =
        Arc::new(SingleCertAndKey::from(certified));
    config
}

struct Connected {
    client: ClientConnection,
    server: ServerConnection,
}

/// Passes bytes back and forth until both sides are done, or one refuses.
fn handshake(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
    name: &str,
) -> Result<Connected, rustls::Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name)?;
    let mut server = ServerConnection::new(Arc::clone(server))?;
    while client.is_handshaking() || server.is_handshaking() || client.wants_write() {
        let mut flight = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut flight).unwrap();
        }
        let mut flight = flight.as_slice();
        while !flight.is_empty() {
            server.read_tls(&mut flight).unwrap();
            server.process_new_packets()?;
        }
        let mut flight = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut flight).unwrap();
        }
        let mut flight = flight.as_slice();
        while !flight.is_empty() {
            client.read_tls(&mut flight).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(Connected { client, server })
}

#[test]
fn both_versions_connect_and_carry_data() {
    let authority = Authority::new("plant");
    let client = client_config(authority.root_pem.as_bytes()).unwrap();
    for (versions, expected) in [
        (TlsVersions::All, ProtocolVersion::TLSv1_3),
        (TlsVersions::Tls12, ProtocolVersion::TLSv1_2),
        (TlsVersions::Tls13, ProtocolVersion::TLSv1_3),
    ] {
        let server = server(&authority, true, versions);
        let Connected {
            mut client,
            mut server,
        } = handshake(&client, &server, "gateway.local").unwrap();
        assert_eq!(client.protocol_version(), Some(expected));
        assert!(
            server.peer_certificates().is_none(),
            "a client certificate is optional"
        );

        client.writer().write_all(b"hello").unwrap();
        let mut flight = Vec::new();
        client.write_tls(&mut flight).unwrap();
        server.read_tls(&mut flight.as_slice()).unwrap();
        server.process_new_packets().unwrap();
        let mut received = [0; 5];
        server.reader().read_exact(&mut received).unwrap();
        assert_eq!(&received, b"hello");
    }
}

#[test]
fn the_name_of_the_workload_certificate_an_address_and_no_sni_all_work() {
    let authority = Authority::new("plant");
    let server = server(&authority, true, TlsVersions::All);
    let mut client = client_config(authority.root_pem.as_bytes()).unwrap();
    for name in ["gateway.local", "edgehub", "127.0.0.1"] {
        assert!(handshake(&client, &server, name).is_ok(), "{name}");
    }
    Arc::make_mut(&mut client).enable_sni = false;
    let connected = handshake(&client, &server, "edgehub").unwrap();
    assert_eq!(connected.server.server_name(), None);
    assert!(handshake(&client, &server, "elsewhere.local").is_err());
}

#[test]
fn any_client_certificate_is_taken_and_kept_for_later() {
    let authority = Authority::new("plant");
    let key = KeyPair::generate().unwrap();
    let client = client_with_certificate(&authority, &key, &key);
    for versions in [TlsVersions::Tls12, TlsVersions::Tls13] {
        let server = server(&authority, true, versions);
        let connected = handshake(&client, &server, "gateway.local").unwrap();
        assert_eq!(
            connected.server.peer_certificates().map(<[_]>::len),
            Some(1)
        );
    }
}

#[test]
fn a_client_certificate_without_its_key_fails_the_handshake() {
    let authority = Authority::new("plant");
    let (stolen, own) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let client = client_with_certificate(&authority, &stolen, &own);
    for versions in [TlsVersions::Tls12, TlsVersions::Tls13] {
        let server = server(&authority, true, versions);
        let error = handshake(&client, &server, "gateway.local").err().unwrap();
        assert!(
            matches!(error, rustls::Error::InvalidCertificate(_)),
            "{error:?}"
        );
    }
}

#[test]
fn without_client_certificates_none_is_asked_for() {
    let authority = Authority::new("plant");
    let key = KeyPair::generate().unwrap();
    let client = client_with_certificate(&authority, &key, &key);
    let server = server(&authority, false, TlsVersions::All);
    let connected = handshake(&client, &server, "gateway.local").unwrap();
    assert!(connected.server.peer_certificates().is_none());
}

#[test]
fn only_the_bundle_is_trusted() {
    let (authority, other) = (Authority::new("plant"), Authority::new("other"));
    let server = server(&authority, true, TlsVersions::All);
    let stranger = client_config(other.root_pem.as_bytes()).unwrap();
    assert!(handshake(&stranger, &server, "gateway.local").is_err());
    // Several certificates in the bundle, and an intermediate as anchor.
    let both = format!("{}{}", other.root_pem, authority.root_pem);
    let both = client_config(both.as_bytes()).unwrap();
    assert!(handshake(&both, &server, "gateway.local").is_ok());
    let intermediate = client_config(authority.intermediate_pem.as_bytes()).unwrap();
    assert!(handshake(&intermediate, &server, "gateway.local").is_ok());
}

#[test]
fn the_daemons_rsa_keys_work_in_both_forms() {
    let authority = Authority::new("plant");
    let chain = authority.server_chain(&KeyPair::from_pem(RSA_PKCS8).unwrap());
    let client = client_config(authority.root_pem.as_bytes()).unwrap();
    for key in [RSA_PKCS8, RSA_PKCS1] {
        for versions in [TlsVersions::Tls12, TlsVersions::Tls13] {
            let server = server_config(chain.as_bytes(), key.as_bytes(), true, versions).unwrap();
            assert!(handshake(&client, &server, "gateway.local").is_ok());
        }
    }
}

#[test]
fn a_sec1_key_works() {
    let authority = Authority::new("plant");
    let key = KeyPair::generate().unwrap();
    let chain = authority.server_chain(&key);
    // PKCS#8 of a P-256 key is 29 bytes of header and the SEC1 key.
    let der = key.serialize_der();
    let sec1 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &der[29..]);
    let pem = format!("-----BEGIN EC PRIVATE KEY-----\n{sec1}\n-----END EC PRIVATE KEY-----\n");
    let server = server_config(chain.as_bytes(), pem.as_bytes(), true, TlsVersions::All).unwrap();
    let client = client_config(authority.root_pem.as_bytes()).unwrap();
    assert!(handshake(&client, &server, "gateway.local").is_ok());
}

#[test]
fn unusable_files_are_named() {
    let authority = Authority::new("plant");
    let key = KeyPair::generate().unwrap();
    let chain = authority.server_chain(&key);
    let key_pem = key.serialize_pem();
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    let make = |chain: &str, key: &str| {
        server_config(chain.as_bytes(), key.as_bytes(), true, TlsVersions::All)
            .err()
            .unwrap()
    };
    assert!(matches!(make("", &key_pem), TlsError::NoCertificate));
    assert!(matches!(
        make("no pem at all", &key_pem),
        TlsError::NoCertificate
    ));
    assert!(matches!(make(&chain, ""), TlsError::Key(_)));
    assert!(matches!(make(&chain, &chain), TlsError::Key(_)));
    assert!(matches!(make(&chain, &other_key), TlsError::Unusable(_)));
    let torn = "-----BEGIN CERTIFICATE-----\n%%%%\n-----END CERTIFICATE-----\n";
    assert!(matches!(make(torn, &key_pem), TlsError::Certificate(_)));

    assert!(matches!(client_config(b""), Err(TlsError::NoTrustAnchor)));
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(matches!(
        client_config(garbage.as_bytes()),
        Err(TlsError::NoTrustAnchor)
    ));
    let mixed = format!("{garbage}{}", authority.root_pem);
    assert!(
        client_config(mixed.as_bytes()).is_ok(),
        "one bad entry does not spoil the bundle"
    );
}

#[test]
fn errors_do_not_show_key_material() {
    let authority = Authority::new("plant");
    let chain = authority.server_chain(&KeyPair::generate().unwrap());
    let secret = "MIGHAgEAMBMGByqGSM49";
    let torn = format!("-----BEGIN PRIVATE KEY-----\n{secret}%%%\n-----END PRIVATE KEY-----\n");
    let errors = [
        server_config(chain.as_bytes(), torn.as_bytes(), true, TlsVersions::All)
            .err()
            .unwrap(),
        server_config(
            chain.as_bytes(),
            RSA_PKCS8.as_bytes(),
            true,
            TlsVersions::All,
        )
        .err()
        .unwrap(),
    ];
    for error in errors {
        let text = format!("{error} {error:?}");
        assert!(!text.contains(secret), "{text}");
        assert!(!text.contains(&RSA_PKCS8[40..80]), "{text}");
    }
}

#[test]
fn version_lists_are_read_as_the_reference_does() {
    for (list, versions, ignored) in [
        ("", TlsVersions::All, vec![]),
        ("tls1.2", TlsVersions::Tls12, vec![]),
        ("Tls12", TlsVersions::Tls12, vec![]),
        ("TLS1_2", TlsVersions::Tls12, vec![]),
        ("tlsv12", TlsVersions::Tls12, vec![]),
        ("tls1.3", TlsVersions::Tls13, vec![]),
        (" tls1.2 , TLSV13 ", TlsVersions::All, vec![]),
        ("tls1.0,tls1.2", TlsVersions::Tls12, vec!["tls1.0"]),
        ("ssl3,nonsense", TlsVersions::All, vec!["ssl3", "nonsense"]),
    ] {
        assert_eq!(TlsVersions::parse(list), (versions, ignored), "{list}");
    }
}

#[test]
fn a_tls_1_2_listener_refuses_what_only_speaks_1_3() {
    let authority = Authority::new("plant");
    let server = server(&authority, true, TlsVersions::Tls12);
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(authority.root_pem.as_bytes()).unwrap());
    let only_13 = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(TlsVersions::Tls13.supported())
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    assert!(handshake(&Arc::new(only_13), &server, "gateway.local").is_err());
}

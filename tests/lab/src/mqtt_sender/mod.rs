//! A leaf or module of our own: sends numbered messages over MQTT and keeps what was acknowledged.
//!
//! It does what a careful device does: QoS 1, a window of messages in flight, and after a lost
//! connection the unacknowledged ones again, in order. It exists beside the SDKs because one
//! process can run thousands of these, and because its window and pace can be chosen. Its codec is
//! not the hub's.

mod outbox;
mod session;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::{Acknowledged, ConnectionString, SenderLog, sas};
use outbox::Outbox;

/// From TCP to CONNACK; then the next attempt.
const CONNECT_MAX: Duration = Duration::from_secs(20);

/// Between attempts: short, because tests and demos restart hubs in under a second.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// A token outlives every test.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Who sends what, how fast, to where.
#[derive(Clone, Debug)]
pub struct SenderOptions {
    /// With `GatewayHostName` it connects there, otherwise to the IoT Hub itself.
    pub connection_string: ConnectionString,
    /// PEM of the root CA to trust.
    pub ca_file: PathBuf,
    /// MQTT over TLS.
    pub port: u16,
    /// Messages in flight at one time.
    pub window: u16,
    /// Size of each body; at least what its number needs.
    pub body_bytes: usize,
    /// Pause between two messages; zero sends as fast as the window allows.
    pub interval: Duration,
    /// Ends by itself after this many; `None` goes on until it is stopped.
    pub count: Option<u64>,
    /// Where acknowledged messages are also written; memory is enough for most tests.
    pub log: Option<PathBuf>,
}

impl SenderOptions {
    /// A window of 50 bodies of 256 bytes, as fast as they are acknowledged, without end.
    #[must_use]
    pub fn new(connection_string: ConnectionString, ca_file: &Path, port: u16) -> Self {
        Self {
            connection_string,
            ca_file: ca_file.to_owned(),
            port,
            window: 50,
            body_bytes: 256,
            interval: Duration::ZERO,
            count: None,
            log: None,
        }
    }

    /// `device` or `device/module`.
    fn id(&self) -> Result<String> {
        let device = self
            .connection_string
            .device_id
            .as_deref()
            .context("no DeviceId")?;
        Ok(match &self.connection_string.module_id {
            Some(module) => format!("{device}/{module}"),
            None => device.to_owned(),
        })
    }

    fn host(&self) -> &str {
        let gateway = self.connection_string.gateway_host_name.as_deref();
        gateway.unwrap_or(&self.connection_string.host_name)
    }
}

/// What a running sender shows.
#[derive(Debug, Default)]
struct Shown {
    acknowledged: AtomicU64,
    in_flight: AtomicU64,
    connects: AtomicU64,
    last_error: Mutex<Option<String>>,
}

/// A running sender. Dropping it ends it at once.
#[derive(Debug)]
pub struct MqttSender {
    id: String,
    shown: Arc<Shown>,
    no_more: CancellationToken,
    end: CancellationToken,
    task: JoinHandle<Result<Vec<Acknowledged>>>,
}

impl MqttSender {
    /// Starts to connect and send on the current runtime.
    ///
    /// # Errors
    /// When the options are incomplete or a file cannot be read or opened. That nobody answers is
    /// no error; it tries again.
    pub fn start(options: SenderOptions) -> Result<Self> {
        let id = options.id()?;
        let tls = connector(&options.ca_file)?;
        let log = options.log.as_deref().map(SenderLog::open).transpose()?;
        let outbox = Outbox::new(&options, &id, log);
        let shown = Arc::new(Shown::default());
        let (no_more, end) = (CancellationToken::new(), CancellationToken::new());
        let run = run(
            options,
            tls,
            outbox,
            Arc::clone(&shown),
            no_more.clone(),
            end.clone(),
        );
        Ok(Self {
            id,
            shown,
            no_more,
            end,
            task: tokio::spawn(run),
        })
    }

    /// `device` or `device/module`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Messages acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shown.acknowledged.load(Ordering::Relaxed)
    }

    /// Messages sent and not acknowledged yet, also while there is no connection.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.shown.in_flight.load(Ordering::Relaxed)
    }

    /// How often it was connected (accepted by CONNACK) so far.
    #[must_use]
    pub fn connects(&self) -> u64 {
        self.shown.connects.load(Ordering::Relaxed)
    }

    /// Why the last connection ended or was not made.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.shown.last_error.lock().clone()
    }

    /// Whether it has sent its whole count, or failed.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// Begins no further message; [`Self::finish`] waits for those in flight.
    pub fn end_sending(&self) {
        self.no_more.cancel();
    }

    /// Begins no further message, waits until everything in flight is acknowledged (at most
    /// `patience`; then gives up what is in flight) and returns its log.
    ///
    /// # Errors
    /// When its log could not be written.
    ///
    /// # Cancel safety
    /// The sender is ended at once; its log in memory is lost.
    pub async fn finish(mut self, patience: Duration) -> Result<(String, Vec<Acknowledged>)> {
        self.end_sending();
        let id = self.id.clone();
        if let Ok(log) = tokio::time::timeout(patience, &mut self.task).await {
            return Ok((id, log??));
        }
        self.end.cancel();
        let log = (&mut self.task).await??;
        Ok((id, log))
    }

    /// Waits for a sender with a count to send all of it; [`Self::finish`] then returns its log.
    ///
    /// # Errors
    /// When it has not after `patience`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn wait_finished(&self, patience: Duration) -> Result<()> {
        let poll = async {
            while !self.is_finished() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(patience, poll).await.with_context(|| {
            let (acknowledged, error) = (self.acknowledged(), self.last_error());
            format!(
                "{}: {acknowledged} acknowledged after {patience:?}, {error:?}",
                self.id
            )
        })
    }
}

impl Drop for MqttSender {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// TLS that trusts one root.
///
/// # Errors
/// When the file is no PEM with a certificate.
pub fn connector(ca_file: &Path) -> Result<TlsConnector> {
    let shown = ca_file.display();
    let mut roots = rustls::RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(ca_file);
    for certificate in certificates.with_context(|| format!("cannot read {shown}"))? {
        roots.add(certificate?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn run(
    options: SenderOptions,
    tls: TlsConnector,
    mut outbox: Outbox,
    shown: Arc<Shown>,
    no_more: CancellationToken,
    end: CancellationToken,
) -> Result<Vec<Acknowledged>> {
    let rounds = async {
        while !outbox.is_done(no_more.is_cancelled()) {
            let connected = tokio::time::timeout(CONNECT_MAX, connect(&options, &tls)).await;
            let ended = match connected {
                Ok(Ok(stream)) => {
                    shown.connects.fetch_add(1, Ordering::Relaxed);
                    session::run(stream, &mut outbox, &shown, &no_more).await
                }
                Ok(Err(error)) => Err(error),
                Err(_) => Err(anyhow::anyhow!("no CONNACK for {CONNECT_MAX:?}")),
            };
            if let Some(error) = outbox.log_error() {
                return Err(error);
            }
            if let Err(error) = ended {
                *shown.last_error.lock() = Some(format!("{error:#}"));
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
        Ok(())
    };
    tokio::select! {
        done = rounds => done?,
        () = end.cancelled() => {}
    }
    Ok(outbox.into_acknowledged())
}

async fn connect(options: &SenderOptions, tls: &TlsConnector) -> Result<session::Stream> {
    let host = options.host();
    let tcp = TcpStream::connect((host, options.port)).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from(host.to_owned())?;
    let stream = tls.connect(name, tcp).await.context("TLS")?;
    let ConnectionString {
        host_name,
        device_id,
        module_id,
        shared_access_key,
        ..
    } = &options.connection_string;
    let device_id = device_id.as_deref().context("no DeviceId")?;
    let resource = sas::resource(host_name, device_id, module_id.as_deref());
    let token = sas::token(
        &resource,
        shared_access_key,
        sas::expires_in(TOKEN_LIFETIME),
        None,
    )?;
    let id = options.id()?;
    let user = format!("{host_name}/{id}/?api-version=2021-04-12&DeviceClientType=edgehub-lab");
    session::open(stream, &id, &user, &token).await
}

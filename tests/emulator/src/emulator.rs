//! Start and stop.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::clock::HubClock;
use crate::connections::Transport;
use crate::control::{self, Control};
use crate::hub::{Hub, Mode};
use crate::identity::Identity;
use crate::journal::Journal;
use crate::ledger::Ledger;
use crate::listener::Port;
use crate::registry::seed;
use crate::{amqp, https, mqtt, tls};

/// How long shutdown waits for tasks; all of them are cancelled, so this is not expected to pass.
const SHUTDOWN_MAX: Duration = Duration::from_secs(5);

/// What an emulator needs to start.
#[derive(Debug, Clone)]
pub struct Options {
    /// The hub's name: what clients connect to and what tokens are for.
    pub hostname: String,
    /// The address of all ports.
    pub address: IpAddr,
    /// Port of AMQP over TLS; 0 takes a free one.
    pub amqp_port: u16,
    /// Port of MQTT over TLS; 0 takes a free one.
    pub mqtt_port: u16,
    /// Port of HTTPS; 0 takes a free one.
    pub https_port: u16,
    /// Port of the plain HTTP control API; 0 takes a free one.
    pub control_port: u16,
    /// PEM file with the server certificate and what is between it and the root.
    pub certificate: PathBuf,
    /// PEM file with the certificate's private key.
    pub key: PathBuf,
    /// JSON file with policies and devices.
    pub seed: PathBuf,
    /// The ledger file, which a restarted emulator continues; a temporary one when none is given.
    /// Twins, sessions and C2D messages are beside it, in a file with `.state` after its name;
    /// without a ledger they end with the process.
    pub ledger: Option<PathBuf>,
    /// Whether everything undocumented is refused.
    pub strict: bool,
}

/// A running emulator. Its tasks live on the runtime that started it, until [`Self::shutdown`].
#[derive(Debug)]
pub struct Emulator {
    amqp: SocketAddr,
    mqtt: SocketAddr,
    https: SocketAddr,
    control: SocketAddr,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Emulator {
    /// Reads the files, opens the ports and serves them. When this returns, all accept.
    ///
    /// # Errors
    /// A file or a port is not usable; the error says which.
    ///
    /// # Cancel safety
    /// Dropped before it returns, it leaves no task behind.
    pub async fn start(options: Options) -> anyhow::Result<Self> {
        let hub = Arc::new(open_hub(&options)?);
        let tls = tls::acceptor(&options.certificate, &options.key)?;
        let bind = async |port| {
            let address = SocketAddr::new(options.address, port);
            let listener = TcpListener::bind(address).await;
            let listener = listener.with_context(|| format!("can not listen on {address}"))?;
            let address = listener.local_addr()?;
            anyhow::Ok((listener, address))
        };
        let (amqp_listener, amqp) = bind(options.amqp_port).await?;
        let (mqtt_listener, mqtt) = bind(options.mqtt_port).await?;
        let (https_listener, https) = bind(options.https_port).await?;
        let (control_listener, control) = bind(options.control_port).await?;

        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let port = |transport, address, gate| Port {
            hub: hub.clone(),
            transport,
            address,
            gate,
            tasks: tasks.clone(),
            shutdown: shutdown.clone(),
        };
        let amqp_port = port(Transport::Amqp, amqp, hub.amqp_port.clone());
        let (for_amqp, for_tls) = (hub.clone(), tls.clone());
        tasks.spawn(amqp_port.run(amqp_listener, move |socket, connection| {
            amqp::serve(for_amqp.clone(), for_tls.clone(), socket, connection)
        }));
        let mqtt_port = port(Transport::Mqtt, mqtt, hub.mqtt_port.clone());
        let (for_mqtt, for_tls) = (hub.clone(), tls.clone());
        tasks.spawn(mqtt_port.run(mqtt_listener, move |socket, connection| {
            mqtt::serve(for_mqtt.clone(), for_tls.clone(), socket, connection)
        }));
        let https_port = port(Transport::Https, https, hub.https_port.clone());
        let for_https = hub.clone();
        tasks.spawn(https_port.run(https_listener, move |socket, connection| {
            https::serve(for_https.clone(), tls.clone(), socket, connection)
        }));
        tasks.spawn(keep_c2d_time(hub.clone(), shutdown.clone()));
        tasks.spawn(serve_control(
            control_listener,
            Control {
                hub: hub.clone(),
                amqp,
                mqtt,
                https,
            },
            shutdown.clone(),
        ));
        let (name, strict) = (options.hostname, options.strict);
        info!(hub = name, strict, %amqp, %mqtt, %https, %control, ledger = hub.ledger.count(), "ready");
        Ok(Self {
            amqp,
            mqtt,
            https,
            control,
            tasks,
            shutdown,
        })
    }

    /// Where AMQP over TLS is served.
    pub fn amqp_address(&self) -> SocketAddr {
        self.amqp
    }

    /// Where MQTT over TLS is served.
    pub fn mqtt_address(&self) -> SocketAddr {
        self.mqtt
    }

    /// Where HTTPS is served.
    pub fn https_address(&self) -> SocketAddr {
        self.https
    }

    /// Where the control API is served.
    pub fn control_address(&self) -> SocketAddr {
        self.control
    }

    /// Closes everything and waits for it. The files need no closing: they are written already.
    ///
    /// # Cancel safety
    /// The closing goes on when this is dropped.
    pub async fn shutdown(self) {
        self.shutdown.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_MAX, self.tasks.wait())
            .await
            .is_err()
        {
            warn!("some connections did not close in time");
        }
        info!("stopped");
    }
}

fn open_hub(options: &Options) -> anyhow::Result<Hub> {
    let clock = HubClock::new();
    let seed = || -> anyhow::Result<_> {
        let text = std::fs::read_to_string(&options.seed)?;
        Ok(seed::read(&text, &options.hostname, clock.now_ms())?)
    };
    let seed = seed().with_context(|| format!("seed {}", options.seed.display()))?;
    let ledger = Ledger::open(options.ledger.as_deref()).context("ledger")?;
    let state = options.ledger.as_ref().map(|ledger| {
        let mut path = ledger.as_os_str().to_owned();
        path.push(".state");
        PathBuf::from(path)
    });
    let journal = Journal::open(state.as_deref()).context("state file")?;
    let mode = if options.strict {
        Mode::Strict
    } else {
        Mode::Lenient
    };
    Hub::new(options.hostname.clone(), mode, clock, seed, ledger, journal).context("state file")
}

/// Lets C2D messages and their locks run out, until shutdown.
async fn keep_c2d_time(hub: Arc<Hub>, shutdown: CancellationToken) {
    let wake = |device: &str| {
        hub.sessions.wake(&Identity {
            device: device.to_owned(),
            module: None,
        });
    };
    let keeping = hub.c2d.keep_time(&hub.clock, wake);
    shutdown.run_until_cancelled(keeping).await;
}

/// Serves the control API; at shutdown it drops its calls, also those that wait for something.
async fn serve_control(listener: TcpListener, control: Control, shutdown: CancellationToken) {
    let served = axum::serve(listener, control::router(control));
    tokio::select! {
        _ = served.into_future() => {}
        () = shutdown.cancelled() => {}
    }
}

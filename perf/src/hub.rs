//! Our hub under measurement: one edge in a lab, release build, reached without the lab's relay.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use edgehub_lab::mqtt_sender::connector;
use edgehub_lab::{AtStart, Binaries, Host, Lab, LabBuilder, Profile, StorageSync, sas};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

use crate::LoadOptions;
use crate::amqp::Account;
use crate::load::{Client, Server, Speech};
use crate::mqtt::Login;

/// The one edge of the lab.
const EDGE: &str = "edge1";

/// Longest start that is still measured.
const START_MAX: Duration = Duration::from_secs(60);

/// An idle hub is looked at this long after it became ready.
const IDLE: Duration = Duration::from_secs(3);

/// What a hub needs before any message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AtRest {
    /// From starting the process until the MQTT port takes connections, with an empty store.
    pub(crate) first_start: Duration,
    /// The same with the store of the first start.
    pub(crate) second_start: Duration,
    /// Resident memory some seconds after the start.
    pub(crate) idle_bytes: u64,
}

/// A lab with one hub.
pub(crate) struct Hub {
    lab: Lab,
}

impl Hub {
    /// Builds in release and starts the hub twice, to measure both starts.
    ///
    /// # Errors
    /// When something does not build or start.
    pub(crate) async fn start(sync: StorageSync, options: &LoadOptions) -> Result<(Self, AtRest)> {
        let binaries = Binaries::build(Profile::Release).await?;
        let lab = LabBuilder::new()
            .layers(1)
            .leaves(usize::from(options.connections), EDGE)
            .storage_sync(EDGE, sync)
            .at_start(EDGE, AtStart::Off)
            .log_level("warning")
            .binaries(binaries)
            .start()
            .await?;
        let hub = Self { lab };
        let first_start = hub.start_process().await?;
        hub.lab.stop(EDGE).await?;
        let second_start = hub.start_process().await?;
        if !options.forward {
            hub.lab.cut(EDGE, edgehub_lab::HUB).await?;
        }
        tokio::time::sleep(IDLE).await;
        let idle_bytes = hub.resident_bytes()?;
        Ok((
            hub,
            AtRest {
                first_start,
                second_start,
                idle_bytes,
            },
        ))
    }

    /// Where it listens, and how to trust it.
    pub(crate) fn server(&self) -> Result<Server> {
        let name = ServerName::try_from(self.host()?.hostname.clone())?;
        Ok(Server {
            address: self.address()?,
            amqp_address: (self.host()?.private_address, self.host()?.ports.amqps).into(),
            tls: Some((connector(self.lab.ca_file())?, name)),
            pid: self.lab.pid(EDGE)?,
        })
    }

    /// One leaf for each connection, over MQTT.
    pub(crate) fn clients(&self, count: u16) -> Result<Vec<Client>> {
        (1..=count)
            .map(|number| self.client(&format!("leaf{number}")))
            .collect()
    }

    /// The same over AMQP.
    pub(crate) fn amqp_clients(&self, count: u16) -> Result<Vec<Client>> {
        (1..=count)
            .map(|number| self.amqp_client(&format!("leaf{number}")))
            .collect()
    }

    pub(crate) fn host(&self) -> Result<&Host> {
        self.lab.host(EDGE)
    }

    pub(crate) fn resident_bytes(&self) -> Result<u64> {
        self.lab.resident_bytes(EDGE)
    }

    /// Messages that it says it has accepted since it was started last.
    pub(crate) async fn received(&self) -> Result<u64> {
        let sum = self
            .lab
            .metrics(EDGE)
            .await?
            .sum("edgehub_messages_received_total", &[]);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a counter: whole, not negative, far below 2^53"
        )]
        Ok(sum as u64)
    }

    /// Ends everything.
    pub(crate) async fn shutdown(self) -> Result<()> {
        self.lab.shutdown().await
    }

    fn client(&self, id: &str) -> Result<Client> {
        let (hub, password) = self.token(id)?;
        let user = format!("{hub}/{id}/?api-version=2021-04-12");
        Ok(Client {
            id: id.to_owned(),
            speech: Speech::Mqtt {
                login: Some(Login { user, password }),
                topic: format!("devices/{id}/messages/events/"),
            },
        })
    }

    fn amqp_client(&self, id: &str) -> Result<Client> {
        let (hub, password) = self.token(id)?;
        let hub = hub.split('.').next().unwrap_or_default();
        Ok(Client {
            id: id.to_owned(),
            speech: Speech::Amqp(Account {
                user: format!("{id}@sas.{hub}"),
                password,
                address: format!("/devices/{id}/messages/events"),
            }),
        })
    }

    /// The IoT Hub's name, and a token for it.
    fn token(&self, id: &str) -> Result<(String, String)> {
        let connection = self.lab.connection_string(id, Some(EDGE))?;
        let hub = connection.host_name;
        let resource = sas::resource(&hub, id, None);
        let expires = sas::expires_in(Duration::from_secs(24 * 3600));
        let token = sas::token(&resource, &connection.shared_access_key, expires, None)?;
        Ok((hub, token))
    }

    fn address(&self) -> Result<SocketAddr> {
        let host = self.host()?;
        Ok((host.private_address, host.ports.mqtts).into())
    }

    async fn start_process(&self) -> Result<Duration> {
        let address = self.address()?;
        let from = Instant::now();
        self.lab.spawn(EDGE).await?;
        while TcpStream::connect(address).await.is_err() {
            if let Some(status) = self.lab.ended(EDGE).await? {
                let log = self.lab.log(EDGE).unwrap_or_default();
                anyhow::bail!("the hub ended ({status}):\n{log}");
            }
            ensure!(from.elapsed() < START_MAX, "the hub does not listen");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let listening = from.elapsed();
        self.lab
            .wait_ready(EDGE)
            .await
            .context("it listens, but does not become ready")?;
        Ok(listening)
    }
}

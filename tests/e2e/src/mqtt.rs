//! A raw MQTT client: TLS, bytes out, packets in. Its codec is not the hub's.

use bytes::BytesMut;
use edgehub_lab::{HUB, Lab, mqtt_sender, sas};
use mqttbytes::v4::{Connect, Packet, PingReq, Publish, Subscribe, read};
use mqttbytes::{Error, QoS};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::PATIENCE;
use crate::token::Token;

/// CONNACK return codes of MQTT 3.1.1.
pub mod code {
    /// Accepted.
    pub const ACCEPTED: u8 = 0;
    /// The level of the protocol is not supported.
    pub const PROTOCOL_LEVEL: u8 = 1;
    /// The client id is not allowed.
    pub const CLIENT_ID: u8 = 2;
    /// It cannot be decided now.
    pub const UNAVAILABLE: u8 = 3;
    /// User name or password is malformed.
    pub const USER_NAME: u8 = 4;
    /// A definite no.
    pub const NOT_AUTHORIZED: u8 = 5;
}

/// What a client says in CONNECT; every part can be bent.
#[derive(Clone)]
pub struct Hello {
    /// Client id.
    pub client_id: String,
    /// User name; an empty one is left out.
    pub user_name: String,
    /// Password; an empty one is left out.
    pub password: String,
}

impl Hello {
    /// A registered device or module that speaks for itself.
    #[must_use]
    pub fn of(lab: &Lab, id: &str) -> Self {
        Self::claiming(lab, id).with(&Token::of(lab, id))
    }

    /// Anything that claims to be `id`, without a password yet.
    #[must_use]
    pub fn claiming(lab: &Lab, id: &str) -> Self {
        let hub = &lab.host(HUB).expect("a lab has a hub").hostname;
        Self {
            client_id: id.to_owned(),
            user_name: format!("{hub}/{id}/?api-version=2021-04-12&DeviceClientType=test"),
            password: String::new(),
        }
    }

    /// The `$edgeHub` of the chain's last device, which speaks for the chain's first element.
    #[must_use]
    pub fn on_behalf(lab: &Lab, chain: &str) -> Self {
        let actor = chain.rsplit(';').next().expect("a chain");
        Self::chained(lab, chain).with(&Token::of(lab, &format!("{actor}/$edgeHub")))
    }

    /// Anything that claims to act along `chain`, without a password yet.
    #[must_use]
    pub fn chained(lab: &Lab, chain: &str) -> Self {
        let target = chain.split(';').next().expect("a chain");
        let mut hello = Self::claiming(lab, target);
        hello.user_name.push_str("&auth-chain=");
        hello.user_name.push_str(&sas::encode(chain));
        hello
    }

    /// With this token.
    #[must_use]
    pub fn with(self, token: &Token) -> Self {
        Self {
            password: token.text(),
            ..self
        }
    }

    /// The CONNECT packet.
    #[must_use]
    pub fn packet(&self) -> Vec<u8> {
        let mut connect = Connect::new(&self.client_id);
        connect.keep_alive = 60;
        connect.clean_session = false;
        if !self.user_name.is_empty() {
            connect.set_login(&self.user_name, &self.password);
        }
        encoded(|bytes| connect.write(bytes))
    }
}

/// Where a host listens for MQTT over TLS.
#[derive(Clone)]
pub struct Door {
    host: String,
    port: u16,
    tls: TlsConnector,
}

impl Door {
    /// The public door of a host of the lab.
    #[must_use]
    pub fn of(lab: &Lab, host: &str) -> Self {
        let host = lab.host(host).expect("a host of the lab");
        Self {
            host: host.hostname.clone(),
            port: host.ports.mqtts,
            tls: mqtt_sender::connector(lab.ca_file()).expect("the lab's CA"),
        }
    }

    /// TCP and TLS, nothing said yet.
    pub async fn open(&self) -> MqttClient {
        let open = async {
            let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from(self.host.clone()).expect("a host name");
            self.tls.connect(name, tcp).await
        };
        let stream = timeout(PATIENCE, open)
            .await
            .expect("TLS within the patience");
        let stream = stream.unwrap_or_else(|error| panic!("TLS with {}: {error}", self.host));
        MqttClient {
            stream,
            input: BytesMut::new(),
        }
    }

    /// Says hello; the code of CONNACK, or `None` when the hub closed instead.
    pub async fn connect(&self, hello: &Hello) -> (MqttClient, Option<u8>) {
        let mut client = self.open().await;
        client.send(&hello.packet()).await;
        let code = client.connack().await;
        (client, code)
    }

    /// Says hello, which has to be accepted.
    pub async fn admitted(&self, hello: &Hello) -> MqttClient {
        let (client, code) = self.connect(hello).await;
        assert_eq!(code, Some(code::ACCEPTED), "{}", hello.user_name);
        client
    }

    /// Says hello, which has to be refused with a code and a close; returns the code.
    pub async fn refused(&self, hello: &Hello) -> u8 {
        let (client, code) = self.connect(hello).await;
        let code = code.unwrap_or_else(|| panic!("closed without CONNACK: {}", hello.user_name));
        if code != code::ACCEPTED {
            assert_eq!(
                client.until_close().await,
                [],
                "after the refusal: {}",
                hello.user_name
            );
        }
        code
    }
}

/// One connection.
#[derive(Debug)]
pub struct MqttClient {
    stream: TlsStream<TcpStream>,
    input: BytesMut,
}

impl MqttClient {
    /// Writes bytes, all in one write.
    pub async fn send(&mut self, bytes: &[u8]) {
        let sent = timeout(PATIENCE, async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        });
        sent.await
            .expect("the hub reads")
            .expect("the connection is open");
    }

    /// The next packet, or `None` when the hub has closed.
    pub async fn next(&mut self) -> Option<Packet> {
        let next = timeout(PATIENCE, self.receive());
        next.await
            .unwrap_or_else(|_| panic!("the hub neither speaks nor closes for {PATIENCE:?}"))
    }

    /// As [`Self::next`], for as long as it takes.
    ///
    /// # Cancel safety
    /// No byte is lost when it is dropped.
    pub async fn receive(&mut self) -> Option<Packet> {
        loop {
            match read(&mut self.input, usize::MAX) {
                Ok(packet) => return Some(packet),
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("the hub does not speak MQTT 3.1.1: {error}"),
            }
            // A reset is a close, too.
            if !matches!(self.stream.read_buf(&mut self.input).await, Ok(1..)) {
                return None;
            }
        }
    }

    /// A packet that has arrived already.
    pub fn received(&mut self) -> Option<Packet> {
        if self.input.is_empty() {
            return None;
        }
        match read(&mut self.input, usize::MAX) {
            Ok(packet) => Some(packet),
            Err(Error::InsufficientBytes(_)) => None,
            Err(error) => panic!("the hub does not speak MQTT 3.1.1: {error}"),
        }
    }

    /// The answer to CONNECT: its code, or `None` for a close.
    pub async fn connack(&mut self) -> Option<u8> {
        match self.next().await {
            Some(Packet::ConnAck(ack)) => Some(ack.code as u8),
            Some(other) => panic!("{other:?} instead of CONNACK"),
            None => None,
        }
    }

    /// Publishes at QoS 1 and waits for the acknowledgement.
    pub async fn publish(&mut self, topic: &str, body: impl AsRef<[u8]>, packet_id: u16) {
        self.send(&publish(topic, QoS::AtLeastOnce, packet_id, body.as_ref()))
            .await;
        self.expect_pubacks([packet_id]).await;
    }

    /// The next packets are acknowledgements, in this order.
    pub async fn expect_pubacks(&mut self, packet_ids: impl IntoIterator<Item = u16>) {
        for packet_id in packet_ids {
            match self.next().await {
                Some(Packet::PubAck(ack)) => assert_eq!(ack.pkid, packet_id, "PUBACK order"),
                other => panic!("{other:?} instead of PUBACK {packet_id}"),
            }
        }
    }

    /// What the hub still says before it closes.
    pub async fn until_close(mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some(packet) = self.next().await {
            packets.push(packet);
        }
        packets
    }

    /// Sends bytes, upon which the hub has to close without a word.
    pub async fn expect_close_after(mut self, bytes: &[u8]) {
        self.send(bytes).await;
        assert_eq!(self.until_close().await, [], "before the close");
    }
}

/// The bytes of a PUBLISH; the packet id does not matter at QoS 0.
#[must_use]
pub fn publish(topic: &str, qos: QoS, packet_id: u16, body: &[u8]) -> Vec<u8> {
    let mut publish = Publish::new(topic, qos, body);
    publish.pkid = packet_id;
    encoded(|bytes| publish.write(bytes))
}

/// The bytes of a SUBSCRIBE with one filter.
#[must_use]
pub fn subscribe(packet_id: u16, filter: &str) -> Vec<u8> {
    let mut subscribe = Subscribe::new(filter, QoS::AtLeastOnce);
    subscribe.pkid = packet_id;
    encoded(|bytes| subscribe.write(bytes))
}

/// The bytes of a PINGREQ.
#[must_use]
pub fn ping() -> Vec<u8> {
    encoded(|bytes| PingReq.write(bytes))
}

/// The telemetry topic of `device` or `device/module`, up to its property bag.
#[must_use]
pub fn telemetry(id: &str) -> String {
    match id.split_once('/') {
        Some((device, module)) => format!("devices/{device}/modules/{module}/messages/events/"),
        None => format!("devices/{id}/messages/events/"),
    }
}

fn encoded(write: impl FnOnce(&mut BytesMut) -> Result<usize, Error>) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    write(&mut bytes).expect("a packet that can be encoded");
    bytes.to_vec()
}

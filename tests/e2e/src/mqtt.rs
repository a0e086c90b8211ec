//! A raw MQTT client: TLS, bytes out, packets in. Its codec is not the hub's.

use std::net::{IpAddr, SocketAddr};

use bytes::BytesMut;
use edgehub_lab::{HUB, Lab, mqtt_sender, sas};
use mqttbytes::v4::{
    ConnAck, Connect, Disconnect, LastWill, Packet, Publish, SubscribeReasonCode, read,
};
use mqttbytes::{Error, QoS};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::PATIENCE;
use crate::packets::encoded;
pub use crate::packets::{
    field, frame, ping, puback, publish, subscribe, subscribe_all, telemetry, unsubscribe,
};
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
    /// Keep-alive in seconds; 60 unless a test says otherwise.
    pub keep_alive_secs: u16,
    /// Clean session; off unless a test says otherwise.
    pub clean_session: bool,
    /// Last will.
    pub will: Option<LastWill>,
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
            keep_alive_secs: 60,
            clean_session: false,
            will: None,
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

    /// With this keep-alive.
    #[must_use]
    pub fn keep_alive(self, seconds: u16) -> Self {
        Self {
            keep_alive_secs: seconds,
            ..self
        }
    }

    /// With clean session.
    #[must_use]
    pub fn clean(self) -> Self {
        Self {
            clean_session: true,
            ..self
        }
    }

    /// With a last will of QoS 1.
    #[must_use]
    pub fn will(self, topic: &str, body: &str, retain: bool) -> Self {
        Self {
            will: Some(LastWill::new(topic, body, QoS::AtLeastOnce, retain)),
            ..self
        }
    }

    /// The CONNECT packet.
    #[must_use]
    pub fn packet(&self) -> Vec<u8> {
        let mut connect = Connect::new(&self.client_id);
        connect.keep_alive = self.keep_alive_secs;
        connect.clean_session = self.clean_session;
        connect.last_will = self.will.clone();
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
    source: Option<IpAddr>,
    receive_buffer_bytes: Option<u32>,
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
            source: None,
            receive_buffer_bytes: None,
        }
    }

    /// The host's own address: past the relay, which would spend the test's own descriptors and
    /// memory on a flood.
    #[must_use]
    pub fn direct(lab: &Lab, host: &str) -> Self {
        Self {
            host: lab
                .host(host)
                .expect("a host of the lab")
                .private_address
                .to_string(),
            ..Self::of(lab, host)
        }
    }

    /// For connections that come from this address (of a [`Self::direct`] door).
    #[must_use]
    pub fn from(self, source: IpAddr) -> Self {
        Self {
            source: Some(source),
            ..self
        }
    }

    /// For connections with a small window (of a [`Self::direct`] door): who does not read is
    /// noticed sooner.
    #[must_use]
    pub fn receive_buffer(self, bytes: u32) -> Self {
        Self {
            receive_buffer_bytes: Some(bytes),
            ..self
        }
    }

    /// With other TLS: a client certificate, one version.
    #[must_use]
    pub fn tls(self, tls: TlsConnector) -> Self {
        Self { tls, ..self }
    }

    /// TCP alone.
    ///
    /// # Errors
    /// When nobody accepts.
    pub async fn tcp(&self) -> std::io::Result<TcpStream> {
        let tcp = match self.host.parse() {
            Err(_) => TcpStream::connect((self.host.as_str(), self.port)).await?,
            Ok(address) => {
                let socket = TcpSocket::new_v4()?;
                if let Some(source) = self.source {
                    socket.bind(SocketAddr::new(source, 0))?;
                }
                if let Some(bytes) = self.receive_buffer_bytes {
                    socket.set_recv_buffer_size(bytes)?;
                }
                socket.connect(SocketAddr::new(address, self.port)).await?
            }
        };
        tcp.set_nodelay(true)?;
        Ok(tcp)
    }

    /// TCP and TLS, nothing said yet.
    pub async fn open(&self) -> MqttClient {
        self.try_open()
            .await
            .unwrap_or_else(|error| panic!("TLS with {}: {error}", self.host))
    }

    /// As [`Self::open`], for what the hub may refuse.
    ///
    /// # Errors
    /// When TCP or TLS fails.
    pub async fn try_open(&self) -> std::io::Result<MqttClient> {
        let open = async {
            let tcp = self.tcp().await?;
            let name = ServerName::try_from(self.host.clone()).expect("a host name");
            self.tls.connect(name, tcp).await
        };
        let stream = timeout(PATIENCE, open)
            .await
            .expect("TLS within the patience")?;
        Ok(MqttClient {
            stream,
            input: BytesMut::new(),
        })
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

    /// As [`Self::admitted`]; also whether the hub knew the session.
    pub async fn resumed(&self, hello: &Hello) -> (MqttClient, bool) {
        let mut client = self.open().await;
        client.send(&hello.packet()).await;
        let ack = client.connack_packet().await.expect("CONNACK, not a close");
        assert_eq!(ack.code as u8, code::ACCEPTED, "{}", hello.user_name);
        (client, ack.session_present)
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

    /// As [`Self::send`], for what the hub may have closed.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let sent = timeout(PATIENCE, async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        });
        sent.await.expect("the hub reads")
    }

    /// Writes these bytes again and again and reads nothing; how often they were taken as a whole
    /// until then. A write may be left half done.
    pub async fn flood(&mut self, bytes: &[u8], until: Instant) -> u64 {
        let mut times = 0;
        while let Ok(Ok(())) = timeout_at(until, self.stream.write_all(bytes)).await {
            times += 1;
        }
        times
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
        self.connack_packet().await.map(|ack| ack.code as u8)
    }

    /// The answer to CONNECT, or `None` for a close.
    pub async fn connack_packet(&mut self) -> Option<ConnAck> {
        match self.next().await {
            Some(Packet::ConnAck(ack)) => Some(ack),
            Some(other) => panic!("{other:?} instead of CONNACK"),
            None => None,
        }
    }

    /// Subscribes and returns the codes of SUBACK, which is the next packet.
    pub async fn subscribe(&mut self, packet_id: u16, filters: &[(&str, u8)]) -> Vec<u8> {
        self.send(&subscribe_all(packet_id, filters)).await;
        self.expect_suback(packet_id).await
    }

    /// The next packet is this SUBACK; its codes.
    pub async fn expect_suback(&mut self, packet_id: u16) -> Vec<u8> {
        match self.next().await {
            Some(Packet::SubAck(ack)) => {
                assert_eq!(ack.pkid, packet_id, "SUBACK");
                let code = |code: &SubscribeReasonCode| match code {
                    SubscribeReasonCode::Success(qos) => *qos as u8,
                    SubscribeReasonCode::Failure => 0x80,
                };
                ack.return_codes.iter().map(code).collect()
            }
            other => panic!("{other:?} instead of SUBACK {packet_id}"),
        }
    }

    /// Unsubscribes; UNSUBACK is the next packet.
    pub async fn unsubscribe(&mut self, packet_id: u16, filters: &[&str]) {
        self.send(&unsubscribe(packet_id, filters)).await;
        match self.next().await {
            Some(Packet::UnsubAck(ack)) => assert_eq!(ack.pkid, packet_id, "UNSUBACK"),
            other => panic!("{other:?} instead of UNSUBACK {packet_id}"),
        }
    }

    /// The next packet is a PUBLISH.
    pub async fn expect_publish(&mut self) -> Publish {
        match self.next().await {
            Some(Packet::Publish(publish)) => publish,
            other => panic!("{other:?} instead of PUBLISH"),
        }
    }

    /// Sends PINGREQ; PINGRESP is the next packet, so nothing else has been on its way.
    pub async fn ping(&mut self) {
        self.send(&ping()).await;
        match self.next().await {
            Some(Packet::PingResp) => {}
            other => panic!("{other:?} instead of PINGRESP"),
        }
    }

    /// Says DISCONNECT and waits for the close, before which nothing comes.
    pub async fn disconnect(self) {
        self.expect_close_after(&encoded(|bytes| Disconnect.write(bytes)))
            .await;
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

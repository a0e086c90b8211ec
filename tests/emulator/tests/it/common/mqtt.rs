//! A raw MQTT client: bytes on a TLS socket, packets by `mqttbytes`.

use std::net::SocketAddr;

use bytes::BytesMut;
use mqttbytes::v4::{
    Connect, ConnectReturnCode, LastWill, Packet, PubAck, Publish, Subscribe, SubscribeFilter,
    SubscribeReasonCode, Unsubscribe, read,
};
use mqttbytes::{Error, QoS};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::token::Token;
use super::{Bed, Files, HOST, PATIENCE};

/// What a client says in its CONNECT; every part can be bent.
#[derive(Debug, Clone)]
pub(crate) struct Hello {
    pub(crate) client_id: String,
    pub(crate) user_name: String,
    pub(crate) token: Token,
    pub(crate) keep_alive: u16,
    pub(crate) clean: bool,
    pub(crate) will: Option<LastWill>,
}

impl Hello {
    /// A device or module that speaks for itself.
    pub(crate) fn of(identity: &str) -> Self {
        Self {
            client_id: identity.to_owned(),
            user_name: format!("{HOST}/{identity}/?api-version=2020-09-30&DeviceClientType=test"),
            token: Token::of(identity),
            keep_alive: 60,
            clean: true,
            will: None,
        }
    }

    /// An edge device that speaks for the first element of the chain.
    pub(crate) fn through(chain: &str) -> Self {
        let target = chain.split(';').next().unwrap();
        let actor = chain.rsplit(';').next().unwrap();
        let mut hello = Self::of(target);
        hello.user_name.push_str("&auth-chain=");
        hello
            .user_name
            .push_str(&chain.replace(';', "%3B").replace('/', "%2F"));
        hello.token = Token::of_hub(actor);
        hello
    }

    /// With clean session 0, as the SDKs connect.
    pub(crate) fn persistent(identity: &str) -> Self {
        Self {
            clean: false,
            ..Self::of(identity)
        }
    }

    pub(crate) fn with_token(self, token: Token) -> Self {
        Self { token, ..self }
    }

    pub(crate) fn packet(&self) -> Vec<u8> {
        let mut connect = Connect::new(&self.client_id);
        connect.keep_alive = self.keep_alive;
        connect.clean_session = self.clean;
        connect.last_will.clone_from(&self.will);
        connect.set_login(self.user_name.clone(), self.token.text());
        let mut bytes = BytesMut::new();
        connect.write(&mut bytes).unwrap();
        bytes.to_vec()
    }
}

/// TLS, or a WebSocket in it.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A connected socket.
pub(crate) struct Client {
    stream: Box<dyn Stream>,
    input: BytesMut,
    /// What the CONNACK said.
    pub(crate) session_present: bool,
}

impl Client {
    /// TLS only.
    pub(crate) async fn open(files: &Files, address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.unwrap();
        let connector = TlsConnector::from(files.tls.clone());
        let name = ServerName::try_from(HOST).unwrap();
        let stream = timeout(PATIENCE, connector.connect(name, socket))
            .await
            .unwrap()
            .unwrap();
        Self::over(stream)
    }

    /// What carries MQTT is there already.
    pub(crate) fn over(stream: impl Stream + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            input: BytesMut::new(),
            session_present: false,
        }
    }

    /// TLS and CONNECT; whatever the answer is.
    pub(crate) async fn connect(bed: &Bed, hello: &Hello) -> (Self, ConnectReturnCode) {
        Self::connect_at(&bed.files, bed.mqtt(), hello).await
    }

    pub(crate) async fn connect_at(
        files: &Files,
        address: SocketAddr,
        hello: &Hello,
    ) -> (Self, ConnectReturnCode) {
        Self::open(files, address).await.hello(hello).await
    }

    /// CONNECT; whatever the answer is.
    pub(crate) async fn hello(mut self, hello: &Hello) -> (Self, ConnectReturnCode) {
        self.send(&hello.packet()).await;
        match self.next().await {
            Some(Packet::ConnAck(ack)) => {
                self.session_present = ack.session_present;
                (self, ack.code)
            }
            other => panic!("no CONNACK but {other:?}"),
        }
    }

    /// TLS and CONNECT, which has to succeed.
    pub(crate) async fn admitted(bed: &Bed, hello: &Hello) -> Self {
        let (client, code) = Self::connect(bed, hello).await;
        assert_eq!(code, ConnectReturnCode::Success, "{}", hello.user_name);
        client
    }

    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// The next packet, or none when the hub has closed.
    pub(crate) async fn next(&mut self) -> Option<Packet> {
        loop {
            match read(&mut self.input, usize::MAX) {
                Ok(packet) => return Some(packet),
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("{error}"),
            }
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.input)).await;
            if !matches!(read.expect("the hub neither answers nor closes"), Ok(1..)) {
                return None;
            }
        }
    }

    /// Publishes at QoS 1 and waits for the acknowledgement.
    pub(crate) async fn publish(&mut self, topic: &str, body: &[u8], packet_id: u16) {
        self.send(&publish(topic, QoS::AtLeastOnce, packet_id, body))
            .await;
        match self.next().await {
            Some(Packet::PubAck(ack)) => assert_eq!(ack.pkid, packet_id),
            other => panic!("no PUBACK but {other:?}"),
        }
    }

    /// The next packet, which has to be a PUBLISH.
    pub(crate) async fn delivery(&mut self) -> Publish {
        match self.next().await {
            Some(Packet::Publish(publish)) => publish,
            other => panic!("no PUBLISH but {other:?}"),
        }
    }

    /// Subscribes, one SUBSCRIBE for all; returns what was granted.
    pub(crate) async fn subscribe(
        &mut self,
        filters: &[&str],
        qos: QoS,
    ) -> Vec<SubscribeReasonCode> {
        let filters = filters
            .iter()
            .map(|path| SubscribeFilter::new((*path).to_owned(), qos));
        let mut subscribe = Subscribe::new_many(filters);
        subscribe.pkid = 7;
        let mut bytes = BytesMut::new();
        subscribe.write(&mut bytes).unwrap();
        self.send(&bytes).await;
        match self.next().await {
            Some(Packet::SubAck(ack)) if ack.pkid == 7 => ack.return_codes,
            other => panic!("no SUBACK but {other:?}"),
        }
    }

    pub(crate) async fn unsubscribe(&mut self, filter: &str) {
        let mut unsubscribe = Unsubscribe::new(filter);
        unsubscribe.pkid = 9;
        let mut bytes = BytesMut::new();
        unsubscribe.write(&mut bytes).unwrap();
        self.send(&bytes).await;
        match self.next().await {
            Some(Packet::UnsubAck(ack)) => assert_eq!(ack.pkid, 9),
            other => panic!("no UNSUBACK but {other:?}"),
        }
    }

    pub(crate) async fn acknowledge(&mut self, packet_id: u16) {
        let mut bytes = BytesMut::new();
        PubAck::new(packet_id).write(&mut bytes).unwrap();
        self.send(&bytes).await;
    }

    /// A PINGREQ and its answer: whatever the hub had sent before would come first.
    pub(crate) async fn expect_nothing(&mut self) {
        self.send(&[0xc0, 0]).await;
        assert_eq!(self.next().await, Some(Packet::PingResp));
    }

    /// Whether nothing is there to be read.
    pub(crate) fn is_silent(&mut self) -> bool {
        let mut reading = std::pin::pin!(self.stream.read_buf(&mut self.input));
        let mut task = std::task::Context::from_waker(std::task::Waker::noop());
        reading.as_mut().poll(&mut task).is_pending()
    }

    /// DISCONNECT, and the end of the socket.
    pub(crate) async fn disconnect(self) {
        self.expect_close_after(&[0xe0, 0]).await;
    }

    /// Sends bytes and expects the hub to close without another packet.
    pub(crate) async fn expect_close_after(mut self, bytes: &[u8]) {
        self.send(bytes).await;
        assert_eq!(self.next().await, None);
    }
}

pub(crate) fn publish(topic: &str, qos: QoS, packet_id: u16, body: &[u8]) -> Vec<u8> {
    let mut publish = Publish::new(topic, qos, body);
    publish.pkid = packet_id;
    let mut bytes = BytesMut::new();
    publish.write(&mut bytes).unwrap();
    bytes.to_vec()
}

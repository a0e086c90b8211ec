//! A parent hub for tests: MQTT and HTTPS over TLS with its own CA, on a loopback address of its own,
//! so that tests do not take each other's ports. Just enough to be connected to.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
    sync::atomic::{AtomicU8, Ordering},
};

use bytes::Bytes;
use edgehub_auth::tls::{self, TlsVersions};
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use ntex_bytes::{BytePages, BytesMut as CodecBuffer};
use ntex_codec::{Decoder, Encoder};
use ntex_mqtt::v3::codec::{
    Codec, ConnectAck, ConnectAckReason, Decoded, Encoded, Packet, Publish as PublishPacket, QoS,
    SubscribeReturnCode,
};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, rustls::ClientConfig, rustls::ServerConfig, server::TlsStream};

/// A publish as it came: client, topic, body.
pub(crate) type Publish = (String, String, String);

#[derive(Debug)]
pub(crate) struct Connected {
    pub(crate) client_id: String,
    pub(crate) user_name: String,
    pub(crate) password: String,
    pub(crate) peer: IpAddr,
}

#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) connects: Vec<Connected>,
    pub(crate) publishes: Vec<Publish>,
    /// Path, authorization, body.
    pub(crate) requests: Vec<(String, String, String)>,
    /// TLS connections to the HTTPS port.
    pub(crate) https_connections: usize,
    /// So many of the first of those answer nothing any more.
    pub(crate) https_silent: usize,
    /// Status and body for every HTTPS request.
    pub(crate) answer: (u16, String),
    /// Accept connections and say nothing.
    pub(crate) is_black_hole: bool,
    /// CONNACK code for these clients.
    pub(crate) refused: Vec<(String, u8)>,
    /// Client and filters of each SUBSCRIBE.
    pub(crate) subscribes: Vec<(String, Vec<String>)>,
    /// What clients are subscribed to. Lives longer than their connections, as sessions do.
    pub(crate) subscriptions: HashSet<(String, String)>,
    /// Cloud-to-device messages that were not acknowledged.
    pub(crate) messages: Vec<DeviceBound>,
    /// Ways to living connections.
    live: HashMap<String, mpsc::Sender<Vec<u8>>>,
}

#[derive(Clone, Debug)]
pub(crate) struct DeviceBound {
    pub(crate) client: String,
    pub(crate) packet_id: u16,
    pub(crate) payload: String,
    was_sent: bool,
}

/// The twin of everybody.
pub(crate) const TWIN: &str = r#"{"desired":{"$version":1},"reported":{"$version":1}}"#;

/// An address, certificates for it, and what was seen. Lives longer than its listeners.
#[derive(Clone)]
pub(crate) struct FakeParent {
    server_tls: Arc<ServerConfig>,
    pub(crate) client_tls: Arc<ClientConfig>,
    pub(crate) address: IpAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
}

impl FakeParent {
    pub(crate) fn new() -> Self {
        Self::at(own_address())
    }

    /// With another CA at an address that is taken already.
    pub(crate) fn at(address: IpAddr) -> Self {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "test root");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![address.to_string()]).unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap().pem();
        let server_tls = tls::server_config(
            certificate.as_bytes(),
            key.serialize_pem().as_bytes(),
            false,
            TlsVersions::All,
        );
        let answer = (
            200,
            r#"{"devices":[],"modules":[],"continuationLink":null}"#.to_owned(),
        );
        Self {
            server_tls: server_tls.unwrap(),
            client_tls: tls::client_config(root_pem.as_bytes()).unwrap(),
            address,
            seen: Arc::new(Mutex::new(Seen {
                answer,
                ..Seen::default()
            })),
        }
    }

    /// Serves MQTT until the returned guard is stopped or dropped, which also breaks every
    /// connection.
    pub(crate) async fn serve_mqtt(&self, port: u16) -> Serving {
        let listener = self.listen(port).await;
        let this = self.clone();
        Serving::start(listener, move |stream, peer| {
            let this = this.clone();
            async move {
                if this.seen.lock().is_black_hole {
                    std::future::pending::<()>().await;
                }
                let acceptor = TlsAcceptor::from(Arc::clone(&this.server_tls));
                if let Ok(stream) = acceptor.accept(stream).await {
                    let _ = this.mqtt(stream, peer).await;
                }
            }
        })
    }

    pub(crate) async fn serve_https(&self, port: u16) -> Serving {
        let listener = self.listen(port).await;
        let this = self.clone();
        Serving::start(listener, move |stream, _| {
            let this = this.clone();
            async move {
                let acceptor = TlsAcceptor::from(Arc::clone(&this.server_tls));
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let number = {
                    let mut seen = this.seen.lock();
                    seen.https_connections += 1;
                    seen.https_connections
                };
                let service = service_fn(move |request| {
                    let this = this.clone();
                    async move {
                        if number <= this.seen.lock().https_silent {
                            std::future::pending::<()>().await;
                        }
                        Ok::<_, Infallible>(this.answer(request).await)
                    }
                });
                let _ = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            }
        })
    }

    /// Serves whatever `serve` does with a TLS connection.
    pub(crate) async fn serve_tls<F>(
        &self,
        port: u16,
        serve: impl Fn(TlsStream<TcpStream>) -> F + Clone + Send + Sync + 'static,
    ) -> Serving
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = self.listen(port).await;
        let server_tls = Arc::clone(&self.server_tls);
        Serving::start(listener, move |stream, _| {
            let (acceptor, serve) = (TlsAcceptor::from(Arc::clone(&server_tls)), serve.clone());
            async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream).await;
                }
            }
        })
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().to_string();
        let authorization = request.headers()["authorization"]
            .to_str()
            .unwrap()
            .to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        let mut seen = self.seen.lock();
        seen.requests.push((path, authorization, body));
        let (status, body) = seen.answer.clone();
        Response::builder()
            .status(status)
            .body(Full::new(Bytes::from(body)))
            .unwrap()
    }

    async fn mqtt(
        &self,
        mut stream: TlsStream<TcpStream>,
        peer: SocketAddr,
    ) -> std::io::Result<()> {
        let codec = Codec::new();
        let mut buffer = CodecBuffer::new();
        let mut client = String::new();
        let mut topic = None;
        let (sender, mut outbound) = mpsc::channel::<Vec<u8>>(256);
        loop {
            let mut chunk = [0; 4096];
            let length = tokio::select! {
                length = stream.read(&mut chunk) => length?,
                Some(bytes) = outbound.recv() => {
                    stream.write_all(&bytes).await?;
                    stream.flush().await?;
                    continue;
                }
            };
            if length == 0 {
                return Ok(());
            }
            buffer.extend_from_slice(&chunk[..length]);
            let mut replies = Vec::new();
            let mut bodies = Vec::new();
            while let Some(packet) = codec.decode(&mut buffer).unwrap() {
                match packet {
                    Decoded::Packet(Packet::Connect(connect), _) => {
                        client = connect.client_id.to_string();
                        let refusal = self.connected(&connect, peer.ip());
                        let return_code = ConnectAckReason::try_from(refusal).unwrap();
                        replies.push(
                            ConnectAck {
                                return_code,
                                session_present: false,
                            }
                            .into_packet(),
                        );
                        let mut seen = self.seen.lock();
                        seen.live.insert(client.clone(), sender.clone());
                        for message in &mut seen.messages {
                            if message.client == client {
                                // Delivered again with the subscription that the session kept.
                                let _ = sender.try_send(message.packet());
                            }
                        }
                    }
                    Decoded::Packet(Packet::PingRequest, _) => replies.push(Packet::PingResponse),
                    Decoded::Packet(Packet::Disconnect, _) => return Ok(()),
                    Decoded::Packet(Packet::PublishAck { packet_id }, _) => {
                        let is_it = |message: &DeviceBound| {
                            message.client == client && message.packet_id == packet_id.get()
                        };
                        self.seen.lock().messages.retain(|message| !is_it(message));
                    }
                    Decoded::Packet(
                        Packet::Subscribe {
                            packet_id,
                            topic_filters,
                        },
                        _,
                    ) => {
                        let filters = topic_filters.iter().map(|(filter, _)| filter.to_string());
                        let filters: Vec<String> = filters.collect();
                        let mut seen = self.seen.lock();
                        let held = filters
                            .iter()
                            .cloned()
                            .map(|filter| (client.clone(), filter));
                        seen.subscriptions.extend(held);
                        seen.subscribes.push((client.clone(), filters));
                        let codes = topic_filters.into_iter().map(|(_, qos)| qos);
                        replies.push(Packet::SubscribeAck {
                            packet_id,
                            status: codes.map(SubscribeReturnCode::Success).collect(),
                        });
                    }
                    Decoded::Packet(
                        Packet::Unsubscribe {
                            packet_id,
                            topic_filters,
                        },
                        _,
                    ) => {
                        for filter in topic_filters {
                            let held = (client.clone(), filter.to_string());
                            self.seen.lock().subscriptions.remove(&held);
                        }
                        replies.push(Packet::UnsubscribeAck { packet_id });
                    }
                    Decoded::Packet(other, _) => panic!("{other:?}"),
                    Decoded::Publish(publish, body, _) => {
                        if let Some(packet_id) = publish.packet_id {
                            replies.push(Packet::PublishAck { packet_id });
                        }
                        topic = Some((publish.topic.to_string(), body.to_vec()));
                        if body.len() == publish.payload_size as usize {
                            bodies.extend(topic.take());
                        }
                    }
                    Decoded::PayloadChunk(chunk, is_last) => {
                        topic.as_mut().unwrap().1.extend_from_slice(&chunk);
                        if is_last {
                            bodies.extend(topic.take());
                        }
                    }
                }
            }
            stream.write_all(&encode(replies)).await?;
            for (topic, _) in &bodies {
                if let Some(answer) = twin_answer(topic) {
                    stream.write_all(&answer).await?;
                }
            }
            let publishes = bodies
                .into_iter()
                .map(|(topic, body)| (client.clone(), topic, String::from_utf8(body).unwrap()));
            self.seen.lock().publishes.extend(publishes);
            stream.flush().await?;
        }
    }

    /// Publishes to a connected client at QoS 0.
    pub(crate) fn publish(&self, client: &str, topic: &str, payload: &str) {
        let seen = self.seen.lock();
        let packet = publish_packet(None, topic, payload, false);
        seen.live[client].try_send(packet).unwrap();
    }

    /// Keeps a cloud-to-device message for a client until it is acknowledged; sends it now if it is
    /// connected, and each time it connects.
    pub(crate) fn send_to_device(&self, client: &str, packet_id: u16, payload: &str) {
        let mut message = DeviceBound {
            client: client.to_owned(),
            packet_id,
            payload: payload.to_owned(),
            was_sent: false,
        };
        let mut seen = self.seen.lock();
        if let Some(live) = seen.live.get(client) {
            live.try_send(message.packet()).unwrap();
        }
        seen.messages.push(message);
    }

    fn connected(&self, connect: &ntex_mqtt::v3::codec::Connect, peer: IpAddr) -> u8 {
        let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap().to_vec()).unwrap();
        let client_id = connect.client_id.to_string();
        let mut seen = self.seen.lock();
        let code = seen
            .refused
            .iter()
            .find(|(id, _)| *id == client_id)
            .map_or(0, |(_, code)| *code);
        seen.connects.push(Connected {
            client_id,
            user_name: text(
                connect
                    .username
                    .as_ref()
                    .map(|name| name.as_bytes().as_ref()),
            ),
            password: text(connect.password.as_deref()),
            peer,
        });
        code
    }
}

impl DeviceBound {
    fn packet(&mut self) -> Vec<u8> {
        let topic = format!("devices/{}/messages/devicebound/%24.mid=m", self.client);
        let dup = std::mem::replace(&mut self.was_sent, true);
        publish_packet(Some(self.packet_id), &topic, &self.payload, dup)
    }
}

/// The answer to a twin request.
fn twin_answer(topic: &str) -> Option<Vec<u8>> {
    if let Some(id) = topic.strip_prefix("$iothub/twin/GET/?$rid=") {
        let topic = format!("$iothub/twin/res/200/?$rid={id}");
        return Some(publish_packet(None, &topic, TWIN, false));
    }
    let id = topic.strip_prefix("$iothub/twin/PATCH/properties/reported/?$rid=")?;
    let topic = format!("$iothub/twin/res/204/?$rid={id}&$version=2");
    Some(publish_packet(None, &topic, "", false))
}

fn publish_packet(packet_id: Option<u16>, topic: &str, payload: &str, dup: bool) -> Vec<u8> {
    let publish = PublishPacket {
        dup,
        retain: false,
        qos: packet_id.map_or(QoS::AtMostOnce, |_| QoS::AtLeastOnce),
        topic: topic.into(),
        packet_id: packet_id.and_then(NonZeroU16::new),
        payload_size: u32::try_from(payload.len()).unwrap(),
    };
    let mut pages = BytePages::default();
    let payload = ntex_bytes::Bytes::copy_from_slice(payload.as_bytes());
    Codec::new()
        .encodev(Encoded::Publish(publish, Some(payload)), &mut pages)
        .unwrap();
    pages.freeze().to_vec()
}

fn encode(packets: Vec<Packet>) -> Vec<u8> {
    let mut pages = BytePages::default();
    for packet in packets {
        Codec::new()
            .encodev(Encoded::Packet(packet), &mut pages)
            .unwrap();
    }
    pages.freeze().to_vec()
}

trait IntoPacket {
    fn into_packet(self) -> Packet;
}

impl IntoPacket for ConnectAck {
    fn into_packet(self) -> Packet {
        Packet::ConnectAck(self)
    }
}

/// A listener and its connections; all end when this is dropped.
pub(crate) struct Serving(tokio::task::JoinHandle<()>);

impl Serving {
    fn start<F>(
        listener: TcpListener,
        serve: impl Fn(TcpStream, SocketAddr) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        Self(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, peer)) = listener.accept().await {
                connections.spawn(serve(stream, peer));
            }
        }))
    }
}

impl Serving {
    /// Ends the listener and breaks all connections; the port is free when this returns.
    pub(crate) async fn stop(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A loopback address that no other test of this or another process uses.
fn own_address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [low, high, ..] = std::process::id().to_le_bytes();
    IpAddr::from([
        127,
        64 + high % 64,
        low,
        NEXT.fetch_add(1, Ordering::Relaxed),
    ])
}

impl FakeParent {
    /// A port on which nothing listens now.
    pub(crate) async fn free_port(&self) -> u16 {
        self.listen(0).await.local_addr().unwrap().port()
    }

    async fn listen(&self, port: u16) -> TcpListener {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(SocketAddr::new(self.address, port)).unwrap();
        socket.listen(100).unwrap()
    }
}

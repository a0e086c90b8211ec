//! An AMQP client: the crate `fe2o3-amqp`, which shares no code with the emulator's engine.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::SocketAddr;

use fe2o3_amqp::connection::{ConnectionHandle, OpenError};
use fe2o3_amqp::link::delivery::DeliveryInfo;
use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::link::{
    DetachError, LinkStateError, ReceiverAttachError, RecvError, SendError, SenderAttachError,
};
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::session::SessionHandle;
use fe2o3_amqp::types::definitions::{self, ErrorCondition, Fields};
use fe2o3_amqp::types::messaging::message::__private::Serializable;
use fe2o3_amqp::types::messaging::{
    AmqpValue, ApplicationProperties, Body, Data, Message, MessageAnnotations, MessageId, Outcome,
    Properties, Source,
};
use fe2o3_amqp::types::primitives::{SimpleValue, Symbol, Value};
use fe2o3_amqp::{Connection, Receiver, Sendable, Sender, Session};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::token::Token;
use super::{Bed, Files, HOST, PATIENCE};

/// A message with any body.
pub(crate) type Whole = Message<Body<Value>>;

const BATCH_FORMAT: u32 = 0x8001_3700;

/// A connection with one session, and a CBS pair once a token was put.
pub(crate) struct Amqp {
    pub(crate) connection: ConnectionHandle<()>,
    pub(crate) session: SessionHandle<()>,
    /// Sessions in which a link was refused: this crate's bookkeeping of the handle that such a
    /// link leaves behind is racy, so each gets one refusal at most.
    old: Vec<SessionHandle<()>>,
    links: u32,
    cbs: Option<(Sender, Receiver)>,
}

impl Amqp {
    pub(crate) async fn open(bed: &Bed) -> Self {
        Self::open_at(&bed.files, bed.amqp()).await
    }

    /// Without SASL, as the SDKs.
    pub(crate) async fn open_at(files: &Files, address: SocketAddr) -> Self {
        let stream = tls(files, address).await;
        Self::over(stream, None).await.unwrap()
    }

    /// With SASL or without, on whatever carries AMQP.
    pub(crate) async fn over(
        stream: impl AsyncRead + AsyncWrite + Debug + Send + Unpin + 'static,
        sasl: Option<SaslProfile>,
    ) -> Result<Self, OpenError> {
        let mut builder = Connection::builder()
            .container_id("test")
            .hostname(HOST)
            .max_frame_size(65_536_u32)
            .channel_max(8_191);
        if let Some(sasl) = sasl {
            builder = builder.sasl_profile(sasl);
        }
        let opening = builder.open_with_stream(stream);
        let mut connection = timeout(PATIENCE, opening).await.expect("no open")?;
        let session = Session::begin(&mut connection).await.unwrap();
        Ok(Self {
            connection,
            session,
            old: Vec::new(),
            links: 0,
            cbs: None,
        })
    }

    /// A connection with the identity's own token.
    pub(crate) async fn of(bed: &Bed, identity: &str) -> Self {
        let mut client = Self::open(bed).await;
        client.admit(identity, &Token::of(identity)).await;
        client
    }

    /// A connection with the token of a policy.
    pub(crate) async fn of_policy(bed: &Bed, policy: &str) -> Self {
        let mut client = Self::open(bed).await;
        let (_, status) = client.put(HOST, &Token::of_policy(policy).text()).await;
        assert_eq!(status, 200);
        client
    }

    /// Puts a token that has to be taken.
    pub(crate) async fn admit(&mut self, identity: &str, token: &Token) {
        let (_, status) = self.put(&resource(identity), &token.text()).await;
        assert_eq!(status, 200, "{identity}");
    }

    /// Puts a token; returns the correlation-id and the status of the answer.
    pub(crate) async fn put(&mut self, name: &str, token: &str) -> (Option<MessageId>, i32) {
        let id = MessageId::String("put".to_owned());
        let request = put_token(name, token, id, "servicebus.windows.net:sastoken");
        self.request(request).await
    }

    /// A request to `$cbs`.
    pub(crate) async fn request(&mut self, request: Whole) -> (Option<MessageId>, i32) {
        if self.cbs.is_none() {
            let sender = self.sender("$cbs", &[]).await.unwrap();
            let receiver = self.receiver("$cbs", &[]).await.unwrap();
            self.cbs = Some((sender, receiver));
        }
        let (sender, receiver) = self.cbs.as_mut().unwrap();
        assert_eq!(send(sender, request).await, Ok(()));
        let answer = next(receiver).await;
        let status = match answer.application.get("status-code") {
            Some(SimpleValue::Int(status)) => *status,
            other => panic!("status-code {other:?}"),
        };
        assert!(answer.application.contains_key("status-description"));
        (answer.properties.correlation_id, status)
    }

    /// Attaches a link that sends; the condition when it is refused.
    pub(crate) async fn sender(
        &mut self,
        address: &str,
        properties: &[(&str, &str)],
    ) -> Result<Sender, String> {
        self.links += 1;
        let builder = Sender::builder()
            .name(format!("sender-{}", self.links))
            .target(address)
            .properties(fields(properties));
        let attaching = timeout(PATIENCE, builder.attach(&mut self.session));
        match attaching.await.unwrap() {
            Ok(sender) => Ok(sender),
            Err(SenderAttachError::RemoteClosedWithError(error)) => Err(self.refused(&error).await),
            Err(other) => panic!("{other:?}"),
        }
    }

    async fn refused(&mut self, error: &definitions::Error) -> String {
        let session = Session::begin(&mut self.connection).await.unwrap();
        self.old.push(std::mem::replace(&mut self.session, session));
        condition(error)
    }

    /// Attaches a link that receives; the condition when it is refused.
    pub(crate) async fn receiver(
        &mut self,
        address: impl Into<Source>,
        properties: &[(&str, &str)],
    ) -> Result<Receiver, String> {
        self.receiver_with(address, properties, CreditMode::Auto(5_000))
            .await
    }

    pub(crate) async fn receiver_with(
        &mut self,
        source: impl Into<Source>,
        properties: &[(&str, &str)],
        credit: CreditMode,
    ) -> Result<Receiver, String> {
        self.links += 1;
        let builder = Receiver::builder()
            .name(format!("receiver-{}", self.links))
            .source(source)
            .target("reply")
            .credit_mode(credit)
            .properties(fields(properties));
        let attaching = timeout(PATIENCE, builder.attach(&mut self.session));
        match attaching.await.unwrap() {
            Ok(receiver) => Ok(receiver),
            Err(ReceiverAttachError::RemoteClosedWithError(error)) => {
                Err(self.refused(&error).await)
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    /// The telemetry link of an identity that is admitted.
    pub(crate) async fn telemetry(&mut self, identity: &str) -> Sender {
        let address = format!("{}/messages/events", path(identity));
        self.sender(&address, &[]).await.unwrap()
    }

    /// A pair of links of one kind, `twin` or `methods`.
    pub(crate) async fn pair(&mut self, identity: &str, kind: &str) -> (Sender, Receiver) {
        let node = match kind {
            "methods" => "methods/deviceBound",
            kind => kind,
        };
        let address = format!("{}/{node}", path(identity));
        let pair = format!("{kind}:{identity}");
        let properties = [
            ("com.microsoft:api-version", "2020-09-30"),
            ("com.microsoft:channel-correlation-id", pair.as_str()),
        ];
        let sender = self.sender(&address, &properties).await.unwrap();
        let receiver = self.receiver(address.as_str(), &properties).await.unwrap();
        (sender, receiver)
    }

    /// Whether the connection ends: by the hub, or with its socket.
    pub(crate) async fn ends(&mut self) -> bool {
        let _ = timeout(PATIENCE, self.connection.on_close()).await.unwrap();
        true
    }
}

/// TLS to a port of the hub.
pub(crate) async fn tls(
    files: &Files,
    address: SocketAddr,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let socket = TcpStream::connect(address).await.unwrap();
    let connector = TlsConnector::from(files.tls.clone());
    let name = ServerName::try_from(HOST).unwrap();
    timeout(PATIENCE, connector.connect(name, socket))
        .await
        .unwrap()
        .unwrap()
}

/// `/devices/{d}[/modules/{m}]`.
pub(crate) fn path(identity: &str) -> String {
    match identity.split_once('/') {
        None => format!("/devices/{identity}"),
        Some((device, module)) => format!("/devices/{device}/modules/{module}"),
    }
}

/// The name of an identity's put-token.
pub(crate) fn resource(identity: &str) -> String {
    format!("{HOST}{}", path(identity))
}

pub(crate) fn put_token(name: &str, token: &str, id: MessageId, kind: &str) -> Whole {
    let properties = Properties::builder().message_id(id).to("$cbs").build();
    let application = [("operation", "put-token"), ("type", kind), ("name", name)];
    Message::builder()
        .properties(properties)
        .application_properties(texts(&application))
        .body(Body::Value(AmqpValue(Value::String(token.to_owned()))))
        .build()
}

/// A message of one data section.
pub(crate) fn data(body: &[u8]) -> Whole {
    Message::builder().body(data_body([body.to_vec()])).build()
}

/// A body of data sections.
pub(crate) fn data_body(sections: impl IntoIterator<Item = Vec<u8>>) -> Body<Value> {
    Body::Data(
        sections
            .into_iter()
            .map(|section| Data(section.into()))
            .collect(),
    )
}

/// A batch as IoT Hub clients send it.
pub(crate) fn batch(messages: impl IntoIterator<Item = Whole>) -> Sendable<Body<Value>> {
    let encode = |message| serde_amqp::to_vec(&Serializable(message)).unwrap();
    let body = data_body(messages.into_iter().map(encode));
    Sendable::builder()
        .message(Message::builder().body(body).build())
        .message_format(BATCH_FORMAT)
        .build()
}

/// Application properties of text.
pub(crate) fn texts(pairs: &[(&str, &str)]) -> ApplicationProperties {
    let pairs = pairs.iter();
    let pairs =
        pairs.map(|(key, value)| ((*key).to_owned(), SimpleValue::String((*value).to_owned())));
    ApplicationProperties(pairs.collect())
}

/// Message annotations.
pub(crate) fn annotations(
    pairs: impl IntoIterator<Item = (&'static str, Value)>,
) -> MessageAnnotations {
    let mut builder = MessageAnnotations::builder();
    for (key, value) in pairs {
        builder = builder.insert(Symbol::from(key), value);
    }
    builder.build()
}

fn fields(pairs: &[(&str, &str)]) -> Fields {
    let pairs = pairs.iter();
    let pairs = pairs.map(|(key, value)| (Symbol::from(*key), Value::String((*value).to_owned())));
    pairs.collect()
}

/// What an error's condition is called.
pub(crate) fn condition(error: &definitions::Error) -> String {
    let symbol = match &error.condition {
        ErrorCondition::AmqpError(error) => Symbol::from(error),
        ErrorCondition::ConnectionError(error) => Symbol::from(error),
        ErrorCondition::SessionError(error) => Symbol::from(error),
        ErrorCondition::LinkError(error) => Symbol::from(error),
        ErrorCondition::Custom(symbol) => symbol.clone(),
    };
    symbol.to_string()
}

/// Sends and waits for the outcome: the condition of a rejection, or the name of what else it is.
pub(crate) async fn send(
    sender: &mut Sender,
    message: impl Into<Sendable<Body<Value>>>,
) -> Result<(), String> {
    let sent = timeout(PATIENCE, sender.send(message)).await;
    match sent.expect("no outcome") {
        Ok(Outcome::Accepted(_)) => Ok(()),
        Ok(Outcome::Rejected(rejected)) => Err(condition(&rejected.error.unwrap())),
        Ok(Outcome::Released(_)) => Err("released".to_owned()),
        Ok(Outcome::Modified(_)) => Err("modified".to_owned()),
        Err(SendError::Detached(error)) => Err(detached(error)),
        Err(SendError::LinkStateError(
            LinkStateError::RemoteClosedWithError(error)
            | LinkStateError::RemoteDetachedWithError(error),
        )) => Err(condition(&error)),
        Err(other) => Err(format!("{other:?}")),
    }
}

/// The condition with which a link was detached.
pub(crate) fn detached(error: DetachError) -> String {
    match error {
        DetachError::RemoteClosedWithError(error) | DetachError::RemoteDetachedWithError(error) => {
            condition(&error)
        }
        other => format!("{other:?}"),
    }
}

/// What a receiver got.
#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) info: DeliveryInfo,
    pub(crate) properties: Properties,
    pub(crate) annotations: BTreeMap<String, Value>,
    pub(crate) application: BTreeMap<String, SimpleValue>,
    pub(crate) body: Vec<u8>,
    pub(crate) value: Option<Value>,
}

impl Got {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub(crate) fn tag(&self) -> Vec<u8> {
        self.info.delivery_tag().to_vec()
    }
}

/// The next message, which has to come.
pub(crate) async fn next(receiver: &mut Receiver) -> Got {
    let delivery = timeout(PATIENCE, receiver.recv::<Body<Value>>()).await;
    got(delivery.expect("no delivery").unwrap())
}

/// The condition with which a receiver's link ends.
pub(crate) async fn ended(receiver: &mut Receiver) -> String {
    match timeout(PATIENCE, receiver.recv::<Body<Value>>()).await {
        Ok(Err(RecvError::LinkStateError(
            LinkStateError::RemoteClosedWithError(error)
            | LinkStateError::RemoteDetachedWithError(error),
        ))) => condition(&error),
        other => panic!("{other:?}"),
    }
}

fn got(delivery: fe2o3_amqp::link::delivery::Delivery<Body<Value>>) -> Got {
    let (info, message) = delivery.into_parts();
    let annotations = message.message_annotations.map(|annotations| annotations.0);
    let annotations = annotations.into_iter().flatten();
    let application = message
        .application_properties
        .map(|properties| properties.0);
    let (body, value) = match message.body {
        Body::Data(sections) => {
            let sections = sections
                .into_iter()
                .flat_map(|Data(bytes)| bytes.into_vec());
            (sections.collect(), None)
        }
        Body::Value(AmqpValue(value)) => (Vec::new(), Some(value)),
        _ => (Vec::new(), None),
    };
    Got {
        info,
        properties: message.properties.unwrap_or_default(),
        annotations: annotations
            .map(|(key, value)| (key_text(key), value))
            .collect(),
        application: application.into_iter().flatten().collect(),
        body,
        value,
    }
}

fn key_text(key: fe2o3_amqp::types::messaging::annotations::OwnedKey) -> String {
    use fe2o3_amqp::types::messaging::annotations::OwnedKey;
    match key {
        OwnedKey::Symbol(symbol) => symbol.to_string(),
        OwnedKey::Ulong(number) => panic!("a key {number}"),
    }
}

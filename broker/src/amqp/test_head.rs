//! Heads for the tests of this module, and an AMQP client for them: the crate `fe2o3-amqp`, which
//! shares no code with the engine, over a byte stream in memory.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::{BoxFuture, ClientInfo, Connectivity, Needs, Upstream, UpstreamError};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message as Stored;
use edgehub_proto::stored;
use edgehub_storage::{DEFAULT_PRIORITY, QueueId, ReadLimit, UPSTREAM_ENDPOINT};
use fe2o3_amqp::connection::{ConnectionHandle, Error as ConnectionError, OpenError};
use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::link::{
    DetachError, LinkStateError, ReceiverAttachError, RecvError, SendError, SenderAttachError,
    delivery::Delivery,
};
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::session::SessionHandle;
use fe2o3_amqp::types::definitions::{self, ErrorCondition, Fields};
use fe2o3_amqp::types::messaging::{
    AmqpValue, ApplicationProperties, Body, Data, Message, MessageId, Outcome, Properties,
};
use fe2o3_amqp::types::primitives::{SimpleValue, Symbol, Value};
use fe2o3_amqp::{Connection, Receiver, Sendable, Sender, Session};
use tokio::io::duplex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{ConnectionContext, ConnectionEnd, serve};
use crate::hub::{Below, ServiceConfig, ServiceParts};
use crate::methods::NoMethods;
use crate::routing::Router;
use crate::telemetry::metrics::AckCounters;
use crate::test_support::{TestHub, token};
use crate::twin::TwinConfig;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A message with any body.
pub(super) type Whole = Message<Body<Value>>;

/// An upstream that is away.
#[derive(Debug)]
struct Away(watch::Sender<Connectivity>);

impl Upstream for Away {
    fn describe(&self, _: &Identity, _: &ClientInfo) {}

    fn need(&self, _: &Identity, _: Needs) {}

    fn twin(&self, _: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>> {
        let away = UpstreamError::Unavailable("away".to_owned());
        Box::pin(std::future::ready(Err(away)))
    }

    fn report(&self, _: &Identity, _: Bytes) -> BoxFuture<Result<Option<u64>, UpstreamError>> {
        let away = UpstreamError::Unavailable("away".to_owned());
        Box::pin(std::future::ready(Err(away)))
    }

    fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.0.subscribe()
    }
}

/// One hub and its head.
pub(super) struct Head {
    pub(super) hub: TestHub,
    pub(super) stop: CancellationToken,
    /// What arrives from upstream.
    pub(super) below: Below,
}

impl Head {
    pub(super) fn new() -> Self {
        Self::of(TestHub::new())
    }

    pub(super) fn of(hub: TestHub) -> Self {
        let below = Below::default();
        below.attach(&hub.hub);
        Self {
            hub,
            stop: CancellationToken::new(),
            below,
        }
    }

    /// With all services, every message routed into these inputs of the module.
    pub(super) fn serving(inputs: &[&str]) -> Self {
        let head = Self::new();
        let hub = &head.hub.hub;
        let route = |input: &&str| {
            let sink = format!(r#"BrokeredEndpoint("/modules/modA/inputs/{input}")"#);
            ((*input).to_owned(), format!("FROM /messages/* INTO {sink}"))
        };
        let routes: Vec<_> = inputs.iter().map(route).collect();
        let (router, bad) = Router::new(&routes, "edge1", None, hub.store()).unwrap();
        assert!(bad.is_empty());
        hub.set_router(router);
        hub.start_services(ServiceParts {
            upstream: Arc::new(Away(watch::Sender::new(Connectivity::Disconnected))),
            own_methods: Arc::new(NoMethods),
            config: ServiceConfig {
                twins: TwinConfig::default(),
                window: 16,
                own_twin: false,
            },
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
        .unwrap();
        head
    }

    pub(super) async fn open(&self) -> Amqp {
        self.open_with(None).await.unwrap()
    }

    pub(super) async fn open_with(&self, sasl: Option<SaslProfile>) -> Result<Amqp, OpenError> {
        let (near, far) = duplex(1 << 20);
        let context = ConnectionContext {
            hub: Arc::clone(&self.hub.hub),
            acks: AckCounters::new(),
            stop: self.stop.clone(),
        };
        let task = tokio::spawn(serve(far, context, None, None));
        let mut builder = Connection::builder()
            .container_id("test")
            .hostname("edge1.local")
            .max_frame_size(65_536_u32)
            .channel_max(8_191);
        if let Some(sasl) = sasl {
            builder = builder.sasl_profile(sasl);
        }
        let opening = builder.open_with_stream(near);
        let mut connection = timeout(PATIENCE, opening).await.expect("no open")?;
        let session = Session::begin(&mut connection).await.unwrap();
        Ok(Amqp {
            connection,
            session,
            old: Vec::new(),
            links: 0,
            cbs: None,
            task,
        })
    }

    /// A connection with the own tokens of these identities.
    pub(super) async fn client(&self, identities: &[&str]) -> Amqp {
        let mut client = self.open().await;
        for identity in identities {
            assert_eq!(client.put(&token(identity)).await, 200, "{identity}");
        }
        client
    }

    /// What lies in the queue upstream, with its senders.
    pub(super) async fn stored(&self) -> Vec<(String, Stored)> {
        let store = self.hub.hub.store();
        let queue = store.queue(&QueueId {
            endpoint: UPSTREAM_ENDPOINT.to_owned(),
            priority: DEFAULT_PRIORITY,
        });
        let limit = ReadLimit {
            entries: 100_000,
            bytes: 1 << 26,
            scan: 100_000,
        };
        let batch = queue.unwrap().read(0, limit, None).await.unwrap();
        let decoded = |entry: edgehub_storage::Entry| {
            let message = stored::decode_message(entry.message).unwrap();
            (entry.sender.to_string(), message)
        };
        batch.entries.into_iter().map(decoded).collect()
    }

    /// Waits until so many messages are in the queues.
    pub(super) async fn queued(&self, expected: u64) {
        let count = || self.hub.hub.store().stats().queued;
        let reached = async {
            while count() != expected {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let outcome = timeout(PATIENCE, reached).await;
        assert!(outcome.is_ok(), "{} instead of {expected}", count());
    }
}

/// A connection with one session, and a pair of links to `$cbs` once a token was put.
pub(super) struct Amqp {
    connection: ConnectionHandle<()>,
    session: SessionHandle<()>,
    /// Sessions in which a link was refused: what that leaves behind in this crate is racy.
    old: Vec<SessionHandle<()>>,
    links: u32,
    cbs: Option<(Sender, Receiver)>,
    pub(super) task: JoinHandle<ConnectionEnd>,
}

impl Amqp {
    /// Puts a token; the status of the answer.
    pub(super) async fn put(&mut self, token: &str) -> i32 {
        self.put_without_wait(token).await;
        self.put_answer().await
    }

    pub(super) async fn put_without_wait(&mut self, token: &str) {
        if self.cbs.is_none() {
            let sender = self.sender("$cbs", &[]).await.unwrap();
            let receiver = self.receiver("$cbs", &[]).await.unwrap();
            self.cbs = Some((sender, receiver));
        }
        let properties = Properties::builder().message_id(7_u64).to("$cbs").build();
        let application = [
            ("operation", "put-token"),
            ("type", "servicebus.windows.net:sastoken"),
            ("name", "h"),
        ];
        let request: Whole = Message::builder()
            .properties(properties)
            .application_properties(texts(&application))
            .body(Body::Value(AmqpValue(Value::String(token.to_owned()))))
            .build();
        let (sender, _) = self.cbs.as_mut().unwrap();
        // The outcome comes with the answer.
        let outcome = sender.send_batchable(request).await.unwrap();
        tokio::spawn(outcome);
    }

    pub(super) async fn put_answer(&mut self) -> i32 {
        let (_, receiver) = self.cbs.as_mut().unwrap();
        let (_, answer) = next(receiver).await;
        let id = answer.properties.unwrap().correlation_id;
        assert_eq!(
            id,
            Some(MessageId::Ulong(7)),
            "with the type of the request"
        );
        let application = answer.application_properties.unwrap().0;
        match application.get("status-code") {
            Some(SimpleValue::Int(status)) => *status,
            other => panic!("status-code {other:?}"),
        }
    }

    /// Attaches a link that sends; the condition when it is refused.
    pub(super) async fn sender(
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
        match attaching.await.expect("no attach") {
            Ok(sender) => Ok(sender),
            Err(SenderAttachError::RemoteClosedWithError(error)) => Err(self.refused(&error).await),
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Attaches a link that receives; the condition when it is refused.
    pub(super) async fn receiver(
        &mut self,
        address: &str,
        properties: &[(&str, &str)],
    ) -> Result<Receiver, String> {
        self.receiver_with(address, properties, CreditMode::Auto(1_000))
            .await
    }

    pub(super) async fn receiver_with(
        &mut self,
        address: &str,
        properties: &[(&str, &str)],
        credit: CreditMode,
    ) -> Result<Receiver, String> {
        self.links += 1;
        let builder = Receiver::builder()
            .name(format!("receiver-{}", self.links))
            .source(address)
            .target("reply")
            .credit_mode(credit)
            .properties(fields(properties));
        let attaching = timeout(PATIENCE, builder.attach(&mut self.session));
        match attaching.await.expect("no attach") {
            Ok(receiver) => Ok(receiver),
            Err(ReceiverAttachError::RemoteClosedWithError(error)) => {
                Err(self.refused(&error).await)
            }
            Err(other) => panic!("{other:?}"),
        }
    }

    async fn refused(&mut self, error: &definitions::Error) -> String {
        let session = Session::begin(&mut self.connection).await.unwrap();
        self.old.push(std::mem::replace(&mut self.session, session));
        condition(error)
    }

    /// The telemetry link of an identity.
    pub(super) async fn telemetry(&mut self, identity: &str) -> Result<Sender, String> {
        self.sender(&address(identity, "messages/events"), &[])
            .await
    }

    /// Both links to a node, with such a correlation id.
    pub(super) async fn pair(
        &mut self,
        identity: &str,
        node: &str,
        id: &str,
    ) -> (Sender, Receiver) {
        let address = address(identity, node);
        let properties = [("com.microsoft:channel-correlation-id", id)];
        let sender = self.sender(&address, &properties).await.unwrap();
        let receiver = self.receiver(&address, &properties).await.unwrap();
        (sender, receiver)
    }

    /// The condition with which the hub closes the connection.
    pub(super) async fn closed(&mut self) -> String {
        match timeout(PATIENCE, self.connection.on_close()).await {
            Ok(Err(ConnectionError::RemoteClosedWithError(error))) => condition(&error),
            other => panic!("{other:?}"),
        }
    }

    /// The client closes the connection.
    pub(super) async fn close(mut self) -> ConnectionEnd {
        let _ = timeout(PATIENCE, self.connection.close()).await.unwrap();
        timeout(PATIENCE, self.task).await.unwrap().unwrap()
    }
}

pub(super) fn address(identity: &str, node: &str) -> String {
    match identity.split_once('/') {
        None => format!("/devices/{identity}/{node}"),
        Some((device, module)) => format!("/devices/{device}/modules/{module}/{node}"),
    }
}

/// A message of one data section.
pub(super) fn data(body: &[u8]) -> Whole {
    Message::builder()
        .body(Body::Data(
            [Data(body.to_vec().into())].into_iter().collect(),
        ))
        .build()
}

/// Application properties of text.
pub(super) fn texts(pairs: &[(&str, &str)]) -> ApplicationProperties {
    let text = |text: &str| SimpleValue::String(text.to_owned());
    let pairs = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), text(value)));
    ApplicationProperties(pairs.collect())
}

fn fields(pairs: &[(&str, &str)]) -> Fields {
    let text = |text: &str| Value::String(text.to_owned());
    let pairs = pairs
        .iter()
        .map(|(key, value)| (Symbol::from(*key), text(value)));
    pairs.collect()
}

/// What an error's condition is called.
pub(super) fn condition(error: &definitions::Error) -> String {
    let symbol = match &error.condition {
        ErrorCondition::AmqpError(error) => Symbol::from(error),
        ErrorCondition::ConnectionError(error) => Symbol::from(error),
        ErrorCondition::SessionError(error) => Symbol::from(error),
        ErrorCondition::LinkError(error) => Symbol::from(error),
        ErrorCondition::Custom(symbol) => symbol.clone(),
    };
    symbol.to_string()
}

/// Sends and waits for the outcome: the condition of a rejection or of the link's end.
pub(super) async fn send(
    sender: &mut Sender,
    message: impl Into<Sendable<Body<Value>>>,
) -> Result<(), String> {
    match timeout(PATIENCE, sender.send(message))
        .await
        .expect("no outcome")
    {
        Ok(Outcome::Accepted(_)) => Ok(()),
        Ok(Outcome::Rejected(rejected)) => Err(condition(&rejected.error.unwrap())),
        Err(SendError::Detached(error)) => Err(detached(error)),
        Err(SendError::LinkStateError(
            LinkStateError::RemoteClosedWithError(error)
            | LinkStateError::RemoteDetachedWithError(error),
        )) => Err(condition(&error)),
        other => Err(format!("{other:?}")),
    }
}

fn detached(error: DetachError) -> String {
    match error {
        DetachError::RemoteClosedWithError(error) | DetachError::RemoteDetachedWithError(error) => {
            condition(&error)
        }
        other => format!("{other:?}"),
    }
}

/// The condition with which the hub detaches a link.
pub(super) async fn on_detach(sender: &mut Sender) -> String {
    detached(
        timeout(PATIENCE, sender.on_detach())
            .await
            .expect("no detach"),
    )
}

/// The next message, which has to come, with its delivery.
pub(super) async fn next(receiver: &mut Receiver) -> (Delivery<Body<Value>>, Whole) {
    let delivery = timeout(PATIENCE, receiver.recv::<Body<Value>>()).await;
    let delivery = delivery.expect("no delivery").unwrap();
    let message = delivery.message().clone();
    (delivery, message)
}

/// The condition with which a receiver's link ends; empty without an error.
pub(super) async fn ended(receiver: &mut Receiver) -> String {
    match timeout(PATIENCE, receiver.recv::<Body<Value>>()).await {
        Ok(Err(RecvError::LinkStateError(
            LinkStateError::RemoteClosedWithError(error)
            | LinkStateError::RemoteDetachedWithError(error),
        ))) => condition(&error),
        Ok(Err(RecvError::LinkStateError(
            LinkStateError::RemoteClosed | LinkStateError::RemoteDetached,
        ))) => String::new(),
        other => panic!("{other:?}"),
    }
}

/// The bytes of a body.
pub(super) fn body(message: &Whole) -> Vec<u8> {
    match &message.body {
        Body::Data(sections) => sections
            .iter()
            .flat_map(|Data(data)| data.to_vec())
            .collect(),
        _ => Vec::new(),
    }
}

//! What the hub tells a connected client, whatever protocol it speaks.
//!
//! A service (twins, methods, cloud-to-device, module inputs) knows identities only. It offers a
//! [`ToClient`] to an [`Outlet`], which finds the live connection and puts the event into that
//! connection's bounded outbox; the head turns it into frames. What a full outbox means is said at
//! each kind of event: nothing here grows without bound and nothing waits.

use std::sync::Arc;

use bytes::Bytes;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;

/// Events that one connection may have waiting. A client that does not read keeps its events here
/// until its connection is closed for not reading.
pub const OUTBOX_EVENTS_MAX: usize = 256;

/// What a client is subscribed to (spec/core.md 8.1). For MQTT derived from the filters of its
/// session, for AMQP from its links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Changes of desired properties.
    pub desired: bool,
    /// Direct methods.
    pub methods: bool,
    /// Cloud-to-device messages; devices only.
    pub cloud_to_device: bool,
    /// Answers to twin requests.
    pub twin_responses: bool,
    /// Messages for the module's inputs; modules only. Which inputs is the head's affair.
    pub inputs: bool,
}

/// An event for a client.
#[derive(Clone, Debug)]
pub enum ToClient {
    /// The answer to a twin request of this connection.
    TwinResponse(TwinResponse),
    /// Desired properties changed. The body holds `$version`.
    Desired {
        /// The version after the change.
        version: u64,
        /// The patch, a JSON object.
        patch: Bytes,
    },
    /// A direct method is called.
    Method {
        /// The id under which the answer comes: a lower-case GUID with dashes.
        request_id: Arc<str>,
        /// The method's name.
        name: Arc<str>,
        /// The request's payload, JSON or empty.
        payload: Bytes,
    },
    /// Cloud-to-device messages, in order.
    CloudToDevice(Vec<Delivery>),
    /// Messages for the module's inputs, in order per queue.
    Inputs(Vec<Delivery>),
}

/// An answer to a twin request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinResponse {
    /// The request's id as the client wrote it, byte for byte.
    pub request_id: Arc<str>,
    /// HTTP-like status: 200 for GET, 204 for PATCH, else an error.
    pub status: u16,
    /// The new version of the reported properties, when known.
    pub version: Option<u64>,
    /// The twin, or a JSON error, or empty.
    pub body: Bytes,
}

/// Names one delivery on its way to a client, stable across reconnects while it is not settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryToken {
    /// Which stream of deliveries of this client: for inputs the place of the queue in the client's
    /// session (its *slot*, 0 to [`INPUT_SLOTS_MAX`] - 1), [`C2D_STREAM`] for cloud-to-device.
    pub stream: u16,
    /// Its number in the stream: the offset in the queue, or a running number.
    pub number: u64,
}

/// Queues of one module that get a slot of their own (see `mqtt::outgoing` for what that is good
/// for). Later queues share the last slot.
pub const INPUT_SLOTS_MAX: u16 = 15;

/// The stream of cloud-to-device messages.
pub const C2D_STREAM: u16 = INPUT_SLOTS_MAX;

/// A message that the client must acknowledge.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// What the head settles it by.
    pub token: DeliveryToken,
    /// The input, for modules; empty for cloud-to-device.
    pub input: Arc<str>,
    /// Whether it may have been sent before (MQTT's DUP).
    pub redelivered: bool,
    /// Who sent it; for cloud-to-device the target itself.
    pub sender: Identity,
    /// The message.
    pub message: Arc<Message>,
}

/// What became of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The client has it (PUBACK, accepted; for QoS 0: written).
    Done,
    /// The client gave it back (AMQP's released and modified): it is sent again, in its place, a
    /// limited number of times (design.md D8). A cloud-to-device message is abandoned upstream.
    Released,
    /// The client does not want it (AMQP's rejected): dropped and counted. A cloud-to-device
    /// message is rejected upstream.
    Rejected,
    /// It can never be sent to this client over this protocol (too large, topic too long):
    /// dropped and counted.
    Undeliverable,
    /// The client is not subscribed to this input: it stays stored, and nothing more of its queue
    /// is sent until the client's subscriptions change.
    NotSubscribed,
}

/// Why an event was not put into an outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// The identity has no live connection.
    #[error("the client is not connected")]
    NotConnected,
    /// It has one, which is not subscribed to such events.
    #[error("the client is not subscribed")]
    NotSubscribed,
    /// [`OUTBOX_EVENTS_MAX`] events wait already.
    #[error("the client does not take its events")]
    Full,
}

/// The way to connected clients.
pub trait Outlet: Send + Sync + std::fmt::Debug {
    /// Puts an event into the outbox of the identity's live connection, if that is subscribed to
    /// it. Never waits.
    ///
    /// # Errors
    /// See [`OfferError`].
    fn offer(&self, to: &Identity, event: ToClient) -> Result<(), OfferError>;

    /// What the identity's live connection is subscribed to; none without one.
    fn features(&self, of: &Identity) -> Option<Features>;
}

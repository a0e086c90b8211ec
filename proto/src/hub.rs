//! What broker and bridge say to each other. They do not see one another: the binary hands each
//! the other's half as a trait object.
//!
//! [`Upstream`] is what the broker asks for, [`Downstream`] what arrives from above. Everything is
//! by identity; how identities map to connections is the bridge's affair. State, not events: the
//! broker says what an identity needs ([`Needs`]), and the bridge keeps that true across
//! reconnects, restarts of the upstream and renewals of tokens.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{oneshot, watch};

use crate::identity::Identity;
use crate::message::Message;

/// A future without a name, so that the traits here can be objects.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What an identity wants to hear from upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Changes of desired properties.
    pub desired: bool,
    /// Direct methods.
    pub methods: bool,
    /// Cloud-to-device messages; devices only.
    pub cloud_to_device: bool,
}

impl Needs {
    /// Whether there is anything to hear.
    #[must_use]
    pub fn any(self) -> bool {
        self.desired || self.methods || self.cloud_to_device
    }
}

/// What a client says about itself when it connects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientInfo {
    /// Its product information (`DeviceClientType`, `com.microsoft:client-version`).
    pub product_info: Option<Arc<str>>,
    /// The id of its Plug and Play model.
    pub model_id: Option<Arc<str>>,
}

/// Whether the upstream can be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connectivity {
    /// It answered last.
    Connected,
    /// Not yet, or not any more. Where every hub starts.
    #[default]
    Disconnected,
}

/// Why the upstream did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UpstreamError {
    /// It cannot be reached now, or did not answer in time (`CloudOperationTimeoutSecs`).
    #[error("the upstream cannot be reached: {0}")]
    Unavailable(String),
    /// It asks for patience (429, 503).
    #[error("the upstream is busy (status {status})")]
    Busy {
        /// The status it answered.
        status: u16,
    },
    /// It said no, for good.
    #[error("the upstream refused (status {status})")]
    Refused {
        /// The status it answered.
        status: u16,
    },
}

impl UpstreamError {
    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// The upstream as the broker sees it: IoT Hub, or the parent's hub.
pub trait Upstream: Send + Sync + fmt::Debug {
    /// States what `identity` needs from now on; replaces what was said before. Returns at once.
    /// [`Needs::default`] gives everything up: the connection may then be closed.
    fn need(&self, identity: &Identity, needs: Needs);

    /// States what is known of `identity` from now on; replaces what was said before. It counts for
    /// connections that are opened for it later.
    fn describe(&self, identity: &Identity, info: &ClientInfo);

    /// Fetches the identity's twin: `{"desired":{…,"$version":n},"reported":{…,"$version":m}}`.
    ///
    /// Fails soon while the upstream is known to be disconnected, and within
    /// `CloudOperationTimeoutSecs` in any case.
    fn twin(&self, identity: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>>;

    /// Sends a patch of reported properties (a JSON object); answers the new version when the
    /// upstream tells it. Times as [`Upstream::twin`].
    fn report(
        &self,
        identity: &Identity,
        patch: Bytes,
    ) -> BoxFuture<Result<Option<u64>, UpstreamError>>;

    /// Whether the upstream can be reached.
    fn connectivity(&self) -> watch::Receiver<Connectivity>;
}

/// The broker as the bridge sees it. No call blocks or waits.
pub trait Downstream: Send + Sync + fmt::Debug {
    /// The identity's desired properties changed: a patch with `$version` in it.
    fn desired(&self, identity: &Identity, patch: Bytes);

    /// A direct method is called on the identity. The bridge answers what
    /// [`MethodCall::reply`] is told.
    fn method(&self, identity: &Identity, call: MethodCall);

    /// A cloud-to-device message for the identity.
    fn cloud_to_device(&self, identity: &Identity, message: CloudToDevice);

    /// The identity's upstream session is up and what it needs is subscribed: what was missed
    /// meanwhile (desired properties) must be fetched.
    fn established(&self, identity: &Identity);
}

/// A direct method that came from upstream.
#[derive(Debug)]
pub struct MethodCall {
    /// The method's name.
    pub name: String,
    /// The request's payload, JSON or empty.
    pub payload: Bytes,
    /// Where the answer goes. Dropped without one, the caller's time runs out.
    pub reply: oneshot::Sender<MethodResult>,
}

/// The answer to a direct method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodResult {
    /// Status: the device's, or 404/504 of a hub that could not deliver it (design.md D10).
    pub status: i32,
    /// Payload, JSON or empty.
    pub payload: Bytes,
}

/// A cloud-to-device message on its way down.
#[derive(Debug)]
pub struct CloudToDevice {
    /// The message. Its system properties hold `to`, ids, expiry and the rest of what came.
    pub message: Message,
    /// Whether the upstream says that it may have been delivered before.
    pub redelivered: bool,
    /// Told once what became of it. Dropped instead, the message is not settled: the bridge ends
    /// the identity's session, so that the upstream takes the message back and delivers it again.
    pub settle: oneshot::Sender<CloudToDeviceOutcome>,
}

/// What became of a cloud-to-device message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloudToDeviceOutcome {
    /// The device has it: complete.
    Completed,
    /// The device gave it back: abandon, so that the upstream delivers it again. Over MQTT, which
    /// has no word for it, the session ends instead.
    Abandoned,
    /// It can never be delivered (for example a topic over 65,535 bytes): reject, where the
    /// protocol upstream has that, else complete.
    Rejected,
}

//! What a peer says about a link that it wants.

use std::sync::Arc;

use fe2o3_amqp_types::definitions::{ReceiverSettleMode, Role, SenderSettleMode};
use fe2o3_amqp_types::messaging::{Source, Target, TargetArchetype};
use fe2o3_amqp_types::performatives::Attach as Frame;
use serde_amqp::Value;
use serde_amqp::primitives::Symbol;

use super::event::LinkTerms;
use crate::performative::AttachFrame;

/// An attach of the peer. Copies share what it says.
#[derive(Clone, Debug, PartialEq)]
pub struct Attach {
    frame: Arc<Frame>,
    coordinator: bool,
    bytes: usize,
}

impl Attach {
    /// `bytes` is the size of its frame.
    pub(super) fn new(frame: AttachFrame, bytes: usize) -> Self {
        Self {
            frame: Arc::new(frame.attach),
            coordinator: frame.coordinator,
            bytes,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The link's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.frame.name
    }

    /// Whether the peer is the link's sender.
    #[must_use]
    pub fn peer_sends(&self) -> bool {
        self.frame.role == Role::Sender
    }

    /// The address of the node that is meant here: of the target when the peer sends, else of the
    /// source.
    #[must_use]
    pub fn address(&self) -> Option<&str> {
        if self.peer_sends() {
            self.target_address()
        } else {
            self.source_address()
        }
    }

    /// The address at the peer's own end.
    #[must_use]
    pub fn other_address(&self) -> Option<&str> {
        if self.peer_sends() {
            self.source_address()
        } else {
            self.target_address()
        }
    }

    fn source_address(&self) -> Option<&str> {
        self.frame.source.as_ref()?.address.as_deref()
    }

    fn target_address(&self) -> Option<&str> {
        match self.frame.target.as_deref()? {
            TargetArchetype::Target(target) => target.address.as_deref(),
        }
    }

    /// The text of a link property.
    #[must_use]
    pub fn property(&self, key: &str) -> Option<&str> {
        let properties = self.frame.properties.as_ref()?;
        match properties.get(&Symbol::from(key))? {
            Value::String(text) => Some(text),
            Value::Symbol(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// Whether there are link properties at all.
    #[must_use]
    pub fn has_properties(&self) -> bool {
        self.frame.properties.is_some()
    }

    /// The text of a filter of the source, described or not.
    #[must_use]
    pub fn filter(&self, name: &str) -> Option<String> {
        let filters = self.frame.source.as_ref()?.filter.as_ref()?;
        let filter = match filters.get(&Symbol::from(name))? {
            Value::Described(described) => &described.value,
            plain => plain,
        };
        match filter {
            Value::String(text) => Some(text.clone()),
            Value::Symbol(text) => Some(text.as_str().to_owned()),
            _ => None,
        }
    }

    /// Largest message that the peer takes, bytes.
    #[must_use]
    pub fn max_message_size(&self) -> Option<u64> {
        // Zero and none both mean no limit (part 2, 2.7.3).
        self.frame.max_message_size.filter(|size| *size > 0)
    }

    /// Settle mode of the sender that the peer asks for.
    #[must_use]
    pub fn snd_settle_mode(&self) -> SenderSettleMode {
        self.frame.snd_settle_mode.clone()
    }

    /// Settle mode of the receiver that the peer asks for.
    #[must_use]
    pub fn rcv_settle_mode(&self) -> ReceiverSettleMode {
        self.frame.rcv_settle_mode.clone()
    }

    /// Whether the target is a coordinator of transactions, which is not served.
    #[must_use]
    pub fn is_coordinator(&self) -> bool {
        self.coordinator
    }

    /// Whether the peer wants its node made.
    #[must_use]
    pub fn is_dynamic(&self) -> bool {
        let source = self.frame.source.as_ref();
        let target = self.frame.target.as_deref();
        if self.peer_sends() {
            target.is_some_and(|TargetArchetype::Target(target)| target.dynamic)
        } else {
            source.is_some_and(|source| source.dynamic)
        }
    }

    pub(super) fn handle(&self) -> u32 {
        self.frame.handle.0
    }

    /// A sender that leaves it out means 0: C# clients do (spec/amqp.md 10.3).
    pub(super) fn initial_delivery_count(&self) -> u32 {
        self.frame.initial_delivery_count.unwrap_or(0)
    }

    /// The answer: mirrored, with source, target and properties as they came.
    pub(super) fn reply(&self, terms: &LinkTerms) -> Frame {
        let we_send = !self.peer_sends();
        let terms_snd = terms.snd_settle_mode.clone();
        let terms_rcv = terms.rcv_settle_mode.clone();
        Frame {
            snd_settle_mode: terms_snd.unwrap_or_else(|| self.snd_settle_mode()),
            rcv_settle_mode: terms_rcv.unwrap_or_else(|| self.rcv_settle_mode()),
            source: self.frame.source.clone(),
            target: self.frame.target.clone(),
            max_message_size: terms.max_message_size,
            properties: self.frame.properties.clone(),
            ..self.mirrored(we_send)
        }
    }

    /// The answer to a link that is refused: without source and target (part 2, 2.6.3).
    pub(super) fn refusal(&self) -> Frame {
        self.mirrored(!self.peer_sends())
    }

    fn mirrored(&self, we_send: bool) -> Frame {
        Frame {
            name: self.frame.name.clone(),
            handle: self.frame.handle.clone(),
            role: if we_send {
                Role::Sender
            } else {
                Role::Receiver
            },
            snd_settle_mode: self.snd_settle_mode(),
            rcv_settle_mode: self.rcv_settle_mode(),
            source: None::<Box<Source>>,
            target: None::<Target>.map(|target| Box::new(TargetArchetype::Target(target))),
            unsettled: None,
            incomplete_unsettled: false,
            // Mandatory for a sender; C and C# insist on it (spec/amqp.md 2.3).
            initial_delivery_count: we_send.then_some(0),
            max_message_size: None,
            offered_capabilities: None,
            desired_capabilities: None,
            properties: None,
        }
    }
}

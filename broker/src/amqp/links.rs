//! What links are for, and which of them an identity has (spec/amqp.md 2.3, 4.7).

use edgehub_amqp::connection::{Attach, LinkId, LinkTerms, ReceiverSettleMode, SenderSettleMode};
use edgehub_amqp::performative::ErrorInfo;
use edgehub_proto::amqp_address::{AmqpAddress, Node};
use edgehub_proto::identity::Identity;

use super::condition;
use super::limits::{CREDIT, MESSAGE_BYTES_MAX};
use crate::hub::Features;

/// Link property that pairs two links: `twin:<guid>`, `methods:<guid>`.
const CORRELATION: &str = "com.microsoft:channel-correlation-id";
/// Link property with the chain of an identity that another acts for.
pub(super) const AUTH_CHAIN: &str = "com.microsoft:auth-chain";

/// Link property with the product information of a client.
pub(super) const CLIENT_VERSION: &str = "com.microsoft:client-version";
/// Link property with the id of a client's model.
pub(super) const MODEL_ID: &str = "com.microsoft:model-id";

/// What a link of an identity is for. The peer sends or receives, as said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// It sends telemetry.
    Telemetry,
    /// A module receives messages for its inputs.
    Inputs,
    /// A device receives cloud-to-device messages.
    CloudToDevice,
    /// It receives direct methods.
    MethodRequests,
    /// It sends their answers.
    MethodResponses,
    /// It sends twin requests.
    TwinRequests,
    /// It receives their answers, and desired properties.
    TwinResponses,
    /// A module waits for cloud-to-device messages, which do not exist for it.
    Silent,
}

const KINDS: usize = 8;

/// What an attach is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The node of tokens.
    Cbs,
    /// A node of an identity.
    Identity(Identity, Kind),
}

/// Finds out what the peer wants.
///
/// # Errors
/// What it is told when there is no such thing.
pub(super) fn wanted(attach: &Attach) -> Result<Wanted, ErrorInfo> {
    if attach.is_dynamic() {
        let text = "nodes are not made on demand";
        return Err(condition::error(condition::NOT_IMPLEMENTED, text));
    }
    let Some(text) = attach.address().filter(|text| !text.is_empty()) else {
        let text = "the link has no address";
        return Err(condition::error(condition::INVALID_FIELD, text));
    };
    let none = || {
        // The reference's text.
        let text = format!(
            "Matching template not found for uri {}",
            condition::excerpt(text)
        );
        condition::error(condition::NOT_ALLOWED, text)
    };
    let (identity, node) = match AmqpAddress::parse(text).ok_or_else(none)? {
        AmqpAddress::Cbs => return Ok(Wanted::Cbs),
        AmqpAddress::Node { identity, node } => (identity, node),
    };
    let kind = match (node, attach.peer_sends(), identity.is_module()) {
        (Node::Events, true, _) => Kind::Telemetry,
        (Node::Events, false, true) => Kind::Inputs,
        (Node::DeviceBound, false, false) => Kind::CloudToDevice,
        (Node::DeviceBound, false, true) => Kind::Silent,
        (Node::Methods, true, _) => Kind::MethodResponses,
        (Node::Methods, false, _) => Kind::MethodRequests,
        (Node::Twin, true, _) => Kind::TwinRequests,
        (Node::Twin, false, _) => Kind::TwinResponses,
        (Node::Events, false, false) | (Node::DeviceBound, true, _) => return Err(none()),
    };
    Ok(Wanted::Identity(identity, kind))
}

/// The terms of a link, whatever the peer asked for (spec/amqp.md 2.3).
pub(super) fn terms(kind: Kind, attach: &Attach) -> LinkTerms {
    let (snd, rcv) = match kind {
        Kind::Telemetry => (SenderSettleMode::Mixed, ReceiverSettleMode::First),
        Kind::Inputs => (SenderSettleMode::Unsettled, ReceiverSettleMode::First),
        Kind::CloudToDevice | Kind::Silent => {
            (SenderSettleMode::Unsettled, ReceiverSettleMode::Second)
        }
        Kind::MethodRequests | Kind::MethodResponses | Kind::TwinRequests | Kind::TwinResponses => {
            (SenderSettleMode::Settled, ReceiverSettleMode::First)
        }
    };
    LinkTerms {
        snd_settle_mode: Some(snd),
        rcv_settle_mode: Some(rcv),
        // The C SDK says 64 KiB and takes whatever IoT Hub sends (spec/amqp.md 7.3, 9.1). Messages
        // for inputs can be far larger than that, and are not sent to modules of it.
        exceeds_max_message_size: kind != Kind::Inputs,
        ..cbs_terms(attach)
    }
}

/// The terms of a link of the node of tokens.
pub(super) fn cbs_terms(attach: &Attach) -> LinkTerms {
    let asked = attach.max_message_size();
    LinkTerms {
        snd_settle_mode: None,
        rcv_settle_mode: None,
        max_message_size: Some(asked.unwrap_or(MESSAGE_BYTES_MAX).min(MESSAGE_BYTES_MAX)),
        credit: if attach.peer_sends() { CREDIT } else { 0 },
        exceeds_max_message_size: false,
    }
}

/// The text behind the colon of what pairs two links; empty when there is none.
fn correlation(attach: &Attach) -> String {
    let text = attach.property(CORRELATION).unwrap_or_default();
    let (_, id) = text.split_once(':').unwrap_or(("", text));
    condition::excerpt(id).to_owned()
}

/// A link of an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Linked {
    id: LinkId,
    correlation: String,
}

/// The links of one identity: at most one of each kind.
#[derive(Debug, Default)]
pub(super) struct Links([Option<Linked>; KINDS]);

impl Links {
    /// The link of a kind.
    pub(super) fn get(&self, kind: Kind) -> Option<LinkId> {
        self.slot(kind).map(|linked| linked.id)
    }

    fn slot(&self, kind: Kind) -> Option<&Linked> {
        self.0.get(kind as usize)?.as_ref()
    }

    /// Takes a link in. Returns those that give way to it: an older one of its kind, and the
    /// partner of a pair that it does not belong to.
    pub(super) fn put(&mut self, kind: Kind, id: LinkId, attach: &Attach) -> Vec<LinkId> {
        let linked = Linked {
            id,
            correlation: correlation(attach),
        };
        let mut gone = Vec::new();
        if let Some(partner) = partner(kind)
            && let Some(slot) = self.0.get_mut(partner as usize)
            && let Some(other) = slot.take_if(|other| other.correlation != linked.correlation)
        {
            gone.push(other.id);
        }
        if let Some(slot) = self.0.get_mut(kind as usize)
            && let Some(older) = slot.replace(linked)
        {
            gone.push(older.id);
        }
        gone
    }

    /// Removes this link, and no other of its kind. Its kind, when it was here.
    pub(super) fn remove(&mut self, id: LinkId) -> bool {
        self.0
            .iter_mut()
            .any(|slot| slot.take_if(|linked| linked.id == id).is_some())
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// All of them.
    pub(super) fn all(&self) -> impl Iterator<Item = LinkId> {
        self.0.iter().flatten().map(|linked| linked.id)
    }

    /// What the identity hears by them. Desired properties from the attach on, until it says no
    /// (spec/amqp.md 2.3).
    pub(super) fn features(&self, wants_desired: bool) -> Features {
        let has = |kind| self.slot(kind).is_some();
        Features {
            desired: has(Kind::TwinResponses) && wants_desired,
            methods: has(Kind::MethodRequests),
            cloud_to_device: has(Kind::CloudToDevice),
            twin_responses: has(Kind::TwinResponses),
            inputs: has(Kind::Inputs),
        }
    }
}

fn partner(kind: Kind) -> Option<Kind> {
    match kind {
        Kind::MethodRequests => Some(Kind::MethodResponses),
        Kind::MethodResponses => Some(Kind::MethodRequests),
        Kind::TwinRequests => Some(Kind::TwinResponses),
        Kind::TwinResponses => Some(Kind::TwinRequests),
        Kind::Telemetry | Kind::Inputs | Kind::CloudToDevice | Kind::Silent => None,
    }
}

//! The performatives of frames (OASIS AMQP 1.0 part 2 section 2.7).
//!
//! Transfer, flow and disposition come for each message or so: they are read and written by hand
//! and allocate nothing (a delivery tag is a slice of the frame). The others go through
//! serde_amqp, after [`crate::value::check`]'s rules were applied to their bytes and in a form
//! that it reads without fail.

mod encode;
mod fields;
mod plain;

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use fe2o3_amqp_types::definitions::{Error as WireError, ErrorCondition, Role};
use fe2o3_amqp_types::performatives::{Attach, Begin, Close, Detach, End, Open};
use serde::de::DeserializeOwned;
use serde_amqp::primitives::Symbol;

use crate::value::{DecodeError, Described, List, Value};

pub use encode::{
    EncodeError, encode_attach, encode_begin, encode_close, encode_detach, encode_disposition,
    encode_end, encode_flow, encode_open, encode_transfer,
};

pub(crate) use fields::{Fields, descriptor_code, list, unexpected, write_described};

use fields::wrong;
use plain::write_plain;

const OPEN: u64 = 0x10;
const BEGIN: u64 = 0x11;
const ATTACH: u64 = 0x12;
const FLOW: u64 = 0x13;
const TRANSFER: u64 = 0x14;
const DISPOSITION: u64 = 0x15;
const DETACH: u64 = 0x16;
const END: u64 = 0x17;
const CLOSE: u64 = 0x18;
const ERROR: u64 = 0x1d;
const RECEIVED: u64 = 0x23;
const ACCEPTED: u64 = 0x24;
const REJECTED: u64 = 0x25;
const RELEASED: u64 = 0x26;
const MODIFIED: u64 = 0x27;
const COORDINATOR: u64 = 0x30;

/// One performative.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Performative {
    /// Opens a connection.
    Open(Box<Open>),
    /// Begins a session.
    Begin(Box<Begin>),
    /// Attaches a link.
    Attach(Box<AttachFrame>),
    /// Windows and credit.
    Flow(Flow),
    /// A delivery, or a part of one.
    Transfer(Transfer),
    /// States of deliveries.
    Disposition(Disposition),
    /// Detaches a link.
    Detach(Detach),
    /// Ends a session.
    End(End),
    /// Closes the connection.
    Close(Close),
}

/// An attach with what its type has no place for.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachFrame {
    /// The performative; without a target where [`AttachFrame::coordinator`].
    pub attach: Attach,
    /// The target is a transaction coordinator (part 4, 4.5.1), which is not served.
    pub coordinator: bool,
}

/// An error of a performative or a rejected delivery (part 2, 2.8.14); its info map is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorInfo {
    /// The condition, a symbol.
    pub condition: Cow<'static, str>,
    /// Text for humans.
    pub description: Option<String>,
}

/// Terminal state of a delivery (part 3, 3.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Taken.
    Accepted,
    /// Invalid, with why.
    Rejected(Option<ErrorInfo>),
    /// Not taken, as if it never was sent.
    Released,
    /// Not taken, with changes; the map of annotations is left out.
    Modified {
        /// Counts as a failed delivery.
        delivery_failed: bool,
        /// Not to be sent to this peer again.
        undeliverable_here: bool,
    },
}

/// State of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeliveryState {
    /// A terminal state.
    Outcome(Outcome),
    /// How far a delivery came; of meaning for resumption alone.
    Received,
    /// One that this engine does not know, such as a transaction's.
    Other,
}

/// flow (part 2, 2.7.4). Its `properties` are not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Next transfer id that is expected; absent before the peer's begin was seen.
    pub next_incoming_id: Option<u32>,
    /// Transfers that the sender of the frame takes.
    pub incoming_window: u32,
    /// Next transfer id of the sender of the frame.
    pub next_outgoing_id: u32,
    /// Transfers that it would send.
    pub outgoing_window: u32,
    /// The link; absent: session only.
    pub handle: Option<u32>,
    /// Deliveries of the link so far.
    pub delivery_count: Option<u32>,
    /// Deliveries that may come from `delivery_count` on.
    pub link_credit: Option<u32>,
    /// Deliveries that wait at the link's sender.
    pub available: Option<u32>,
    /// The sender of the link uses the credit up.
    pub drain: bool,
    /// The peer answers with a flow.
    pub echo: bool,
}

/// transfer (part 2, 2.7.5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// The link.
    pub handle: u32,
    /// Number of the delivery; may be absent on continuations.
    pub delivery_id: Option<u32>,
    /// Tag of the delivery; may be absent on continuations.
    pub delivery_tag: Option<Bytes>,
    /// Format of the message; may be absent on continuations.
    pub message_format: Option<u32>,
    /// Settled by its sender. Absent on the first transfer means false.
    pub settled: Option<bool>,
    /// More transfers of the delivery follow.
    pub more: bool,
    /// 0 first, 1 second; overrides the link's.
    pub rcv_settle_mode: Option<u8>,
    /// State at the sender.
    pub state: Option<DeliveryState>,
    /// Resumes a delivery.
    pub resume: bool,
    /// The delivery is given up; what came of it is void.
    pub aborted: bool,
    /// A disposition may wait.
    pub batchable: bool,
}

/// disposition (part 2, 2.7.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disposition {
    /// Who says it: the receiver or the sender of the deliveries.
    pub role: Role,
    /// First delivery.
    pub first: u32,
    /// Last delivery; absent: the first.
    pub last: Option<u32>,
    /// Settled by who says it.
    pub settled: bool,
    /// The state.
    pub state: Option<DeliveryState>,
    /// May be answered late.
    pub batchable: bool,
}

impl ErrorInfo {
    /// An error with a text.
    pub fn new(condition: impl Into<Cow<'static, str>>, description: impl Into<String>) -> Self {
        Self {
            condition: condition.into(),
            description: Some(description.into()),
        }
    }
}

impl From<WireError> for ErrorInfo {
    fn from(error: WireError) -> Self {
        Self {
            condition: Cow::Owned(condition_text(&error.condition)),
            description: error.description,
        }
    }
}

impl From<&ErrorInfo> for WireError {
    fn from(error: &ErrorInfo) -> Self {
        let condition = ErrorCondition::Custom(error.condition.as_ref().into());
        Self::new(condition, error.description.clone(), None)
    }
}

fn condition_text(condition: &ErrorCondition) -> String {
    match condition {
        ErrorCondition::AmqpError(error) => Symbol::from(error).into_inner(),
        ErrorCondition::ConnectionError(error) => Symbol::from(error).into_inner(),
        ErrorCondition::SessionError(error) => Symbol::from(error).into_inner(),
        ErrorCondition::LinkError(error) => Symbol::from(error).into_inner(),
        ErrorCondition::Custom(symbol) => symbol.as_str().to_owned(),
    }
}

/// Reads the performative at the beginning of a frame's body, and the payload behind it; the
/// payload and a delivery tag are slices of `body`.
///
/// # Errors
/// When the bytes are no performative; the connection is to be closed.
pub fn decode(body: &Bytes) -> Result<(Performative, Bytes), DecodeError> {
    let mut rest: &[u8] = body;
    let value = Value::read(&mut rest)?;
    let length = body.len().saturating_sub(rest.len());
    let Value::Described(described) = value else {
        return Err(DecodeError::Type {
            field: "performative",
            expected: "a described list",
        });
    };
    let code = descriptor_code(&described)?;
    let performative = match code {
        FLOW => Performative::Flow(read_flow(&described)?),
        TRANSFER => Performative::Transfer(read_transfer(&described, body)?),
        DISPOSITION => Performative::Disposition(read_disposition(&described)?),
        OPEN => Performative::Open(cold("open", code, list(&described)?, &[])?),
        BEGIN => Performative::Begin(cold("begin", code, list(&described)?, &[])?),
        ATTACH => Performative::Attach(Box::new(read_attach(list(&described)?)?)),
        DETACH => Performative::Detach(*cold("detach", code, list(&described)?, &[])?),
        END => Performative::End(*cold("end", code, list(&described)?, &[])?),
        CLOSE => Performative::Close(*cold("close", code, list(&described)?, &[])?),
        _ => return Err(unexpected(&described)),
    };
    Ok((performative, body.slice(length..)))
}

fn cold<T: DeserializeOwned>(
    performative: &'static str,
    code: u64,
    fields: List<'_>,
    without: &[usize],
) -> Result<Box<T>, DecodeError> {
    let mut bytes = BytesMut::new();
    write_plain(code, fields, without, &mut bytes);
    let read = serde_amqp::from_slice(&bytes);
    read.map(Box::new)
        .map_err(|error| DecodeError::Performative {
            performative,
            reason: reason(&error).to_owned(),
        })
}

/// Not the error's own text, which may have values of the peer in it.
fn reason(error: &serde_amqp::Error) -> &'static str {
    match error {
        serde_amqp::Error::InvalidFormatCode => "a field is of another type",
        serde_amqp::Error::SequenceLengthMismatch | serde_amqp::Error::InvalidLength => {
            "a field has another number of elements"
        }
        serde_amqp::Error::Io(_) => "it ends too early",
        _ => "a field is missing or its value is not one that is allowed",
    }
}

/// An attach whose target is a coordinator is read without its target; unsettled deliveries are
/// of meaning for resumption alone and are not read.
fn read_attach(fields: List<'_>) -> Result<AttachFrame, DecodeError> {
    const TARGET: usize = 6;
    const UNSETTLED: usize = 7;
    let coordinator = match fields.iter().nth(TARGET) {
        Some(Value::Described(target)) => descriptor_code(&target) == Ok(COORDINATOR),
        _ => false,
    };
    let without: &[usize] = if coordinator {
        &[TARGET, UNSETTLED]
    } else {
        &[UNSETTLED]
    };
    Ok(AttachFrame {
        attach: *cold("attach", ATTACH, fields, without)?,
        coordinator,
    })
}

fn read_flow(described: &Described<'_>) -> Result<Flow, DecodeError> {
    let mut fields = Fields::of(described)?;
    Ok(Flow {
        next_incoming_id: fields.uint("next-incoming-id")?,
        incoming_window: fields.mandatory_uint("incoming-window")?,
        next_outgoing_id: fields.mandatory_uint("next-outgoing-id")?,
        outgoing_window: fields.mandatory_uint("outgoing-window")?,
        handle: fields.uint("handle")?,
        delivery_count: fields.uint("delivery-count")?,
        link_credit: fields.uint("link-credit")?,
        available: fields.uint("available")?,
        drain: fields.flag("drain")?,
        echo: fields.flag("echo")?,
    })
}

fn read_transfer(described: &Described<'_>, body: &Bytes) -> Result<Transfer, DecodeError> {
    let mut fields = Fields::of(described)?;
    Ok(Transfer {
        handle: fields.mandatory_uint("handle")?,
        delivery_id: fields.uint("delivery-id")?,
        delivery_tag: fields
            .binary("delivery-tag")?
            .map(|tag| body.slice_ref(tag)),
        message_format: fields.uint("message-format")?,
        settled: fields.bool("settled")?,
        more: fields.flag("more")?,
        rcv_settle_mode: fields.ubyte("rcv-settle-mode")?,
        state: fields.state()?,
        resume: fields.flag("resume")?,
        aborted: fields.flag("aborted")?,
        batchable: fields.flag("batchable")?,
    })
}

fn read_disposition(described: &Described<'_>) -> Result<Disposition, DecodeError> {
    let mut fields = Fields::of(described)?;
    let role = fields.bool("role")?;
    Ok(Disposition {
        role: match role.ok_or(DecodeError::Missing { field: "role" })? {
            false => Role::Sender,
            true => Role::Receiver,
        },
        first: fields.mandatory_uint("first")?,
        last: fields.uint("last")?,
        settled: fields.flag("settled")?,
        state: fields.state()?,
        batchable: fields.flag("batchable")?,
    })
}

fn read_state(described: &Described<'_>) -> Result<DeliveryState, DecodeError> {
    // A state by a descriptor that is no code or known symbol is another's extension.
    let Ok(code) = descriptor_code(described) else {
        return Ok(DeliveryState::Other);
    };
    let outcome = match code {
        ACCEPTED => Outcome::Accepted,
        RELEASED => Outcome::Released,
        REJECTED => {
            let mut fields = Fields::of(described)?;
            Outcome::Rejected(match fields.next() {
                Value::Described(error) => Some(read_error(&error)?),
                Value::Null => None,
                _ => return Err(wrong("error", "an error")),
            })
        }
        MODIFIED => {
            let mut fields = Fields::of(described)?;
            Outcome::Modified {
                delivery_failed: fields.flag("delivery-failed")?,
                undeliverable_here: fields.flag("undeliverable-here")?,
            }
        }
        RECEIVED => return Ok(DeliveryState::Received),
        _ => return Ok(DeliveryState::Other),
    };
    Ok(DeliveryState::Outcome(outcome))
}

fn read_error(described: &Described<'_>) -> Result<ErrorInfo, DecodeError> {
    if descriptor_code(described)? != ERROR {
        return Err(unexpected(described));
    }
    let mut fields = Fields::of(described)?;
    let condition = fields.text("condition")?;
    let condition = condition.ok_or(DecodeError::Missing { field: "condition" })?;
    Ok(ErrorInfo {
        condition: Cow::Owned(condition.to_owned()),
        description: fields.text("description")?.map(str::to_owned),
    })
}

#[cfg(test)]
mod tests;

//! The performatives of frames (OASIS AMQP 1.0 part 2 section 2.7).
//!
//! Transfer, flow and disposition come for each message or so: they are read and written by hand
//! and allocate nothing (a delivery tag is a slice of the frame). The others go through
//! serde_amqp, after [`crate::value::check`]'s rules were applied to their bytes.

use std::borrow::Cow;

use bytes::{Bytes, BytesMut};
use fe2o3_amqp_types::definitions::{Error as WireError, ErrorCondition, Role};
use fe2o3_amqp_types::performatives::{Attach, Begin, Close, Detach, End, Open};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_amqp::primitives::Symbol;

use crate::value::{DecodeError, Described, List, Value, write_compound};

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

/// Codes of descriptors and the symbols that may stand for them.
const SYMBOLS: [(&str, u64); 30] = [
    ("amqp:open:list", OPEN),
    ("amqp:begin:list", BEGIN),
    ("amqp:attach:list", ATTACH),
    ("amqp:flow:list", FLOW),
    ("amqp:transfer:list", TRANSFER),
    ("amqp:disposition:list", DISPOSITION),
    ("amqp:detach:list", DETACH),
    ("amqp:end:list", END),
    ("amqp:close:list", CLOSE),
    ("amqp:error:list", ERROR),
    ("amqp:received:list", RECEIVED),
    ("amqp:accepted:list", ACCEPTED),
    ("amqp:rejected:list", REJECTED),
    ("amqp:released:list", RELEASED),
    ("amqp:modified:list", MODIFIED),
    ("amqp:coordinator:list", COORDINATOR),
    ("amqp:header:list", 0x70),
    ("amqp:delivery-annotations:map", 0x71),
    ("amqp:message-annotations:map", 0x72),
    ("amqp:properties:list", 0x73),
    ("amqp:application-properties:map", 0x74),
    ("amqp:data:binary", 0x75),
    ("amqp:amqp-sequence:list", 0x76),
    ("amqp:amqp-value:*", 0x77),
    ("amqp:footer:map", 0x78),
    ("amqp:sasl-mechanisms:list", 0x40),
    ("amqp:sasl-init:list", 0x41),
    ("amqp:sasl-challenge:list", 0x42),
    ("amqp:sasl-response:list", 0x43),
    ("amqp:sasl-outcome:list", 0x44),
];

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
    let bytes = body.get(..length).unwrap_or_default();
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
        OPEN => Performative::Open(cold("open", bytes)?),
        BEGIN => Performative::Begin(cold("begin", bytes)?),
        ATTACH => Performative::Attach(Box::new(read_attach(&described, bytes)?)),
        DETACH => Performative::Detach(*cold("detach", bytes)?),
        END => Performative::End(*cold("end", bytes)?),
        CLOSE => Performative::Close(*cold("close", bytes)?),
        _ => return Err(unexpected(&described)),
    };
    Ok((performative, body.slice(length..)))
}

fn cold<T: DeserializeOwned>(
    performative: &'static str,
    bytes: &[u8],
) -> Result<Box<T>, DecodeError> {
    let read = serde_amqp::from_slice(bytes);
    read.map(Box::new)
        .map_err(|error| DecodeError::Performative {
            performative,
            reason: error.to_string(),
        })
}

/// An attach whose target is a coordinator is read without its target.
fn read_attach(described: &Described<'_>, bytes: &[u8]) -> Result<AttachFrame, DecodeError> {
    const TARGET: usize = 6;
    let fields = list(described)?;
    let coordinator = match fields.iter().nth(TARGET) {
        Some(Value::Described(target)) => descriptor_code(&target) == Ok(COORDINATOR),
        _ => false,
    };
    if !coordinator {
        let attach = *cold("attach", bytes)?;
        return Ok(AttachFrame {
            attach,
            coordinator,
        });
    }
    let mut without = BytesMut::with_capacity(bytes.len());
    write_described(&mut without, ATTACH, |out| {
        for (index, field) in fields.iter().enumerate() {
            let field = if index == TARGET { Value::Null } else { field };
            out.push(field);
        }
    });
    let attach = *cold("attach", &without)?;
    Ok(AttachFrame {
        attach,
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

/// Appends a flow.
pub fn encode_flow(flow: &Flow, out: &mut BytesMut) {
    write_described(out, FLOW, |out| {
        out.uint(flow.next_incoming_id);
        out.uint(Some(flow.incoming_window));
        out.uint(Some(flow.next_outgoing_id));
        out.uint(Some(flow.outgoing_window));
        out.uint(flow.handle);
        out.uint(flow.delivery_count);
        out.uint(flow.link_credit);
        out.uint(flow.available);
        out.flag(flow.drain);
        out.flag(flow.echo);
    });
}

/// Appends a transfer; its payload is the caller's to append.
pub fn encode_transfer(transfer: &Transfer, out: &mut BytesMut) {
    write_described(out, TRANSFER, |out| {
        out.uint(Some(transfer.handle));
        out.uint(transfer.delivery_id);
        out.optional(transfer.delivery_tag.as_ref().map(|tag| Value::Binary(tag)));
        out.uint(transfer.message_format);
        out.optional(transfer.settled.map(Value::Bool));
        out.flag(transfer.more);
        out.optional(transfer.rcv_settle_mode.map(Value::Ubyte));
        out.state(transfer.state.as_ref());
        out.flag(transfer.resume);
        out.flag(transfer.aborted);
        out.flag(transfer.batchable);
    });
}

/// Appends a disposition.
pub fn encode_disposition(disposition: &Disposition, out: &mut BytesMut) {
    write_described(out, DISPOSITION, |out| {
        out.push(Value::Bool(disposition.role == Role::Receiver));
        out.uint(Some(disposition.first));
        out.uint(disposition.last);
        out.flag(disposition.settled);
        out.state(disposition.state.as_ref());
        out.flag(disposition.batchable);
    });
}

/// Appends an open.
///
/// # Errors
/// When the types refuse to be written, which a value of this engine never does.
pub fn encode_open(open: &Open, out: &mut BytesMut) -> Result<(), EncodeError> {
    encode_cold("open", open, out)
}

/// Appends a begin.
///
/// # Errors
/// As [`encode_open`].
pub fn encode_begin(begin: &Begin, out: &mut BytesMut) -> Result<(), EncodeError> {
    encode_cold("begin", begin, out)
}

/// Appends an attach.
///
/// # Errors
/// As [`encode_open`].
pub fn encode_attach(attach: &Attach, out: &mut BytesMut) -> Result<(), EncodeError> {
    encode_cold("attach", attach, out)
}

/// Appends a detach.
pub fn encode_detach(handle: u32, closed: bool, error: Option<&ErrorInfo>, out: &mut BytesMut) {
    write_described(out, DETACH, |out| {
        out.uint(Some(handle));
        out.flag(closed);
        out.error(error);
    });
}

/// Appends an end.
pub fn encode_end(error: Option<&ErrorInfo>, out: &mut BytesMut) {
    write_described(out, END, |out| out.error(error));
}

/// Appends a close.
pub fn encode_close(error: Option<&ErrorInfo>, out: &mut BytesMut) {
    write_described(out, CLOSE, |out| out.error(error));
}

/// A performative that could not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the performative {performative} cannot be written: {reason}")]
pub struct EncodeError {
    /// Its name.
    pub performative: &'static str,
    /// What the encoder says.
    pub reason: String,
}

fn encode_cold<T: Serialize>(
    performative: &'static str,
    value: &T,
    out: &mut BytesMut,
) -> Result<(), EncodeError> {
    let bytes = serde_amqp::to_vec(value).map_err(|error| EncodeError {
        performative,
        reason: error.to_string(),
    })?;
    out.extend_from_slice(&bytes);
    Ok(())
}

fn wrong(field: &'static str, expected: &'static str) -> DecodeError {
    DecodeError::Type { field, expected }
}

/// That a described value has no place where it stands.
pub(crate) fn unexpected(described: &Described<'_>) -> DecodeError {
    let descriptor = match described.descriptor() {
        Value::Ulong(code) => format!("{code:#x}"),
        Value::Symbol(name) => name.chars().take(64).collect(),
        _ => "of a type that is no descriptor".to_owned(),
    };
    DecodeError::Descriptor { descriptor }
}

/// The code of a descriptor, also where its symbol was sent.
pub(crate) fn descriptor_code(described: &Described<'_>) -> Result<u64, DecodeError> {
    let code = match described.descriptor() {
        Value::Ulong(code) => Some(code),
        Value::Symbol(name) => SYMBOLS
            .iter()
            .find(|(s, _)| *s == name)
            .map(|(_, code)| *code),
        _ => None,
    };
    code.ok_or_else(|| unexpected(described))
}

pub(crate) fn list<'a>(described: &Described<'a>) -> Result<List<'a>, DecodeError> {
    match described.value() {
        Value::List(list) => Ok(list),
        _ => Err(wrong("composite", "a list")),
    }
}

/// Fields of a composite in their order. Those behind the last that was sent are null; those
/// that the standard does not have are not looked at.
pub(crate) struct Fields<I>(I);

impl<'a> Fields<()> {
    pub(crate) fn of(
        described: &Described<'a>,
    ) -> Result<Fields<impl Iterator<Item = Value<'a>> + use<'a>>, DecodeError> {
        Ok(Fields(list(described)?.iter()))
    }
}

impl<'a, I: Iterator<Item = Value<'a>>> Fields<I> {
    pub(crate) fn next(&mut self) -> Value<'a> {
        self.0.next().unwrap_or(Value::Null)
    }

    pub(crate) fn uint(&mut self, field: &'static str) -> Result<Option<u32>, DecodeError> {
        match self.next() {
            Value::Uint(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a uint")),
        }
    }

    fn mandatory_uint(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.uint(field)?.ok_or(DecodeError::Missing { field })
    }

    pub(crate) fn ubyte(&mut self, field: &'static str) -> Result<Option<u8>, DecodeError> {
        match self.next() {
            Value::Ubyte(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a ubyte")),
        }
    }

    fn bool(&mut self, field: &'static str) -> Result<Option<bool>, DecodeError> {
        match self.next() {
            Value::Bool(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a boolean")),
        }
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        Ok(self.bool(field)?.unwrap_or(false))
    }

    pub(crate) fn binary(&mut self, field: &'static str) -> Result<Option<&'a [u8]>, DecodeError> {
        match self.next() {
            Value::Binary(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a binary")),
        }
    }

    /// A string or symbol: clients mix them up, and nothing depends on which it is.
    pub(crate) fn text(&mut self, field: &'static str) -> Result<Option<&'a str>, DecodeError> {
        match self.next() {
            Value::Str(value) | Value::Symbol(value) => Ok(Some(value)),
            Value::Null => Ok(None),
            _ => Err(wrong(field, "a string or symbol")),
        }
    }

    fn state(&mut self) -> Result<Option<DeliveryState>, DecodeError> {
        match self.next() {
            Value::Described(state) => read_state(&state).map(Some),
            Value::Null => Ok(None),
            _ => Err(wrong("state", "a delivery state")),
        }
    }
}

/// Writes the fields of a composite; nulls behind the last value are left out.
pub(crate) struct FieldWriter<'o> {
    out: &'o mut BytesMut,
    count: u32,
    nulls: u32,
}

/// Appends a composite.
pub(crate) fn write_described(
    out: &mut BytesMut,
    code: u64,
    fields: impl FnOnce(&mut FieldWriter<'_>),
) {
    out.extend_from_slice(&[0x00]);
    Value::Ulong(code).write(out);
    write_compound(out, 0xc0, |out| {
        let mut writer = FieldWriter {
            out,
            count: 0,
            nulls: 0,
        };
        fields(&mut writer);
        writer.count
    });
}

impl FieldWriter<'_> {
    /// Nulls that were held back, and the field that comes.
    fn begin(&mut self) -> &mut BytesMut {
        for _ in 0..self.nulls {
            Value::Null.write(self.out);
        }
        self.count = self.count.saturating_add(self.nulls).saturating_add(1);
        self.nulls = 0;
        self.out
    }

    pub(crate) fn push(&mut self, value: Value<'_>) {
        if value.is_null() {
            self.nulls = self.nulls.saturating_add(1);
        } else {
            value.write(self.begin());
        }
    }

    pub(crate) fn optional(&mut self, value: Option<Value<'_>>) {
        self.push(value.unwrap_or(Value::Null));
    }

    pub(crate) fn uint(&mut self, value: Option<u32>) {
        self.optional(value.map(Value::Uint));
    }

    /// A boolean whose default is false.
    pub(crate) fn flag(&mut self, value: bool) {
        self.optional(value.then_some(Value::Bool(true)));
    }

    fn error(&mut self, error: Option<&ErrorInfo>) {
        match error {
            None => self.push(Value::Null),
            Some(error) => write_described(self.begin(), ERROR, |out| {
                out.push(Value::Symbol(&error.condition));
                out.optional(error.description.as_deref().map(Value::Str));
            }),
        }
    }

    /// States that are not an outcome are none of this engine's to send.
    fn state(&mut self, state: Option<&DeliveryState>) {
        let Some(DeliveryState::Outcome(outcome)) = state else {
            return self.push(Value::Null);
        };
        let (code, empty) = match outcome {
            Outcome::Accepted => (ACCEPTED, true),
            Outcome::Released => (RELEASED, true),
            Outcome::Rejected(_) => (REJECTED, false),
            Outcome::Modified { .. } => (MODIFIED, false),
        };
        let out = self.begin();
        if empty {
            out.extend_from_slice(&[0x00]);
            Value::Ulong(code).write(out);
            Value::List(List::default()).write(out);
            return;
        }
        write_described(out, code, |out| match outcome {
            Outcome::Rejected(error) => out.error(error.as_ref()),
            Outcome::Modified {
                delivery_failed,
                undeliverable_here,
            } => {
                out.flag(*delivery_failed);
                out.flag(*undeliverable_here);
            }
            Outcome::Accepted | Outcome::Released => {}
        });
    }
}

#[cfg(test)]
#[path = "performative_tests.rs"]
mod tests;

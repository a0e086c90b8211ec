//! Writing of performatives.

use bytes::BytesMut;
use fe2o3_amqp_types::definitions::Role;
use fe2o3_amqp_types::performatives::{Attach, Begin, Open};
use serde::Serialize;

use super::fields::write_described;
use super::{
    CLOSE, DETACH, DISPOSITION, Disposition, END, ErrorInfo, FLOW, Flow, TRANSFER, Transfer,
};
use crate::value::Value;

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

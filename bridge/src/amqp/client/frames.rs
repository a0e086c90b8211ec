//! Frames on their way into the output.

use bytes::{BufMut, Bytes, BytesMut};
use edgehub_amqp::frame::FRAME_HEADER_BYTES;
use edgehub_amqp::performative::{self, EncodeError, Transfer};

/// Appends a frame whose body `write` makes.
pub(super) fn frame<E>(
    out: &mut BytesMut,
    channel: u16,
    write: impl FnOnce(&mut BytesMut) -> Result<(), E>,
) -> Result<(), E> {
    let start = begin(out, channel);
    let result = write(out);
    if result.is_err() {
        out.truncate(start);
    } else {
        finish(out, start);
    }
    result
}

/// Appends a frame whose body cannot fail.
pub(super) fn sure(out: &mut BytesMut, channel: u16, write: impl FnOnce(&mut BytesMut)) {
    let _ = frame(out, channel, |out| {
        write(out);
        Ok::<(), EncodeError>(())
    });
}

/// Appends one transfer with as much of `rest` as fits into a frame of `bytes_max`, and takes that
/// off `rest`.
pub(super) fn transfer(
    out: &mut BytesMut,
    channel: u16,
    bytes_max: usize,
    mut transfer: Transfer,
    rest: &mut Bytes,
) {
    let start = begin(out, channel);
    for more in [false, true] {
        transfer.more = more;
        out.truncate(start + FRAME_HEADER_BYTES);
        performative::encode_transfer(&transfer, out);
        let used = out.len() - start;
        let room = bytes_max.saturating_sub(used);
        if more || rest.len() <= room {
            let part = rest.split_to(rest.len().min(room));
            out.extend_from_slice(&part);
            break;
        }
    }
    finish(out, start);
}

fn begin(out: &mut BytesMut, channel: u16) -> usize {
    let start = out.len();
    out.put_u32(0);
    out.put_u8(2);
    out.put_u8(0);
    out.put_u16(channel);
    start
}

fn finish(out: &mut BytesMut, start: usize) {
    let size = u32::try_from(out.len().saturating_sub(start)).unwrap_or(u32::MAX);
    if let Some(place) = out.get_mut(start..start + 4) {
        place.copy_from_slice(&size.to_be_bytes());
    }
}

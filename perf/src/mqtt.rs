//! As much of MQTT 3.1.1 as a publisher needs, by hand.
//!
//! The codec is this small so that the generator's own cost stays out of the figures as far as
//! possible, and so that it is neither the hub's codec nor that of the tests.

use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::load::{Publisher, Stream};

/// Asks the server to close.
pub(crate) const DISCONNECT: [u8; 2] = [0xE0, 0];

/// Longest answer that a server has reason to send to a publisher.
const ANSWER_BYTES_MAX: usize = 4096;

/// User name and password of a CONNECT.
#[derive(Clone, Debug)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: String,
}

/// A CONNECT packet with clean session and a keep-alive that never comes due in a measurement.
fn connect(client_id: &str, login: Option<&Login>) -> Vec<u8> {
    const CLEAN_SESSION: u8 = 0x02;
    const USER_AND_PASSWORD: u8 = 0xC0;
    const KEEP_ALIVE_SECS: u16 = 600;
    let flags = CLEAN_SESSION
        | if login.is_some() {
            USER_AND_PASSWORD
        } else {
            0
        };
    let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, flags];
    body.extend(KEEP_ALIVE_SECS.to_be_bytes());
    push_text(&mut body, client_id);
    if let Some(login) = login {
        push_text(&mut body, &login.user);
        push_text(&mut body, &login.password);
    }
    packet(0x10, &body)
}

/// Sends CONNECT and waits until it is accepted.
///
/// # Errors
/// When it is not.
pub(crate) async fn open(
    stream: &mut dyn Stream,
    client_id: &str,
    login: Option<&Login>,
) -> Result<()> {
    stream.write_all(&connect(client_id, login)).await?;
    stream.flush().await?;
    let mut answer = [0; 4];
    stream
        .read_exact(&mut answer)
        .await
        .context("closed instead of CONNACK")?;
    match decode(&answer)? {
        Some((Answer::ConnAck { code: 0 }, _)) => Ok(()),
        other => bail!("CONNECT was answered with {other:?}"),
    }
}

/// A window of QoS 1 publishes.
#[derive(Debug)]
pub(crate) struct Sender {
    template: PublishTemplate,
    /// Packet ids that are not in flight.
    free: Vec<u16>,
    /// When each packet id, from 1 on, was sent; none while it is free.
    sent: Vec<Option<Instant>>,
}

impl Sender {
    pub(crate) fn new(topic: &str, body_bytes: usize, window: u16) -> Self {
        Self {
            template: PublishTemplate::new(topic, body_bytes),
            free: (1..=window).rev().collect(),
            sent: vec![None; usize::from(window)],
        }
    }

    fn slot(&mut self, packet_id: u16) -> Result<&mut Option<Instant>> {
        let at = usize::from(packet_id).checked_sub(1);
        at.and_then(|at| self.sent.get_mut(at))
            .context("a packet id that was never used")
    }
}

impl Publisher for Sender {
    fn fill(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<()> {
        while let Some(packet_id) = self.free.pop() {
            self.template.write(packet_id, out);
            *self.slot(packet_id)? = Some(now);
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8], acknowledged: &mut dyn FnMut(Instant)) -> Result<usize> {
        let mut used = 0;
        while let Some((answer, length)) = decode(bytes.get(used..).unwrap_or_default())? {
            used += length;
            let Answer::PubAck { packet_id } = answer else {
                bail!("a second CONNACK");
            };
            let sent = self.slot(packet_id)?.take();
            acknowledged(sent.with_context(|| format!("packet id {packet_id} is not in flight"))?);
            self.free.push(packet_id);
        }
        Ok(used)
    }

    fn in_flight(&self) -> usize {
        self.sent.len() - self.free.len()
    }

    fn farewell(&self) -> Vec<u8> {
        DISCONNECT.to_vec()
    }
}

/// One PUBLISH of QoS 1; only its packet id changes from one to the next.
#[derive(Clone, Debug)]
struct PublishTemplate {
    before: Vec<u8>,
    after: Vec<u8>,
}

impl PublishTemplate {
    fn new(topic: &str, body_bytes: usize) -> Self {
        const QOS_1: u8 = 0x32;
        let mut head = Vec::new();
        push_text(&mut head, topic);
        let mut before = vec![QOS_1];
        push_remaining_length(&mut before, head.len() + 2 + body_bytes);
        before.extend(head);
        // Not all the same byte: nothing on the way shall profit from that.
        let after = (0u8..=255).cycle().step_by(7).take(body_bytes).collect();
        Self { before, after }
    }

    fn write(&self, packet_id: u16, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.before);
        out.extend_from_slice(&packet_id.to_be_bytes());
        out.extend_from_slice(&self.after);
    }
}

/// What a server answers to a publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Accepted when the code is 0.
    ConnAck { code: u8 },
    /// The publish with this packet id is taken.
    PubAck { packet_id: u16 },
}

/// The first complete packet of `bytes` and its length; `None` while it is not complete.
fn decode(bytes: &[u8]) -> Result<Option<(Answer, usize)>> {
    let Some((&kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    let mut length = 0;
    for (at, &byte) in rest.iter().enumerate().take(4) {
        length |= usize::from(byte & 0x7F) << (7 * at);
        ensure!(length <= ANSWER_BYTES_MAX, "an answer of {length} bytes");
        if byte & 0x80 == 0 {
            let (start, end) = (at + 2, at + 2 + length);
            let Some(body) = bytes.get(start..end) else {
                return Ok(None);
            };
            let answer = match (kind, body) {
                (0x20, [_, code]) => Answer::ConnAck { code: *code },
                (0x40, [high, low]) => Answer::PubAck {
                    packet_id: u16::from_be_bytes([*high, *low]),
                },
                _ => bail!("unexpected packet 0x{kind:02x} of {length} bytes"),
            };
            return Ok(Some((answer, end)));
        }
    }
    ensure!(rest.len() < 4, "remaining length of more than four bytes");
    Ok(None)
}

fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    push_remaining_length(&mut bytes, body.len());
    bytes.extend_from_slice(body);
    bytes
}

fn push_remaining_length(out: &mut Vec<u8>, mut length: usize) {
    loop {
        let digit = u8::try_from(length % 128).unwrap_or_default();
        length /= 128;
        out.push(if length > 0 { digit | 0x80 } else { digit });
        if length == 0 {
            return;
        }
    }
}

/// A text with its length in front; what does not fit into the two bytes of the length is cut.
fn push_text(out: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
    out.extend(length.to_be_bytes());
    out.extend(text.bytes().take(usize::from(length)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connect_has_the_bytes_of_the_standard() {
        let bytes = connect("ab", None);
        assert_eq!(bytes, b"\x10\x0e\x00\x04MQTT\x04\x02\x02\x58\x00\x02ab");
        let login = Login {
            user: "u".to_owned(),
            password: "pw".to_owned(),
        };
        let bytes = connect("a", Some(&login));
        assert_eq!(&bytes[8..10], [4, 0xC2]);
        assert!(bytes.ends_with(b"\x00\x01a\x00\x01u\x00\x02pw"));
    }

    #[test]
    fn publish_has_the_bytes_of_the_standard() {
        let mut bytes = Vec::new();
        PublishTemplate::new("t", 3).write(0x0102, &mut bytes);
        assert_eq!(bytes, b"\x32\x08\x00\x01t\x01\x02\x00\x07\x0e");
        let mut bytes = Vec::new();
        PublishTemplate::new("t", 1024).write(1, &mut bytes);
        assert_eq!(&bytes[..3], [0x32, 0x85, 0x08]);
        assert_eq!(bytes.len(), 3 + 1029);
    }

    #[test]
    fn answers_are_read_one_after_the_other() {
        let bytes = b"\x20\x02\x00\x05\x40\x02\x12\x34";
        let (first, used) = decode(bytes).unwrap().unwrap();
        assert_eq!((first, used), (Answer::ConnAck { code: 5 }, 4));
        let (second, _) = decode(&bytes[used..]).unwrap().unwrap();
        assert_eq!(second, Answer::PubAck { packet_id: 0x1234 });
        for cut in 0..4 {
            assert_eq!(decode(&bytes[4..4 + cut]).unwrap(), None);
        }
    }

    #[test]
    fn anything_else_ends_the_measurement() {
        assert!(decode(b"\x30\x00").is_err());
        assert!(decode(b"\x40\xff\xff\xff\xff\x01").is_err());
        assert!(decode(b"\x40\xff\xff\x7f").is_err());
    }
}

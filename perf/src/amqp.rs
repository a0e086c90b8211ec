//! As much of AMQP 1.0 as a sender needs, by hand: SASL PLAIN, one session, one link.
//!
//! The codec is this small for the reasons of [`crate::mqtt`]'s. Clause numbers are those of the
//! OASIS standard's parts 2 (transport) and 5 (security).

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::load::{Publisher, Stream};

const SASL_HEADER: [u8; 8] = *b"AMQP\x03\x01\x00\x00";
const AMQP_HEADER: [u8; 8] = *b"AMQP\x00\x01\x00\x00";

/// Longest frame that a hub has reason to send to a sender.
const FRAME_BYTES_MAX: usize = 64 * 1024;

/// Descriptors (2.7 and 5.3.3).
mod code {
    pub(super) const OPEN: u8 = 0x10;
    pub(super) const BEGIN: u8 = 0x11;
    pub(super) const ATTACH: u8 = 0x12;
    pub(super) const FLOW: u8 = 0x13;
    pub(super) const TRANSFER: u8 = 0x14;
    pub(super) const DISPOSITION: u8 = 0x15;
    pub(super) const CLOSE: u8 = 0x18;
    pub(super) const ACCEPTED: u8 = 0x24;
    pub(super) const SOURCE: u8 = 0x28;
    pub(super) const TARGET: u8 = 0x29;
    pub(super) const SASL_INIT: u8 = 0x41;
    pub(super) const SASL_OUTCOME: u8 = 0x44;
    pub(super) const DATA: u8 = 0x75;
}

/// Who sends, and where to.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    pub(crate) user: String,
    pub(crate) password: String,
    /// Of the link's target.
    pub(crate) address: String,
}

/// One link with a window of unsettled transfers.
#[derive(Debug)]
pub(crate) struct Sender {
    before: Vec<u8>,
    middle: Vec<u8>,
    after: Vec<u8>,
    window: usize,
    /// When each unsettled delivery was written, the oldest first; none once it is settled.
    sent: VecDeque<Option<Instant>>,
    unsettled: usize,
    /// Number of the oldest in `sent`, and of the delivery that is next.
    first: u32,
    next: u32,
    /// Deliveries that the hub has given credit for, and transfers that its window has room for,
    /// both from the beginning.
    credit_until: u32,
    window_until: u32,
}

impl Sender {
    /// Logs in and attaches the link; the hub has given credit then.
    ///
    /// # Errors
    /// When the hub refuses anything of it.
    pub(crate) async fn open(
        stream: &mut dyn Stream,
        account: &Account,
        body_bytes: usize,
        window: u16,
    ) -> Result<Self> {
        let plain = format!("\0{}\0{}", account.user, account.password);
        let init = [symbol("PLAIN"), binary(plain.as_bytes())];
        let init = frame(1, &described(code::SASL_INIT, &list(&init)));
        let hello = [
            AMQP_HEADER.to_vec(),
            frame(0, &open()),
            frame(0, &begin()),
            frame(0, &attach(&account.address)),
        ];
        stream.write_all(&SASL_HEADER).await?;
        stream.write_all(&init).await?;
        stream.flush().await?;
        header(stream, SASL_HEADER).await?;
        loop {
            let frame = read_frame(stream).await?;
            let frame = Frame::parse(&frame)?;
            if frame.code == code::SASL_OUTCOME {
                ensure!(frame.number(0) == Some(0), "SASL PLAIN is refused");
                break;
            }
        }
        stream.write_all(&hello.concat()).await?;
        stream.flush().await?;
        header(stream, AMQP_HEADER).await?;
        let mut sender = Self::new(body_bytes, window);
        while sender.credit_until == 0 {
            let frame = read_frame(stream).await?;
            sender.frame(&frame, &mut |_| {})?;
        }
        Ok(sender)
    }

    fn new(body_bytes: usize, window: u16) -> Self {
        // Not all the same byte: nothing on the way shall profit from that.
        let body: Vec<u8> = (0u8..=255).cycle().step_by(7).take(body_bytes).collect();
        let message = described(code::DATA, &binary(&body));
        let id = [0; 4];
        let transfer = |id: &[u8; 4]| {
            let fields = [
                uint(0),
                [&[0x70][..], id].concat(),
                binary(id),
                uint(0),
                vec![0x42],
            ];
            let performative = described(code::TRANSFER, &list(&fields));
            frame(0, &[performative, message.clone()].concat())
        };
        // Where the two places of the number are, told by what differs.
        let (zeros, ones) = (transfer(&id), transfer(&[1; 4]));
        let differs = |at: &usize| zeros.get(*at) != ones.get(*at);
        let mut places = (0..zeros.len()).filter(differs).step_by(4);
        let number = places.next().unwrap_or_default();
        let tag = places.next().unwrap_or_default();
        let part = |from, to| zeros.get(from..to).unwrap_or_default().to_vec();
        Self {
            before: part(0, number),
            middle: part(number + 4, tag),
            after: part(tag + 4, zeros.len()),
            window: usize::from(window),
            sent: VecDeque::new(),
            unsettled: 0,
            first: 0,
            next: 0,
            credit_until: 0,
            window_until: 0,
        }
    }

    /// Takes one frame, without its size.
    fn frame(&mut self, bytes: &[u8], settled: &mut dyn FnMut(Instant)) -> Result<()> {
        let frame = Frame::parse(bytes)?;
        let number = |index: usize| {
            let number = frame
                .number(index)
                .and_then(|number| u32::try_from(number).ok());
            number.with_context(|| format!("field {index} of a frame 0x{:02x}", frame.code))
        };
        match frame.code {
            // A heartbeat, and what is answered to the hello.
            0 | code::OPEN | code::BEGIN | code::ATTACH => {}
            code::FLOW => {
                self.window_until = frame.number(0).map_or(Ok(0), u32::try_from)? + number(1)?;
                if frame.number(4) == Some(0) {
                    self.credit_until = number(5)? + number(6)?;
                }
            }
            code::DISPOSITION => {
                ensure!(
                    frame.number(0) == Some(1),
                    "a disposition of a sender, which the hub is not"
                );
                let first = number(1)?;
                let last = frame.number(2).map_or(Ok(first), u32::try_from)?;
                let outcome = frame.outcome;
                ensure!(
                    outcome == Some(code::ACCEPTED),
                    "{first} to {last} have the outcome {outcome:?}"
                );
                ensure!(first <= last && last < self.next, "never sent: {last}");
                self.settle(first, last, settled)?;
            }
            other => bail!("the hub sends a frame 0x{other:02x}"),
        }
        Ok(())
    }

    fn settle(&mut self, first: u32, last: u32, settled: &mut dyn FnMut(Instant)) -> Result<()> {
        for number in first..=last {
            let at = number.checked_sub(self.first).map(usize::try_from);
            let place = at.and_then(|at| self.sent.get_mut(at.ok()?));
            let sent = place.and_then(Option::take);
            settled(sent.with_context(|| format!("{number} is settled twice"))?);
            self.unsettled -= 1;
        }
        while self.sent.front().is_some_and(Option::is_none) {
            self.sent.pop_front();
            self.first += 1;
        }
        Ok(())
    }
}

impl Publisher for Sender {
    fn fill(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<()> {
        let until = self.credit_until.min(self.window_until);
        while self.unsettled < self.window && self.next < until {
            let number = self.next.to_be_bytes();
            out.extend_from_slice(&self.before);
            out.extend_from_slice(&number);
            out.extend_from_slice(&self.middle);
            out.extend_from_slice(&number);
            out.extend_from_slice(&self.after);
            self.sent.push_back(Some(now));
            self.unsettled += 1;
            self.next += 1;
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8], settled: &mut dyn FnMut(Instant)) -> Result<usize> {
        let mut used = 0;
        while let Some((size, rest)) = bytes.get(used..).and_then(<[u8]>::split_first_chunk) {
            let size = frame_size(*size)?;
            let Some(frame) = rest.get(..size - 4) else {
                break;
            };
            self.frame(frame, settled)?;
            used += size;
        }
        Ok(used)
    }

    fn in_flight(&self) -> usize {
        self.unsettled
    }

    fn farewell(&self) -> Vec<u8> {
        frame(0, &described(code::CLOSE, &list(&[])))
    }
}

async fn header(stream: &mut dyn Stream, wanted: [u8; 8]) -> Result<()> {
    let mut header = [0; 8];
    stream.read_exact(&mut header).await.context("no header")?;
    ensure!(header == wanted, "the hub answers with {header:?}");
    Ok(())
}

fn frame_size(size: [u8; 4]) -> Result<usize> {
    let size = usize::try_from(u32::from_be_bytes(size))?;
    ensure!(
        (8..=FRAME_BYTES_MAX).contains(&size),
        "a frame of {size} bytes"
    );
    Ok(size)
}

/// One whole frame, without its size.
async fn read_frame(stream: &mut dyn Stream) -> Result<Vec<u8>> {
    let mut size = [0; 4];
    let read = stream.read_exact(&mut size).await;
    read.context("the hub closed the connection")?;
    let mut frame = vec![0; frame_size(size)? - 4];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

/// What a sender looks at in a performative: the scalars among its first fields, and an outcome.
#[derive(Debug, Default, PartialEq, Eq)]
struct Frame {
    /// 0 for an empty frame.
    code: u8,
    /// None where a field is null or no scalar.
    numbers: Vec<Option<u64>>,
    outcome: Option<u8>,
}

impl Frame {
    /// `bytes` begin behind the size (2.3.1).
    fn parse(bytes: &[u8]) -> Result<Self> {
        let offset = usize::from(*bytes.first().context("an empty frame")?) * 4;
        let start = offset.checked_sub(4).context("a data offset below 2")?;
        let mut body = bytes.get(start..).context("a data offset too far")?;
        if body.is_empty() {
            return Ok(Self::default());
        }
        let [0, 0x53, code, rest @ ..] = body else {
            bail!("a performative with another descriptor");
        };
        body = rest;
        let (count, mut fields) = match body {
            [0x45, rest @ ..] => (0, rest),
            [0xc0, _, count, rest @ ..] => (u32::from(*count), rest),
            [0xd0, _, _, _, _, a, b, c, d, rest @ ..] => {
                (u32::from_be_bytes([*a, *b, *c, *d]), rest)
            }
            _ => bail!("a performative that is no list"),
        };
        let mut frame = Self {
            code: *code,
            ..Self::default()
        };
        for _ in 0..count.min(8) {
            if let [0, 0x53, outcome, ..] = fields {
                frame.outcome = Some(*outcome);
                break;
            }
            let (number, rest) = scalar(fields).context("a field is cut")?;
            frame.numbers.push(number);
            fields = rest;
        }
        Ok(frame)
    }

    fn number(&self, index: usize) -> Option<u64> {
        self.numbers.get(index).copied().flatten()
    }
}

/// A value that is not described, and what is behind it (1.2: the first half of a constructor says
/// how many bytes follow).
fn scalar(bytes: &[u8]) -> Option<(Option<u64>, &[u8])> {
    let (&constructor, rest) = bytes.split_first()?;
    let fixed = |size: usize| {
        let number = rest.get(..size)?;
        let number = number
            .iter()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        Some((number, rest.get(size..)?))
    };
    Some(match constructor >> 4 {
        4 => match constructor {
            0x41 => (Some(1), rest),
            0x42..=0x44 => (Some(0), rest),
            _ => (None, rest),
        },
        kind @ 5..=8 => {
            let (number, rest) = fixed(1 << (kind - 5))?;
            (Some(number), rest)
        }
        9 => (None, rest.get(16..)?),
        kind @ (0xa..=0xf) => {
            let (size, rest) = fixed(if kind % 2 == 0 { 1 } else { 4 })?;
            (None, rest.get(usize::try_from(size).ok()?..)?)
        }
        _ => return None,
    })
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = length(body.len() + 8).to_vec();
    frame.extend([2, kind, 0, 0]);
    frame.extend_from_slice(body);
    frame
}

/// open with a container and a host name (2.7.1).
fn open() -> Vec<u8> {
    let fields = [string("edgehub-perf"), string("edgehub"), uint(65_536)];
    described(code::OPEN, &list(&fields))
}

/// begin: the hub is told of a large window (2.7.2).
fn begin() -> Vec<u8> {
    let fields = [vec![0x40], uint(0), uint(5_000), uint(5_000)];
    described(code::BEGIN, &list(&fields))
}

/// attach of a sender (2.7.3).
fn attach(address: &str) -> Vec<u8> {
    let fields = [
        string("telemetry"),
        uint(0),
        vec![0x42],
        vec![0x40],
        vec![0x40],
        described(code::SOURCE, &list(&[string("telemetry")])),
        described(code::TARGET, &list(&[string(address)])),
        vec![0x40],
        vec![0x40],
        uint(0),
    ];
    described(code::ATTACH, &list(&fields))
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

fn described(code: u8, value: &[u8]) -> Vec<u8> {
    [&[0, 0x53, code], value].concat()
}

fn uint(value: u32) -> Vec<u8> {
    [&[0x70][..], &value.to_be_bytes()].concat()
}

fn string(text: &str) -> Vec<u8> {
    variable(0xb1, text.as_bytes())
}

fn symbol(text: &str) -> Vec<u8> {
    variable(0xb3, text.as_bytes())
}

fn binary(bytes: &[u8]) -> Vec<u8> {
    match u8::try_from(bytes.len()) {
        Ok(size) => [&[0xa0, size], bytes].concat(),
        Err(_) => variable(0xb0, bytes),
    }
}

fn variable(constructor: u8, bytes: &[u8]) -> Vec<u8> {
    [&[constructor][..], &length(bytes.len()), bytes].concat()
}

fn list(fields: &[Vec<u8>]) -> Vec<u8> {
    let content = fields.concat();
    let (size, count) = (length(content.len() + 4), length(fields.len()));
    [&[0xd0][..], &size, &count, &content].concat()
}

#[cfg(test)]
#[path = "amqp_tests.rs"]
mod tests;

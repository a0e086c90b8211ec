//! A raw AMQP client: every frame is written by hand, value by value, and read back with serde_amqp.
//! Nothing of the hub's own engine is in it.
//!
//! Encodings (OASIS AMQP 1.0 part 1): `a1`/`b1` string, `a3`/`b3` symbol, `a0`/`b0` binary, `52`/`70`
//! uint, `53` ulong, `54`/`71` int, `41`/`42` true and false, `40` null, `98` uuid, `c0`/`d0` list,
//! `c1`/`d1` map, `00` described.

use std::time::Duration;

use edgehub_lab::Lab;
use rustls_pki_types::ServerName;
use serde_amqp::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::token::Token;
use crate::{PATIENCE, tls};

/// The header of AMQP.
pub const AMQP: [u8; 8] = *b"AMQP\x00\x01\x00\x00";
/// The header of SASL.
pub const SASL: [u8; 8] = *b"AMQP\x03\x01\x00\x00";
/// The header of TLS within.
pub const TLS: [u8; 8] = *b"AMQP\x02\x01\x00\x00";
/// Format of a batch.
pub const BATCH: u32 = 0x8001_3700;

/// Codes of performatives.
pub mod code {
    #![allow(missing_docs, reason = "the names say it")]
    pub const OPEN: u64 = 0x10;
    pub const BEGIN: u64 = 0x11;
    pub const ATTACH: u64 = 0x12;
    pub const FLOW: u64 = 0x13;
    pub const TRANSFER: u64 = 0x14;
    pub const DISPOSITION: u64 = 0x15;
    pub const DETACH: u64 = 0x16;
    pub const END: u64 = 0x17;
    pub const CLOSE: u64 = 0x18;
    pub const ACCEPTED: u64 = 0x24;
    pub const REJECTED: u64 = 0x25;
    pub const RELEASED: u64 = 0x26;
    pub const MODIFIED: u64 = 0x27;
}

pub use encode::*;

mod encode;

/// A frame that arrived.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its channel.
    pub channel: u16,
    /// The performative's code.
    pub code: u64,
    fields: Vec<Value>,
    /// What follows the performative.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A field; null when it is absent.
    #[must_use]
    pub fn field(&self, index: usize) -> &Value {
        self.fields.get(index).unwrap_or(&Value::Null)
    }

    /// A field that is a number.
    #[must_use]
    pub fn number(&self, index: usize) -> Option<u64> {
        number(self.field(index))
    }

    /// The condition of an error in this field.
    #[must_use]
    pub fn condition(&self, index: usize) -> Option<String> {
        let Value::Described(error) = self.field(index) else {
            return None;
        };
        let Value::List(fields) = &error.value else {
            return None;
        };
        match fields.first()? {
            Value::Symbol(condition) => Some(condition.as_str().to_owned()),
            _ => None,
        }
    }

    /// The code of the outcome of a disposition.
    #[must_use]
    pub fn outcome(&self) -> Option<u64> {
        described_code(self.field(4))
    }

    /// The condition of a rejected outcome.
    #[must_use]
    pub fn rejection(&self) -> Option<String> {
        let Value::Described(state) = self.field(4) else {
            return None;
        };
        let Value::List(fields) = &state.value else {
            return None;
        };
        let error = Self {
            channel: 0,
            code: 0,
            fields: fields.clone(),
            payload: Vec::new(),
        };
        error.condition(0)
    }

    /// The sections of the message of a transfer: code, encoded value, value.
    #[must_use]
    pub fn sections(&self) -> Vec<(u64, Vec<u8>, Value)> {
        let mut sections = Vec::new();
        let mut rest = &self.payload[..];
        while !rest.is_empty() {
            let (section, behind) = split(rest);
            let Value::Described(value) = decode(section) else {
                panic!("no section: {section:?}")
            };
            let code = described_code(&Value::Described(value.clone())).expect("a code");
            sections.push((code, section[3..].to_vec(), value.value));
            rest = behind;
        }
        sections
    }

    /// The value of a key in a map section (0x72 annotations, 0x74 application properties).
    #[must_use]
    pub fn entry(&self, section: u64, key: &str) -> Option<Value> {
        let (_, _, value) = self
            .sections()
            .into_iter()
            .find(|(code, ..)| *code == section)?;
        let Value::Map(map) = value else { return None };
        map.into_iter().find_map(|(found, value)| {
            let found = match found {
                Value::Symbol(text) => text.as_str().to_owned(),
                Value::String(text) => text,
                _ => return None,
            };
            (found == key).then_some(value)
        })
    }

    /// A field of the properties section; 5 is the correlation id.
    #[must_use]
    pub fn property(&self, index: usize) -> Value {
        let section = self.sections().into_iter().find(|(code, ..)| *code == 0x73);
        match section {
            Some((_, _, Value::List(fields))) => fields.get(index).cloned().unwrap_or(Value::Null),
            _ => Value::Null,
        }
    }

    /// The bytes of the data sections.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let sections = self.sections().into_iter();
        let data = sections.filter_map(|(code, _, value)| match value {
            Value::Binary(bytes) if code == 0x75 => Some(bytes.to_vec()),
            _ => None,
        });
        data.collect::<Vec<_>>().concat()
    }
}

/// A number of any width.
#[must_use]
pub fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Ubyte(value) => Some((*value).into()),
        Value::Ushort(value) => Some((*value).into()),
        Value::Uint(value) => Some((*value).into()),
        Value::Ulong(value) => Some(*value),
        Value::Int(value) => u64::try_from(*value).ok(),
        Value::Long(value) => u64::try_from(*value).ok(),
        _ => None,
    }
}

fn described_code(value: &Value) -> Option<u64> {
    let Value::Described(described) = value else {
        return None;
    };
    match &described.descriptor {
        serde_amqp::descriptor::Descriptor::Code(code) => Some(*code),
        serde_amqp::descriptor::Descriptor::Name(_) => None,
    }
}

fn decode(bytes: &[u8]) -> Value {
    serde_amqp::from_slice(bytes).unwrap_or_else(|error| panic!("{error}: {bytes:02x?}"))
}

/// The first value of some bytes, and what is behind it.
fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    bytes.split_at(length(bytes))
}

/// How long the value at the beginning is: its first byte says how wide it is (part 1, 1.2).
fn length(bytes: &[u8]) -> usize {
    let width = |at: usize, size: usize| {
        let bytes = &bytes[at..at + size];
        bytes
            .iter()
            .fold(0, |sum, byte| (sum << 8) | usize::from(*byte))
    };
    match bytes[0] {
        0x00 => {
            let descriptor = 1 + length(&bytes[1..]);
            descriptor + length(&bytes[descriptor..])
        }
        code => match code >> 4 {
            4 => 1,
            5 => 2,
            6 => 3,
            7 => 5,
            8 => 9,
            9 => 17,
            0xa | 0xc | 0xe => 2 + width(1, 1),
            _ => 5 + width(1, 4),
        },
    }
}

/// One connection.
#[derive(Debug)]
pub struct Amqp {
    stream: TlsStream<TcpStream>,
    input: Vec<u8>,
}

impl Amqp {
    /// TLS to a host's 5671.
    pub async fn connect(lab: &Lab, host: &str) -> Self {
        Self::connect_with(lab, host, &tls::connector(lab, tls::BOTH, None)).await
    }

    /// The same with a client's own TLS.
    pub async fn connect_with(lab: &Lab, host: &str, connector: &TlsConnector) -> Self {
        let host = lab.host(host).expect("a host");
        let client = Self::try_connect(&host.hostname, host.ports.amqps, connector).await;
        client.unwrap_or_else(|error| panic!("TLS with {}: {error}", host.hostname))
    }

    /// As [`Self::connect_with`], for a host that may not be there.
    ///
    /// # Errors
    /// When TCP or TLS fails.
    pub async fn try_connect(
        host: &str,
        port: u16,
        connector: &TlsConnector,
    ) -> std::io::Result<Self> {
        let tcp = TcpStream::connect((host, port)).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(host.to_owned()).expect("a name");
        Ok(Self {
            stream: connector.connect(name, tcp).await?,
            input: Vec::new(),
        })
    }

    /// An open connection with one session on channel 0.
    pub async fn session(lab: &Lab, host: &str) -> Self {
        let mut client = Self::connect(lab, host).await;
        client.start(None).await;
        client
    }

    /// Header, open and begin in one write, as C# does.
    pub async fn start(&mut self, idle_ms: Option<u32>) {
        let bytes = [AMQP.to_vec(), frame(0, &open(idle_ms)), frame(0, &begin())];
        self.send(&bytes.concat()).await;
        assert_eq!(self.header().await, AMQP);
        self.expect(code::OPEN).await;
        self.expect(code::BEGIN).await;
    }

    /// Writes bytes.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).await.expect("the connection is open");
    }

    /// Writes bytes, if the other side takes them.
    pub async fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Writes a frame on channel 0.
    pub async fn say(&mut self, body: &[u8]) {
        self.send(&frame(0, body)).await;
    }

    async fn fill(&mut self, wanted: usize) -> bool {
        while self.input.len() < wanted {
            let mut buffer = vec![0; 65_536];
            let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await;
            match read.unwrap_or_else(|_| panic!("nothing for {PATIENCE:?}")) {
                Ok(0) | Err(_) => return false,
                Ok(read) => self.input.extend_from_slice(&buffer[..read]),
            }
        }
        true
    }

    /// A protocol header.
    pub async fn header(&mut self) -> [u8; 8] {
        self.try_header().await.expect("a header, not a close")
    }

    /// A protocol header. None when the connection ends.
    pub async fn try_header(&mut self) -> Option<[u8; 8]> {
        if !self.fill(8).await {
            return None;
        }
        let header: Vec<u8> = self.input.drain(..8).collect();
        Some(header.try_into().expect("eight bytes"))
    }

    /// The next frame as it is: type and body. None when the connection ends.
    pub async fn raw_frame(&mut self) -> Option<(u8, u16, Vec<u8>)> {
        if !self.fill(8).await {
            return None;
        }
        let size = u32::from_be_bytes(self.input[..4].try_into().expect("four bytes"));
        let size = usize::try_from(size).expect("small");
        if !self.fill(size).await {
            return None;
        }
        let frame: Vec<u8> = self.input.drain(..size).collect();
        let start = usize::from(frame[4]) * 4;
        let channel = u16::from_be_bytes([frame[6], frame[7]]);
        Some((frame[5], channel, frame[start..].to_vec()))
    }

    /// The next frame that is no heartbeat. None when the connection ends.
    pub async fn try_next(&mut self) -> Option<Frame> {
        loop {
            let (_, channel, body) = self.raw_frame().await?;
            if body.is_empty() {
                continue;
            }
            let (performative, payload) = split(&body);
            let Value::Described(described) = decode(performative) else {
                panic!("no performative: {body:02x?}")
            };
            let code = described_code(&Value::Described(described.clone())).expect("a code");
            let Value::List(fields) = described.value else {
                panic!("no list: {body:02x?}")
            };
            return Some(Frame {
                channel,
                code,
                fields,
                payload: payload.to_vec(),
            });
        }
    }

    /// The next frame, which must be there.
    pub async fn next(&mut self) -> Frame {
        self.try_next().await.expect("the connection is open")
    }

    /// The next frame that is no flow, which must be of this kind.
    pub async fn expect(&mut self, code: u64) -> Frame {
        loop {
            let frame = self.next().await;
            if frame.code == code {
                return frame;
            }
            assert_eq!(frame.code, code::FLOW, "{frame:?} instead of {code:#x}");
        }
    }

    /// Waits for a frame of each of two kinds, in any order. The one of the first kind.
    pub async fn next_of_two(&mut self, one: u64, other: u64) -> Frame {
        let mut frames = Vec::new();
        while frames.len() < 2 {
            let frame = self.next().await;
            if frame.code != code::FLOW {
                assert!([one, other].contains(&frame.code), "{frame:?}");
                frames.push(frame);
            }
        }
        frames.sort_by_key(|frame| frame.code != one);
        let codes: Vec<u64> = frames.iter().map(|frame| frame.code).collect();
        assert_eq!(codes, [one, other]);
        frames.swap_remove(0)
    }

    /// Reads until the connection ends; the condition with which it was closed.
    pub async fn until_closed(&mut self) -> Option<String> {
        let mut condition = None;
        while let Some(frame) = self.try_next().await {
            if frame.code == code::CLOSE {
                condition = frame.condition(0);
            }
        }
        condition
    }

    /// Whether the other side has ended the connection; looks for a moment only.
    pub async fn is_closed(&mut self) -> bool {
        let mut buffer = vec![0; 65_536];
        let look = Duration::from_millis(50);
        loop {
            match tokio::time::timeout(look, self.stream.read(&mut buffer)).await {
                Err(_) => return false,
                Ok(Ok(0) | Err(_)) => return true,
                Ok(Ok(read)) => self.input.extend_from_slice(&buffer[..read]),
            }
        }
    }

    /// Whether nothing arrives for a while beside flows.
    pub async fn is_quiet(&mut self, time: Duration) -> bool {
        loop {
            match tokio::time::timeout(time, self.try_next()).await {
                Err(_) => return true,
                Ok(Some(frame)) if frame.code == code::FLOW => {}
                Ok(_) => return false,
            }
        }
    }

    /// Attaches a link, which must be accepted; on one that sends, credit must come.
    pub async fn attach(&mut self, link: &Link) -> Frame {
        self.say(&link.attach()).await;
        let attached = self.expect(code::ATTACH).await;
        let terminus = if link.sends { 6 } else { 5 };
        if described_code(attached.field(terminus)).is_none() {
            let detach = self.expect(code::DETACH).await;
            panic!("refused: {:?}", detach.condition(2));
        }
        if link.sends {
            let flow = self.next().await;
            assert_eq!(flow.code, code::FLOW, "{flow:?}");
            assert_eq!(flow.number(4), Some(link.handle.into()));
            assert!(flow.number(5).is_some(), "rhea needs the delivery count");
            assert!(flow.number(6) > Some(0), "{flow:?}");
        }
        attached
    }

    /// Attaches a link, which must be refused. With what.
    pub async fn refused(&mut self, link: &Link) -> String {
        self.say(&link.attach()).await;
        let attached = self.expect(code::ATTACH).await;
        assert_eq!(*attached.field(5), Value::Null, "no source");
        assert_eq!(*attached.field(6), Value::Null, "no target");
        let detach = self.expect(code::DETACH).await;
        assert_eq!(*detach.field(1), Value::Bool(true), "closed");
        self.say(&described(
            code::DETACH,
            &list(&[uint(link.handle), boolean(true)]),
        ))
        .await;
        detach.condition(2).expect("a condition")
    }

    /// Attaches the pair of the node of tokens: handles 100 and 101.
    pub async fn cbs(&mut self) {
        self.attach(&Link::sender(100, "$cbs")).await;
        self.attach(&Link::receiver(101, "$cbs")).await;
        self.say(&credit(101, 0, 1_000, false)).await;
    }

    /// Puts a token on [`Amqp::cbs`]'s links; the answer.
    pub async fn put(&mut self, id: u32, message_id: Vec<u8>, token: &str) -> Frame {
        let transfer = Transfer {
            handle: 100,
            id,
            ..Transfer::default()
        };
        let message = put_token(message_id, token).encode();
        self.say(&transfer.with(&message)).await;
        let settled = self.expect(code::DISPOSITION).await;
        assert_eq!(settled.outcome(), Some(code::ACCEPTED), "{settled:?}");
        self.expect(code::TRANSFER).await
    }

    /// Authenticates an identity by its own token; `id` is the delivery's.
    pub async fn authenticate(&mut self, lab: &Lab, identity: &str, id: u32) {
        let token = Token::of(lab, identity).text();
        let answer = self.put(id, string("m"), &token).await;
        assert_eq!(
            answer.entry(0x74, "status-code"),
            Some(Value::Int(200)),
            "{identity}"
        );
    }

    /// Takes a call of the method `reboot` with `{"delay":3}` and answers it, on the link of this
    /// handle with this delivery, by the uuid that C needs (spec/amqp.md 7.4).
    pub async fn answer_reboot(&mut self, handle: u32, id: u32, status: i32) {
        let call = self.expect(code::TRANSFER).await;
        assert_eq!(*call.field(4), Value::Bool(true), "settled");
        assert_eq!(
            call.entry(0x74, "IoThub-methodname"),
            Some(Value::String("reboot".into()))
        );
        assert_eq!(call.body(), br#"{"delay":3}"#);
        let Value::Uuid(correlation) = call.property(5) else {
            panic!("{call:?}")
        };
        let answer = Message {
            correlation_id: Some(uuid(correlation.into_inner())),
            application: vec![("IoThub-status", int(status))],
            ..Message::of(br#"{"ok":true}"#)
        };
        let transfer = Transfer {
            handle,
            id,
            ..Transfer::default()
        };
        let settled = self.deliver(&transfer, &answer.encode()).await;
        assert_eq!(settled.outcome(), Some(code::ACCEPTED));
    }

    /// Sends a message on a link and waits for its outcome.
    pub async fn deliver(&mut self, transfer: &Transfer, message: &[u8]) -> Frame {
        self.say(&transfer.with(message)).await;
        self.expect(code::DISPOSITION).await
    }
}

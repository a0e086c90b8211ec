//! A raw WebSocket client: the handshake as text, frames as bytes. Every byte is the test's.

use std::fmt::Write as _;

use bytes::{Buf as _, BytesMut};
use edgehub_lab::{Lab, mqtt_sender};
use mqttbytes::Error;
use mqttbytes::v4::{Packet, read};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use crate::PATIENCE;

/// The key of RFC 6455's example, and what the server has to make of it.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// What masks the payload of every frame of the client.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// Kinds of frames.
pub mod opcode {
    /// Goes on with the message.
    pub const CONTINUATION: u8 = 0;
    /// A message of text.
    pub const TEXT: u8 = 1;
    /// A message of bytes.
    pub const BINARY: u8 = 2;
    /// The end.
    pub const CLOSE: u8 = 8;
    /// A question.
    pub const PING: u8 = 9;
    /// Its answer.
    pub const PONG: u8 = 10;
}

/// What the server says to a request for a WebSocket.
#[derive(Debug)]
pub struct Upgrade {
    /// Status code.
    pub status: u16,
    /// The head of the answer, in lower case.
    pub head: String,
    /// The open WebSocket.
    pub socket: WebSocket,
}

/// One connection after the handshake.
#[derive(Debug)]
pub struct WebSocket {
    stream: TlsStream<TcpStream>,
    /// Bytes from the server that are no whole frame yet.
    frames: BytesMut,
    /// Bytes of binary frames that are no whole packet yet.
    packets: BytesMut,
}

/// Asks a host of the lab for a WebSocket of this sub-protocol.
pub async fn upgrade(lab: &Lab, host: &str, path: &str, protocol: Option<&str>) -> Upgrade {
    let mut headers = format!(
        "GET {path} HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n"
    );
    if let Some(protocol) = protocol {
        let _ = write!(headers, "Sec-WebSocket-Protocol: {protocol}\r\n");
    }
    let mut socket = WebSocket::open(lab, host).await;
    let name = &lab.host(host).expect("a host of the lab").hostname;
    let _ = write!(headers, "Host: {name}\r\n\r\n");
    socket.send(headers.as_bytes()).await;
    let head = socket.head().await;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no HTTP answer: {head}"));
    Upgrade {
        status,
        head: head.to_ascii_lowercase(),
        socket,
    }
}

/// A WebSocket that speaks MQTT.
pub async fn connect(lab: &Lab, host: &str) -> WebSocket {
    let upgrade = upgrade(lab, host, "/$iothub/websocket", Some("mqtt")).await;
    assert_eq!(upgrade.status, 101, "{}", upgrade.head);
    let accept = format!("sec-websocket-accept: {}", ACCEPT.to_ascii_lowercase());
    assert!(upgrade.head.contains(&accept), "{}", upgrade.head);
    upgrade.socket
}

/// The bytes of one masked frame.
#[must_use]
pub fn frame(is_last: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(is_last, opcode, payload.len() as u64, true);
    let mask = MASK.iter().cycle();
    bytes.extend(payload.iter().zip(mask).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// The header of a frame that says it has so many bytes, with the mask if it is masked.
#[must_use]
pub fn header(is_last: bool, opcode: u8, length: u64, is_masked: bool) -> Vec<u8> {
    let mask = if is_masked { 0x80 } else { 0 };
    let mut bytes = vec![if is_last { 0x80 | opcode } else { opcode }];
    match u8::try_from(length) {
        Ok(length @ 0..=125) => bytes.push(mask | length),
        _ => match u16::try_from(length) {
            Ok(length) => {
                bytes.push(mask | 126);
                bytes.extend(length.to_be_bytes());
            }
            Err(_) => {
                bytes.push(mask | 127);
                bytes.extend(length.to_be_bytes());
            }
        },
    }
    if is_masked {
        bytes.extend(MASK);
    }
    bytes
}

impl WebSocket {
    /// TLS with a host's HTTPS port, nothing said yet.
    pub async fn open(lab: &Lab, host: &str) -> Self {
        let host = lab.host(host).expect("a host of the lab");
        let tls = mqtt_sender::connector(lab.ca_file()).expect("the lab's CA");
        let name = ServerName::try_from(host.hostname.clone()).expect("a host name");
        let open = async {
            let tcp = TcpStream::connect((host.hostname.as_str(), host.ports.https)).await?;
            tcp.set_nodelay(true)?;
            tls.connect(name, tcp).await
        };
        let stream = timeout(PATIENCE, open).await;
        Self {
            stream: stream.expect("TLS within the patience").expect("TLS"),
            frames: BytesMut::new(),
            packets: BytesMut::new(),
        }
    }

    /// Writes bytes as they are.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.try_send(bytes).await.expect("the connection is open");
    }

    /// As [`Self::send`], for what the hub may have closed.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let sent = timeout(PATIENCE, async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        });
        sent.await.expect("the hub reads")
    }

    /// Writes bytes as one binary message.
    pub async fn send_binary(&mut self, bytes: &[u8]) {
        self.send(&frame(true, opcode::BINARY, bytes)).await;
    }

    /// The next frame: its opcode and payload; `None` when the hub has closed.
    pub async fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let next = timeout(PATIENCE, async {
            loop {
                if let Some(frame) = self.take_frame() {
                    return Some(frame);
                }
                if !self.fill().await {
                    return None;
                }
            }
        });
        next.await
            .unwrap_or_else(|_| panic!("the hub neither speaks nor closes for {PATIENCE:?}"))
    }

    /// The next MQTT packet; `None` when the hub has closed.
    pub async fn next(&mut self) -> Option<Packet> {
        loop {
            match read(&mut self.packets, usize::MAX) {
                Ok(packet) => return Some(packet),
                Err(Error::InsufficientBytes(_)) => {}
                Err(error) => panic!("the hub does not speak MQTT 3.1.1: {error}"),
            }
            match self.next_frame().await? {
                (opcode::BINARY, payload) => self.packets.extend_from_slice(&payload),
                (opcode::CLOSE, _) => return None,
                // Servers do not ping: some clients of Azure break on it (spec/mqtt.md 1.2).
                other => panic!("{other:?} instead of a binary frame"),
            }
        }
    }

    /// The hub closes, after no packet.
    pub async fn expect_close(mut self, what: &str) {
        let next = self.next().await;
        assert!(next.is_none(), "{what}: {next:?} instead of a close");
    }

    /// Reads until the hub closes, whatever it says.
    ///
    /// # Cancel safety
    /// Safe: what was read is thrown away anyway.
    pub async fn end(&mut self) {
        while self.fill().await {
            self.frames.clear();
        }
    }

    /// The answer's head; what follows it stays.
    async fn head(&mut self) -> String {
        let read = timeout(PATIENCE, async {
            loop {
                let end = self.frames.windows(4).position(|four| four == b"\r\n\r\n");
                if let Some(end) = end {
                    return self.frames.split_to(end + 4);
                }
                if !self.fill().await {
                    return self.frames.split();
                }
            }
        });
        let head = read.await.expect("an answer");
        String::from_utf8_lossy(&head).into_owned()
    }

    /// Reads more; whether there was any.
    async fn fill(&mut self) -> bool {
        // A reset is a close, too.
        matches!(self.stream.read_buf(&mut self.frames).await, Ok(1..))
    }

    fn take_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let (first, second) = (*self.frames.first()?, *self.frames.get(1)?);
        assert_eq!(
            first & 0xf0,
            0x80,
            "the server's frames are whole, without extensions"
        );
        assert_eq!(second & 0x80, 0, "a server does not mask");
        let (header, length) = match second {
            126 => (4, big_endian(self.frames.get(2..4)?)),
            127 => (10, big_endian(self.frames.get(2..10)?)),
            length => (2, usize::from(length)),
        };
        if self.frames.len() < header + length {
            return None;
        }
        self.frames.advance(header);
        Some((first & 0x0f, self.frames.split_to(length).to_vec()))
    }
}

fn big_endian(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .fold(0, |sum, byte| sum << 8 | usize::from(*byte))
}

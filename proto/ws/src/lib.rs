//! A WebSocket as a stream of bytes.
//!
//! MQTT and AMQP over WebSocket are the same protocols with binary messages in between: packets may
//! be split and merged across frames (OASIS MQTT 3.1.1 section 6). [`ByteStream`] hides the frames,
//! so that a protocol's connection does not know what carries it. It answers the peer's pings and
//! sends none of its own (spec/mqtt.md 1.2: Java clients break on them); a text frame is an error.
//!
//! No handshake is decided here: the server's HTTP head does its side and says
//! [`ByteStream::server`]; a client calls [`connect`] on a stream that is already TLS.

#![deny(missing_docs)]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

/// Path that the Azure SDKs connect to.
pub const PATH: &str = "/$iothub/websocket";
/// Sub-protocol of MQTT.
pub const MQTT: &str = "mqtt";
/// Sub-protocol of AMQP.
pub const AMQP: &str = "AMQPWSB10";

/// Bytes of one message from the peer: several of the largest packets.
pub const MESSAGE_BYTES_MAX: usize = 1_048_576;
/// Bytes that one message of ours carries at most.
const CHUNK_BYTES: usize = 65_536;
/// Bytes that are gathered before they are written without being flushed.
const WRITE_BUFFER_BYTES: usize = 16_384;
/// Bytes that are read from the transport at once; allocated per connection.
const READ_BUFFER_BYTES: usize = 8_192;

/// What a server answers in `Sec-WebSocket-Accept` to a client's `Sec-WebSocket-Key`
/// (RFC 6455 section 4.2.2).
#[must_use]
pub fn accept_key(key: &[u8]) -> String {
    derive_accept_key(key)
}

/// The bytes that a WebSocket carries.
#[derive(Debug)]
pub struct ByteStream<S> {
    socket: WebSocketStream<S>,
    /// What is left of the message that was read last.
    incoming: Bytes,
}

impl<S> ByteStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    /// The server's side, after the upgrade.
    pub async fn server(stream: S) -> Self {
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config())).await;
        Self::new(socket)
    }

    fn new(socket: WebSocketStream<S>) -> Self {
        Self {
            socket,
            incoming: Bytes::new(),
        }
    }
}

/// Asks the server at the other end of `stream` for a WebSocket of `protocol` on [`PATH`].
///
/// # Errors
/// When the transport fails, or the server does not agree to the upgrade and the sub-protocol.
pub async fn connect<S>(stream: S, host: &str, protocol: &str) -> io::Result<ByteStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut request = format!("ws://{host}{PATH}")
        .into_client_request()
        .map_err(other)?;
    let wanted = HeaderValue::from_str(protocol).map_err(io::Error::other)?;
    request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, wanted);
    // The library insists on an answer that names the sub-protocol.
    let (socket, _) = client_async_with_config(request, stream, Some(config()))
        .await
        .map_err(other)?;
    Ok(ByteStream::new(socket))
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_BYTES + 2 * CHUNK_BYTES)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX))
}

impl<S> AsyncRead for ByteStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_read(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.incoming.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(task)) {
                Some(Ok(Message::Binary(data))) => self.incoming = data,
                // Pings are answered by the library; a close is followed by the end.
                Some(Ok(
                    Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_),
                )) => {}
                Some(Ok(Message::Text(_))) => {
                    let error = io::Error::new(io::ErrorKind::InvalidData, "a text frame");
                    return Poll::Ready(Err(error));
                }
                None | Some(Err(Error::ConnectionClosed | Error::AlreadyClosed)) => {
                    return Poll::Ready(Ok(()));
                }
                Some(Err(error)) => return Poll::Ready(Err(other(error))),
            }
        }
        let count = self.incoming.len().min(buffer.remaining());
        if let Some(part) = self.incoming.get(..count) {
            buffer.put_slice(part);
        }
        self.incoming.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S> AsyncWrite for ByteStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn poll_write(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let part = data.get(..CHUNK_BYTES).unwrap_or(data);
        if part.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(Pin::new(&mut self.socket).poll_ready(task)).map_err(other)?;
        let message = Message::Binary(Bytes::copy_from_slice(part));
        Pin::new(&mut self.socket)
            .start_send(message)
            .map_err(other)?;
        Poll::Ready(Ok(part.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(task).map_err(other)
    }

    /// Says good-bye with a close frame and waits for the peer's; the caller bounds the wait.
    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.socket).poll_close(task)) {
            Ok(()) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(other(error))),
        }
    }
}

fn other(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::Protocol(_) | Error::Capacity(_) | Error::Utf8(_) => {
            io::Error::new(io::ErrorKind::InvalidData, error)
        }
        Error::ConnectionClosed | Error::AlreadyClosed => {
            io::Error::new(io::ErrorKind::BrokenPipe, error)
        }
        error => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{SinkExt, StreamExt};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// A client that speaks frames, and our server's side.
    async fn pair() -> (WebSocketStream<DuplexStream>, ByteStream<DuplexStream>) {
        let (ours, theirs) = duplex(4096);
        let client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
        (client, ByteStream::server(ours).await)
    }

    #[tokio::test]
    async fn frames_may_cut_packets_anywhere() {
        let (mut client, mut server) = pair().await;
        let frames: [&'static [u8]; 4] = [b"a", b"", b"bcd", b"efgh"];
        let send = async {
            for frame in frames {
                let frame = Bytes::from_static(frame);
                client.send(Message::Binary(frame)).await.unwrap();
            }
        };
        let mut read = [0; 8];
        let (_, count) = tokio::join!(send, server.read_exact(&mut read));
        assert_eq!((count.unwrap(), &read), (8, b"abcdefgh"));
    }

    #[tokio::test]
    async fn large_writes_arrive_whole_in_binary_messages() {
        let (mut client, mut server) = pair().await;
        let data: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let write = async {
            server.write_all(&data).await.unwrap();
            server.flush().await.unwrap();
        };
        let read = async {
            let mut got = Vec::new();
            while got.len() < data.len() {
                match client.next().await.unwrap().unwrap() {
                    Message::Binary(part) => got.extend_from_slice(&part),
                    other => panic!("{other:?}"),
                }
            }
            got
        };
        let ((), got) = tokio::join!(write, read);
        assert!(got == data);
    }

    #[tokio::test]
    async fn pings_are_answered_and_text_is_refused() {
        let (mut client, mut server) = pair().await;
        client
            .send(Message::Ping(Bytes::from_static(b"x")))
            .await
            .unwrap();
        client
            .send(Message::Binary(Bytes::from_static(b"1")))
            .await
            .unwrap();
        let mut read = [0; 1];
        server.read_exact(&mut read).await.unwrap();
        server.flush().await.unwrap();
        let answer = client.next().await.unwrap().unwrap();
        assert_eq!(answer, Message::Pong(Bytes::from_static(b"x")));
        client.send(Message::text("no")).await.unwrap();
        let error = server.read(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_close_is_the_end_of_the_stream_and_a_huge_frame_an_error() {
        let (mut client, mut server) = pair().await;
        let (closed, read) = tokio::join!(client.close(None), server.read_u8());
        closed.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        let (ours, mut theirs) = duplex(4096);
        let mut server = ByteStream::server(ours).await;
        // FIN, binary, masked, 64-bit length of 2^40, and the mask.
        let head = [0x82, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4];
        theirs.write_all(&head).await.unwrap();
        let error = server.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_client_insists_on_its_protocol() {
        for (answered, good) in [("mqtt", true), ("AMQPWSB10", false)] {
            let (ours, mut theirs) = duplex(4096);
            let server = async move {
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    request.push(theirs.read_u8().await.unwrap());
                }
                let request = String::from_utf8(request).unwrap();
                assert!(request.starts_with("GET /$iothub/websocket HTTP/1.1\r\n"));
                let key = request
                    .lines()
                    .find_map(|line| line.strip_prefix("Sec-WebSocket-Key: "))
                    .unwrap();
                let answer = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\
                     Connection: Upgrade\r\nSec-WebSocket-Accept: {}\r\n\
                     Sec-WebSocket-Protocol: {answered}\r\n\r\n",
                    accept_key(key.as_bytes())
                );
                theirs.write_all(answer.as_bytes()).await.unwrap();
                theirs
            };
            let (connected, _) = tokio::join!(connect(ours, "h.example:443", MQTT), server);
            assert_eq!(connected.is_ok(), good, "{answered}");
        }
    }
}

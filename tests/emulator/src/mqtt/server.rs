//! One MQTT connection from accept to close.

use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use mqttbytes::v4::{ConnAck, ConnectReturnCode, LastWill};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

use super::CloseReason;
use super::codec::{self, CodecError};
use super::connect::{self, Admitted};
use super::delivery::OpenSession;
use super::handler::Handler;
use super::session::{Session, Turn};
use crate::clock::utc_text;
use crate::connections::Connection;
use crate::counters::Counter;
use crate::hub::{Hub, idle_limit};
use crate::ledger::LedgerError;
use crate::limits::{CONNECT_TIMEOUT, LINGER, READ_BATCH_BYTES};
use crate::port::{Gated, PortGate};

/// What carries MQTT: TLS, or a WebSocket in it.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Serves a socket of the MQTT port until it ends. Never fails: the reason goes to the log.
pub(crate) async fn serve(
    hub: Arc<Hub>,
    tls: TlsAcceptor,
    socket: Gated<TcpStream>,
    connection: Connection,
) {
    serve_over(&hub, &hub.mqtt_port, tls.accept(socket), &connection).await;
}

/// Serves MQTT on a stream that is still being opened, of the port that `gate` switches. Never
/// fails: the reason goes to the log.
pub(crate) async fn serve_over<S: Stream>(
    hub: &Hub,
    gate: &PortGate,
    stream: impl Future<Output = io::Result<S>>,
    connection: &Connection,
) {
    let mut input = BytesMut::with_capacity(READ_BATCH_BYTES);
    let opening = open(hub, stream, &mut input);
    let opened = tokio::select! {
        opened = gate.limit(CONNECT_TIMEOUT, opening) => opened,
        () = connection.closing() => return,
    };
    let opened = opened.unwrap_or(Err(CloseReason::Silence));
    let Opened {
        stream,
        admitted,
        keep_alive,
        clean,
        will,
    } = match opened {
        Ok(opened) => opened,
        // Logged already, with the reason.
        Err(CloseReason::Refused(_)) => return,
        Err(reason) => {
            info!(connection = connection.id(), %reason, "mqtt connection not opened");
            return;
        }
    };
    let Admitted {
        session,
        claim,
        expires_at_ms,
    } = admitted;
    let client = claim.identity.to_string();
    let chain = claim
        .chain
        .as_ref()
        .map(ToString::to_string)
        .unwrap_or_default();
    if let Some(old) = connection.identify(&claim) {
        info!(
            connection = old,
            client, "closed: replaced by a newer connection"
        );
    }
    // The registry may have changed since admission, before this connection was in the table.
    if hub.admits(&claim).is_err() {
        info!(
            connection = connection.id(),
            client, "closed: not admitted any more"
        );
        return;
    }
    let opened = match OpenSession::open(hub, &claim.identity, connection, clean) {
        Ok(opened) => opened,
        Err(reason) => {
            info!(connection = connection.id(), client, %reason, "closed");
            return;
        }
    };
    let present = opened.is_present;
    info!(
        connection = connection.id(),
        client, chain, clean, present, "connected"
    );

    let life = Life {
        hub,
        gate,
        session: &session,
        opened: &opened,
        connection,
        idle: idle_limit(keep_alive),
    };
    let (mut reader, mut writer) = tokio::io::split(stream);
    let reason = life
        .run(&mut reader, &mut writer, input, expires_at_ms)
        .await;
    // What the client has not acknowledged is free before anybody can see it gone.
    drop(opened);
    let mut stream = reader.unsplit(writer);
    if let Some(will) = will.filter(|_| !matches!(reason, CloseReason::Disconnect)) {
        store_will(hub, &session, &will);
    }
    info!(connection = connection.id(), client, %reason, "closed");
    if !matches!(
        reason,
        CloseReason::Closed | CloseReason::Io(_) | CloseReason::End
    ) {
        close(&mut stream).await;
    }
}

/// An accepted CONNECT.
struct Opened<S> {
    stream: S,
    admitted: Admitted,
    keep_alive: u16,
    clean: bool,
    will: Option<LastWill>,
}

/// Whatever comes before MQTT, CONNECT, and the refusal if there is one. The CONNACK of success is
/// left to the caller's first turn, because an older connection has to be fenced before it.
async fn open<S: Stream>(
    hub: &Hub,
    stream: impl Future<Output = io::Result<S>>,
    input: &mut BytesMut,
) -> Result<Opened<S>, CloseReason> {
    let mut stream = stream.await?;
    let connect = loop {
        match codec::first_packet(input) {
            Ok(Some(connect)) => break connect,
            Ok(None) => {}
            Err(error @ CodecError::Level(_)) => {
                refuse(&mut stream, ConnectReturnCode::RefusedProtocolVersion).await;
                return Err(error.into());
            }
            Err(error) => {
                close(&mut stream).await;
                return Err(error.into());
            }
        }
        if stream.read_buf(input).await? == 0 {
            return Err(CloseReason::End);
        }
    };
    match connect::admit(hub, &connect) {
        Ok(admitted) => Ok(Opened {
            stream,
            admitted,
            keep_alive: connect.keep_alive,
            clean: connect.clean_session,
            will: connect.last_will,
        }),
        Err(error) => {
            let code = error.code();
            info!(client = connect.client_id, ?code, reason = %error, "connect refused");
            hub.counters.add_other(Counter::ConnectsRefused);
            refuse(&mut stream, code).await;
            Err(CloseReason::Refused(code))
        }
    }
}

/// A will counts also when the connection is fenced: it is the last thing of it.
fn store_will(hub: &Hub, session: &Session, will: &LastWill) {
    let now_utc = utc_text(hub.clock.now_ms());
    let turn = session.will(will, &now_utc);
    if let Err(error) = hub.ledger.append(&turn.batch, &now_utc, None) {
        warn!(%error, "will not stored");
    }
}

async fn refuse(stream: &mut impl Stream, code: ConnectReturnCode) {
    let mut reply = BytesMut::new();
    if ConnAck::new(code, false).write(&mut reply).is_ok() && stream.write_all(&reply).await.is_ok()
    {
        close(stream).await;
    }
}

/// Ends a connection so that the client still gets what was sent: closing a socket with unread
/// input would reset it and take our last packet along.
async fn close(stream: &mut impl Stream) {
    let ending = async {
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    let _ = timeout(LINGER, ending).await;
}

/// A connection between CONNACK and its end.
struct Life<'a> {
    hub: &'a Hub,
    gate: &'a PortGate,
    session: &'a Session,
    opened: &'a OpenSession<'a>,
    connection: &'a Connection,
    idle: Duration,
}

impl Life<'_> {
    async fn run<S: Stream>(
        &self,
        reader: &mut ReadHalf<S>,
        writer: &mut WriteHalf<S>,
        input: BytesMut,
        expires_at_ms: u64,
    ) -> CloseReason {
        let ended = async {
            tokio::select! {
                reason = self.turns(reader, writer, input) => reason,
                () = self.hub.clock.sleep_until(expires_at_ms) => CloseReason::TokenExpired,
                () = self.opened.overflowed() => CloseReason::Overflow,
            }
        };
        tokio::select! {
            // A black hole also swallows our FIN: it is sent when the port is healed.
            reason = async { let reason = ended.await; self.gate.flowing().await; reason } => reason,
            () = self.connection.closing() => CloseReason::Closed,
        }
    }

    async fn turns<S: Stream>(
        &self,
        reader: &mut ReadHalf<S>,
        writer: &mut WriteHalf<S>,
        mut input: BytesMut,
    ) -> CloseReason {
        let mut turn = Turn::default();
        let accepted = ConnAck::new(ConnectReturnCode::Success, self.opened.is_present);
        if let Err(error) = accepted.write(&mut turn.replies) {
            return CodecError::Packet(error).into();
        }
        loop {
            let turned = self.turn(writer, &mut input, &mut turn).await;
            let filled = match turned {
                Ok(()) => self.wait(reader, writer, &mut input).await,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = filled {
                return reason;
            }
        }
    }

    /// Waits for input; meanwhile sends what the hub has for the client. Only input counts
    /// against the keep-alive.
    async fn wait<S: Stream>(
        &self,
        reader: &mut ReadHalf<S>,
        writer: &mut WriteHalf<S>,
        input: &mut BytesMut,
    ) -> Result<(), CloseReason> {
        let filling = self.gate.limit(self.idle, fill(reader, input));
        let mut filling = std::pin::pin!(filling);
        loop {
            tokio::select! {
                filled = &mut filling => {
                    filled.unwrap_or(Err(CloseReason::KeepAlive))?;
                    // What was there before the input goes out before its answers.
                    if self.opened.is_woken() {
                        self.deliver(writer).await?;
                    }
                    return Ok(());
                }
                () = self.opened.ready() => self.deliver(writer).await?,
            }
        }
    }

    /// Handles what `input` has, in one or more steps: stores, then answers.
    async fn turn<S: Stream>(
        &self,
        writer: &mut WriteHalf<S>,
        input: &mut BytesMut,
        turn: &mut Turn,
    ) -> Result<(), CloseReason> {
        loop {
            // Bytes that were read before the port became a black hole wait like the others.
            self.gate.flowing().await;
            let handled = self.step(input, turn)?;
            self.send(writer, &turn.replies).await?;
            turn.replies.clear();
            if handled? {
                return Ok(());
            }
        }
    }

    /// Handles and stores; the answers are in the turn then, also when the connection has to end.
    fn step(
        &self,
        input: &mut BytesMut,
        turn: &mut Turn,
    ) -> Result<Result<bool, CloseReason>, LedgerError> {
        let now_ms = self.hub.clock.now_ms();
        let now_utc = utc_text(now_ms);
        let handler = Handler {
            hub: self.hub,
            session: self.session,
            actor: self.opened.actor(),
            now_ms,
            now_utc: &now_utc,
        };
        let handled = handler.handle(input, turn);
        if !turn.batch.is_empty() {
            let fence = Some(self.connection.fence());
            self.hub.ledger.append(&turn.batch, &now_utc, fence)?;
            turn.batch.clear();
        }
        Ok(handled)
    }

    /// Sends what the hub has for the client.
    async fn deliver<S: Stream>(&self, writer: &mut WriteHalf<S>) -> Result<(), CloseReason> {
        // A message counts as delivered when it is taken: not while nothing can leave.
        self.gate.flowing().await;
        let outgoing = self.opened.take()?;
        self.send(writer, &outgoing.bytes).await?;
        self.opened.written(&outgoing)
    }

    async fn send<S: Stream>(
        &self,
        writer: &mut WriteHalf<S>,
        bytes: &[u8],
    ) -> Result<(), CloseReason> {
        if bytes.is_empty() {
            return Ok(());
        }
        let sending = async {
            writer.write_all(bytes).await?;
            writer.flush().await
        };
        let sent = self.gate.limit(self.idle, sending).await;
        Ok(sent.ok_or(CloseReason::KeepAlive)??)
    }
}

/// Waits for input, then takes what else is there without waiting, up to a batch.
///
/// # Cancel safety
/// What was read is in `input`.
async fn fill(reader: &mut ReadHalf<impl Stream>, input: &mut BytesMut) -> Result<(), CloseReason> {
    if reader.read_buf(input).await? == 0 {
        return Err(CloseReason::End);
    }
    while input.len() < READ_BATCH_BYTES {
        let mut more = std::pin::pin!(reader.read_buf(input));
        let polled = std::future::poll_fn(|cx| Poll::Ready(more.as_mut().poll(cx))).await;
        match polled {
            // An end or a failure shows again at the next turn's read, after this input.
            Poll::Pending | Poll::Ready(Ok(0) | Err(_)) => break,
            Poll::Ready(Ok(_)) => {}
        }
    }
    Ok(())
}

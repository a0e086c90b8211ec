//! One MQTT connection from accept to close.

use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::BytesMut;
use mqttbytes::v4::{ConnAck, ConnectReturnCode, LastWill};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{info, warn};

use super::CloseReason;
use super::codec::{self, CodecError};
use super::connect::{self, Admitted};
use super::session::{Session, Turn};
use crate::clock::utc_text;
use crate::connections::Connection;
use crate::hub::{Hub, idle_limit};
use crate::limits::{CONNECT_TIMEOUT, LINGER, READ_BATCH_BYTES};
use crate::port::Gated;

type Stream = TlsStream<Gated<TcpStream>>;

/// Serves a socket until it ends. Never fails: the reason goes to the log.
pub(crate) async fn serve(
    hub: Arc<Hub>,
    tls: TlsAcceptor,
    socket: Gated<TcpStream>,
    connection: Connection,
) {
    let mut input = BytesMut::with_capacity(READ_BATCH_BYTES);
    let opening = open(&hub, tls, socket, &mut input);
    let opened = tokio::select! {
        opened = hub.mqtt_port.limit(CONNECT_TIMEOUT, opening) => opened,
        () = connection.closing() => return,
    };
    let opened = opened.unwrap_or(Err(CloseReason::Silence));
    let Opened {
        mut stream,
        admitted,
        keep_alive,
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
    info!(connection = connection.id(), client, chain, "connected");

    let life = Life {
        hub: &hub,
        session: &session,
        connection: &connection,
    };
    let reason = life
        .run(&mut stream, input, idle_limit(keep_alive), expires_at_ms)
        .await;
    if let Some(will) = will.filter(|_| !matches!(reason, CloseReason::Disconnect)) {
        store_will(&hub, &session, &will);
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
struct Opened {
    stream: Stream,
    admitted: Admitted,
    keep_alive: u16,
    will: Option<LastWill>,
}

/// TLS handshake, CONNECT, and the refusal if there is one. The CONNACK of success is left to the
/// caller's first turn, because an older connection has to be fenced before it.
async fn open(
    hub: &Hub,
    tls: TlsAcceptor,
    socket: Gated<TcpStream>,
    input: &mut BytesMut,
) -> Result<Opened, CloseReason> {
    let mut stream = tls.accept(socket).await?;
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
            will: connect.last_will,
        }),
        Err(error) => {
            let code = error.code();
            info!(client = connect.client_id, ?code, reason = %error, "connect refused");
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

async fn refuse(stream: &mut Stream, code: ConnectReturnCode) {
    let mut reply = BytesMut::new();
    if ConnAck::new(code, false).write(&mut reply).is_ok() && stream.write_all(&reply).await.is_ok()
    {
        close(stream).await;
    }
}

/// Ends a connection so that the client still gets what was sent: closing a socket with unread
/// input would reset it and take our last packet along.
async fn close(stream: &mut Stream) {
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
    session: &'a Session,
    connection: &'a Connection,
}

impl Life<'_> {
    async fn run(
        &self,
        stream: &mut Stream,
        input: BytesMut,
        idle: Duration,
        expires_at_ms: u64,
    ) -> CloseReason {
        let ended = async {
            tokio::select! {
                reason = self.turns(stream, input, idle) => reason,
                () = self.hub.clock.sleep_until(expires_at_ms) => CloseReason::TokenExpired,
            }
        };
        let gate = &self.hub.mqtt_port;
        tokio::select! {
            // A black hole also swallows our FIN: it is sent when the port is healed.
            reason = async { let reason = ended.await; gate.flowing().await; reason } => reason,
            () = self.connection.closing() => CloseReason::Closed,
        }
    }

    async fn turns(&self, stream: &mut Stream, mut input: BytesMut, idle: Duration) -> CloseReason {
        let mut turn = Turn::default();
        if let Err(error) = ConnAck::new(ConnectReturnCode::Success, false).write(&mut turn.replies)
        {
            return CodecError::Packet(error).into();
        }
        loop {
            if let Err(reason) = self.turn(stream, &mut input, &mut turn, idle).await {
                return reason;
            }
            match self
                .hub
                .mqtt_port
                .limit(idle, fill(stream, &mut input))
                .await
            {
                Some(Ok(())) => {}
                Some(Err(reason)) => return reason,
                None => return CloseReason::KeepAlive,
            }
        }
    }

    /// Handles what `input` has: stores, then answers.
    async fn turn(
        &self,
        stream: &mut Stream,
        input: &mut BytesMut,
        turn: &mut Turn,
        idle: Duration,
    ) -> Result<(), CloseReason> {
        // Bytes that were read before the port became a black hole wait like the others.
        self.hub.mqtt_port.flowing().await;
        let now_utc = utc_text(self.hub.clock.now_ms());
        let handled = self.session.handle(input, &self.hub.faults, &now_utc, turn);
        if !turn.batch.is_empty() {
            self.hub
                .ledger
                .append(&turn.batch, &now_utc, Some(self.connection.fence()))?;
            turn.batch.clear();
        }
        if !turn.replies.is_empty() {
            let sending = async {
                stream.write_all(&turn.replies).await?;
                stream.flush().await
            };
            self.hub
                .mqtt_port
                .limit(idle, sending)
                .await
                .ok_or(CloseReason::KeepAlive)??;
            turn.replies.clear();
        }
        handled
    }
}

/// Waits for input, then takes what else is there without waiting, up to a batch.
///
/// # Cancel safety
/// What was read is in `input`.
async fn fill(stream: &mut Stream, input: &mut BytesMut) -> Result<(), CloseReason> {
    if stream.read_buf(input).await? == 0 {
        return Err(CloseReason::End);
    }
    while input.len() < READ_BATCH_BYTES {
        let mut more = std::pin::pin!(stream.read_buf(input));
        let polled = std::future::poll_fn(|cx| Poll::Ready(more.as_mut().poll(cx))).await;
        match polled {
            // An end or a failure shows again at the next turn's read, after this input.
            Poll::Pending | Poll::Ready(Ok(0) | Err(_)) => break,
            Poll::Ready(Ok(_)) => {}
        }
    }
    Ok(())
}

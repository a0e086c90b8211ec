//! One MQTT connection on a byte stream: reads, lets the state machine work, hands each turn's
//! publishes to the store as one batch and writes what is due as one write.
//!
//! It does not know what carries the stream; 8883 and, later, WebSocket use it alike. Nothing
//! here happens once per message but the copy into the store's record: no task, channel, wake-up
//! or write (design.md section 4).
//!
//! Lifetime: the task ends when the client leaves, breaks the protocol, falls silent, is taken
//! over or revoked, its token expires, its message cannot be stored, or the hub stops.

use std::cell::RefCell;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use edgehub_auth::authenticator::{AuthnError, Claim, Credential};
use edgehub_proto::topic;
use edgehub_proto::username::MqttUserName;
use edgehub_storage::{AppendBatch, StoreClosed, TryAppendError};
use ntex_mqtt::v3::codec::ConnectAckReason;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::limits::{FAREWELL_MAX, READ_BYTES_MAX, WRITE_MAX};
use super::machine::{CloseReason, ConnectRequest, Event, Incoming, Machine, Timing};
use crate::hub::{ConnectError, Connected, Hub, Ingest, Outcome, Telemetry};
use crate::telemetry::metrics::{self, AckCounters};

/// What connections of one listener share.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    /// The hub behind the head.
    pub hub: Arc<Hub>,
    /// Bounds of a connection's times.
    pub timing: Timing,
    /// Where PUBACKs are counted.
    pub acks: AckCounters,
    /// Fires when the hub stops.
    pub stop: CancellationToken,
}

/// Why a connection's task ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionEnd {
    /// The protocol ended it.
    #[error(transparent)]
    Protocol(#[from] CloseReason),
    /// The transport failed.
    #[error("the transport failed: {0}")]
    Transport(#[from] io::Error),
    /// The peer closed the transport without DISCONNECT.
    #[error("the client closed the connection without DISCONNECT")]
    PeerGone,
    /// CONNECT was refused.
    #[error("CONNECT was refused: {0}")]
    Refused(String),
    /// A topic named another identity (design.md D4).
    #[error("a topic names another identity")]
    ForeignTopic,
    /// Another connection of the identity took over, or its right was revoked.
    #[error("taken over by another connection, or revoked")]
    Revoked,
    /// Its token expired.
    #[error("the token expired")]
    TokenExpired,
    /// A message could not be stored: nothing of it was acknowledged.
    #[error("a message could not be stored")]
    NotStored,
    /// The client does not read what is written.
    #[error("the client does not read")]
    NotReading,
    /// The hub stops.
    #[error("the hub stops")]
    Stopping,
}

thread_local! {
    /// One read buffer for each worker thread instead of one for each connection.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES_MAX]);
}

/// Serves one connection until it ends.
///
/// # Cancel safety
/// Dropping it closes the connection; nothing unacknowledged counts as stored for the client.
pub async fn serve<S>(mut stream: S, context: ConnectionContext) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let clock = Arc::clone(context.hub.clock());
    let mut machine = Machine::new(context.timing, clock.instant());
    let end = match handshake(&mut stream, &mut machine, &context).await {
        Ok(connected) => {
            let identity = connected.principal.identity().clone();
            let end = Session::new(&mut stream, machine, connected, &context)
                .run()
                .await;
            context.hub.disconnected(&identity);
            if let ConnectionEnd::NotStored = end {
                metrics::messages_unacknowledged(&identity).increment(1);
                tracing::warn!("Connection of {identity} closed: {end}");
            } else {
                tracing::info!("Connection of {identity} closed: {end}");
            }
            end
        }
        Err(end) => {
            tracing::debug!("An MQTT connection ended before it was accepted: {end}");
            end
        }
    };
    // The peer may be gone: what matters was decided before.
    let _ = timeout(FAREWELL_MAX, stream.shutdown()).await;
    end
}

/// Reads until CONNECT is complete, judges it and answers it.
async fn handshake<S>(
    stream: &mut S,
    machine: &mut Machine,
    context: &ConnectionContext,
) -> Result<Connected, ConnectionEnd>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let request = loop {
        match machine.poll() {
            Some(Event::Connect(request)) => break request,
            Some(Event::Close(reason)) => {
                flush(stream, machine, context).await?;
                return Err(reason.into());
            }
            Some(Event::Publish(_)) => return Err(CloseReason::FirstPacket.into()),
            None => {}
        }
        let deadline = Instant::from_std(machine.deadline());
        tokio::select! {
            read = read_some(stream, machine, context) => read?,
            () = sleep_until(deadline) => return Err(CloseReason::ConnectTimeout.into()),
            () = context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
        }
    };
    let judged = match claim(&request) {
        Ok(claim) => tokio::select! {
            judged = context.hub.connect(claim) => judged.map_err(|error| refusal(&error)),
            () = context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
        },
        Err(refused) => Err(refused),
    };
    match judged {
        Ok(connected) => {
            // Registered first, then answered (spec/mqtt.md 2.4).
            machine.accept(false, context.hub.clock().instant());
            flush(stream, machine, context).await?;
            Ok(connected)
        }
        Err((code, text)) => {
            tracing::info!("Refused the connection of {}: {text}", request.client_id);
            machine.refuse(code);
            flush(stream, machine, context).await?;
            Err(ConnectionEnd::Refused(text))
        }
    }
}

/// What CONNECT claims, or the code and text of the refusal (design.md D6).
fn claim(request: &ConnectRequest) -> Result<Claim, (ConnectAckReason, String)> {
    let malformed = |text: String| (ConnectAckReason::BadUserNameOrPassword, text);
    let user_name = request
        .user_name
        .as_deref()
        .ok_or_else(|| malformed("no user name".into()))?;
    let user_name = MqttUserName::parse(user_name).map_err(|error| malformed(error.to_string()))?;
    if user_name.identity.as_str() != request.client_id {
        let text = "the client id is not the identity of the user name".to_owned();
        return Err((ConnectAckReason::NotAuthorized, text));
    }
    let credential = request
        .password
        .clone()
        .map_or(Credential::None, Credential::Sas);
    Ok(Claim {
        identity: user_name.identity,
        chain: user_name.auth_chain,
        credential,
    })
}

fn refusal(error: &ConnectError) -> (ConnectAckReason, String) {
    let code = match error {
        ConnectError::Refused(AuthnError::MalformedToken { .. }) => {
            ConnectAckReason::BadUserNameOrPassword
        }
        ConnectError::Refused(error) if error.is_definite() => ConnectAckReason::NotAuthorized,
        ConnectError::Refused(_) | ConnectError::Full(_) => ConnectAckReason::ServiceUnavailable,
    };
    // With the short name under which docs/errors.md explains it.
    let text = match error {
        ConnectError::Refused(refused) => format!("{refused} ({})", refused.reason()),
        ConnectError::Full(_) => error.to_string(),
    };
    (code, text)
}

type PendingAppend = Pin<Box<dyn Future<Output = Result<(), StoreClosed>> + Send>>;

/// A connection that was accepted.
struct Session<'a, S> {
    stream: &'a mut S,
    machine: Machine,
    ingest: Ingest,
    /// A batch that waits for room in the store; the next one is gathered meanwhile.
    appending: Option<PendingAppend>,
    /// A write was begun and not finished. Nothing may follow it: after a gap the client could
    /// read acknowledgements that were never given.
    cut: bool,
    connected: Connected,
    context: &'a ConnectionContext,
}

impl<'a, S> Session<'a, S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    fn new(
        stream: &'a mut S,
        machine: Machine,
        connected: Connected,
        context: &'a ConnectionContext,
    ) -> Self {
        let identity = connected.principal.identity().clone();
        let ingest = Ingest::new(Arc::clone(&context.hub), identity);
        Self {
            stream,
            machine,
            ingest,
            appending: None,
            cut: false,
            connected,
            context,
        }
    }

    async fn run(mut self) -> ConnectionEnd {
        match self.turns().await {
            Ok(never) => match never {},
            Err(end) => {
                // What was answered before the end still leaves.
                if !self.cut {
                    let farewell = flush(self.stream, &mut self.machine, self.context);
                    let _ = timeout(FAREWELL_MAX, farewell).await;
                }
                // What was read is stored, acknowledged or not (spec/mqtt.md 8.1).
                if !matches!(end, ConnectionEnd::NotStored) {
                    self.store_the_rest().await;
                }
                end
            }
        }
    }

    async fn turns(&mut self) -> Result<std::convert::Infallible, ConnectionEnd> {
        let clock = Arc::clone(self.context.hub.clock());
        let progress = Arc::clone(self.ingest.progress());
        let closed = self.connected.registration.closed().clone();
        let token_end = self.connected.principal.expires_at_ms();
        loop {
            self.events()?;
            self.store()?;
            self.cut = true;
            tokio::select! {
                biased;
                flushed = flush(self.stream, &mut self.machine, self.context) => flushed?,
                // A client that does not read keeps neither its successor nor the hub waiting.
                () = closed.cancelled() => return Err(ConnectionEnd::Revoked),
                () = self.context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
            }
            self.cut = false;
            let deadline = Instant::from_std(self.machine.deadline());
            let wants_input = self.machine.wants_input();
            let left = token_end.map(|end| token_left(end, clock.unix_ms()));
            tokio::select! {
                read = read_some(self.stream, &mut self.machine, self.context), if wants_input => {
                    read?;
                }
                () = progress.changed() => {
                    if progress.failed() {
                        return Err(ConnectionEnd::NotStored);
                    }
                    self.machine.committed(progress.committed());
                }
                appended = async {
                    match self.appending.as_mut() {
                        Some(appending) => appending.await,
                        None => std::future::pending().await,
                    }
                } => {
                    self.appending = None;
                    appended.map_err(|StoreClosed| ConnectionEnd::Stopping)?;
                }
                () = sleep_until(deadline) => {
                    if let Some(reason) = self.machine.expired(clock.instant()) {
                        return Err(reason.into());
                    }
                }
                () = token_expiry(left) => {
                    if token_end.is_some_and(|end| token_left(end, clock.unix_ms()).is_zero()) {
                        return Err(ConnectionEnd::TokenExpired);
                    }
                }
                () = closed.cancelled() => return Err(ConnectionEnd::Revoked),
                () = self.context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
            }
        }
    }

    /// Lets the machine work off what it has.
    fn events(&mut self) -> Result<(), ConnectionEnd> {
        let now_ms = self.context.hub.clock().unix_ms();
        while let Some(event) = self.machine.poll() {
            match event {
                Event::Publish(publish) => self.publish(publish, now_ms)?,
                Event::Close(reason) => return Err(reason.into()),
                Event::Connect(_) => return Err(CloseReason::SecondConnect.into()),
            }
        }
        Ok(())
    }

    fn publish(&mut self, publish: Incoming, now_ms: u64) -> Result<(), ConnectionEnd> {
        let telemetry = Telemetry {
            sequence: publish.sequence,
            duplicate: publish.duplicate,
            retain: publish.retain,
            topic: topic::parse_publish(&publish.topic),
            body: publish.payload,
        };
        match self.ingest.take(telemetry, now_ms) {
            Outcome::Gathered => Ok(()),
            Outcome::Dropped(_) => {
                self.machine.dropped(publish.sequence);
                Ok(())
            }
            Outcome::Foreign => {
                let identity = self.connected.principal.identity();
                tracing::warn!("{identity} published to a topic of another identity: closing");
                Err(ConnectionEnd::ForeignTopic)
            }
        }
    }

    /// Hands the batch to the store, unless an earlier one still waits for room.
    fn store(&mut self) -> Result<(), ConnectionEnd> {
        if self.appending.is_some() {
            return Ok(());
        }
        let Some(batch) = self.ingest.take_batch() else {
            return Ok(());
        };
        match self.context.hub.store().try_append(batch) {
            Ok(()) => Ok(()),
            Err(TryAppendError::Full(batch)) => {
                self.appending = Some(self.append(batch));
                Ok(())
            }
            Err(TryAppendError::Closed) => Err(ConnectionEnd::Stopping),
        }
    }

    fn append(&self, batch: AppendBatch) -> PendingAppend {
        let store = self.context.hub.store().clone();
        Box::pin(async move { store.append(batch).await })
    }

    async fn store_the_rest(&mut self) {
        let rest = async {
            if let Some(appending) = self.appending.take() {
                appending.await?;
            }
            match self.ingest.take_batch() {
                Some(batch) => self.append(batch).await,
                None => Ok(()),
            }
        };
        // Unacknowledged messages: storing them is a courtesy that must not hold a task.
        let _ = timeout(FAREWELL_MAX, rest).await;
    }
}

/// How long a token is good; its end already has the five minutes of tolerance.
fn token_left(end_ms: u64, now_ms: u64) -> Duration {
    Duration::from_millis(end_ms.saturating_sub(now_ms))
}

/// Wakes when the token may have expired; looks again every minute, since the clock can move.
async fn token_expiry(left: Option<Duration>) {
    match left {
        Some(left) => tokio::time::sleep(left.min(Duration::from_secs(60))).await,
        None => std::future::pending().await,
    }
}

/// Reads once from the socket into the machine.
///
/// # Cancel safety
/// Nothing is lost when it is dropped: bytes are taken and handed over in one poll.
async fn read_some<S>(
    stream: &mut S,
    machine: &mut Machine,
    context: &ConnectionContext,
) -> Result<(), ConnectionEnd>
where
    S: AsyncRead + Unpin,
{
    std::future::poll_fn(|task| {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            match Pin::new(&mut *stream).poll_read(task, &mut buffer) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Poll::Ready(Err(ConnectionEnd::PeerGone))
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => {
                    Poll::Ready(Err(ConnectionEnd::PeerGone))
                }
                Poll::Ready(Ok(())) => {
                    machine.receive(buffer.filled(), context.hub.clock().instant());
                    Poll::Ready(Ok(()))
                }
            }
        })
    })
    .await
}

/// Writes what the machine has to say, in one write.
async fn flush<S>(
    stream: &mut S,
    machine: &mut Machine,
    context: &ConnectionContext,
) -> Result<(), ConnectionEnd>
where
    S: AsyncWrite + Send + Unpin,
{
    let Some(output) = machine.output() else {
        return Ok(());
    };
    let acks = machine.take_acks_written();
    if acks > 0 {
        context.acks.acks.increment(acks);
        context.acks.writes.increment(1);
    }
    let write = pin!(async {
        stream.write_all(&output).await?;
        stream.flush().await
    });
    match timeout(WRITE_MAX, write).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(ConnectionEnd::NotReading),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connect_is_refused_by_the_codes_of_the_contract() {
        let request = |client_id: &str, user_name: Option<&str>| ConnectRequest {
            client_id: client_id.to_owned(),
            user_name: user_name.map(str::to_owned),
            password: Some("x".to_owned()),
            clean_session: false,
        };
        let code = |request| claim(&request).map_err(|(code, _)| code);
        let good = "h/d1/?api-version=2021-04-12";
        assert!(code(request("d1", Some(good))).is_ok());
        let differs = code(request("D1", Some(good))).unwrap_err();
        assert_eq!(differs, ConnectAckReason::NotAuthorized);
        for user_name in [None, Some("h/d1"), Some("")] {
            let malformed = code(request("d1", user_name)).unwrap_err();
            assert_eq!(malformed, ConnectAckReason::BadUserNameOrPassword);
        }
    }
}

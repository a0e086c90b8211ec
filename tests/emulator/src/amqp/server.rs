//! One AMQP connection from accept to close.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::info;

use super::client::{Client, Role};
use crate::connections::Connection;
use crate::counters::Counter;
use crate::hub::Hub;
use crate::limits::{CONNECT_TIMEOUT, LINGER, READ_BATCH_BYTES};
use crate::port::{Gated, PortGate};

/// What carries AMQP: TLS, or a WebSocket in it.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Serves a socket of the AMQP port until it ends. Never fails: the reason goes to the log.
pub(crate) async fn serve(
    hub: Arc<Hub>,
    tls: TlsAcceptor,
    socket: Gated<TcpStream>,
    connection: Connection,
) {
    serve_over(&hub, &hub.amqp_port, tls.accept(socket), &connection).await;
}

/// Serves AMQP on a stream that is still being opened, of the port that `gate` switches. Never
/// fails: the reason goes to the log.
pub(crate) async fn serve_over<S: Stream>(
    hub: &Hub,
    gate: &PortGate,
    stream: impl Future<Output = io::Result<S>>,
    connection: &Connection,
) {
    let served = async {
        let stream = match gate.limit(CONNECT_TIMEOUT, stream).await {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => return format!("not opened: {error}"),
            None => return "not opened in time".to_owned(),
        };
        hub.counters.add_other(Counter::AmqpHandshakes);
        run(hub, gate, stream, connection).await
    };
    let reason = tokio::select! {
        // First, so that no link is detached when its socket is killed with it.
        biased;
        () = connection.closing() => "closed by the control API".to_owned(),
        reason = served => reason,
    };
    info!(
        connection = connection.id(),
        reason, "amqp connection ended"
    );
}

/// Returns why it is over.
async fn run<S: Stream>(hub: &Hub, gate: &PortGate, stream: S, connection: &Connection) -> String {
    let (reader, writer) = tokio::io::split(stream);
    let wake = Arc::new(Notify::new());
    let mut life = Life {
        hub,
        gate,
        client: Client::new(hub, connection, wake.clone()),
        reader,
        writer,
        input: BytesMut::with_capacity(READ_BATCH_BYTES),
        output: Output::default(),
        stalled: Duration::ZERO,
        stalled_since: None,
        has_input: false,
        ledger: hub.ledger.watch(),
        feedback: hub.c2d.feedback.watch(),
    };
    let reason = loop {
        if let Err(reason) = life.turn() {
            break reason;
        }
        if let Err(error) = life.wait(&wake).await {
            break error.to_string();
        }
    };
    let Life {
        client,
        reader,
        writer,
        ..
    } = life;
    // Nobody is connected any more before anybody can see the socket gone.
    drop(client);
    close(&mut reader.unsplit(writer)).await;
    reason
}

/// A connection between its first byte and its end.
struct Life<'a, S> {
    hub: &'a Hub,
    gate: &'a PortGate,
    client: Client<'a>,
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    input: BytesMut,
    output: Output,
    /// How long the port has been a black hole: that time does not count.
    stalled: Duration,
    stalled_since: Option<Instant>,
    /// Something was read that the engine has not seen.
    has_input: bool,
    ledger: watch::Receiver<u64>,
    feedback: watch::Receiver<u64>,
}

impl<S: Stream> Life<'_, S> {
    /// The time of the connection.
    fn now(&self) -> Instant {
        let now = Instant::now();
        now.checked_sub(self.stalled).unwrap_or(now)
    }

    /// Handles what is there.
    ///
    /// # Errors
    /// The connection is over.
    fn turn(&mut self) -> Result<(), String> {
        let now = self.now();
        if self.stalled_since.is_none() && std::mem::take(&mut self.has_input) {
            self.client.engine.receive(&mut self.input, now);
        }
        self.client.turn(&mut self.input, now);
        while let Some(bytes) = self.client.engine.output() {
            self.output.waiting.push_back(bytes);
        }
        match &self.client.closed {
            Some(cause) if self.output.is_empty() => Err(cause.to_string()),
            _ => Ok(()),
        }
    }

    /// Waits for something to handle.
    ///
    /// # Cancel safety
    /// What was read and written is accounted for.
    async fn wait(&mut self, wake: &Notify) -> io::Result<()> {
        if self.client.closed.is_some() {
            // The last frames, as long as the client takes them.
            let writing = self.output.write(&mut self.writer);
            let written = self.gate.limit(LINGER, writing).await;
            return written.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
        }
        let client = &mut self.client;
        let stalled = self.stalled_since.is_some();
        let wants_input = !stalled && client.engine.wants_input() && self.output.has_room();
        let deadline = client.engine.deadline().filter(|_| !stalled);
        let deadline = deadline.map(|at| at + self.stalled);
        let expiry_ms = client.tokens.next_expiry_ms();
        let (has_readers, has_feedback) = (client.readers > 0, client.feedbacks > 0);
        let clock = &self.hub.clock;
        let unlock_ms = match has_feedback {
            true => self.hub.c2d.feedback.tick(clock.now_ms()),
            false => None,
        };
        self.input.reserve(READ_BATCH_BYTES);
        tokio::select! {
            read = self.reader.read_buf(&mut self.input), if wants_input => {
                if read? == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the client closed the socket"));
                }
                self.has_input = true;
                self.note_stall();
            }
            written = self.output.write(&mut self.writer), if !self.output.is_empty() => written?,
            () = wake.notified() => client.woken(),
            () = sleep_until(deadline.unwrap_or_else(Instant::now).into()), if deadline.is_some() => {
                self.note_stall();
                if self.stalled_since.is_none() {
                    let now = self.now();
                    self.client.engine.expired(now);
                }
            }
            () = clock.sleep_until(expiry_ms.unwrap_or_default()), if expiry_ms.is_some() => {
                client.expire();
            }
            _ = self.ledger.changed(), if has_readers => {
                client.stir_all(|role| matches!(role, Role::Events(_)));
            }
            _ = self.feedback.changed(), if has_feedback => {
                client.stir_all(|role| matches!(role, Role::Feedback));
            }
            // The next round's tick frees what it held, and says that it changed.
            () = clock.sleep_until(unlock_ms.unwrap_or_default()), if unlock_ms.is_some() => {}
            () = self.gate.flowing(), if stalled => {
                if let Some(since) = self.stalled_since.take() {
                    self.stalled += since.elapsed();
                }
            }
        }
        Ok(())
    }

    /// Whatever happens while the port is a black hole is looked at when it is healed.
    fn note_stall(&mut self) {
        if self.gate.is_black_hole() {
            self.stalled_since.get_or_insert_with(Instant::now);
        }
    }
}

/// What waits to be written.
#[derive(Debug, Default)]
struct Output {
    waiting: VecDeque<Bytes>,
    /// Written, and perhaps still in a buffer of the stream.
    needs_flush: bool,
}

impl Output {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && !self.needs_flush
    }

    /// A client that does not read is not listened to either.
    fn has_room(&self) -> bool {
        let bytes: usize = self.waiting.iter().map(Bytes::len).sum();
        bytes < READ_BATCH_BYTES
    }

    /// Writes everything.
    ///
    /// # Cancel safety
    /// What was not written stays.
    async fn write(&mut self, writer: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_write(cx, Pin::new(&mut *writer))).await
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        mut writer: Pin<&mut impl AsyncWrite>,
    ) -> Poll<io::Result<()>> {
        while let Some(bytes) = self.waiting.front_mut() {
            let written = ready!(writer.as_mut().poll_write(cx, bytes))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.needs_flush = true;
            bytes.advance(written);
            if bytes.is_empty() {
                self.waiting.pop_front();
            }
        }
        ready!(writer.poll_flush(cx))?;
        self.needs_flush = false;
        Poll::Ready(Ok(()))
    }
}

/// Ends a connection so that the client still gets what was sent: closing a socket with unread
/// input would reset it and take our last frames along.
async fn close(stream: &mut impl Stream) {
    let ending = async {
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    let _ = timeout(LINGER, ending).await;
}

//! One MQTT session: a connection for one identity, driven by one task.
//!
//! The task owns the socket and the state machine. Each turn it takes all waiting commands, writes
//! the output in one go and reports all acknowledgements of a read in one event.

use std::{sync::Arc, time::Duration};

use edgehub_proto::{bag, identity::Identity, stored, topic};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, warn};

use super::{
    machine::Machine,
    terms::{Connack, ConnectParams, MachineConfig, MachineError, PublishError},
};
use crate::{
    counters::{self, SentCounters},
    lanes::{CloseCause, Disposition, DropReason, Outgoing, SessionId},
    limits,
    transport::{Command, SessionEvent},
};

/// How long DISCONNECT and the end of TLS may take.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a session needs beside its stream.
pub(super) struct SessionContext {
    pub(super) session: SessionId,
    pub(super) identity: Identity,
    pub(super) expires_at_ms: Option<u64>,
    pub(super) events: mpsc::Sender<SessionEvent>,
}

/// Runs the session on `stream` until it ends; tells why.
pub(super) async fn run<S>(
    stream: S,
    config: MachineConfig,
    connect: ConnectParams,
    context: SessionContext,
    commands: &mut mpsc::Receiver<Command>,
) -> CloseCause
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let machine = match Machine::new(config, connect, monotonic_now()) {
        Ok(machine) => machine,
        Err(error) => return CloseCause::Local(error.to_string().into()),
    };
    let (reader, writer) = tokio::io::split(stream);
    let counters = SentCounters::new(context.identity.clone());
    let mut running = Running {
        reader,
        writer,
        machine,
        context,
        counters,
        refused: Vec::new(),
        is_open: false,
        needs_flush: false,
    };
    let cause = running.until_closed(commands).await;
    let ignored = running.machine.ignored_publishes();
    if ignored > 0 {
        debug!(identity = %running.context.identity, ignored, "publishes from upstream ignored");
    }
    cause
}

struct Running<S> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    machine: Machine,
    context: SessionContext,
    counters: SentCounters,
    /// Messages that cannot be sent, to be reported with the next acknowledgements.
    refused: Vec<(u64, Disposition)>,
    is_open: bool,
    needs_flush: bool,
}

/// What a turn waits for.
enum Input {
    Command(Option<Command>),
    Flushed(std::io::Result<()>),
    Read(std::io::Result<usize>),
    TimedOut,
    Written(std::io::Result<usize>),
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Running<S> {
    async fn until_closed(&mut self, commands: &mut mpsc::Receiver<Command>) -> CloseCause {
        let mut buffer = vec![0; limits::READ_CHUNK_BYTES];
        loop {
            let input = self.next_input(&mut buffer, commands).await;
            let turn = match input {
                Input::Command(Some(Command::Send(batch))) => self.send_all(batch, commands),
                Input::Command(Some(Command::Close) | None) => Turn::Close,
                Input::Read(Ok(0)) => Turn::End(self.lost("closed by the upstream")),
                Input::Read(Ok(length)) => self.received(buffer.get(..length).unwrap_or_default()),
                Input::Written(Ok(length)) => {
                    self.machine.written(length);
                    self.needs_flush = true;
                    Turn::GoOn
                }
                Input::Flushed(Ok(())) => {
                    self.needs_flush = false;
                    Turn::GoOn
                }
                Input::TimedOut => match self.machine.handle_timeout(monotonic_now()) {
                    Ok(()) => Turn::GoOn,
                    Err(error) => Turn::End(cause_of(&error)),
                },
                Input::Read(Err(error))
                | Input::Written(Err(error))
                | Input::Flushed(Err(error)) => Turn::End(self.lost(&error.to_string())),
            };
            self.report().await;
            match turn {
                Turn::GoOn => {}
                Turn::Close => {
                    self.say_goodbye().await;
                    return CloseCause::Requested;
                }
                Turn::End(cause) => return cause,
            }
        }
    }

    /// Waits for whatever comes first. All branches are cancel safe: a write or read that was not
    /// chosen has taken nothing.
    async fn next_input(
        &mut self,
        buffer: &mut [u8],
        commands: &mut mpsc::Receiver<Command>,
    ) -> Input {
        let output = self.machine.output();
        let has_output = !output.is_empty();
        let deadline = self.machine.next_timeout().map(Instant::from_std);
        tokio::select! {
            command = commands.recv() => Input::Command(command),
            read = self.reader.read(buffer) => Input::Read(read),
            input = push(&mut self.writer, output), if has_output || self.needs_flush => input,
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                Input::TimedOut
            }
        }
    }

    fn received(&mut self, data: &[u8]) -> Turn {
        let result = self.machine.receive(monotonic_now(), data);
        match (result, self.machine.poll_connack()) {
            (Err(error), _) => Turn::End(cause_of(&error)),
            (Ok(()), Some(Connack::Accepted)) => {
                self.is_open = true;
                Turn::GoOn
            }
            (Ok(()), Some(refusal)) => Turn::End(refused(refusal)),
            (Ok(()), None) => Turn::GoOn,
        }
    }

    /// Sends a batch and whatever else waits, so that it goes into the same write.
    fn send_all(&mut self, batch: Vec<Outgoing>, commands: &mut mpsc::Receiver<Command>) -> Turn {
        let mut batch = batch;
        loop {
            if let Err(NoRoom) = self.send(batch) {
                return Turn::End(CloseCause::Local("window overrun".into()));
            }
            batch = match commands.try_recv() {
                Ok(Command::Send(more)) => more,
                Ok(Command::Close) => return Turn::Close,
                Err(_) => return Turn::GoOn,
            };
        }
    }

    fn send(&mut self, batch: Vec<Outgoing>) -> Result<(), NoRoom> {
        for outgoing in batch {
            let token = outgoing.token;
            if let Some(reason) = self.publish(outgoing)? {
                self.refused.push((token, Disposition::Unsendable(reason)));
            }
        }
        Ok(())
    }

    /// Puts a message into the output, or says why it can never be sent.
    fn publish(&mut self, outgoing: Outgoing) -> Result<Option<DropReason>, NoRoom> {
        let Outgoing {
            token,
            priority,
            resend,
            entry,
        } = outgoing;
        let identity = &self.context.identity;
        let message = match stored::decode_message(entry.message) {
            Ok(message) => message,
            Err(error) => {
                warn!(%identity, offset = entry.offset, %error, "stored message is damaged");
                counters::dropped(identity, String::new(), DropReason::CorruptRecord);
                return Ok(Some(DropReason::CorruptRecord));
            }
        };
        let topic = topic::telemetry(identity, &bag::encode_upstream(&message));
        let output = counters::output_of(&message);
        match self
            .machine
            .publish(monotonic_now(), token, resend, topic, &message.body)
        {
            Ok(()) => {
                self.counters.sent(token, output, priority);
                Ok(None)
            }
            Err(error @ (PublishError::TooLarge { .. } | PublishError::TopicTooLong { .. })) => {
                warn!(%identity, offset = entry.offset, %error, "message cannot be sent over MQTT");
                counters::dropped(identity, output.to_owned(), DropReason::TooLarge);
                Ok(Some(DropReason::TooLarge))
            }
            Err(PublishError::NoRoom) => Err(NoRoom),
        }
    }

    /// Tells what happened in this turn.
    async fn report(&mut self) {
        let session = self.context.session;
        if std::mem::take(&mut self.is_open) {
            let expires_at_ms = self.context.expires_at_ms;
            let opened = SessionEvent::Opened {
                session,
                expires_at_ms,
            };
            // The receiver is gone only when the whole bridge is.
            let _ = self.context.events.send(opened).await;
        }
        let mut dispositions = std::mem::take(&mut self.refused);
        for token in self.machine.drain_acked() {
            self.counters.accepted(token);
            dispositions.push((token, Disposition::Accepted));
        }
        if !dispositions.is_empty() {
            let disposed = SessionEvent::Disposed {
                session,
                dispositions,
            };
            let _ = self.context.events.send(disposed).await;
        }
    }

    async fn say_goodbye(&mut self) {
        self.machine.disconnect(monotonic_now());
        let (writer, output) = (&mut self.writer, self.machine.output());
        let goodbye = async move {
            writer.write_all(output).await?;
            writer.shutdown().await
        };
        // The other side learns it from the end of the connection anyway.
        let _ = timeout(GOODBYE_TIMEOUT, goodbye).await;
    }

    fn lost(&self, text: &str) -> CloseCause {
        if self.machine.is_connecting() {
            CloseCause::Unreachable(format!("{text} before CONNACK").into())
        } else {
            CloseCause::Lost(text.into())
        }
    }
}

/// Writes what there is, or else flushes what TLS still holds.
async fn push<W: AsyncWrite + Unpin>(writer: &mut W, output: &[u8]) -> Input {
    if output.is_empty() {
        Input::Flushed(writer.flush().await)
    } else {
        Input::Written(writer.write(output).await)
    }
}

/// The lane sent more than its window. Without an end of the session what has no room would wait
/// for an answer that never comes.
struct NoRoom;

enum Turn {
    Close,
    End(CloseCause),
    GoOn,
}

/// Monotonic time of the runtime: the one that its timers use and that tests can pause.
fn monotonic_now() -> std::time::Instant {
    Instant::now().into_std()
}

fn refused(connack: Connack) -> CloseCause {
    let text = |text: &str| Arc::<str>::from(text);
    match connack {
        Connack::Accepted => CloseCause::Local(text("accepted")),
        Connack::BadCredentials => CloseCause::Refused(text("bad user name or password")),
        Connack::IdentifierRejected => CloseCause::Refused(text("client identifier rejected")),
        Connack::NotAuthorized => CloseCause::Refused(text("not authorized")),
        Connack::ServerUnavailable => CloseCause::Busy(text("server unavailable")),
        Connack::UnacceptableProtocol => CloseCause::Protocol(text("unacceptable protocol")),
    }
}

fn cause_of(error: &MachineError) -> CloseCause {
    let text = Arc::<str>::from(error.to_string());
    match error {
        MachineError::ConnackTimeout(_) => CloseCause::Unreachable(text),
        MachineError::AckStall(_) | MachineError::PingTimeout(_) => CloseCause::Lost(text),
        MachineError::Malformed(_)
        | MachineError::PacketTooLarge { .. }
        | MachineError::UnexpectedPacket { .. }
        | MachineError::UnknownPacketId(_) => CloseCause::Protocol(text),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;

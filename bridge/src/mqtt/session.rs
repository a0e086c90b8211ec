//! One MQTT session: a connection for one identity, driven by one task.
//!
//! The task owns the socket, the state machine and what there is to hear. Each turn it takes all
//! waiting commands, writes the output in one go and reports all acknowledgements of a read in one
//! event.

use std::{sync::Arc, time::Duration};

use edgehub_proto::{
    hub::{Downstream, Needs},
    identity::Identity,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    hearing::Hearing,
    machine::Machine,
    replies::Reply,
    telemetry::{NoRoom, Telemetry},
    terms::{Connack, ConnectParams, MachineConfig, MachineError},
};
use crate::{
    lanes::{CloseCause, Outgoing, SessionId},
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
    pub(super) needs: watch::Receiver<Needs>,
    pub(super) downstream: Arc<dyn Downstream>,
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
    let identity = context.identity.clone();
    let mut running = Running {
        reader,
        writer,
        machine,
        telemetry: Telemetry::new(identity.clone()),
        hearing: Hearing::new(identity, Arc::clone(&context.downstream)),
        context,
        has_opened: false,
        is_engaged: false,
        needs_flush: false,
    };
    running.until_closed(commands).await
}

struct Running<S> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    machine: Machine,
    context: SessionContext,
    telemetry: Telemetry,
    hearing: Hearing,
    /// CONNACK came and is not reported.
    has_opened: bool,
    /// What was last reported.
    is_engaged: bool,
    needs_flush: bool,
}

/// What a turn waits for.
enum Input {
    Command(Option<Command>),
    Flushed(std::io::Result<()>),
    Needs,
    Read(std::io::Result<usize>),
    Reply(Reply),
    TimedOut,
    Written(std::io::Result<usize>),
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Running<S> {
    async fn until_closed(&mut self, commands: &mut mpsc::Receiver<Command>) -> CloseCause {
        let mut buffer = vec![0; limits::READ_CHUNK_BYTES];
        loop {
            let input = self.next_input(&mut buffer, commands).await;
            let turn = match self.take(input, &buffer, commands) {
                Turn::GoOn => self.pursue(),
                end => end,
            };
            self.report().await;
            match turn {
                Turn::GoOn => {}
                Turn::Close => {
                    self.say_goodbye().await;
                    return CloseCause::Requested;
                }
                Turn::End(cause) => {
                    if matches!(cause, CloseCause::Unsettled(_)) {
                        // The link is fine: what is acknowledged must not come again too.
                        self.say_goodbye().await;
                    }
                    return cause;
                }
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
        let deadlines = [self.machine.next_timeout(), self.hearing.next_timeout()];
        let deadline = deadlines.into_iter().flatten().min().map(Instant::from_std);
        tokio::select! {
            command = commands.recv() => Input::Command(command),
            changed = self.context.needs.changed() => match changed {
                Ok(()) => Input::Needs,
                // Nobody wants the session any more.
                Err(_) => Input::Command(None),
            },
            reply = self.hearing.next_reply(monotonic_now) => Input::Reply(reply),
            read = self.reader.read(buffer) => Input::Read(read),
            input = push(&mut self.writer, output), if has_output || self.needs_flush => input,
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                Input::TimedOut
            }
        }
    }

    fn take(
        &mut self,
        input: Input,
        buffer: &[u8],
        commands: &mut mpsc::Receiver<Command>,
    ) -> Turn {
        match input {
            Input::Command(Some(Command::Send(batch))) => self.send_all(batch, commands),
            Input::Command(Some(Command::Request(requests))) => {
                self.hearing.request(requests);
                Turn::GoOn
            }
            Input::Command(Some(Command::Close) | None) => Turn::Close,
            // Before CONNACK the newest needs are read when it comes.
            Input::Needs if self.machine.is_connecting() => Turn::GoOn,
            Input::Needs => {
                let needs = *self.context.needs.borrow_and_update();
                Turn::from(self.hearing.need(needs))
            }
            Input::Reply(reply) => {
                let now = monotonic_now();
                Turn::from(self.hearing.take_reply(&mut self.machine, now, reply))
            }
            Input::Read(Ok(0)) => Turn::End(self.lost("closed by the upstream")),
            Input::Read(Ok(length)) => self.received(buffer.get(..length).unwrap_or_default()),
            Input::Written(Ok(length)) => {
                self.machine.written(length);
                if self.machine.output().is_empty() {
                    self.hearing.is_read();
                }
                self.needs_flush = true;
                Turn::GoOn
            }
            Input::Flushed(Ok(())) => {
                self.needs_flush = false;
                Turn::GoOn
            }
            Input::TimedOut => {
                self.hearing.handle_timeout(monotonic_now());
                match self.machine.handle_timeout(monotonic_now()) {
                    Ok(()) => Turn::GoOn,
                    Err(error) => Turn::End(cause_of(&error)),
                }
            }
            Input::Read(Err(error)) | Input::Written(Err(error)) | Input::Flushed(Err(error)) => {
                Turn::End(self.lost(&error.to_string()))
            }
        }
    }

    fn received(&mut self, data: &[u8]) -> Turn {
        let now = monotonic_now();
        let result = self.machine.receive(now, data);
        match self.machine.poll_connack() {
            None => {}
            Some(Connack::Accepted) => {
                self.has_opened = true;
                let needs = *self.context.needs.borrow_and_update();
                if let Err(cause) = self.hearing.need(needs) {
                    return Turn::End(cause);
                }
            }
            Some(refusal) => return Turn::End(refused(refusal)),
        }
        // What came before a fault still counts.
        while let Some(event) = self.machine.poll_event() {
            let taken = self.hearing.take_event(&mut self.machine, now, event);
            if let Err(cause) = taken {
                return Turn::End(cause);
            }
        }
        result.map_or_else(|error| Turn::End(cause_of(&error)), |()| Turn::GoOn)
    }

    /// Does everything that the input has made possible.
    fn pursue(&mut self) -> Turn {
        if self.machine.is_connecting() {
            return Turn::GoOn;
        }
        Turn::from(self.hearing.pursue(&mut self.machine, monotonic_now()))
    }

    /// Sends a batch and whatever else waits, so that it goes into the same write.
    fn send_all(&mut self, batch: Vec<Outgoing>, commands: &mut mpsc::Receiver<Command>) -> Turn {
        let mut batch = batch;
        loop {
            if let Err(NoRoom) = self.telemetry.send(&mut self.machine, batch) {
                return Turn::End(CloseCause::Local("window overrun".into()));
            }
            batch = match commands.try_recv() {
                Ok(Command::Send(more)) => more,
                Ok(Command::Request(requests)) => {
                    self.hearing.request(requests);
                    Vec::new()
                }
                Ok(Command::Close) => return Turn::Close,
                Err(_) => return Turn::GoOn,
            };
        }
    }

    /// Tells what happened in this turn.
    async fn report(&mut self) {
        let session = self.context.session;
        // A receiver is gone only when the whole bridge is.
        if std::mem::take(&mut self.has_opened) {
            let expires_at_ms = self.context.expires_at_ms;
            let opened = SessionEvent::Opened {
                session,
                expires_at_ms,
            };
            let _ = self.context.events.send(opened).await;
        }
        let dispositions = self.telemetry.dispositions(&mut self.machine);
        if !dispositions.is_empty() {
            let disposed = SessionEvent::Disposed {
                session,
                dispositions,
            };
            let _ = self.context.events.send(disposed).await;
        }
        for (request, answer) in self.hearing.take_outcomes() {
            let answered = SessionEvent::Answered { request, answer };
            let _ = self.context.events.send(answered).await;
        }
        let engaged = self.hearing.is_engaged();
        if std::mem::replace(&mut self.is_engaged, engaged) != engaged {
            let engaged = SessionEvent::Engaged { session, engaged };
            let _ = self.context.events.send(engaged).await;
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

enum Turn {
    Close,
    End(CloseCause),
    GoOn,
}

impl From<Result<(), CloseCause>> for Turn {
    fn from(result: Result<(), CloseCause>) -> Self {
        result.map_or_else(Self::End, |()| Self::GoOn)
    }
}

/// Monotonic time of the runtime: the one that its timers use and that tests can pause.
pub(super) fn monotonic_now() -> std::time::Instant {
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
        MachineError::AckStall(_)
        | MachineError::PingTimeout(_)
        | MachineError::SubackTimeout(_) => CloseCause::Lost(text),
        MachineError::Busy => CloseCause::Local(text),
        MachineError::Malformed(_)
        | MachineError::PacketTooLarge { .. }
        | MachineError::UnexpectedPacket { .. }
        | MachineError::UnknownPacketId(_)
        | MachineError::UnknownSubscription(_) => CloseCause::Protocol(text),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;

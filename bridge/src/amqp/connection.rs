//! The task of one connection: dials, moves bytes, hands everything to the [`Multiplex`].

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use edgehub_proto::{hub::Needs, identity::Identity};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::{
    arrivals::{Awaited, Reply},
    multiplex::{Multiplex, Told},
    ways::Ways,
};
use crate::{
    dial::ByteIo,
    lanes::{CloseCause, SessionId},
    limits,
    transport::{Command, SessionEvent},
};

/// How long a connection without identities is kept.
const LINGER: Duration = Duration::from_secs(5);

/// How long the end of TLS may take.
const GOODBYE_MAX: Duration = Duration::from_secs(1);

/// How long a method's answer is waited for: the longest that IoT Hub lets a caller wait, 300 s,
/// and the reference's slack (spec/core.md 6).
const METHOD_MAX: Duration = Duration::from_secs(330);

/// An identity joins a connection.
#[derive(Debug)]
pub(super) struct Admission {
    pub(super) session: SessionId,
    pub(super) identity: Identity,
    pub(super) needs: Needs,
    /// Where its events go, but for the last one.
    pub(super) events: mpsc::Sender<SessionEvent>,
    /// Told why it is over.
    pub(super) over: oneshot::Sender<CloseCause>,
}

/// What the identities of a connection tell it.
#[derive(Debug)]
pub(super) enum Input {
    Admit(Admission),
    /// None: the lane is gone.
    Command(SessionId, Option<Command>),
    Need(SessionId, Needs),
}

/// Where an identity's events go.
struct Outlet {
    events: mpsc::Sender<SessionEvent>,
    over: oneshot::Sender<CloseCause>,
}

pub(super) struct Connection {
    pub(super) multiplex: Multiplex,
    pub(super) ways: Arc<Ways>,
    pub(super) inputs: mpsc::Receiver<Input>,
    /// Identities that fit; lowered to what the upstream admits.
    pub(super) capacity: Arc<AtomicUsize>,
    pub(super) cancel: CancellationToken,
}

/// What a turn waits for.
enum Turn {
    Flushed(std::io::Result<()>),
    Input(Option<Input>),
    Read(std::io::Result<usize>),
    Reply(Option<(SessionId, Reply)>),
    Stop,
    TimedOut,
    Written(std::io::Result<usize>),
}

impl Connection {
    /// Runs until the connection is over. Everybody who is on it then, or comes too late, is told.
    pub(super) async fn run(mut self) {
        let mut outlets = HashMap::new();
        if let Some(stream) = self.dial(&mut outlets).await {
            let running = Running::new(&mut self, stream, &mut outlets);
            running.until_over().await;
        }
        // Closed first, so that nobody comes after the last look.
        self.inputs.close();
        while let Ok(input) = self.inputs.try_recv() {
            if let Input::Admit(late) = input {
                let _ = late.over.send(CloseCause::Requested);
            }
        }
    }

    /// Dials while identities gather. None when nothing came of it.
    async fn dial(&mut self, outlets: &mut HashMap<SessionId, Outlet>) -> Option<Box<dyn ByteIo>> {
        let ways = Arc::clone(&self.ways);
        let mut dialing = Box::pin(async move { ways.dial(now).await });
        loop {
            tokio::select! {
                dialed = &mut dialing => match dialed {
                    Ok(stream) => {
                        self.multiplex.connected(now());
                        return Some(stream);
                    }
                    Err(text) => {
                        self.multiplex.unreachable(&text);
                        carry_out(&mut self.multiplex, outlets, None).await;
                        return None;
                    }
                },
                input = self.inputs.recv() => {
                    take_input(&mut self.multiplex, outlets, input?);
                    carry_out(&mut self.multiplex, outlets, None).await;
                    if self.multiplex.members() == 0 {
                        // Nobody waits for it any more.
                        return None;
                    }
                }
            }
        }
    }
}

struct Running<'a> {
    multiplex: &'a mut Multiplex,
    outlets: &'a mut HashMap<SessionId, Outlet>,
    inputs: &'a mut mpsc::Receiver<Input>,
    capacity: &'a AtomicUsize,
    cancel: &'a CancellationToken,
    reader: ReadHalf<Box<dyn ByteIo>>,
    writer: WriteHalf<Box<dyn ByteIo>>,
    read: BytesMut,
    replies: JoinSet<(SessionId, Reply)>,
    needs_flush: bool,
    is_closing: bool,
    /// Since when there has been no identity.
    empty_since: Option<Instant>,
}

impl<'a> Running<'a> {
    fn new(
        connection: &'a mut Connection,
        stream: Box<dyn ByteIo>,
        outlets: &'a mut HashMap<SessionId, Outlet>,
    ) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self {
            multiplex: &mut connection.multiplex,
            outlets,
            inputs: &mut connection.inputs,
            capacity: &connection.capacity,
            cancel: &connection.cancel,
            reader,
            writer,
            read: BytesMut::new(),
            replies: JoinSet::new(),
            needs_flush: false,
            is_closing: false,
            empty_since: None,
        }
    }

    async fn until_over(mut self) {
        loop {
            self.look_at_members();
            let turn = self.next_turn().await;
            self.take(turn);
            // What waits already goes into the same write.
            while let Ok(input) = self.inputs.try_recv() {
                take_input(self.multiplex, self.outlets, input);
            }
            carry_out(self.multiplex, self.outlets, Some(&mut self.replies)).await;
            if self.multiplex.is_over() {
                break;
            }
        }
        let (writer, output) = (&mut self.writer, self.multiplex.output());
        let goodbye = async move {
            writer.write_all(output).await?;
            writer.shutdown().await
        };
        // The other side learns it from the end of the connection anyway.
        let _ = timeout(GOODBYE_MAX, goodbye).await;
    }

    /// Closes a connection that nobody uses.
    fn look_at_members(&mut self) {
        if let Some(max) = self.multiplex.members_max() {
            self.capacity.fetch_min(max, Ordering::Relaxed);
        }
        if self.multiplex.members() > 0 {
            self.empty_since = None;
            return;
        }
        let since = *self.empty_since.get_or_insert_with(Instant::now);
        let is_due = self.cancel.is_cancelled() || Instant::now() >= since + LINGER;
        if is_due && !std::mem::replace(&mut self.is_closing, true) {
            info!("upstream connection is closed: nobody uses it");
            // Nobody is taken on any more.
            self.inputs.close();
            self.multiplex.close(now());
        }
    }

    /// Waits for whatever comes first. All branches are cancel safe: a write or read that was not
    /// chosen has taken nothing.
    async fn next_turn(&mut self) -> Turn {
        let output = self.multiplex.output();
        let has_output = !output.is_empty();
        let linger = self
            .empty_since
            .filter(|_| !self.is_closing)
            .map(|since| since + LINGER);
        let due = self.multiplex.next_timeout().map(Instant::from_std);
        let deadline = due.into_iter().chain(linger).min();
        self.read.reserve(limits::AMQP_READ_CHUNK_BYTES);
        tokio::select! {
            input = self.inputs.recv(), if !self.inputs.is_closed() => Turn::Input(input),
            read = self.reader.read_buf(&mut self.read) => Turn::Read(read),
            turn = push(&mut self.writer, output), if has_output || self.needs_flush => turn,
            Some(reply) = self.replies.join_next() => Turn::Reply(reply.ok()),
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                Turn::TimedOut
            }
            () = self.cancel.cancelled(), if self.empty_since.is_some() && !self.is_closing => {
                Turn::Stop
            }
        }
    }

    fn take(&mut self, turn: Turn) {
        match turn {
            Turn::Input(Some(input)) => take_input(self.multiplex, self.outlets, input),
            // All identities have gone, and the pool with them.
            Turn::Input(None) | Turn::Stop => {}
            Turn::Read(Ok(0)) => self.multiplex.broken("closed by the upstream"),
            Turn::Read(Ok(_)) => self.multiplex.receive(&mut self.read, now()),
            Turn::Written(Ok(length)) => {
                self.multiplex.written(length, now());
                self.needs_flush = true;
            }
            Turn::Flushed(Ok(())) => self.needs_flush = false,
            Turn::TimedOut => self.multiplex.handle_timeout(now()),
            Turn::Reply(Some((session, reply))) => self.multiplex.reply(session, reply, now()),
            // Its task cannot panic, and is cancelled only with us.
            Turn::Reply(None) => {}
            Turn::Read(Err(error)) | Turn::Written(Err(error)) | Turn::Flushed(Err(error)) => {
                self.multiplex.broken(&error.to_string());
            }
        }
    }
}

fn take_input(multiplex: &mut Multiplex, outlets: &mut HashMap<SessionId, Outlet>, input: Input) {
    match input {
        Input::Admit(admission) => {
            let Admission {
                session,
                identity,
                needs,
                events,
                over,
            } = admission;
            outlets.insert(session, Outlet { events, over });
            multiplex.admit(session, identity, needs, now());
        }
        Input::Command(session, command) => multiplex.command(session, command, now()),
        Input::Need(session, needs) => multiplex.need(session, needs, now()),
    }
}

/// Does what the members want.
async fn carry_out(
    multiplex: &mut Multiplex,
    outlets: &mut HashMap<SessionId, Outlet>,
    mut replies: Option<&mut JoinSet<(SessionId, Reply)>>,
) {
    for told in multiplex.told() {
        match told {
            Told::Await(session, awaited) => {
                if let Some(replies) = replies.as_deref_mut() {
                    replies.spawn(async move { (session, wait_for(awaited).await) });
                }
            }
            Told::Event(session, event) => {
                if let Some(outlet) = outlets.get(&session) {
                    // A receiver is gone only when the whole bridge is.
                    let _ = outlet.events.send(event).await;
                }
            }
            Told::Closed(session, cause) => {
                debug!(%session, %cause, "identity leaves the connection");
                if let Some(outlet) = outlets.remove(&session) {
                    let _ = outlet.over.send(cause);
                }
            }
        }
    }
}

async fn wait_for(awaited: Awaited) -> Reply {
    match awaited {
        Awaited::CloudToDevice { number, reply } => Reply::CloudToDevice {
            number,
            outcome: reply.await.ok(),
        },
        Awaited::Method { call, reply } => Reply::Method {
            call,
            result: timeout(METHOD_MAX, reply).await.ok().and_then(Result::ok),
        },
    }
}

/// Writes what there is, or else flushes what TLS still holds.
async fn push<W: AsyncWrite + Unpin>(writer: &mut W, output: &[u8]) -> Turn {
    if output.is_empty() {
        Turn::Flushed(writer.flush().await)
    } else {
        Turn::Written(writer.write(output).await)
    }
}

/// Monotonic time of the runtime: the one that its timers use and that tests can pause.
pub(super) fn now() -> std::time::Instant {
    Instant::now().into_std()
}

//! The byte stream of one connection: reads into the machine, writes what it has to say.
//!
//! Reading and writing go on side by side: a client that is slow to read still has its packets
//! worked off, until the machine has no more room. Nothing here knows what carries the stream.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use edgehub_proto::clock::Clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::ConnectionEnd;
use super::limits::{READ_BYTES_MAX, WRITE_MAX};
use super::machine::Machine;
use crate::telemetry::metrics::AckCounters;

thread_local! {
    /// One read buffer for each worker thread instead of one for each connection.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES_MAX]);
}

/// A stream, and what is being written to it.
#[derive(Debug)]
pub(super) struct Transport<S> {
    stream: S,
    chunk: Option<ntex_bytes::Bytes>,
    /// Bytes of the chunk that the stream has taken.
    offset: usize,
    /// The chunk was taken, but may still be in a buffer of the stream.
    flushing: bool,
    /// When the peer took something last, or the writing began.
    moved_at: Instant,
}

impl<S> Transport<S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    pub(super) fn new(stream: S, now: Instant) -> Self {
        Self {
            stream,
            chunk: None,
            offset: 0,
            flushing: false,
            moved_at: now,
        }
    }

    /// Whether something is being written.
    pub(super) fn is_writing(&self) -> bool {
        self.chunk.is_some() || self.flushing
    }

    /// Takes the output of the machine, unless older output is still being written. Whether there
    /// was any.
    pub(super) fn load(
        &mut self,
        machine: &mut Machine,
        counters: &AckCounters,
        now: Instant,
    ) -> bool {
        if self.is_writing() {
            return false;
        }
        let Some(chunk) = machine.output() else {
            return false;
        };
        let acks = machine.take_acks_written();
        if acks > 0 {
            counters.acks.increment(acks);
            counters.writes.increment(1);
        }
        self.chunk = Some(chunk);
        self.offset = 0;
        self.moved_at = now;
        true
    }

    /// Writes what the stream takes at once.
    pub(super) async fn write_now(
        &mut self,
        machine: &mut Machine,
        clock: &dyn Clock,
    ) -> io::Result<()> {
        std::future::poll_fn(|task| match self.poll_write(machine, clock, task) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        })
        .await
    }

    /// Writes until nothing is left, and reads once if that is wanted; returns when either was
    /// done.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped: how far a write got is kept, and bytes are read and
    /// handed over in one poll.
    pub(super) async fn progress(
        &mut self,
        machine: &mut Machine,
        clock: &dyn Clock,
        reads: bool,
    ) -> Result<(), ConnectionEnd> {
        std::future::poll_fn(|task| {
            let mut moved = false;
            if self.is_writing() {
                match self.poll_write(machine, clock, task) {
                    Poll::Ready(written) => {
                        written?;
                        moved = true;
                    }
                    Poll::Pending => {}
                }
            }
            if reads {
                match self.poll_read(machine, clock, task) {
                    Poll::Ready(read) => {
                        read?;
                        moved = true;
                    }
                    Poll::Pending => {}
                }
            }
            if moved {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            }
        })
        .await
    }

    /// Writes all that the machine has to say.
    ///
    /// # Cancel safety
    /// What was not written then is not written; nothing is written twice.
    pub(super) async fn finish(
        &mut self,
        machine: &mut Machine,
        counters: &AckCounters,
        clock: &dyn Clock,
    ) -> io::Result<()> {
        while self.is_writing() || self.load(machine, counters, clock.instant()) {
            std::future::poll_fn(|task| self.poll_write(machine, clock, task)).await?;
        }
        Ok(())
    }

    /// When [`Transport::is_stalled`] must be asked; none while nothing is written.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.is_writing().then(|| self.moved_at + WRITE_MAX)
    }

    /// Whether the client has read nothing for too long.
    pub(super) fn is_stalled(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| now >= deadline)
    }

    /// Ready when nothing is left to write.
    fn poll_write(
        &mut self,
        machine: &mut Machine,
        clock: &dyn Clock,
        task: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while let Some(chunk) = &self.chunk {
            let rest = chunk.get(self.offset..).unwrap_or_default();
            if rest.is_empty() {
                self.chunk = None;
                self.flushing = true;
                break;
            }
            let taken = ready!(Pin::new(&mut self.stream).poll_write(task, rest))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.offset += taken;
            self.moved_at = clock.instant();
            machine.written(taken);
        }
        if self.flushing {
            ready!(Pin::new(&mut self.stream).poll_flush(task))?;
            self.flushing = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_read(
        &mut self,
        machine: &mut Machine,
        clock: &dyn Clock,
        task: &mut Context<'_>,
    ) -> Poll<Result<(), ConnectionEnd>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            match ready!(Pin::new(&mut self.stream).poll_read(task, &mut buffer)) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Poll::Ready(Err(ConnectionEnd::PeerGone))
                }
                Err(error) => Poll::Ready(Err(error.into())),
                Ok(()) if buffer.filled().is_empty() => Poll::Ready(Err(ConnectionEnd::PeerGone)),
                Ok(()) => {
                    machine.receive(buffer.filled(), clock.instant());
                    Poll::Ready(Ok(()))
                }
            }
        })
    }
}

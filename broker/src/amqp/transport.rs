//! The byte stream of one connection: reads for the engine, writes what it has to say.
//!
//! Reading and writing go on side by side. Nothing here knows what carries the stream; over a
//! WebSocket each write is one message of whole frames (spec/amqp.md 1.3).

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use edgehub_proto::clock::Clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::limits::{READ_BYTES_MAX, WRITE_MAX};

thread_local! {
    /// One read buffer for each worker thread instead of one for each connection.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES_MAX]);
}

/// A stream, what was read from it, and what is being written to it.
#[derive(Debug)]
pub(super) struct Transport<S> {
    stream: S,
    /// What the engine has not taken yet.
    pub(super) input: BytesMut,
    chunk: Bytes,
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
            input: BytesMut::new(),
            chunk: Bytes::new(),
            flushing: false,
            moved_at: now,
        }
    }

    /// Whether something is being written.
    pub(super) fn is_writing(&self) -> bool {
        !self.chunk.is_empty() || self.flushing
    }

    /// Takes frames to write. Only while nothing else is being written.
    pub(super) fn load(&mut self, chunk: Bytes, now: Instant) {
        self.chunk = chunk;
        self.moved_at = now;
    }

    /// Writes what the stream takes at once.
    pub(super) async fn write_now(&mut self, clock: &dyn Clock) -> io::Result<()> {
        std::future::poll_fn(|task| match self.poll_write(clock, task) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        })
        .await
    }

    /// Writes all that was loaded.
    ///
    /// # Cancel safety
    /// What was not written then is not written; nothing is written twice.
    pub(super) async fn finish(&mut self, clock: &dyn Clock) -> io::Result<()> {
        std::future::poll_fn(|task| self.poll_write(clock, task)).await
    }

    /// Writes until nothing is left, and reads once if that is wanted; returns when either was
    /// done. The end of the stream is an error of kind `UnexpectedEof`.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped.
    pub(super) async fn progress(&mut self, clock: &dyn Clock, reads: bool) -> io::Result<()> {
        std::future::poll_fn(|task| {
            let mut moved = false;
            if self.is_writing()
                && let Poll::Ready(written) = self.poll_write(clock, task)
            {
                written?;
                moved = true;
            }
            if reads && let Poll::Ready(read) = self.poll_read(task) {
                read?;
                moved = true;
            }
            if moved {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            }
        })
        .await
    }

    /// When the peer has read nothing for too long; none while nothing is written.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.is_writing().then(|| self.moved_at + WRITE_MAX)
    }

    /// Ready when nothing is left to write.
    fn poll_write(&mut self, clock: &dyn Clock, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.chunk.is_empty() {
            let taken = ready!(Pin::new(&mut self.stream).poll_write(task, &self.chunk))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let _ = self.chunk.split_to(taken.min(self.chunk.len()));
            self.moved_at = clock.instant();
            self.flushing = true;
        }
        if self.flushing {
            ready!(Pin::new(&mut self.stream).poll_flush(task))?;
            self.flushing = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_read(&mut self, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.stream).poll_read(task, &mut buffer))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            self.input.extend_from_slice(buffer.filled());
            Poll::Ready(Ok(()))
        })
    }
}

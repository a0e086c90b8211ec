//! The state of a listening port, which a test can change: open, black hole, refused.
//!
//! Black hole: connections are accepted and nothing is read from or written to any socket of the
//! port, old or new, until it is healed; then all of them go on where they were. Refused: the
//! listener is closed, existing connections go on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::timeout;

/// What a port does with its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PortState {
    BlackHole,
    Open,
    Refused,
}

/// The switch of one port.
#[derive(Debug, Clone)]
pub(crate) struct PortGate {
    stall: Arc<Stall>,
    wanted: watch::Sender<PortState>,
    /// What the listener has carried out: [`PortState::Refused`] or not.
    reached: watch::Sender<PortState>,
}

impl PortGate {
    pub(crate) fn new() -> Self {
        Self {
            stall: Arc::default(),
            wanted: watch::Sender::new(PortState::Open),
            reached: watch::Sender::new(PortState::Refused),
        }
    }

    pub(crate) fn state(&self) -> PortState {
        *self.wanted.borrow()
    }

    /// Changes the state and returns when the listener has followed.
    pub(crate) async fn set(&self, state: PortState) {
        self.stall.set(state == PortState::BlackHole);
        let mut reached = self.reached.subscribe();
        self.wanted.send_replace(state);
        // Fails only when the listener is gone, at shutdown.
        let _ = reached.wait_for(|reached| *reached == state).await;
    }

    /// For the listener: the states as they come.
    pub(crate) fn watch(&self) -> watch::Receiver<PortState> {
        self.wanted.subscribe()
    }

    /// For the listener: says that it has followed.
    pub(crate) fn report(&self, state: PortState) {
        self.reached.send_replace(state);
    }

    /// Whether the port is a black hole.
    pub(crate) fn is_black_hole(&self) -> bool {
        self.stall.is_on()
    }

    /// Returns when the port is no black hole.
    pub(crate) async fn flowing(&self) {
        std::future::poll_fn(|cx| self.stall.poll_flowing(cx)).await;
    }

    /// Limits the time that `work` may take, not counting black holes: after one it starts again.
    /// None when the time is over.
    ///
    /// # Cancel safety
    /// That of `work`.
    pub(crate) async fn limit<T>(
        &self,
        time: Duration,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            match timeout(time, work.as_mut()).await {
                Ok(done) => return Some(done),
                Err(_) if self.stall.is_on() => self.flowing().await,
                Err(_) => return None,
            }
        }
    }

    /// Puts a socket under this switch.
    pub(crate) fn guard<S>(&self, socket: S) -> Gated<S> {
        Gated {
            socket,
            stall: self.stall.clone(),
        }
    }
}

/// Whether the port is a black hole, and who waits for its end.
#[derive(Debug, Default)]
struct Stall {
    on: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

impl Stall {
    fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    fn set(&self, on: bool) {
        let mut waiting = self.waiting.lock();
        self.on.store(on, Ordering::SeqCst);
        if !on {
            waiting.drain(..).for_each(Waker::wake);
        }
    }

    fn poll_flowing(&self, cx: &Context<'_>) -> Poll<()> {
        if !self.is_on() {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.lock();
        if !self.is_on() {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// A socket that stands still while its port is a black hole.
#[derive(Debug)]
pub(crate) struct Gated<S> {
    socket: S,
    stall: Arc<Stall>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Gated<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        std::task::ready!(self.stall.poll_flowing(cx));
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gated<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        std::task::ready!(self.stall.poll_flowing(cx));
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.stall.poll_flowing(cx));
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.stall.poll_flowing(cx));
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_stalled_socket_goes_on_where_it_was() {
        let gate = PortGate::new();
        let (near, mut far) = tokio::io::duplex(64);
        let mut near = gate.guard(near);
        far.write_all(b"before").await.unwrap();
        gate.stall.set(true);
        let reader = tokio::spawn(async move {
            let mut text = [0; 6];
            near.read_exact(&mut text).await.unwrap();
            near.write_all(&text).await.unwrap();
            text
        });
        far.write_all(b"during").await.unwrap();
        tokio::task::yield_now().await;
        assert!(!reader.is_finished());
        gate.stall.set(false);
        assert_eq!(&reader.await.unwrap(), b"before");
        let mut echo = [0; 6];
        far.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"before");
    }
}

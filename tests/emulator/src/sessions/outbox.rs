//! What waits to be sent to one client, besides the answers of its own connection's turns.

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::limits::OUTBOX_BYTES_MAX;

/// A connection's outgoing packets. Filled by anybody, emptied by the connection's task.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
    /// Something did not fit: the connection ends, so that nothing goes missing unseen.
    overflow: CancellationToken,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Whole packets, in the order in which they go out.
    packets: BytesMut,
    /// Somebody has filled it, or asked to look, since it was last emptied.
    woken: bool,
}

impl Outbox {
    /// Adds a packet; false when the client reads too slowly to get it.
    pub(crate) fn push(&self, packet: &[u8]) -> bool {
        let mut waiting = self.waiting.lock();
        if waiting.packets.len() + packet.len() > OUTBOX_BYTES_MAX {
            self.overflow.cancel();
        } else {
            waiting.packets.extend_from_slice(packet);
        }
        waiting.woken = true;
        self.wake.notify_one();
        !self.overflow.is_cancelled()
    }

    /// Makes the connection look whether there is something for it, here or in its C2D queue.
    pub(crate) fn wake(&self) {
        self.waiting.lock().woken = true;
        self.wake.notify_one();
    }

    /// Whether there may be something.
    pub(crate) fn is_woken(&self) -> bool {
        self.waiting.lock().woken
    }

    /// Returns when there may be something.
    ///
    /// # Cancel safety
    /// A wake-up is not lost.
    pub(crate) async fn ready(&self) {
        self.wake.notified().await;
    }

    /// Returns when something did not fit.
    ///
    /// # Cancel safety
    /// Holds no state: dropping it loses nothing.
    pub(crate) async fn overflowed(&self) {
        self.overflow.cancelled().await;
    }

    /// Takes all packets.
    pub(crate) fn take(&self) -> BytesMut {
        let mut waiting = self.waiting.lock();
        waiting.woken = false;
        std::mem::take(&mut waiting.packets)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn packets_go_out_in_order_and_wake_the_connection() {
        let outbox = Outbox::default();
        assert!(outbox.push(b"one") && outbox.push(b"two"));
        timeout(Duration::from_secs(10), outbox.ready())
            .await
            .unwrap();
        assert_eq!(outbox.take(), &b"onetwo"[..]);
        assert_eq!(outbox.take(), &b""[..]);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_overflows() {
        let outbox = Outbox::default();
        let packet = vec![0; OUTBOX_BYTES_MAX];
        assert!(outbox.push(&packet));
        assert!(!outbox.push(b"x"));
        assert_eq!(outbox.take().len(), OUTBOX_BYTES_MAX);
        assert!(!outbox.push(b"x"), "a gap is not filled later");
        timeout(Duration::from_secs(10), outbox.overflowed())
            .await
            .unwrap();
    }
}

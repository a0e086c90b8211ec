//! What waits to be sent to one client, besides the answers of its own connection's turns.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::limits::OUTBOX_BYTES_MAX;

/// What the hub sends to a client on its own account. Each protocol has its own form of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Push {
    /// A desired patch with its `$version` in the body.
    Desired { version: u64, body: String },
    /// A direct method; its id is a uuid, its payload JSON.
    Method {
        rid: String,
        name: String,
        payload: String,
    },
}

impl Push {
    fn bytes(&self) -> usize {
        match self {
            Self::Desired { body, .. } => body.len(),
            Self::Method { rid, name, payload } => rid.len() + name.len() + payload.len(),
        }
    }
}

/// What waits for one connection. Filled by anybody, emptied by the connection's task.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    wake: Arc<Notify>,
    /// Something did not fit: the connection ends, so that nothing goes missing unseen.
    overflow: CancellationToken,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order in which they go out.
    pushes: Vec<Push>,
    bytes: usize,
    /// Somebody has filled it, or asked to look, since it was last emptied.
    woken: bool,
}

impl Outbox {
    /// An outbox whose wake-ups go to somebody who has several.
    pub(crate) fn of_many(wake: Arc<Notify>) -> Self {
        Self {
            wake,
            ..Self::default()
        }
    }

    /// Adds something; false when the client reads too slowly to get it.
    pub(crate) fn push(&self, push: &Push) -> bool {
        let mut waiting = self.waiting.lock();
        let bytes = waiting.bytes + push.bytes();
        if bytes > OUTBOX_BYTES_MAX {
            self.overflow.cancel();
        } else {
            waiting.bytes = bytes;
            waiting.pushes.push(push.clone());
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

    /// Whether something did not fit.
    pub(crate) fn is_overflowed(&self) -> bool {
        self.overflow.is_cancelled()
    }

    /// Takes everything.
    pub(crate) fn take(&self) -> Vec<Push> {
        std::mem::take(&mut *self.waiting.lock()).pushes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn desired(body: &str) -> Push {
        Push::Desired {
            version: 1,
            body: body.to_owned(),
        }
    }

    #[tokio::test]
    async fn pushes_go_out_in_order_and_wake_the_connection() {
        let outbox = Outbox::default();
        assert!(outbox.push(&desired("one")) && outbox.push(&desired("two")));
        timeout(Duration::from_secs(10), outbox.ready())
            .await
            .unwrap();
        assert!(outbox.is_woken());
        assert_eq!(outbox.take(), [desired("one"), desired("two")]);
        assert_eq!(outbox.take(), []);
        assert!(!outbox.is_woken());
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_overflows() {
        let outbox = Outbox::default();
        assert!(outbox.push(&desired(&"x".repeat(OUTBOX_BYTES_MAX))));
        assert!(!outbox.push(&desired("x")));
        assert_eq!(outbox.take().len(), 1);
        assert!(!outbox.push(&desired("x")), "a gap is not filled later");
        timeout(Duration::from_secs(10), outbox.overflowed())
            .await
            .unwrap();
        assert!(outbox.is_overflowed());
    }
}

//! Requests that may take longer than a connection may live: calls of methods.
//!
//! [`super::serve`] gives each request its connection's [`Patience`]. Whoever answers a request
//! late for a good reason holds on to it meanwhile, and bounds that time itself.

use tokio::sync::watch;

/// The patience of one connection; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Patience(watch::Sender<usize>);

impl Patience {
    /// Keeps the connection until the guard is dropped, or the hub stops.
    pub(super) fn hold(&self) -> Held {
        self.0.send_modify(|held| *held += 1);
        Held(self.clone())
    }

    /// Waits until nobody holds on to it.
    ///
    /// # Cancel safety
    /// Safe: nothing is changed.
    pub(super) async fn exhausted(&self) {
        // An error cannot be: this is a sender.
        let _ = self.0.subscribe().wait_for(|held| *held == 0).await;
    }
}

/// While it lives the connection does.
#[derive(Debug)]
pub(super) struct Held(Patience);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.0.send_modify(|held| *held -= 1);
    }
}

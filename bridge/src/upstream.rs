//! The bridge's half of [`edgehub_proto::hub`]: what the broker asks, on its way to the pump.
//!
//! Needs are state: the newest one of an identity is what counts, so they are kept by identity until
//! the pump takes them all. Twin requests go through a bounded channel; an asker waits for its own
//! answer at most for the operation time-out, whatever happens to the pump.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use edgehub_proto::{
    hub::{BoxFuture, ClientInfo, Connectivity, Needs, Upstream, UpstreamError},
    identity::Identity,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, mpsc::error::TrySendError, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use crate::{
    client_infos::ClientInfos,
    connectivity::ConnectivityMonitor,
    limits,
    transport::{TwinAnswer, TwinAsk},
};

/// A twin request on its way to the pump.
#[derive(Debug)]
pub(crate) struct Asking {
    pub(crate) identity: Identity,
    pub(crate) ask: TwinAsk,
    /// When the asker stops waiting.
    pub(crate) deadline: Instant,
    pub(crate) reply: oneshot::Sender<Result<TwinAnswer, UpstreamError>>,
}

/// Needs that the pump has not taken: the newest of each identity; and whose session is to be
/// replaced.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    changed: Mutex<HashMap<Identity, Needs>>,
    renewals: Mutex<HashSet<Identity>>,
    notify: Notify,
}

impl Wishes {
    fn state(&self, identity: &Identity, needs: Needs) {
        self.changed.lock().insert(identity.clone(), needs);
        self.notify.notify_one();
    }

    fn renew(&self, identity: &Identity) {
        self.renewals.lock().insert(identity.clone());
        self.notify.notify_one();
    }

    /// Waits until there is something to take.
    ///
    /// # Cancel safety
    ///
    /// Nothing is taken here; what was stated before is noticed by the next call.
    pub(crate) async fn changed(&self) {
        self.notify.notified().await;
    }

    /// Takes the identities whose session is to be replaced.
    pub(crate) fn take_renewals(&self) -> HashSet<Identity> {
        std::mem::take(&mut *self.renewals.lock())
    }

    /// Takes all needs that were stated since the last call.
    pub(crate) fn take(&self) -> HashMap<Identity, Needs> {
        std::mem::take(&mut *self.changed.lock())
    }
}

/// What the pump is asked.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) wishes: Arc<Wishes>,
    pub(crate) requests: mpsc::Receiver<Asking>,
}

/// The upstream as the broker sees it.
#[derive(Debug)]
pub(crate) struct UpstreamHandle {
    wishes: Arc<Wishes>,
    requests: mpsc::Sender<Asking>,
    monitor: ConnectivityMonitor,
    operation_timeout: Duration,
    infos: Arc<ClientInfos>,
}

/// Makes the two ends. `operation_timeout` bounds every request.
pub(crate) fn upstream(
    monitor: ConnectivityMonitor,
    operation_timeout: Duration,
    infos: Arc<ClientInfos>,
) -> (UpstreamHandle, Asked) {
    let wishes = Arc::new(Wishes::default());
    let (requests, receiver) = mpsc::channel(limits::REQUESTS_MAX);
    let handle = UpstreamHandle {
        wishes: Arc::clone(&wishes),
        requests,
        monitor,
        operation_timeout,
        infos,
    };
    let asked = Asked {
        wishes,
        requests: receiver,
    };
    (handle, asked)
}

impl UpstreamHandle {
    fn ask(
        &self,
        identity: &Identity,
        ask: TwinAsk,
    ) -> impl Future<Output = Result<TwinAnswer, UpstreamError>> + Send + 'static {
        let deadline = Instant::now() + self.operation_timeout;
        let (reply, answer) = oneshot::channel();
        let asking = Asking {
            identity: identity.clone(),
            ask,
            deadline,
            reply,
        };
        // Handed over at once: the order of an identity's requests is that of the calls.
        let sent = self.requests.try_send(asking);
        async move {
            match sent {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => return Err(too_many()),
                Err(TrySendError::Closed(_)) => return Err(stopping()),
            }
            match timeout_at(deadline, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => Err(stopping()),
                Err(_) => Err(timed_out()),
            }
        }
    }
}

impl Upstream for UpstreamHandle {
    fn need(&self, identity: &Identity, needs: Needs) {
        self.wishes.state(identity, needs);
    }

    fn describe(&self, identity: &Identity, info: &ClientInfo) {
        // A model is stamped on all that the session sends: it has to be the right one. The rest
        // counts when the next session opens.
        if self.infos.set(identity, info) {
            self.wishes.renew(identity);
        }
    }

    fn twin(&self, identity: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>> {
        let answer = self.ask(identity, TwinAsk::Get);
        Box::pin(async move { Ok(answer.await?.body) })
    }

    fn report(
        &self,
        identity: &Identity,
        patch: Bytes,
    ) -> BoxFuture<Result<Option<u64>, UpstreamError>> {
        let answer = self.ask(identity, TwinAsk::Report(patch));
        Box::pin(async move { Ok(answer.await?.version) })
    }

    fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.monitor.subscribe()
    }
}

/// More requests wait than are kept: as if the upstream had asked for patience.
pub(crate) fn too_many() -> UpstreamError {
    UpstreamError::Busy { status: 429 }
}

pub(crate) fn stopping() -> UpstreamError {
    UpstreamError::Unavailable("the hub stops".to_owned())
}

pub(crate) fn timed_out() -> UpstreamError {
    UpstreamError::Unavailable("no answer in time".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::id;

    fn ends() -> (UpstreamHandle, Asked) {
        let monitor = ConnectivityMonitor::new(id("edge1/$edgeHub"));
        upstream(monitor, Duration::from_secs(20), Arc::default())
    }

    const METHODS: Needs = Needs {
        desired: false,
        methods: true,
        cloud_to_device: false,
    };

    #[tokio::test]
    async fn only_the_newest_needs_of_an_identity_count() {
        let (handle, asked) = ends();
        handle.need(&id("a"), METHODS);
        handle.need(&id("b"), METHODS);
        handle.need(&id("a"), Needs::default());
        asked.wishes.changed().await;
        let taken = asked.wishes.take();
        assert_eq!(taken.len(), 2);
        assert_eq!(
            (taken[&id("a")], taken[&id("b")]),
            (Needs::default(), METHODS)
        );
        assert!(asked.wishes.take().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_asker_waits_no_longer_than_the_operation_time_out() {
        let (handle, mut asked) = ends();
        let begin = Instant::now();
        let answer = handle.twin(&id("a")).await;
        assert_eq!(answer, Err(timed_out()));
        assert_eq!(begin.elapsed(), Duration::from_secs(20));
        let asking = asked.requests.recv().await.unwrap();
        assert!(asking.reply.is_closed(), "nobody waits any more");
        assert_eq!(asking.deadline, Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn answers_reach_their_askers() {
        let (handle, mut asked) = ends();
        let twin = handle.twin(&id("a"));
        let report = handle.report(&id("b"), Bytes::from_static(b"{}"));
        for (identity, ask) in [("a", "Get"), ("b", "Report(b\"{}\")")] {
            let asking = asked.requests.recv().await.unwrap();
            assert_eq!(asking.identity, id(identity));
            assert_eq!(format!("{:?}", asking.ask), ask);
            let answer = TwinAnswer {
                body: Bytes::from_static(b"twin"),
                version: Some(7),
            };
            asking.reply.send(Ok(answer)).unwrap();
        }
        assert_eq!(report.await, Ok(Some(7)));
        assert_eq!(twin.await, Ok(Bytes::from_static(b"twin")));
    }

    #[tokio::test]
    async fn too_many_requests_and_a_stopped_pump_are_said_at_once() {
        let (handle, asked) = ends();
        let waiting: Vec<_> = (0..limits::REQUESTS_MAX)
            .map(|_| handle.twin(&id("a")))
            .collect();
        assert_eq!(handle.twin(&id("a")).await, Err(too_many()));
        drop(asked);
        assert_eq!(handle.twin(&id("a")).await, Err(stopping()));
        for one in waiting {
            assert_eq!(one.await, Err(stopping()));
        }
    }
}

//! An upstream, an outlet and a router for tests, and a service between them with a real store.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::{BoxFuture, ClientInfo, Connectivity, Needs, Upstream, UpstreamError};
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;
use edgehub_storage::{ConnectionStringWrap, Store, StoreConfig};
use parking_lot::Mutex;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::json::Object;
use super::patch::merge;
use super::test_support::json;
use super::{TwinChanges, TwinConfig, TwinParts, TwinReply, TwinService, document};
use crate::hub::{Features, OfferError, Outlet, ToClient};
use crate::test_support::{PausedClock, id};

pub(super) const OWN: &str = "edge1/$edgeHub";
/// Short, because tests wait for it.
pub(super) const SYNC_PERIOD: Duration = Duration::from_millis(400);

/// What the upstream was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Twin(Identity),
    Report(Identity, String),
}

/// An IoT Hub with twins; it counts versions and answers as it is told.
#[derive(Debug)]
pub(super) struct FakeUpstream {
    connectivity: watch::Sender<Connectivity>,
    state: Arc<Mutex<UpstreamState>>,
    /// Number of requests that may be answered; more wait.
    gate: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct UpstreamState {
    twins: HashMap<Identity, (Object, Object)>,
    asked: Vec<(tokio::time::Instant, Asked)>,
    /// Answers to the next requests instead of the right ones.
    failures: VecDeque<Failure>,
    answered: usize,
    under_way: usize,
    under_way_max: usize,
}

/// How a request fails.
#[derive(Clone, Debug)]
pub(super) enum Failure {
    /// Nothing happens.
    Unheard(UpstreamError),
    /// A patch is merged, but the answer is lost.
    Unanswered(UpstreamError),
}

impl FakeUpstream {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            connectivity: watch::Sender::new(Connectivity::Connected),
            state: Arc::default(),
            gate: watch::Sender::new(usize::MAX),
        })
    }

    pub(super) fn set_online(&self, online: bool) {
        self.connectivity.send_replace(if online {
            Connectivity::Connected
        } else {
            Connectivity::Disconnected
        });
    }

    /// Sets a twin whose versions are in the texts.
    pub(super) fn set(&self, identity: &Identity, desired: &str, reported: &str) {
        let twin = (json(desired), json(reported));
        self.state.lock().twins.insert(identity.clone(), twin);
    }

    pub(super) fn reported(&self, identity: &Identity) -> Object {
        self.state.lock().twins[identity].1.clone()
    }

    pub(super) fn fail_next(&self, failure: Failure) {
        self.state.lock().failures.push_back(failure);
    }

    /// Answers only so many requests from now on.
    pub(super) fn answer_only(&self, more: usize) {
        let answered = self.state.lock().answered;
        self.gate.send_replace(answered.saturating_add(more));
    }

    pub(super) fn answer_all(&self) {
        self.gate.send_replace(usize::MAX);
    }

    /// What it was asked so far.
    pub(super) fn asked(&self) -> Vec<Asked> {
        let state = self.state.lock();
        state.asked.iter().map(|(_, asked)| asked.clone()).collect()
    }

    pub(super) fn fetch_times(&self) -> Vec<tokio::time::Instant> {
        let state = self.state.lock();
        let fetches = state.asked.iter();
        let fetches = fetches.filter(|(_, asked)| matches!(asked, Asked::Twin(_)));
        fetches.map(|(at, _)| *at).collect()
    }

    pub(super) fn under_way_max(&self) -> usize {
        self.state.lock().under_way_max
    }

    fn ask<T: Send + 'static>(
        &self,
        asked: Asked,
        answer: impl FnOnce(&mut UpstreamState) -> Result<T, UpstreamError> + Send + 'static,
    ) -> BoxFuture<Result<T, UpstreamError>> {
        {
            let mut state = self.state.lock();
            state.asked.push((tokio::time::Instant::now(), asked));
            state.under_way += 1;
            state.under_way_max = state.under_way_max.max(state.under_way);
        }
        let mut gate = self.gate.subscribe();
        let state = Arc::clone(&self.state);
        let online = *self.connectivity.borrow() == Connectivity::Connected;
        Box::pin(async move {
            let open = {
                let state = Arc::clone(&state);
                gate.wait_for(move |answers| state.lock().answered < *answers)
            };
            open.await.unwrap();
            let mut state = state.lock();
            state.answered += 1;
            state.under_way -= 1;
            if !online {
                return Err(UpstreamError::Unavailable("offline".to_owned()));
            }
            match state.failures.pop_front() {
                None => answer(&mut state),
                Some(Failure::Unheard(error)) => Err(error),
                Some(Failure::Unanswered(error)) => {
                    answer(&mut state).ok();
                    Err(error)
                }
            }
        })
    }
}

impl Upstream for FakeUpstream {
    fn describe(&self, _: &Identity, _: &ClientInfo) {}

    fn need(&self, _: &Identity, _: Needs) {}

    fn twin(&self, identity: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>> {
        let of = identity.clone();
        self.ask(Asked::Twin(of.clone()), move |state| {
            let (desired, reported) = state.twins.entry(of).or_insert_with(new_twin);
            Ok(document::body(Some(desired), reported))
        })
    }

    fn report(
        &self,
        identity: &Identity,
        patch: Bytes,
    ) -> BoxFuture<Result<Option<u64>, UpstreamError>> {
        let of = identity.clone();
        let text = String::from_utf8(patch.to_vec()).unwrap();
        self.ask(Asked::Report(of.clone(), text), move |state| {
            let (_, reported) = state.twins.entry(of).or_insert_with(new_twin);
            let version = document::version(reported).unwrap() + 1;
            merge(reported, &Object::parse(&patch, 20).unwrap());
            merge(reported, &json(&format!(r#"{{"$version":{version}}}"#)));
            Ok(Some(version))
        })
    }

    fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.connectivity.subscribe()
    }
}

fn new_twin() -> (Object, Object) {
    (json(r#"{"$version":1}"#), json(r#"{"$version":1}"#))
}

/// Clients: what they were told, and whether they are there.
#[derive(Debug, Default)]
pub(super) struct FakeOutlet {
    clients: Mutex<HashMap<Identity, Client>>,
}

#[derive(Debug, Default)]
struct Client {
    refuses: Option<OfferError>,
    /// Not subscribed to answers.
    deaf: bool,
    desired: Vec<(u64, String)>,
}

impl FakeOutlet {
    /// A client that takes events, or does not.
    pub(super) fn set(&self, identity: &Identity, refuses: Option<OfferError>) {
        self.clients
            .lock()
            .entry(identity.clone())
            .or_default()
            .refuses = refuses;
    }

    /// A client that is not subscribed to answers.
    pub(super) fn set_deaf(&self, identity: &Identity) {
        self.clients
            .lock()
            .entry(identity.clone())
            .or_default()
            .deaf = true;
    }

    pub(super) fn desired(&self, identity: &Identity) -> Vec<(u64, String)> {
        let clients = self.clients.lock();
        let client = clients.get(identity);
        client
            .map(|client| client.desired.clone())
            .unwrap_or_default()
    }
}

impl Outlet for FakeOutlet {
    fn offer(&self, to: &Identity, event: ToClient) -> Result<(), OfferError> {
        let mut clients = self.clients.lock();
        let client = clients.get_mut(to).ok_or(OfferError::NotConnected)?;
        if let Some(refuses) = client.refuses {
            return Err(refuses);
        }
        let ToClient::Desired { version, patch } = event else {
            panic!("twins offer changes only");
        };
        let patch = String::from_utf8(patch.to_vec()).unwrap();
        client.desired.push((version, patch));
        Ok(())
    }

    fn features(&self, of: &Identity) -> Option<Features> {
        let clients = self.clients.lock();
        let deaf = clients.get(of).is_some_and(|client| client.deaf);
        Some(Features {
            twin_responses: !deaf,
            ..Features::default()
        })
    }
}

/// Keeps the messages that tell of changes.
#[derive(Debug, Default)]
pub(super) struct FakeChanges(Mutex<Vec<(Identity, Message)>>);

impl FakeChanges {
    pub(super) fn bodies(&self) -> Vec<(String, String)> {
        let told = self.0.lock();
        let body = |message: &Message| String::from_utf8(message.body.to_vec()).unwrap();
        told.iter()
            .map(|(who, message)| (who.to_string(), body(message)))
            .collect()
    }
}

impl TwinChanges for FakeChanges {
    fn changed(&self, reporter: &Identity, message: Message) -> BoxFuture<()> {
        self.0.lock().push((reporter.clone(), message));
        Box::pin(std::future::ready(()))
    }
}

/// A service with everything that it needs; its store outlives restarts.
pub(super) struct World {
    pub(super) upstream: Arc<FakeUpstream>,
    pub(super) outlet: Arc<FakeOutlet>,
    pub(super) changes: Arc<FakeChanges>,
    pub(super) twins: Arc<TwinService>,
    pub(super) store: Store,
    tasks: TaskTracker,
    stop: CancellationToken,
    folder: TempDir,
}

impl World {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::open(folder, FakeUpstream::new(), Arc::default())
    }

    fn open(folder: TempDir, upstream: Arc<FakeUpstream>, outlet: Arc<FakeOutlet>) -> Self {
        let clock = PausedClock::new();
        let config = StoreConfig::new(folder.path().join("edgeHub"));
        let wrap = Arc::new(ConnectionStringWrap::new(b"a key of a test"));
        let opened = Store::open(config, Arc::clone(&clock) as _, wrap).unwrap();
        let store = opened.store;
        let changes = Arc::<FakeChanges>::default();
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let twins = TwinService::start(TwinParts {
            upstream: Arc::clone(&upstream) as _,
            outlet: Arc::clone(&outlet) as _,
            changes: Arc::clone(&changes) as _,
            store: store.clone(),
            clock,
            own_identity: Identity::parse(OWN).unwrap(),
            config: TwinConfig {
                sealed: true,
                sync_period: SYNC_PERIOD,
                report_period: Duration::ZERO,
            },
            tasks: tasks.clone(),
            stop: stop.clone(),
        })
        .unwrap();
        Self {
            upstream,
            outlet,
            changes,
            twins,
            store,
            tasks,
            stop,
            folder,
        }
    }

    /// Ends the service and closes the store.
    pub(super) async fn stop(self) -> (TempDir, Arc<FakeUpstream>, Arc<FakeOutlet>) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        drop(self.twins);
        self.store.close().await.unwrap();
        (self.folder, self.upstream, self.outlet)
    }

    /// Another run of the hub on the same store.
    pub(super) async fn restart(self) -> Self {
        let (folder, upstream, outlet) = self.stop().await;
        Self::open(folder, upstream, outlet)
    }

    /// Whether nobody works.
    pub(super) fn is_at_rest(&self) -> bool {
        let slots = self.twins.slots.lock();
        slots.values().all(|slot| !slot.running)
    }
}

/// Waits until something holds.
pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = Duration::from_secs(60);
    let holds = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    if tokio::time::timeout(patience, holds).await.is_err() {
        panic!("not within {patience:?}: {what}");
    }
}

pub(super) fn leaf() -> Identity {
    id("leaf1")
}

pub(super) fn patch(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

pub(super) fn twin(reply: &TwinReply) -> Value {
    assert_eq!(reply.status, 200);
    serde_json::from_slice(&reply.body).unwrap()
}

pub(super) fn report(of: &Identity, text: &str) -> Asked {
    Asked::Report(of.clone(), text.to_owned())
}

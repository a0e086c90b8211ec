//! A pump with a real store and a fake transport, for its tests; the clock moves only by hand.

use std::collections::BTreeMap;
use std::pin::Pin;

use edgehub_auth::authenticator::{IdentityRefresh, RefreshOutcome};
use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use edgehub_auth::scope_tree::{Authentication, ServiceIdentity, Status};
use edgehub_proto::{clock::ManualClock, stored};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::advance;

use super::*;
use crate::lanes::{CloseCause, Disposition, Outgoing};
use crate::test_support::{HeldClock, TestStore, UNIX_MS, id, settle_down};
use crate::transport::{TwinAnswer, TwinAsk};
use crate::upstream::{UpstreamHandle, upstream};

/// How the fake upstream treats a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    Accepts,
    /// The session's task dies without a word.
    Dies,
    /// Says nothing until its manner is another one.
    Hangs,
    Refuses,
    Unreachable,
    /// Accepts the session and answers messages once the manner is another one.
    Waits,
    /// Accepts the session and never answers a message.
    Withholds,
}

#[derive(Debug, Default)]
pub(super) struct Seen {
    manners: BTreeMap<String, Manner>,
    /// Bodies per sender, in the order of arrival.
    ledger: BTreeMap<String, Vec<String>>,
    opened: BTreeMap<String, usize>,
    /// What sessions were told to listen for, in the order in which they were told.
    pub(super) needs: BTreeMap<String, Vec<Needs>>,
    pub(super) batches: usize,
    /// Notified when a manner changes.
    changed: Arc<Notify>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct FakeTransport(pub(super) Arc<Mutex<Seen>>);

impl FakeTransport {
    pub(super) fn set(&self, sender: &str, manner: Manner) {
        let mut seen = self.0.lock();
        seen.manners.insert(sender.to_owned(), manner);
        seen.changed.notify_waiters();
    }

    pub(super) fn ledger(&self, sender: &str) -> Vec<String> {
        self.0
            .lock()
            .ledger
            .get(sender)
            .cloned()
            .unwrap_or_default()
    }

    pub(super) fn opened(&self, sender: &str) -> usize {
        self.0
            .lock()
            .opened
            .get(sender)
            .copied()
            .unwrap_or_default()
    }

    fn manner(&self, sender: &str) -> Manner {
        let manner = self.0.lock().manners.get(sender).copied();
        manner.unwrap_or(Manner::Accepts)
    }

    /// Waits until the sender's manner is another one than to hang.
    async fn another_manner(&self, sender: &str) -> Manner {
        let changed = Arc::clone(&self.0.lock().changed);
        loop {
            let notified = changed.notified();
            let manner = self.manner(sender);
            if manner != Manner::Hangs {
                return manner;
            }
            notified.await;
        }
    }

    async fn serve(self, mut request: OpenRequest) -> Option<CloseCause> {
        let session = request.session;
        let sender = request.identity.as_str().to_owned();
        let manner = {
            *self.0.lock().opened.entry(sender.clone()).or_default() += 1;
            self.manner(&sender)
        };
        let manner = if manner == Manner::Hangs {
            self.another_manner(&sender).await
        } else {
            manner
        };
        match manner {
            Manner::Dies => return None,
            Manner::Refuses => return Some(CloseCause::Refused("no".into())),
            Manner::Unreachable => return Some(CloseCause::Unreachable("away".into())),
            Manner::Accepts | Manner::Hangs | Manner::Waits | Manner::Withholds => {}
        }
        let opened = SessionEvent::Opened {
            session,
            expires_at_ms: None,
        };
        request.events.send(opened).await.ok()?;
        loop {
            self.told(&sender, *request.needs.borrow_and_update());
            let command = tokio::select! {
                Ok(()) = request.needs.changed() => continue,
                command = request.commands.recv() => command,
            };
            match command {
                None | Some(Command::Close) => return Some(CloseCause::Requested),
                Some(Command::Send(batch)) => {
                    let dispositions = self.take(&sender, batch);
                    while manner == Manner::Waits && self.manner(&sender) == Manner::Waits {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    if manner != Manner::Withholds {
                        let disposed = SessionEvent::Disposed {
                            session,
                            dispositions,
                        };
                        request.events.send(disposed).await.ok()?;
                    }
                }
                Some(Command::Request(requests)) if manner == Manner::Accepts => {
                    for twin in requests {
                        let answered = SessionEvent::Answered {
                            request: twin.request,
                            answer: Ok(answer(&sender, &twin.ask)),
                        };
                        request.events.send(answered).await.ok()?;
                    }
                }
                Some(Command::Request(_)) => {}
            }
        }
    }

    fn told(&self, sender: &str, needs: Needs) {
        let mut seen = self.0.lock();
        let told = seen.needs.entry(sender.to_owned()).or_default();
        if told.last() != Some(&needs) {
            told.push(needs);
        }
    }

    fn take(&self, sender: &str, batch: Vec<Outgoing>) -> Vec<(u64, Disposition)> {
        let mut seen = self.0.lock();
        seen.batches += 1;
        let ledger = seen.ledger.entry(sender.to_owned()).or_default();
        batch
            .into_iter()
            .map(|outgoing| {
                let message = stored::decode_message(outgoing.entry.message).unwrap();
                ledger.push(String::from_utf8(message.body.to_vec()).unwrap());
                (outgoing.token, Disposition::Accepted)
            })
            .collect()
    }
}

/// A twin that names its owner; a patch gets its length as version.
fn answer(sender: &str, ask: &TwinAsk) -> TwinAnswer {
    match ask {
        TwinAsk::Get => TwinAnswer {
            body: sender.to_owned().into(),
            version: None,
        },
        TwinAsk::Report(patch) => TwinAnswer {
            body: bytes::Bytes::new(),
            version: Some(patch.len() as u64),
        },
    }
}

impl Transport for FakeTransport {
    fn open(&self, request: OpenRequest) {
        let (session, events) = (request.session, request.events.clone());
        let serving = self.clone().serve(request);
        tokio::spawn(async move {
            if let Some(cause) = serving.await {
                let _ = events.send(SessionEvent::Closed { session, cause }).await;
            }
        });
    }
}

/// Answers every refresh with the same outcome.
struct FixedRefresh(RefreshOutcome);

impl IdentityRefresh for FixedRefresh {
    fn refresh<'a>(
        &'a self,
        _target: &'a Identity,
        _on_behalf_of: &'a str,
    ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>> {
        Box::pin(std::future::ready(self.0))
    }
}

pub(super) struct World {
    pub(super) store: TestStore,
    pub(super) transport: FakeTransport,
    pub(super) scope: Arc<ScopeCache>,
    pub(super) refresh: RefreshOutcome,
    pub(super) track: bool,
    pub(super) _held: HeldClock,
}

pub(super) struct Running {
    pub(super) cancel: CancellationToken,
    task: JoinHandle<()>,
    pub(super) monitor: ConnectivityMonitor,
    pub(super) upstream: UpstreamHandle,
}

impl World {
    pub(super) fn new() -> Self {
        let scope = ScopeCache::new(&id("edge1"));
        Self {
            store: TestStore::new(),
            transport: FakeTransport::default(),
            scope,
            refresh: RefreshOutcome::Unavailable,
            track: true,
            _held: HeldClock::new(),
        }
    }

    pub(super) fn run(&self, queues: Vec<Queue>) -> Running {
        let monitor = ConnectivityMonitor::new(id("edge1/$edgeHub"));
        let judge = Judge {
            own_device: id("edge1"),
            scope: Arc::clone(&self.scope),
            refresh: Arc::new(FixedRefresh(self.refresh)),
            has_walked: Box::new(|| false),
            track_device_state: self.track,
        };
        let (counts, _) = watch::channel(LaneCounts::default());
        let (upstream, asked) = upstream(monitor.clone(), Duration::from_secs(20), Arc::default());
        let parts = PumpParts {
            config: LaneConfig {
                seed: 5,
                ..LaneConfig::default()
            },
            queues,
            transport: Arc::new(self.transport.clone()),
            clock: Arc::new(ManualClock::new(UNIX_MS)),
            monitor: monitor.clone(),
            judge,
            counts,
            asked,
        };
        let cancel = CancellationToken::new();
        let pump = Pump::new(parts, &TaskTracker::new(), &cancel);
        let task = tokio::spawn(pump.run(cancel.clone()));
        Running {
            cancel,
            task,
            monitor,
            upstream,
        }
    }

    pub(super) fn know(&self, identity: &str, status: Status) {
        let record = ServiceIdentity {
            identity: id(identity),
            generation_id: "1".to_owned(),
            status,
            is_edge: identity == "edge1",
            device_scope: Some("ms-azure-iot-edge://edge1-1".to_owned()),
            parent_scopes: vec!["ms-azure-iot-edge://edge1-1".to_owned()],
            authentication: Authentication::None,
        };
        self.scope.apply(ScopeChange::Upsert(vec![record]));
    }
}

impl Running {
    pub(super) fn is_stopped(&self) -> bool {
        self.task.is_finished()
    }

    pub(super) async fn stop(self) {
        self.cancel.cancel();
        within(Duration::from_secs(5), "stop", || self.task.is_finished()).await;
        self.task.await.unwrap();
    }
}

pub(super) fn bodies(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

/// Moves the clock in small steps until the condition holds, at most `limit`.
pub(super) async fn within(limit: Duration, what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {limit:?}"
        );
        settle_down().await;
        task::spawn_blocking(|| std::thread::sleep(Duration::from_millis(1)))
            .await
            .unwrap();
        advance(Duration::from_millis(50)).await;
    }
}

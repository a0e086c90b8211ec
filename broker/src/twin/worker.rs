//! The worker of one identity: carries out what [`TwinSync`] decides.
//!
//! There is one while something is to be done. It has no twin in memory while it waits; each
//! event reads it, changes it and writes it back if it changed.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_proto::hub::UpstreamError;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::document::Twin;
use super::drafts::Draft;
use super::inbox::{Command, Queued, Report, Signal};
use super::limits::{COMMANDS_MAX, UPSTREAM_ANSWER_MAX};
use super::outcome::{Answer, Forward, Next, ReportOutcome};
use super::pace::Now;
use super::service::TwinService;
use super::sync::TwinSync;
use super::{TwinError, TwinReply, metrics, notification, validate};
use crate::hub::ToClient;

type Eventually<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// See the module.
pub(super) struct Worker {
    service: Arc<TwinService>,
    identity: Identity,
    sync: TwinSync,
    wake: Arc<Notify>,
    /// Clients that wait for the next fetch.
    asking: Vec<oneshot::Sender<TwinReply>>,
    /// Clients that wait for the fetch under way.
    waiting: Vec<oneshot::Sender<TwinReply>>,
    turn: Turn,
    request: Option<Eventually<Response>>,
    retired: bool,
}

/// The permit to ask the upstream.
enum Turn {
    None,
    Queued {
        for_client: bool,
        permit: Eventually<Option<OwnedSemaphorePermit>>,
    },
    Held(#[expect(dead_code, reason = "given back when it goes")] OwnedSemaphorePermit),
}

enum Response {
    Fetch(Result<Bytes, UpstreamError>),
    Report(Result<Option<u64>, UpstreamError>),
}

enum Woke {
    Stopped,
    Somehow,
    Turn(Option<OwnedSemaphorePermit>),
    Response(Response),
}

/// Reports that are answered once the twin is stored.
#[derive(Default)]
struct Accepted {
    replies: Vec<oneshot::Sender<Result<(), TwinError>>>,
    messages: Vec<Message>,
}

impl Worker {
    pub(super) fn new(
        service: Arc<TwinService>,
        identity: Identity,
        sync: TwinSync,
        wake: Arc<Notify>,
    ) -> Self {
        Self {
            service,
            identity,
            sync,
            wake,
            asking: Vec::new(),
            waiting: Vec::new(),
            turn: Turn::None,
            request: None,
            retired: false,
        }
    }

    /// Works until nothing is left to do or the hub stops.
    pub(super) async fn run(mut self) {
        while !self.service.stop.is_cancelled() {
            let commands = self.commands();
            if !commands.is_empty() {
                self.work_off(commands).await;
                continue;
            }
            let next = self.sync.next(self.service.clock.instant());
            match (next, &self.turn) {
                (Next::Forward, _) => {
                    self.forward_missed().await;
                    continue;
                }
                (Next::Fetch { .. }, Turn::Held(_)) => {
                    self.begin_fetch();
                    continue;
                }
                (Next::Report, Turn::Held(_)) => {
                    self.begin_report().await;
                    continue;
                }
                (Next::Fetch { for_client }, _) => self.queue(for_client),
                (Next::Report, _) => self.queue(false),
                (Next::At(_) | Next::Idle, _) => {
                    if self.request.is_none() {
                        self.turn = Turn::None;
                    }
                    if next == Next::Idle && self.request.is_none() && self.retire() {
                        return;
                    }
                }
            }
            match self.wait(next).await {
                Woke::Stopped => return,
                Woke::Somehow => {}
                Woke::Turn(permit) => self.turn = permit.map_or(Turn::None, Turn::Held),
                Woke::Response(response) => {
                    self.request = None;
                    match response {
                        Response::Fetch(result) => self.fetched(result).await,
                        Response::Report(result) => self.reported(result).await,
                    }
                }
            }
        }
    }

    async fn wait(&mut self, next: Next) -> Woke {
        let deadline = match next {
            Next::At(at) => Some(Instant::from_std(at)),
            _ => None,
        };
        let (turn, request) = (&mut self.turn, &mut self.request);
        tokio::select! {
            () = self.service.stop.cancelled() => Woke::Stopped,
            () = self.wake.notified() => Woke::Somehow,
            permit = async {
                match turn {
                    Turn::Queued { permit, .. } => permit.await,
                    _ => std::future::pending().await,
                }
            } => Woke::Turn(permit),
            response = async {
                match request {
                    Some(request) => request.await,
                    None => std::future::pending().await,
                }
            } => Woke::Response(response),
            () = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            } => Woke::Somehow,
        }
    }

    fn commands(&self) -> VecDeque<Queued> {
        let mut slots = self.service.slots.lock();
        let slot = slots.get_mut(&self.identity);
        slot.map(|slot| slot.inbox.take()).unwrap_or_default()
    }

    /// Ends this worker, unless there is something to do again.
    fn retire(&mut self) -> bool {
        let mut slots = self.service.slots.lock();
        let Some(slot) = slots.get_mut(&self.identity) else {
            self.retired = true;
            return true;
        };
        if !slot.inbox.is_empty() {
            return false;
        }
        self.retired = true;
        if self.sync.is_stale(self.service.clock.instant()) {
            slots.remove(&self.identity);
        } else {
            slot.running = false;
            let new = self.service.new_sync(&self.identity);
            slot.rest = Some(std::mem::replace(&mut self.sync, new));
        }
        true
    }

    fn now(&self) -> Now {
        Now {
            instant: self.service.clock.instant(),
            online: self.service.is_online(),
            jitter: rand::random_range(0.8..=1.2),
        }
    }

    /// Queues for a permit; a client does not wait behind those that only synchronise.
    fn queue(&mut self, for_client: bool) {
        if let Turn::Queued {
            for_client: queued, ..
        } = self.turn
            && (queued || !for_client)
        {
            return;
        }
        let permits = if for_client {
            &self.service.gets
        } else {
            &self.service.syncs
        };
        let permits: Arc<Semaphore> = Arc::clone(permits);
        self.turn = Turn::Queued {
            for_client,
            permit: Box::pin(async move { permits.acquire_owned().await.ok() }),
        };
    }

    async fn work_off(&mut self, commands: VecDeque<Queued>) {
        let needs_twin = |queued: &Queued| {
            !matches!(
                queued.command,
                Command::Get(_)
                    | Command::Signal(Signal::Established | Signal::Online | Signal::Lost)
            )
        };
        let mut draft = if commands.iter().any(needs_twin) {
            self.open().await.map(Some)
        } else {
            Ok(None)
        };
        let mut accepted = Accepted::default();
        for command in commands.into_iter().map(|queued| queued.command) {
            match (command, &mut draft) {
                (Command::Get(reply), _) => self.ask(reply),
                (Command::Signal(Signal::Established), _) => self.sync.established(),
                (Command::Signal(Signal::Online), _) => self.sync.online(),
                (Command::Signal(Signal::Lost), _) => self.sync.lost(),
                (Command::Report(report), Ok(Some(draft))) => {
                    self.report(&mut draft.twin, report, &mut accepted);
                }
                (Command::Desired(patch), Ok(Some(draft))) => {
                    let forward = self.sync.desired(&mut draft.twin, patch);
                    self.forward(&mut draft.twin, forward);
                }
                (Command::Signal(Signal::Subscribed), Ok(Some(draft))) => {
                    self.sync.subscribed();
                    let forward = self.sync.forward(&mut draft.twin);
                    self.forward(&mut draft.twin, forward);
                }
                (Command::Signal(Signal::Removed), Ok(Some(draft))) => {
                    draft.twin = Twin::default();
                    draft.removed = true;
                    self.forget();
                }
                (Command::Report(report), _) => drop(report.reply.send(Err(TwinError::NotStored))),
                (Command::Desired(_), _) => self.sync.lost(),
                (Command::Signal(Signal::Subscribed), _) => self.sync.subscribed(),
                (Command::Signal(Signal::Removed), _) => self.forget(),
            }
        }
        match draft {
            Ok(None) => {}
            Ok(Some(draft)) => self.close(draft, accepted).await,
            Err(_) => self.abandon(),
        }
    }

    fn ask(&mut self, reply: oneshot::Sender<TwinReply>) {
        if self.asking.len() < COMMANDS_MAX {
            self.asking.push(reply);
            self.sync.ask();
        } else {
            drop(reply.send(self.service.refusal(&TwinError::Busy)));
        }
    }

    fn report(&mut self, twin: &mut Twin, report: Report, accepted: &mut Accepted) {
        let taken = validate::reported_patch(&report.patch)
            .map_err(TwinError::from)
            // An empty patch is a hub's question whether we are there (spec/core.md 8.5).
            .and_then(|patch| {
                if patch.is_empty() {
                    return Ok(false);
                }
                self.sync.report(twin, &patch).map(|()| true)
            });
        match taken {
            Ok(changed) => {
                metrics::reported_properties("edge_hub", &self.identity).increment(1);
                accepted.replies.push(report.reply);
                if changed && report.notify {
                    let own = &self.service.own_identity;
                    let now_ms = self.service.clock.unix_ms();
                    let message =
                        notification::twin_change(own, &self.identity, report.patch, now_ms);
                    accepted.messages.push(message);
                }
            }
            Err(error) => {
                // Quoted: names of properties are in it.
                let reason = error.to_string();
                tracing::debug!("A report of {} is refused: {reason:?}", self.identity);
                drop(report.reply.send(Err(error)));
            }
        }
    }

    /// The identity is gone: nothing that is under way matters any more.
    fn forget(&mut self) {
        self.request = None;
        self.turn = Turn::None;
        self.service.unsynced.lock().remove(&self.identity);
        self.sync = self.service.new_sync(&self.identity);
        let gone = self.service.refusal(&TwinError::Gone);
        for reply in self.asking.drain(..).chain(self.waiting.drain(..)) {
            drop(reply.send(gone.clone()));
        }
    }

    fn begin_fetch(&mut self) {
        self.sync.begin_fetch();
        self.waiting.append(&mut self.asking);
        let answer = self.service.upstream.twin(&self.identity);
        self.request = Some(Box::pin(async move {
            let answer = timeout(UPSTREAM_ANSWER_MAX, answer).await;
            Response::Fetch(answer.unwrap_or_else(|_| Err(no_answer())))
        }));
    }

    async fn begin_report(&mut self) {
        let Ok(draft) = self.open().await else {
            self.abandon();
            return;
        };
        if let Some(patch) = self.sync.begin_report(&draft.twin) {
            self.send_report(patch);
        }
    }

    fn send_report(&mut self, patch: Bytes) {
        let answer = self.service.upstream.report(&self.identity, patch);
        self.request = Some(Box::pin(async move {
            let answer = timeout(UPSTREAM_ANSWER_MAX, answer).await;
            Response::Report(answer.unwrap_or_else(|_| Err(no_answer())))
        }));
    }

    async fn fetched(&mut self, result: Result<Bytes, UpstreamError>) {
        match &result {
            Ok(_) => metrics::get_twin("upstream", &self.identity).increment(1),
            Err(error) => {
                tracing::debug!("The twin of {} cannot be fetched: {error}", self.identity);
            }
        }
        let Ok(mut draft) = self.open().await else {
            self.abandon();
            return;
        };
        let outcome = self.sync.fetched(&mut draft.twin, result, self.now());
        let unheard = !self.waiting.is_empty() && !self.is_heard();
        if outcome.forward || unheard {
            let forward = self.sync.forward(&mut draft.twin);
            self.forward(&mut draft.twin, forward);
        }
        let reply = match outcome.answer {
            Answer::Twin(body) => TwinReply { status: 200, body },
            Answer::Refused { status } => {
                // An answer needs a status that says error.
                let status = if status < 400 { 500 } else { status };
                self.service
                    .refused(status, "The upstream refused the request")
            }
        };
        if reply.status == 200 && !self.waiting.is_empty() && !unheard {
            self.sync.answered(&mut draft.twin);
        }
        self.close(draft, Accepted::default()).await;
        self.answer_waiting(&reply);
    }

    /// The twin cannot be read: what is under way has nowhere to go.
    fn abandon(&mut self) {
        self.request = None;
        self.turn = Turn::None;
        self.sync.abandon(self.now());
        let reply = self.service.refusal(&TwinError::NotStored);
        self.answer_waiting(&reply);
    }

    fn answer_waiting(&mut self, reply: &TwinReply) {
        for waiting in self.waiting.drain(..) {
            drop(waiting.send(reply.clone()));
        }
    }

    async fn reported(&mut self, result: Result<Option<u64>, UpstreamError>) {
        if let Err(error) = &result {
            let identity = &self.identity;
            tracing::debug!("Reported properties of {identity} are not taken upstream: {error}");
        }
        let Ok(mut draft) = self.open().await else {
            self.abandon();
            return;
        };
        match self.sync.reported(&mut draft.twin, result, self.now()) {
            ReportOutcome::Continue(patch) => self.send_report(patch),
            ReportOutcome::Confirmed => {
                metrics::reported_properties("upstream", &self.identity).increment(1);
            }
            ReportOutcome::Dropped { status } => {
                metrics::reported_properties_dropped(&self.identity).increment(1);
                tracing::warn!(
                    "Dropped reported properties of {}: the upstream refused them with status \
                     {status}",
                    self.identity
                );
            }
            ReportOutcome::Failed => {}
        }
        self.close(draft, Accepted::default()).await;
    }

    async fn forward_missed(&mut self) {
        let Ok(mut draft) = self.open().await else {
            self.abandon();
            return;
        };
        let forward = self.sync.forward(&mut draft.twin);
        self.forward(&mut draft.twin, forward);
        self.close(draft, Accepted::default()).await;
    }

    /// Whether answers reach the client. Python asks after each reconnect, but subscribes to the
    /// answers only once its application has asked.
    fn is_heard(&self) -> bool {
        let features = self.service.outlet.features(&self.identity);
        features.is_some_and(|features| features.twin_responses)
    }

    fn forward(&mut self, twin: &mut Twin, forward: Option<Forward>) {
        let Some(Forward { version, patch }) = forward else {
            return;
        };
        let event = ToClient::Desired { version, patch };
        let offered = self.service.outlet.offer(&self.identity, event);
        self.sync.forwarded(twin, offered, self.now());
    }

    /// Reads the twin.
    async fn open(&mut self) -> Result<Draft, TwinError> {
        self.service.read(&self.identity).await
    }

    /// Stores the twin if it changed, and answers the reports that made it so.
    async fn close(&mut self, draft: Draft, accepted: Accepted) {
        let result = self.service.write(&self.identity, draft).await;
        match &result {
            Ok(()) => {
                for message in accepted.messages {
                    self.service.changes.changed(&self.identity, message).await;
                }
            }
            Err(_) => self.sync.not_stored(self.now()),
        }
        for reply in accepted.replies {
            drop(reply.send(result.clone()));
        }
    }
}

impl Drop for Worker {
    /// A worker that did not end by itself (the hub stops, or it panicked) must not leave its
    /// identity without one: the next command finds a fresh beginning.
    fn drop(&mut self) {
        if !self.retired {
            self.service.slots.lock().remove(&self.identity);
        }
    }
}

fn no_answer() -> UpstreamError {
    let seconds = UPSTREAM_ANSWER_MAX.as_secs();
    UpstreamError::Unavailable(format!("no answer for {seconds} seconds"))
}

//! Direct methods: from upstream and from modules of this device to connected clients.
//!
//! [`MethodService`] is a thin shell around `calls`, which decides. It is told what happens to
//! clients, offers calls through an [`Outlet`] and tells callers what came of theirs. It does not
//! know who may call: the HTTPS head ([`crate::http::methods_api`]) and the bridge do.
//!
//! # Ordering
//! Calls of one client reach it in the order in which they were made, those that waited for it
//! first. Whoever changes a client's subscriptions or its live connection does that first and
//! calls [`MethodService::subscribed`] or [`MethodService::disconnected`] afterwards, without a
//! lock that the outlet needs: the service offers while it holds its own.
//!
//! # Where this behaviour comes from
//! spec/core.md 6 and 10 item 17, spec/mqtt.md 5.4, design.md D10. Instead of the reference's 3 s
//! after a subscription, waiting calls leave at once, and all of them.

mod calls;
pub mod limits;
mod request;

#[cfg(test)]
mod calls_model_tests;
#[cfg(test)]
mod service_tests;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_proto::clock::Clock;
use edgehub_proto::hub::{BoxFuture, MethodCall, MethodResult};
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use calls::{Calls, Expiry, Finished};
pub(crate) use request::error_body;
pub use request::{BAD_STATUS, BadRequest, MethodOutcome, MethodRequest, RequestId};

use crate::hub::{Outlet, ToClient};
use crate::telemetry::metrics;
use limits::CALLS_PER_CLIENT_MAX;

/// The methods of this hub's own module.
pub trait OwnMethods: Send + Sync + fmt::Debug {
    /// Carries a method out and answers it; 404 when there is none of this name.
    ///
    /// Dropped when the caller has waited long enough.
    fn call(&self, name: &str, payload: Bytes) -> BoxFuture<MethodResult>;
}

/// No methods at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoMethods;

impl OwnMethods for NoMethods {
    fn call(&self, name: &str, _payload: Bytes) -> BoxFuture<MethodResult> {
        let payload = error_body(&format!("Method {name} is not supported"));
        Box::pin(std::future::ready(MethodResult {
            status: 404,
            payload,
        }))
    }
}

/// Parts a [`MethodService`] is made of.
#[derive(Debug)]
pub struct MethodParts {
    /// `{device}/$edgeHub`.
    pub own_identity: Identity,
    /// What is called on it.
    pub own_methods: Arc<dyn OwnMethods>,
    /// The way to clients.
    pub outlet: Arc<dyn Outlet>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Owns the tasks that wait for answers to calls from upstream.
    pub tasks: TaskTracker,
    /// Ends them.
    pub stop: CancellationToken,
}

/// Calls clients and hands back what they answer. One per hub, shared.
#[derive(Debug)]
pub struct MethodService {
    parts: MethodParts,
    own_calls: Semaphore,
    calls: Mutex<Calls<watch::Sender<Progress>>>,
}

/// How far a call is.
#[derive(Clone, Debug)]
enum Progress {
    /// It waits, until then.
    Waits(std::time::Instant),
    /// It is over.
    Over(MethodOutcome),
}

impl MethodService {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: MethodParts) -> Arc<Self> {
        Arc::new(Self {
            parts,
            own_calls: Semaphore::new(CALLS_PER_CLIENT_MAX),
            calls: Mutex::new(Calls::new()),
        })
    }

    /// Calls a method and waits for what comes of it: at most for the request's two time-outs.
    ///
    /// # Cancel safety
    /// A dropped call is forgotten; an answer that still comes is ignored.
    pub async fn invoke(
        self: &Arc<Self>,
        target: &Identity,
        request: MethodRequest,
    ) -> MethodOutcome {
        if *target == self.parts.own_identity {
            return self.invoke_own(request).await;
        }
        match self.begin(target, request) {
            Ok(waiting) => waiting.outcome().await,
            Err(outcome) => outcome,
        }
    }

    /// Calls a method for upstream: the client must be there, and IoT Hub's patience counts. Does
    /// not wait; the answer goes to [`MethodCall::reply`].
    pub fn upstream_call(self: &Arc<Self>, target: &Identity, call: MethodCall) {
        let MethodCall {
            name,
            payload,
            reply,
        } = call;
        let request = match MethodRequest::from_upstream(&name, payload) {
            Ok(request) => request,
            Err(bad) => {
                // Whoever asked may have gone; so below.
                let _ = reply.send(MethodOutcome::Bad(bad).into_result());
                return;
            }
        };
        if *target == self.parts.own_identity {
            let service = Arc::clone(self);
            let outcome = async move { service.invoke_own(request).await };
            return self.answer(target, reply, outcome);
        }
        match self.begin(target, request) {
            Ok(waiting) => self.answer(target, reply, waiting.outcome()),
            Err(outcome) => {
                tracing::debug!("A method for {target} was not delivered: {outcome:?}");
                let _ = reply.send(outcome.into_result());
            }
        }
    }

    /// Answers a call from upstream when its outcome is there.
    fn answer(
        self: &Arc<Self>,
        target: &Identity,
        mut reply: oneshot::Sender<MethodResult>,
        outcome: impl Future<Output = MethodOutcome> + Send + 'static,
    ) {
        let service = Arc::clone(self);
        let target = target.clone();
        self.parts.tasks.spawn(async move {
            let clock = &service.parts.clock;
            let begun = clock.instant();
            let outcome = tokio::select! {
                outcome = outcome => outcome,
                () = reply.closed() => return,
                () = service.parts.stop.cancelled() => return,
            };
            let took = clock.instant().saturating_duration_since(begun);
            metrics::direct_method_duration(metrics::UPSTREAM, &target).record(took);
            let _ = reply.send(outcome.into_result());
        });
    }

    /// Takes a client's answer; `status` is none when it is missing or no number. Late, unknown and
    /// foreign answers are ignored.
    pub fn responded(
        &self,
        from: &Identity,
        request_id: &str,
        status: Option<i32>,
        payload: Bytes,
    ) {
        let (status, payload) = match status {
            Some(status) => (status, payload),
            None => (BAD_STATUS, Bytes::new()),
        };
        let finished = RequestId::parse(request_id)
            .and_then(|id| self.calls.lock().responded(from, id, status, payload));
        match finished {
            Some(finished) => tell(finished),
            None => tracing::debug!("{from} answered a method that nobody waits for"),
        }
    }

    /// The client's subscriptions may have changed: what waits for it is offered to it.
    pub fn subscribed(&self, client: &Identity) {
        let mut calls = self.calls.lock();
        self.release(&mut calls, client);
    }

    /// The client's live connection is over, also because another one takes over.
    pub fn disconnected(&self, client: &Identity) {
        let finished = self.calls.lock().disconnected(client);
        finished.into_iter().for_each(tell);
    }

    /// Time.
    #[must_use]
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.parts.clock
    }

    /// How many calls wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.calls.lock().len()
    }

    async fn invoke_own(&self, request: MethodRequest) -> MethodOutcome {
        let Ok(_permit) = self.own_calls.try_acquire() else {
            return MethodOutcome::TooManyCalls(self.parts.own_identity.clone());
        };
        let answer = self.parts.own_methods.call(&request.name, request.payload);
        match timeout(request.response_timeout, answer).await {
            Ok(MethodResult { status, payload }) => MethodOutcome::Answered { status, payload },
            Err(_) => MethodOutcome::TimedOut(RequestId::random()),
        }
    }

    /// Takes a call and offers it at once. An error is what came of it already.
    fn begin(
        self: &Arc<Self>,
        target: &Identity,
        request: MethodRequest,
    ) -> Result<Waiting, MethodOutcome> {
        let id = RequestId::random();
        let now = self.parts.clock.instant();
        let (reply, progress) = watch::channel(Progress::Waits(now + request.connect_timeout));
        let mut calls = self.calls.lock();
        calls
            .park(id, target, request, reply, now)
            .map_err(|(_, outcome)| outcome)?;
        self.release(&mut calls, target);
        // Without a connect time-out a call that was not taken is over.
        if let Expiry::Over((_, outcome)) = calls.expire(id, now) {
            return Err(outcome);
        }
        drop(calls);
        Ok(Waiting {
            service: Arc::clone(self),
            id,
            progress,
        })
    }

    fn release(&self, calls: &mut Calls<watch::Sender<Progress>>, client: &Identity) {
        let now = self.parts.clock.instant();
        let offer = |id: RequestId, request: &MethodRequest, reply: &watch::Sender<Progress>| {
            let event = ToClient::Method {
                request_id: id.to_string().into(),
                name: Arc::clone(&request.name),
                payload: request.payload.clone(),
            };
            self.parts.outlet.offer(client, event)?;
            reply.send_replace(Progress::Waits(now + request.response_timeout));
            Ok(())
        };
        let finished = calls.release(client, now, offer);
        finished.into_iter().for_each(tell);
    }
}

fn tell((reply, outcome): Finished<watch::Sender<Progress>>) {
    reply.send_replace(Progress::Over(outcome));
}

/// A call under way; dropping it forgets it.
struct Waiting {
    service: Arc<MethodService>,
    id: RequestId,
    progress: watch::Receiver<Progress>,
}

impl Waiting {
    async fn outcome(mut self) -> MethodOutcome {
        loop {
            let deadline = match &*self.progress.borrow_and_update() {
                Progress::Over(outcome) => return outcome.clone(),
                Progress::Waits(deadline) => *deadline,
            };
            tokio::select! {
                changed = self.progress.changed() => if changed.is_err() {
                    // Cannot be: a call tells its outcome before its handle goes.
                    return MethodOutcome::TimedOut(self.id);
                },
                () = sleep_until(Instant::from_std(deadline)) => self.expire(),
            }
        }
    }

    fn expire(&self) {
        let now = self.service.parts.clock.instant();
        let expiry = self.service.calls.lock().expire(self.id, now);
        if let Expiry::Over(finished) = expiry {
            tell(finished);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.service.calls.lock().forget(self.id);
    }
}

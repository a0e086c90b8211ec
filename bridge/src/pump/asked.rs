//! What the broker asks the pump: needs and twin requests.

use edgehub_proto::{hub::UpstreamError, identity::Identity};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

use super::Pump;
use crate::{
    counters::{self, TwinOperation},
    lanes::{RequestFault, RequestId, SessionId},
    transport::{Command, TwinAnswer, TwinAsk, TwinRequest},
    upstream::{self, Asking},
};

/// A request that is not over.
pub(super) struct Pending {
    identity: Identity,
    operation: TwinOperation,
    /// Taken when it is sent.
    ask: Option<TwinAsk>,
    asked_at: Instant,
    deadline: Instant,
    reply: oneshot::Sender<Result<TwinAnswer, UpstreamError>>,
}

impl Pump {
    /// Hands the newest needs to the lanes.
    pub(super) fn take_wishes(&mut self) {
        for (identity, needs) in self.parts.asked.wishes.take() {
            debug!(%identity, ?needs, "needs");
            self.scheduler.need(&identity, needs);
        }
    }

    /// Has sessions replaced that say of their identity what is not so any more.
    pub(super) fn take_renewals(&mut self) {
        let now = self.now();
        for identity in self.parts.asked.wishes.take_renewals() {
            debug!(%identity, "session is to be replaced: another model");
            self.scheduler.renew(&identity, now);
        }
    }

    pub(super) fn take_request(&mut self, asking: Asking) {
        let Asking {
            identity,
            ask,
            deadline,
            reply,
        } = asking;
        if reply.is_closed() {
            return;
        }
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let operation = match ask {
            TwinAsk::Get => TwinOperation::Get,
            TwinAsk::Report(_) => TwinOperation::Report,
        };
        let pending = Pending {
            identity: identity.clone(),
            operation,
            ask: Some(ask),
            asked_at: Instant::now(),
            deadline,
            reply,
        };
        self.pending.insert(request, pending);
        let now = self.now();
        self.scheduler
            .request(&identity, request, deadline.into_std(), now);
    }

    /// Gives requests to their session.
    pub(super) fn make_requests(&mut self, session: SessionId, requests: Vec<RequestId>) {
        let mut batch = Vec::with_capacity(requests.len());
        for request in requests {
            let pending = self.pending.get_mut(&request);
            let wanted = pending.filter(|pending| !pending.reply.is_closed());
            let made = wanted.and_then(|pending| {
                let ask = pending.ask.take()?;
                let deadline = pending.deadline.into_std();
                Some(TwinRequest {
                    request,
                    ask,
                    deadline,
                })
            });
            match made {
                Some(made) => batch.push(made),
                // Nobody waits for it any more.
                None => {
                    self.pending.remove(&request);
                    self.scheduler.answered(request);
                }
            }
        }
        if !batch.is_empty() {
            self.tell(session, Command::Request(batch));
        }
    }

    pub(super) fn take_answer(
        &mut self,
        request: RequestId,
        answer: Result<TwinAnswer, UpstreamError>,
    ) {
        self.scheduler.answered(request);
        let Some(pending) = self.pending.remove(&request) else {
            return;
        };
        match &answer {
            Ok(_) => {
                let took = pending.asked_at.elapsed();
                counters::twin_operation(&pending.identity, pending.operation, took);
            }
            Err(error) => {
                debug!(identity = %pending.identity, operation = ?pending.operation, %error,
                    "twin request failed");
            }
        }
        // The asker may have gone.
        let _ = pending.reply.send(answer);
    }

    pub(super) fn fail(&mut self, request: RequestId, fault: RequestFault) {
        let Some(pending) = self.pending.remove(&request) else {
            return;
        };
        debug!(identity = %pending.identity, operation = ?pending.operation, ?fault,
            "twin request failed");
        let unavailable = |text: &str| UpstreamError::Unavailable(text.to_owned());
        let error = match fault {
            RequestFault::Gone => UpstreamError::Refused { status: 404 },
            RequestFault::Lost => unavailable("the connection ended before the answer"),
            RequestFault::Stopping => upstream::stopping(),
            RequestFault::TimedOut => upstream::timed_out(),
            RequestFault::TooMany => upstream::too_many(),
            RequestFault::Unreachable => unavailable("no connection"),
        };
        let _ = pending.reply.send(Err(error));
    }
}

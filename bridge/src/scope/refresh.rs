//! One identity from the upstream, when a client is not known or its credential does not fit.
//!
//! Bad passwords and invented ids must not cause unbounded work upstream (design.md D12): calls for
//! the same identity share one request, answers are remembered for a while, a token bucket bounds
//! the rate, and a caller waits a bounded time.
//!
//! # What counts as "not found"
//!
//! An answer without the identity, a 404 for an identity that we do not know either, or a complete
//! walk without it. Any other refusal may be about us (our token, our clock, a parent that is
//! offline itself) and removes nothing.

use std::{collections::HashMap, pin::Pin, sync::Arc};

use edgehub_auth::{
    authenticator::{IdentityRefresh, RefreshOutcome},
    scope_cache::ScopeChange,
    scope_tree::{Authentication, ServiceIdentity},
};
use edgehub_proto::{identity::Identity, scope::ScopeResponse};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info};

use super::{
    api::ScopeApi,
    keeper::{ScopeKeeper, WalkWait},
};
use crate::{bucket::TokenBucket, limits};

/// What is asked for, and in whose name.
type Question = (Identity, String);

/// Refreshes that are under way or remembered.
#[derive(Debug)]
pub(super) struct Refreshes {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    under_way: HashMap<Question, watch::Receiver<Option<RefreshOutcome>>>,
    remembered: HashMap<Question, (Instant, RefreshOutcome)>,
    bucket: Option<TokenBucket>,
}

/// What to do about a question.
enum Plan {
    /// The answer is known.
    Answer(RefreshOutcome),
    /// Ask the upstream, and tell the others through this.
    Ask(
        watch::Sender<Option<RefreshOutcome>>,
        watch::Receiver<Option<RefreshOutcome>>,
    ),
    /// Somebody has asked already.
    Wait(watch::Receiver<Option<RefreshOutcome>>),
}

impl Refreshes {
    pub(super) fn new() -> Self {
        let (under_way, remembered) = (HashMap::new(), HashMap::new());
        Self {
            state: Mutex::new(State {
                under_way,
                remembered,
                bucket: None,
            }),
        }
    }
}

/// Refreshes identities for the authenticator. Cheap to clone.
pub(crate) struct ScopeRefresh<A> {
    keeper: Arc<ScopeKeeper<A>>,
    tasks: TaskTracker,
    cancel: CancellationToken,
}

impl<A> Clone for ScopeRefresh<A> {
    fn clone(&self) -> Self {
        Self {
            keeper: Arc::clone(&self.keeper),
            tasks: self.tasks.clone(),
            cancel: self.cancel.clone(),
        }
    }
}

impl<A> std::fmt::Debug for ScopeRefresh<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScopeRefresh")
            .field("keeper", &self.keeper)
            .finish_non_exhaustive()
    }
}

impl<A: ScopeApi> IdentityRefresh for ScopeRefresh<A> {
    fn refresh<'a>(
        &'a self,
        target: &'a Identity,
        on_behalf_of: &'a str,
    ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>> {
        Box::pin(self.refresh_one(target, on_behalf_of))
    }
}

impl<A: ScopeApi> ScopeRefresh<A> {
    /// Requests run in `tasks` until `cancel`.
    pub(crate) fn new(
        keeper: Arc<ScopeKeeper<A>>,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            keeper,
            tasks,
            cancel,
        }
    }

    async fn refresh_one(&self, target: &Identity, on_behalf_of: &str) -> RefreshOutcome {
        let question = (target.clone(), on_behalf_of.to_owned());
        let deadline = Instant::now() + self.keeper.config.refresh_timeout;
        let mut answer = match self.keeper.plan(&question) {
            Plan::Answer(outcome) => return outcome,
            Plan::Wait(answer) => answer,
            Plan::Ask(sender, answer) => {
                let keeper = Arc::clone(&self.keeper);
                let cancel = self.cancel.clone();
                // In a task of its own: it serves others too if this caller goes away.
                self.tasks.spawn(async move {
                    let asked = keeper.ask(&question.0, &question.1, deadline);
                    let outcome = tokio::select! {
                        outcome = timeout_at(deadline, asked) => outcome.ok(),
                        () = cancel.cancelled() => None,
                    };
                    let outcome = outcome.unwrap_or(RefreshOutcome::Unavailable);
                    debug!(identity = %question.0, ?outcome, "identity refreshed");
                    keeper.remember(question, outcome);
                    // Nobody may be waiting any more.
                    let _ = sender.send(Some(outcome));
                });
                answer
            }
        };
        let outcome = timeout_at(deadline, answer.wait_for(Option::is_some)).await;
        match outcome {
            Ok(Ok(outcome)) => outcome.unwrap_or(RefreshOutcome::Unavailable),
            _ => RefreshOutcome::Unavailable,
        }
    }
}

impl<A: ScopeApi> ScopeKeeper<A> {
    fn plan(&self, question: &Question) -> Plan {
        let now = Instant::now();
        let mut state = self.refreshes.state.lock();
        if let Some((at, outcome)) = state.remembered.get(question) {
            let age = now.saturating_duration_since(*at);
            match outcome {
                RefreshOutcome::NotFound if age < self.config.negative_ttl => {
                    return Plan::Answer(RefreshOutcome::NotFound);
                }
                RefreshOutcome::Unavailable if age < self.config.unavailable_ttl => {
                    return Plan::Answer(RefreshOutcome::Unavailable);
                }
                RefreshOutcome::Refreshed
                    if age < self.config.min_interval && self.has_credential(&question.0) =>
                {
                    return Plan::Answer(RefreshOutcome::Limited);
                }
                _ => {}
            }
        }
        // Without its sender the task that asked has died, and nobody will ever answer.
        if let Some(answer) = state.under_way.get(question)
            && answer.has_changed().is_ok()
        {
            return Plan::Wait(answer.clone());
        }
        let bucket = state.bucket.get_or_insert_with(|| {
            let (rate, burst) = (limits::REFRESH_PER_SECOND, limits::REFRESH_BURST);
            TokenBucket::new(rate, burst, now.into_std())
        });
        if !bucket.take(now.into_std()) || state.under_way.len() >= limits::REFRESH_PARALLEL_MAX {
            return Plan::Answer(RefreshOutcome::Limited);
        }
        let (sender, answer) = watch::channel(None);
        state.under_way.insert(question.clone(), answer.clone());
        Plan::Ask(sender, answer)
    }

    /// An identity without a credential is asked about again and again: it may just have got one.
    fn has_credential(&self, identity: &Identity) -> bool {
        let tree = self.cache().current();
        tree.get(identity)
            .is_some_and(|record| record.authentication != Authentication::None)
    }

    fn remember(&self, question: Question, outcome: RefreshOutcome) {
        let now = Instant::now();
        let longest = self.config.min_interval.max(self.config.negative_ttl);
        let mut state = self.refreshes.state.lock();
        state.under_way.remove(&question);
        if state.remembered.len() >= limits::REFRESH_MEMORY_MAX {
            state
                .remembered
                .retain(|_, (at, _)| now.saturating_duration_since(*at) < longest);
        }
        if state.remembered.len() < limits::REFRESH_MEMORY_MAX {
            state.remembered.insert(question, (now, outcome));
        }
    }

    async fn ask(
        &self,
        target: &Identity,
        on_behalf_of: &str,
        deadline: Instant,
    ) -> RefreshOutcome {
        let Ok(actor) = Identity::device(on_behalf_of) else {
            return RefreshOutcome::NotFound;
        };
        let mut chain = self.cache().current().auth_chain(&actor);
        if chain.is_none() {
            // Perhaps a new edge device: a walk finds it.
            let walked = self.walk_on_demand(deadline).await;
            chain = self.cache().current().auth_chain(&actor);
            if chain.is_none() {
                return match walked {
                    WalkWait::Complete => RefreshOutcome::NotFound,
                    WalkWait::Incomplete => RefreshOutcome::Unavailable,
                };
            }
        }
        let Some(chain) = chain else {
            return RefreshOutcome::Unavailable;
        };
        match self.api.identity(target, &chain).await {
            Ok(answer) => match find(answer, target) {
                Some(records) => {
                    self.take_fetched(records).await;
                    RefreshOutcome::Refreshed
                }
                None => {
                    // It is not in the actor's scope: only there that is evidence. A sibling must
                    // not be able to ask our other children's identities away.
                    let tree = self.cache().current();
                    let chain = tree.try_auth_chain(target);
                    let is_evidence = actor == *tree.own_device()
                        || chain.is_some_and(|chain| chain.elements().contains(&actor));
                    if is_evidence {
                        self.remove(target).await;
                    }
                    RefreshOutcome::NotFound
                }
            },
            Err(error) if error.is_denied() => {
                let is_known = self.cache().current().get(target).is_some();
                debug!(identity = %target, %error, is_known, "refresh denied");
                if error.is_not_found() && !is_known {
                    return RefreshOutcome::NotFound;
                }
                let walked = self.walk_on_demand(deadline).await;
                let is_known = self.cache().current().get(target).is_some();
                match (walked, is_known) {
                    (WalkWait::Complete, false) => RefreshOutcome::NotFound,
                    (WalkWait::Complete, true) => RefreshOutcome::Refreshed,
                    (WalkWait::Incomplete, _) => RefreshOutcome::Unavailable,
                }
            }
            Err(error) => {
                debug!(identity = %target, %error, "refresh failed");
                RefreshOutcome::Unavailable
            }
        }
    }

    /// The upstream answered and the identity is not there.
    async fn remove(&self, identity: &Identity) {
        let tree = self.cache().current();
        let is_ours = identity.device_id() == tree.own_device().device_id()
            && (!identity.is_module() || identity.is_edge_hub());
        if !is_ours && tree.get(identity).is_some() {
            info!(%identity, "identity is not in the scope any more");
            self.records
                .apply(ScopeChange::Remove(vec![identity.clone()]))
                .await;
        }
    }
}

/// The record of `target` in an answer, with its device's if it is a module. Exactly one of each is
/// expected; others are not ours to take.
pub(super) fn find(answer: ScopeResponse, target: &Identity) -> Option<Vec<ServiceIdentity>> {
    let device = target.device_identity();
    let devices = answer
        .devices
        .into_iter()
        .filter_map(|one| ServiceIdentity::try_from(one).ok());
    let modules = answer
        .modules
        .into_iter()
        .filter_map(|one| ServiceIdentity::try_from(one).ok());
    let records: Vec<ServiceIdentity> = devices
        .chain(modules)
        .filter(|record| record.identity == *target || record.identity == device)
        .collect();
    let count = records
        .iter()
        .filter(|record| record.identity == *target)
        .count();
    (count == 1).then_some(records)
}

#[cfg(test)]
#[path = "refresh_tests.rs"]
mod tests;

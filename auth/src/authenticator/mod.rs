//! Authentication: is the client who it says it is, and may it act for whom it says.
//!
//! [`verify()`] has the rules and judges by one snapshot of the scope. [`Authenticator`] adds
//! time: it asks upstream when a newer record could change a refusal, for at most
//! [`REFRESH_WAIT`], and says whether a refusal is the last word.
//!
//! # Definite or not (design.md D6)
//! | Situation | Answer |
//! |---|---|
//! | token malformed, expired, for somebody else; certificate; wrong chain | definite |
//! | scope never walked nor restored | not definite |
//! | identity known, but the token is wrong, it is disabled, or the actor is not above it | definite, even while upstream is away |
//! | identity unknown, upstream says that it does not exist (or there is no upstream to ask) | definite |
//! | identity unknown, upstream is away, slow, or may not be asked now | not definite |
//! | identity known, an edge device above it unknown | not definite, unless upstream denies the identity |
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 3.1; design.md D6 and D12 instead of its waits of 100 s.

mod claim;
mod error;
mod verify;

#[cfg(test)]
mod refresh_tests;
#[cfg(test)]
mod secret_tests;
#[cfg(test)]
mod service_tests;
#[cfg(test)]
mod token_tests;
#[cfg(test)]
mod verify_tests;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use edgehub_proto::clock::Clock;
use edgehub_proto::identity::Identity;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

pub use claim::{AudienceHosts, Claim, Credential, Principal, ServiceClaim, ServicePrincipal};
pub use error::{AuthnError, Undecided};
pub use verify::{RefreshQuery, Stale, Verdict, verify, verify_service};

use crate::limits::{REFRESH_WAIT, REFRESHES_PER_ATTEMPT_MAX};
use crate::scope_cache::ScopeCache;
use crate::scope_tree::ScopeTree;

/// Fetches one identity from upstream into the [`ScopeCache`].
///
/// The implementation coalesces calls for one identity, remembers what it was told (negative
/// cache), and limits how often upstream is asked (D12): callers may be as many as there are
/// clients with wrong passwords.
pub trait IdentityRefresh: Send + Sync {
    /// Fetches `target`, in the name of the edge device `on_behalf_of`. By the time the future is
    /// done the cache holds what was learned. An answer about a module has its device too; both
    /// are to be applied, because a module may use its device's key.
    ///
    /// # Cancel safety
    /// Callers drop the future after [`REFRESH_WAIT`]; the call upstream may go on.
    fn refresh<'a>(
        &'a self,
        target: &'a Identity,
        on_behalf_of: &'a str,
    ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>>;
}

/// What came of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshOutcome {
    /// Upstream may not be asked now: rate limit, or asked in vain a moment ago.
    Limited,
    /// Upstream answered, and the identity is not in our scope: positive evidence. Also for an
    /// answer that is remembered.
    NotFound,
    /// Upstream answered; its record is in the cache.
    Refreshed,
    /// Upstream is not reachable, or gave no usable answer.
    Unavailable,
}

/// Decides who is let in. One for all connections; cheap to share behind an `Arc`.
pub struct Authenticator {
    cache: Arc<ScopeCache>,
    hosts: AudienceHosts,
    clock: Arc<dyn Clock>,
    refresh: Option<Arc<dyn IdentityRefresh>>,
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Authenticator")
            .field("hosts", &self.hosts)
            .field("refresh", &self.refresh.is_some())
            .finish_non_exhaustive()
    }
}

impl Authenticator {
    /// An authenticator on `cache`. Without `refresh` the cache is all there is to know, and an
    /// identity that an initialised cache lacks does not exist.
    pub fn new(
        cache: Arc<ScopeCache>,
        hosts: AudienceHosts,
        clock: Arc<dyn Clock>,
        refresh: Option<Arc<dyn IdentityRefresh>>,
    ) -> Self {
        Self {
            cache,
            hosts,
            clock,
            refresh,
        }
    }

    /// Decides about a client, asking upstream if that may help. Takes at most [`REFRESH_WAIT`].
    ///
    /// # Errors
    /// [`AuthnError`] with the reason; [`AuthnError::is_definite`] says whether it is final.
    ///
    /// # Cancel safety
    /// Safe: nothing is kept but what the refresh has already put into the cache.
    pub async fn authenticate(&self, claim: &Claim) -> Result<Principal, AuthnError> {
        let verify = |tree: &ScopeTree, now_ms| verify(tree, &self.hosts, claim, now_ms);
        let principal = self.decide(verify).await?;
        if principal.used_device_key() {
            debug!(identity = %principal.identity(), "module authenticated with its device's key");
        }
        Ok(principal)
    }

    /// Decides about the caller of a scope or registry call, as [`Self::authenticate`] does.
    ///
    /// # Errors
    /// [`AuthnError`] with the reason; [`AuthnError::is_definite`] says whether it is final.
    ///
    /// # Cancel safety
    /// As [`Self::authenticate`].
    pub async fn authenticate_service(
        &self,
        claim: &ServiceClaim,
    ) -> Result<ServicePrincipal, AuthnError> {
        self.decide(|tree, now_ms| verify_service(tree, &self.hosts, claim, now_ms))
            .await
    }

    /// Asks upstream for one identity, for at most [`REFRESH_WAIT`]: the step before the answer
    /// to a child hub's question ([`crate::scope_server::IdentityQuery`]).
    ///
    /// # Cancel safety
    /// As [`Self::authenticate`].
    pub async fn refresh(&self, query: &RefreshQuery) -> RefreshOutcome {
        let Some(refresh) = &self.refresh else {
            return RefreshOutcome::Unavailable;
        };
        let refreshed = refresh.refresh(&query.identity, &query.on_behalf_of);
        match timeout_at(Instant::now() + REFRESH_WAIT, refreshed).await {
            Ok(outcome) => outcome,
            Err(_) => RefreshOutcome::Unavailable,
        }
    }

    async fn decide<P>(
        &self,
        check: impl Fn(&ScopeTree, u64) -> Verdict<P>,
    ) -> Result<P, AuthnError> {
        // Before the snapshot is taken: one that becomes initialised in between then counts as
        // not initialised, which is the safe mistake.
        let initialised = self.cache.is_initialised();
        let check = || check(&self.cache.current(), self.clock.unix_ms());
        let mut stale = match check() {
            Verdict::Accepted(proof) => return Ok(proof),
            Verdict::Refused(error) => return Err(error),
            Verdict::Stale(stale) => stale,
        };
        if !initialised {
            let identity = stale.query.identity;
            return Err(AuthnError::Undecided {
                identity,
                cause: Undecided::NotInitialised,
            });
        }
        let Some(refresh) = &self.refresh else {
            return Err(stale.error);
        };

        let deadline = Instant::now() + REFRESH_WAIT;
        let mut asked: Vec<(RefreshQuery, Answer)> = Vec::new();
        while asked.len() < REFRESHES_PER_ATTEMPT_MAX
            && asked.iter().all(|(query, _)| *query != stale.query)
        {
            let query = stale.query.clone();
            let refreshed = refresh.refresh(&query.identity, &query.on_behalf_of);
            let outcome = timeout_at(deadline, refreshed).await;
            asked.push((query, Answer::from(outcome.ok())));
            stale = match check() {
                Verdict::Accepted(proof) => return Ok(proof),
                Verdict::Refused(error) => return Err(error),
                Verdict::Stale(stale) => stale,
            };
        }
        let answer = asked
            .iter()
            .find(|(query, _)| *query == stale.query)
            .map(|(_, answer)| *answer);
        Err(conclude(
            stale,
            answer.unwrap_or(Answer::None(Undecided::RefreshLimited)),
        ))
    }
}

/// What upstream said about the identity on which a refusal depends.
#[derive(Clone, Copy)]
enum Answer {
    None(Undecided),
    NotFound,
    Refreshed,
}

impl From<Option<RefreshOutcome>> for Answer {
    fn from(outcome: Option<RefreshOutcome>) -> Self {
        match outcome {
            Some(RefreshOutcome::Limited) => Self::None(Undecided::RefreshLimited),
            Some(RefreshOutcome::NotFound) => Self::NotFound,
            Some(RefreshOutcome::Refreshed) => Self::Refreshed,
            Some(RefreshOutcome::Unavailable) => Self::None(Undecided::UpstreamUnavailable),
            None => Self::None(Undecided::RefreshTimedOut),
        }
    }
}

/// The last word, or not: the table in the module's documentation.
fn conclude(stale: Stale, answer: Answer) -> AuthnError {
    let identity = stale.query.identity;
    match (&stale.error, answer) {
        (
            AuthnError::UnknownIdentity { .. } | AuthnError::OutOfScope { .. },
            Answer::None(cause),
        ) => AuthnError::Undecided { identity, cause },
        (AuthnError::OutOfScope { .. }, Answer::Refreshed) => AuthnError::Undecided {
            identity,
            cause: Undecided::AncestorUnknown,
        },
        _ => stale.error,
    }
}

//! Credentials: tokens that are put, SASL, and when they stop to count (spec/amqp.md 1.4, 3;
//! design.md D7).

use std::time::Duration;

use edgehub_amqp::connection::{Incoming, SaslPlain};
use edgehub_amqp::performative::Outcome;
use edgehub_amqp::sasl::SaslCode;
use edgehub_auth::authenticator::{AuthnError, Claim, Credential, Principal};
use edgehub_proto::amqp_address;
use edgehub_proto::identity::Identity;

use super::{Head, Job};
use crate::amqp::cbs::{self, Answer, Asked};
use crate::amqp::client::Proof;
use crate::amqp::condition;
use crate::amqp::limits::{CREDENTIAL_MAX, VERDICT_MAX};

impl Head {
    /// Whether the peer has presented a credential that was found good: it is no stranger any more.
    pub(in crate::amqp) fn is_known(&self) -> bool {
        !self.clients.is_empty()
            || self.plain.is_some()
            || self.tokens.any_verified(self.hub.clock().unix_ms())
    }

    pub(super) fn put_token(&mut self, incoming: &Incoming, now_ms: u64) {
        let scope = self.hub.scope().current();
        let is_known = |identity: &Identity| scope.get(identity).is_some();
        match cbs::read(incoming.received, &incoming.payload, is_known) {
            Asked::Judge(request, text, claim) => {
                if self.tokens.holds(&request.owner, &text, now_ms) {
                    // A hub below us puts its one token for each of its identities.
                    return self.answer(request, &Answer::ok());
                }
                *self.verifying.entry(request.owner.clone()).or_default() += 1;
                self.jobs.push_back(Job::Judge(request, text, claim));
            }
            Asked::Answered(received, message_id, reply_to, answer) => {
                self.engine.settle(received, Outcome::Accepted);
                self.engine.settle_first(received.link());
                if self.is_told() {
                    tracing::info!("Refused a token: {} ({})", answer.text, answer.status);
                }
                self.cbs.say(message_id.as_ref(), reply_to, &answer);
            }
        }
    }

    fn answer(&mut self, request: cbs::Request, answer: &Answer) {
        self.engine.settle(request.received, Outcome::Accepted);
        self.engine.settle_first(request.received.link());
        self.cbs.answer(request, answer);
    }

    /// Takes the verdict on a token.
    pub(super) fn judged(
        &mut self,
        request: cbs::Request,
        text: &str,
        verdict: &Result<Principal, AuthnError>,
    ) {
        let now_ms = self.hub.clock().unix_ms();
        let owner = request.owner.clone();
        if let Some(count) = self.verifying.get_mut(&owner) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.verifying.remove(&owner);
            }
        }
        let answer = match request.concluded(verdict.as_ref()) {
            Err(answer) => {
                self.hub.count_refusal(&owner);
                if self.is_told() {
                    tracing::info!("Refused a token of {owner}: {}", answer.text);
                }
                answer
            }
            Ok(standing) if !self.tokens.keep(&owner, text, standing, now_ms) => {
                Answer::new(403, "this connection has too many tokens")
            }
            Ok(standing) => {
                if standing.verified {
                    self.renew(&owner, text, standing.expires_at_ms);
                }
                Answer::ok()
            }
        };
        self.answer(request, &answer);
        self.unpark();
    }

    /// A newer token of this owner: those that live by the older one live longer.
    fn renew(&mut self, owner: &Identity, text: &str, expires_at_ms: u64) {
        for client in self.clients.values_mut() {
            if client.proof == Proof::Token(owner.clone()) {
                client.claim.credential = Credential::Sas(text.to_owned());
                client.expires_at_ms = Some(expires_at_ms);
                client.registration.renew(client.claim.clone());
            }
        }
    }

    pub(super) fn sasl_external(&mut self) {
        // The certificate itself is judged with the identity of each link.
        let code = if self.certificate.is_some() {
            SaslCode::Ok
        } else {
            SaslCode::Auth
        };
        self.engine.sasl_outcome(code);
    }

    pub(super) fn sasl_plain(&mut self, plain: &SaslPlain) {
        let Some(identity) = amqp_address::sasl_identity(&plain.authcid) else {
            self.engine.sasl_outcome(SaslCode::Auth);
            return;
        };
        let claim = Claim {
            identity,
            chain: None,
            credential: Credential::Sas(plain.password.expose().clone()),
        };
        self.jobs.push_back(Job::Plain(claim));
    }

    /// Takes the verdict on SASL PLAIN.
    pub(super) fn plain_judged(&mut self, claim: Claim, verdict: Result<Principal, AuthnError>) {
        match verdict {
            Ok(principal) => {
                self.plain = Some((claim, principal.expires_at_ms()));
                self.engine.sasl_outcome(SaslCode::Ok);
            }
            Err(error) => {
                self.hub.count_refusal(&claim.identity);
                tracing::info!("Refused SASL PLAIN of {}: {error}", claim.identity);
                let code = if error.is_definite() {
                    SaslCode::Auth
                } else {
                    SaslCode::SysTemp
                };
                self.engine.sasl_outcome(code);
            }
        }
    }

    /// Looks at what can expire.
    pub(in crate::amqp) fn expire(&mut self) {
        let now_ms = self.hub.clock().unix_ms();
        let expired: Vec<Identity> = self
            .clients
            .values()
            .filter(|client| client.expires_at_ms.is_some_and(|at| at <= now_ms))
            .map(|client| client.identity.clone())
            .collect();
        let text = "the token expired";
        let error = condition::error(condition::UNAUTHORIZED, text);
        for identity in expired {
            tracing::info!("The token of {identity} expired");
            self.drop_client(&identity, &error);
        }
        if let Some((_, Some(at))) = self.plain
            && at <= now_ms
        {
            self.engine.close(Some(error));
            return;
        }
        if self.patience_left().is_some_and(|left| left.is_zero()) {
            let text = "no valid credential is presented";
            self.engine
                .close(Some(condition::error(condition::UNAUTHORIZED, text)));
        }
    }

    /// After how long [`Head::expire`] must be called.
    pub(in crate::amqp) fn expires_in(&self) -> Duration {
        let now_ms = self.hub.clock().unix_ms();
        let clients = self.clients.values();
        let ends = clients.filter_map(|client| client.expires_at_ms);
        let first = ends
            .chain(self.plain.iter().filter_map(|(_, at)| *at))
            .min();
        let left = first.map_or(CREDENTIAL_MAX, |at| {
            Duration::from_millis(at.saturating_sub(now_ms))
        });
        // Clocks can move: they are looked at now and then.
        let first = left.min(CREDENTIAL_MAX);
        self.patience_left().map_or(first, |left| left.min(first))
    }

    /// How long the peer may go on without anything that counts; none once it has shown something,
    /// and while the connection is not open, which is bounded elsewhere.
    fn patience_left(&self) -> Option<Duration> {
        if !self.engine.is_open() || self.is_known() {
            return None;
        }
        let age = self.hub.clock().instant().duration_since(self.began);
        let is_asking = !self.asked.is_empty() || !self.jobs.is_empty() || self.jobs_running > 0;
        let patience = if is_asking {
            CREDENTIAL_MAX + VERDICT_MAX
        } else {
            CREDENTIAL_MAX
        };
        Some(patience.saturating_sub(age))
    }
}

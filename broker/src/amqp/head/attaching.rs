//! Links: which of them an identity gets, and by what it is let in (spec/amqp.md 2.3, 2.4, 3).

use edgehub_amqp::connection::{Attach, LinkId};
use edgehub_amqp::limits::CBS_TEXT_BYTES_MAX;
use edgehub_amqp::performative::ErrorInfo;
use edgehub_auth::authenticator::{Claim, Credential};
use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::Identity;

use super::ends::stolen;
use super::{Guard, Head, Job, Waiting};
use crate::amqp::client::{Client, ClientParts, Proof};
use crate::amqp::condition;
use crate::amqp::links::{self, Wanted};
use crate::amqp::tokens;
use crate::hub::{ConnectError, ConnectOptions, Connected};
use crate::telemetry::metrics;

/// By what an identity can be let in.
enum Basis {
    /// A credential that is there.
    Now(Claim, Proof),
    /// One whose verdict is awaited (design.md D7).
    Later,
}

impl Head {
    pub(super) fn attached(&mut self, link: LinkId, attach: Attach) {
        match links::wanted(&attach) {
            Err(error) => self.refuse(link, &attach, None, &error),
            Ok(Wanted::Cbs) if self.plain.is_some() => {
                let text = "this connection was authenticated by SASL";
                let error = condition::error(condition::NOT_ALLOWED, text);
                self.refuse(link, &attach, None, &error);
            }
            Ok(Wanted::Cbs) => {
                self.engine.accept(link, &links::cbs_terms(&attach));
                if attach.peer_sends() {
                    self.cbs_requests.insert(link);
                } else {
                    // No request could name a longer one.
                    let address = attach.other_address();
                    let address = address.filter(|text| text.len() <= CBS_TEXT_BYTES_MAX);
                    self.cbs.attached(link, address);
                }
            }
            Ok(Wanted::Identity(identity, kind)) => {
                self.wanted(identity, Waiting { link, kind, attach });
            }
        }
    }

    /// A link of an identity, which may have to be let in first.
    pub(super) fn wanted(&mut self, identity: Identity, waiting: Waiting) {
        if let Some(client) = self.clients.get(&identity) {
            if client.registration.is_live() {
                return self.open(&identity, waiting);
            }
            // Another connection has its place, which the guard is about to say: the place is not
            // taken back by whoever is late.
            return self.refuse(waiting.link, &waiting.attach, Some(&identity), &stolen());
        }
        if let Some(others) = self.asked.get_mut(&identity) {
            others.push(waiting);
            return;
        }
        match self.basis(&identity, &waiting.attach) {
            Ok(Basis::Now(claim, proof)) => {
                self.asked.insert(identity, vec![waiting]);
                let options = ConnectOptions {
                    info: None,
                    clean_session: false,
                };
                self.jobs.push_back(Job::Connect(claim, proof, options));
            }
            Ok(Basis::Later) => self.parked.push((identity, waiting)),
            Err(error) => self.refuse(waiting.link, &waiting.attach, Some(&identity), &error),
        }
    }

    /// Looks again at links that waited for the verdict on a token.
    pub(super) fn unpark(&mut self) {
        for (identity, waiting) in std::mem::take(&mut self.parked) {
            self.wanted(identity, waiting);
        }
    }

    fn basis(&self, identity: &Identity, attach: &Attach) -> Result<Basis, ErrorInfo> {
        if let Some((claim, _)) = &self.plain {
            if claim.identity != *identity {
                let text = "SASL PLAIN authenticated another identity";
                return Err(condition::error(condition::UNAUTHORIZED, text));
            }
            return Ok(Basis::Now(claim.clone(), Proof::Connection));
        }
        let chain = match attach.property(links::AUTH_CHAIN) {
            None => None,
            Some(text) => Some(AuthChain::parse(text).map_err(|error| {
                condition::error(condition::UNAUTHORIZED, format!("the auth chain: {error}"))
            })?),
        };
        let now_ms = self.hub.clock().unix_ms();
        if let Some((owner, claim)) = self.tokens.claim(identity, chain.as_ref(), now_ms) {
            return Ok(Basis::Now(claim, Proof::Token(owner)));
        }
        let hub = tokens::acting_hub(chain.as_ref());
        let mut owners = [Some(identity), hub.as_ref()].into_iter().flatten();
        if owners.any(|owner| self.verifying.contains_key(owner)) {
            return Ok(Basis::Later);
        }
        let Some(certificate) = &self.certificate else {
            let text = "no token was put for this identity";
            return Err(condition::error(condition::UNAUTHORIZED, text));
        };
        let claim = Claim {
            identity: identity.clone(),
            chain,
            credential: Credential::Certificate(certificate.clone()),
        };
        Ok(Basis::Now(claim, Proof::Connection))
    }

    fn open(&mut self, identity: &Identity, waiting: Waiting) {
        let Waiting { link, kind, attach } = waiting;
        let Some(client) = self.clients.get_mut(identity) else {
            return;
        };
        for older in client.links.put(kind, link, &attach) {
            client.detached(older);
            self.owners.remove(&older);
            self.engine.detach(older, None);
        }
        client.attached(kind, &attach, &self.hub);
        self.owners.insert(link, (identity.clone(), kind));
        self.engine.accept(link, &links::terms(kind, &attach));
        client.announce(&self.hub);
        self.stirred.insert(identity.clone());
    }

    fn refuse(
        &mut self,
        link: LinkId,
        attach: &Attach,
        identity: Option<&Identity>,
        error: &ErrorInfo,
    ) {
        metrics::links_refused(&error.condition).increment(1);
        if self.is_told() {
            let address = condition::excerpt(attach.address().unwrap_or_default());
            let who = identity.map_or("(unknown)", Identity::as_str);
            let why = error.description.as_deref().unwrap_or_default();
            tracing::info!(
                "Refused a link of {who} to {address:?}: {} ({why}; refusal {} of this connection)",
                error.condition,
                self.refusals
            );
        }
        self.engine.refuse(link, error);
    }

    pub(super) fn detached(&mut self, link: LinkId, error: Option<&ErrorInfo>) {
        if self.cbs_requests.remove(&link) {
            return;
        }
        let Some((identity, _)) = self.owners.remove(&link) else {
            self.cbs.detached(link);
            // Or one that waited for a verdict.
            for waiting in self.asked.values_mut() {
                waiting.retain(|waiting| waiting.link != link);
            }
            self.parked.retain(|(_, waiting)| waiting.link != link);
            return;
        };
        let Some(client) = self.clients.get_mut(&identity) else {
            return;
        };
        if let Some(error) = error {
            let condition = condition::excerpt(&error.condition);
            tracing::debug!("{identity} detached a link: {condition:?}");
        }
        client.detached(link);
        if client.links.is_empty() {
            self.forget(&identity);
        } else {
            client.announce(&self.hub);
            self.stirred.insert(identity);
        }
    }

    /// Takes the verdict on an identity.
    pub(super) fn connected(
        &mut self,
        claim: Claim,
        proof: Proof,
        connected: Result<Connected, ConnectError>,
    ) {
        let identity = claim.identity.clone();
        let waiting = self.asked.remove(&identity).unwrap_or_default();
        let connected = match connected {
            Ok(connected) => connected,
            Err(error) => {
                let error = condition::not_connected(&error);
                for waiting in waiting {
                    self.refuse(waiting.link, &waiting.attach, Some(&identity), &error);
                }
                return;
            }
        };
        if waiting.is_empty() || !self.engine.is_open() {
            // Nobody wants it any more. It was never announced, so nobody is told.
            drop(connected);
            return;
        }
        self.generation += 1;
        // Fires too when the client is gone: nobody waits for what is over.
        let closed = connected.registration.closed().child_token();
        self.guards.push(Guard {
            identity: identity.clone(),
            generation: self.generation,
            closed: closed.clone(),
        });
        let client = Client::new(
            &self.hub,
            ClientParts {
                generation: self.generation,
                registration: connected.registration,
                gone: closed.drop_guard(),
                claim,
                proof,
                expires_at_ms: connected.principal.expires_at_ms(),
                outbox: connected.outbox,
            },
        );
        self.clients.insert(identity.clone(), client);
        for waiting in waiting {
            self.open(&identity, waiting);
        }
    }
}

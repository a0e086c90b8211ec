//! The tokens that a connection was given, by whom they were made out to (design.md D7).

use std::collections::HashMap;

use edgehub_auth::authenticator::{Claim, Credential};
use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::Identity;

use super::limits::TOKENS_MAX;

/// A token that was not refused.
#[derive(Clone)]
struct Token {
    text: String,
    expires_at_ms: u64,
}

/// The tokens of one connection.
#[derive(Default)]
pub(super) struct Tokens {
    by_owner: HashMap<Identity, Token>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("owners", &self.by_owner.len())
            .finish()
    }
}

impl Tokens {
    /// Whether one of them is good at this time.
    pub(super) fn any(&self, now_ms: u64) -> bool {
        self.by_owner
            .values()
            .any(|token| token.expires_at_ms > now_ms)
    }

    /// Whether this very token is held.
    pub(super) fn holds(&self, owner: &Identity, text: &str, now_ms: u64) -> bool {
        let token = self.by_owner.get(owner);
        token.is_some_and(|token| token.text == text && token.expires_at_ms > now_ms)
    }

    /// Keeps a token in the place of an older one of its owner. False when there are too many.
    pub(super) fn keep(
        &mut self,
        owner: &Identity,
        text: String,
        expires_at_ms: u64,
        now_ms: u64,
    ) -> bool {
        if self.by_owner.len() >= TOKENS_MAX && !self.by_owner.contains_key(owner) {
            self.by_owner
                .retain(|_, token| token.expires_at_ms > now_ms);
            if self.by_owner.len() >= TOKENS_MAX {
                return false;
            }
        }
        let token = Token {
            text,
            expires_at_ms,
        };
        self.by_owner.insert(owner.clone(), token);
        true
    }

    /// What an identity can claim: by its own token, else by that of the actor of its auth chain
    /// (spec/amqp.md 3). With it the owner of the token.
    pub(super) fn claim(
        &self,
        identity: &Identity,
        chain: Option<&AuthChain>,
    ) -> Option<(Identity, Claim)> {
        if let Some(token) = self.by_owner.get(identity) {
            let claim = Claim {
                identity: identity.clone(),
                chain: None,
                credential: Credential::Sas(token.text.clone()),
            };
            return Some((identity.clone(), claim));
        }
        let actor = chain?.actor()?;
        let owner = Identity::edge_hub(actor.device_id()).ok()?;
        let token = self.by_owner.get(&owner)?;
        let claim = Claim {
            identity: identity.clone(),
            chain: chain.cloned(),
            credential: Credential::Sas(token.text.clone()),
        };
        Some((owner, claim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    fn text(claim: Option<(Identity, Claim)>) -> Option<(String, String)> {
        let (owner, claim) = claim?;
        let Credential::Sas(text) = claim.credential else {
            return None;
        };
        Some((owner.to_string(), text))
    }

    #[test]
    fn the_own_token_counts_before_that_of_the_actor() {
        let mut tokens = Tokens::default();
        let chain = AuthChain::parse("leaf1;e3;e4").unwrap();
        assert!(tokens.claim(&id("leaf1"), Some(&chain)).is_none());
        assert!(tokens.keep(&id("e4/$edgeHub"), "hub".into(), 10, 0));
        assert!(tokens.keep(&id("e3/$edgeHub"), "other".into(), 10, 0));
        let claim = text(tokens.claim(&id("leaf1"), Some(&chain)));
        assert_eq!(claim, Some(("e4/$edgeHub".into(), "hub".into())));
        assert!(tokens.claim(&id("leaf1"), None).is_none());
        assert!(tokens.keep(&id("leaf1"), "own".into(), 10, 0));
        let claim = text(tokens.claim(&id("leaf1"), Some(&chain)));
        assert_eq!(claim, Some(("leaf1".into(), "own".into())));
    }

    #[test]
    fn there_are_never_too_many_and_expired_ones_make_room() {
        let mut tokens = Tokens::default();
        for n in 0..TOKENS_MAX {
            let expires_at_ms = if n == 0 { 5 } else { 10 };
            assert!(tokens.keep(&id(&format!("d{n}")), "t".into(), expires_at_ms, 0));
        }
        assert!(!tokens.keep(&id("one-more"), "t".into(), 10, 4));
        assert!(tokens.keep(&id("d7"), "renewed".into(), 20, 4));
        assert!(tokens.keep(&id("one-more"), "t".into(), 10, 5));
        assert!(tokens.holds(&id("d7"), "renewed", 19) && !tokens.holds(&id("d7"), "renewed", 20));
        assert!(tokens.any(19) && !tokens.any(20));
    }

    #[test]
    fn no_token_is_shown() {
        let mut tokens = Tokens::default();
        tokens.keep(&id("d"), "secret".into(), 1, 0);
        assert!(!format!("{tokens:?}").contains("secret"));
    }
}

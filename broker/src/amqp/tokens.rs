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
    standing: Standing,
}

/// What is known of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    /// Until when it counts, Unix milliseconds.
    pub(super) expires_at_ms: u64,
    /// It was found good. Otherwise it could not be judged, and each use of it is judged anew.
    pub(super) verified: bool,
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
    /// Whether one of them was found good and is at this time.
    pub(super) fn any_verified(&self, now_ms: u64) -> bool {
        self.by_owner.values().any(|token| token.is_good(now_ms))
    }

    /// Whether this very token is held and was found good.
    pub(super) fn holds(&self, owner: &Identity, text: &str, now_ms: u64) -> bool {
        let token = self.by_owner.get(owner);
        token.is_some_and(|token| token.text == text && token.is_good(now_ms))
    }

    /// Keeps a token in the place of an older one of its owner; one that could not be judged never
    /// takes the place of a good one. False when there are too many.
    pub(super) fn keep(
        &mut self,
        owner: &Identity,
        text: &str,
        standing: Standing,
        now_ms: u64,
    ) -> bool {
        match self.by_owner.get(owner) {
            Some(held) if held.is_good(now_ms) && !standing.verified => return true,
            None if self.by_owner.len() >= TOKENS_MAX => {
                self.by_owner
                    .retain(|_, token| token.standing.expires_at_ms > now_ms);
                if self.by_owner.len() >= TOKENS_MAX {
                    return false;
                }
            }
            _ => {}
        }
        let text = text.to_owned();
        self.by_owner
            .insert(owner.clone(), Token { text, standing });
        true
    }

    /// What an identity can claim: by its own token, else by that of the actor of its auth chain
    /// (spec/amqp.md 3). With it the owner of the token.
    pub(super) fn claim(
        &self,
        identity: &Identity,
        chain: Option<&AuthChain>,
        now_ms: u64,
    ) -> Option<(Identity, Claim)> {
        let hub = acting_hub(chain).filter(|hub| self.by_owner.contains_key(hub));
        let own = self.by_owner.get(identity);
        // An own token that is over is only tried when there is no other.
        let own = own.filter(|own| own.standing.expires_at_ms > now_ms || hub.is_none());
        if let Some(token) = own {
            let claim = Claim {
                identity: identity.clone(),
                chain: None,
                credential: Credential::Sas(token.text.clone()),
            };
            return Some((identity.clone(), claim));
        }
        let owner = hub?;
        let token = self.by_owner.get(&owner)?;
        let claim = Claim {
            identity: identity.clone(),
            chain: chain.cloned(),
            credential: Credential::Sas(token.text.clone()),
        };
        Some((owner, claim))
    }
}

impl Token {
    fn is_good(&self, now_ms: u64) -> bool {
        self.standing.verified && self.standing.expires_at_ms > now_ms
    }
}

/// The hub that acts for an identity with such a chain: its token is looked for
/// (spec/amqp.md 3).
pub(super) fn acting_hub(chain: Option<&AuthChain>) -> Option<Identity> {
    let actor = chain?.actor()?;
    Identity::edge_hub(actor.device_id()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    fn good(expires_at_ms: u64) -> Standing {
        Standing {
            expires_at_ms,
            verified: true,
        }
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
        assert!(tokens.claim(&id("leaf1"), Some(&chain), 0).is_none());
        assert!(tokens.keep(&id("e4/$edgeHub"), "hub", good(10), 0));
        assert!(tokens.keep(&id("e3/$edgeHub"), "other", good(10), 0));
        let acted = Some(("e4/$edgeHub".into(), "hub".into()));
        let own = Some(("leaf1".into(), "own".into()));
        assert_eq!(text(tokens.claim(&id("leaf1"), Some(&chain), 0)), acted);
        assert!(tokens.claim(&id("leaf1"), None, 0).is_none());
        assert!(tokens.keep(&id("leaf1"), "own", good(5), 0));
        assert_eq!(text(tokens.claim(&id("leaf1"), Some(&chain), 4)), own);
        // Once it is over it only counts, as the reason of a refusal, where there is no other.
        assert_eq!(text(tokens.claim(&id("leaf1"), Some(&chain), 5)), acted);
        assert_eq!(text(tokens.claim(&id("leaf1"), None, 5)), own);
    }

    #[test]
    fn there_are_never_too_many_and_expired_ones_make_room() {
        let mut tokens = Tokens::default();
        for n in 0..TOKENS_MAX {
            let standing = good(if n == 0 { 5 } else { 10 });
            assert!(tokens.keep(&id(&format!("d{n}")), "t", standing, 0));
        }
        assert!(!tokens.keep(&id("one-more"), "t", good(10), 4));
        assert!(tokens.keep(&id("d7"), "renewed", good(20), 4));
        assert!(tokens.keep(&id("one-more"), "t", good(10), 5));
        assert!(tokens.holds(&id("d7"), "renewed", 19) && !tokens.holds(&id("d7"), "renewed", 20));
        assert!(tokens.any_verified(19) && !tokens.any_verified(20));
    }

    #[test]
    fn a_token_that_could_not_be_judged_never_replaces_a_good_one() {
        let mut tokens = Tokens::default();
        let open = Standing {
            expires_at_ms: 100,
            verified: false,
        };
        let held = |tokens: &Tokens, now_ms| text(tokens.claim(&id("d"), None, now_ms)).unwrap().1;
        assert!(tokens.keep(&id("d"), "open", open, 0));
        assert!(!tokens.any_verified(0) && !tokens.holds(&id("d"), "open", 0));
        assert!(tokens.keep(&id("d"), "good", good(10), 0));
        assert!(tokens.keep(&id("d"), "open", open, 9));
        assert_eq!(held(&tokens, 9), "good");
        assert!(tokens.keep(&id("d"), "open", open, 10));
        assert_eq!(held(&tokens, 10), "open");
    }

    #[test]
    fn no_token_is_shown() {
        let mut tokens = Tokens::default();
        tokens.keep(&id("d"), "secret", good(1), 0);
        assert!(!format!("{tokens:?}").contains("secret"));
    }
}

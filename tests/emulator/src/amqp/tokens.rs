//! The tokens of one connection: those that its clients put by CBS or brought by SASL PLAIN.
//!
//! A token was verified before it comes here. Put-tokens have names, of which there may be a
//! limited number; what counts for a link is who signed.

use std::collections::HashMap;

use crate::authorize::Signer;
use crate::limits::TOKENS_MAX;

/// A verified token.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Token {
    /// As it came: it is verified again for every link.
    pub(super) text: String,
    pub(super) expires_ms: u64,
}

/// One name too many.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("more than {TOKENS_MAX} tokens on the connection")]
pub(super) struct TooMany;

/// The tokens by who signed them. An identity has one, the newest; a policy has one for each name,
/// because they may be for different resources.
#[derive(Default)]
pub(super) struct Tokens {
    /// Put-token names.
    names: HashMap<String, Signer>,
    signers: HashMap<Signer, HashMap<String, Token>>,
    next_expiry_ms: Option<u64>,
}

impl Tokens {
    /// Enters a token under its put-token name.
    ///
    /// # Errors
    /// The connection has its most names already; nothing is changed then.
    pub(super) fn put(&mut self, name: &str, signer: Signer, token: Token) -> Result<(), TooMany> {
        if self.names.len() >= TOKENS_MAX && !self.names.contains_key(name) {
            return Err(TooMany);
        }
        let slot = match &signer {
            Signer::Identity(_) => String::new(),
            Signer::Policy(_) => name.to_owned(),
        };
        if let Some(old) = self.names.insert(name.to_owned(), signer.clone())
            && old != signer
            && let Some(tokens) = self.signers.get_mut(&old)
        {
            tokens.remove(name);
        }
        self.signers.entry(signer).or_default().insert(slot, token);
        self.note_expiry();
        Ok(())
    }

    /// The token that an identity signed.
    pub(super) fn of(&self, signer: &Signer) -> Option<&Token> {
        self.signers.get(signer)?.values().next()
    }

    /// The tokens of policies.
    pub(super) fn of_policies(&self) -> impl Iterator<Item = (&Signer, &Token)> {
        let policies = self.signers.iter();
        let policies = policies.filter(|(signer, _)| matches!(signer, Signer::Policy(_)));
        policies.flat_map(|(signer, tokens)| tokens.values().map(move |token| (signer, token)))
    }

    /// When the next signer has no valid token left.
    pub(super) fn next_expiry_ms(&self) -> Option<u64> {
        self.next_expiry_ms
    }

    /// Drops the tokens that have expired; returns who has none left.
    pub(super) fn expire(&mut self, now_ms: u64) -> Vec<Signer> {
        let mut gone = Vec::new();
        self.signers.retain(|signer, tokens| {
            tokens.retain(|_, token| token.expires_ms > now_ms);
            if tokens.is_empty() {
                gone.push(signer.clone());
            }
            !tokens.is_empty()
        });
        self.names.retain(|_, signer| !gone.contains(signer));
        self.note_expiry();
        gone
    }

    fn note_expiry(&mut self) {
        let last =
            |tokens: &HashMap<String, Token>| tokens.values().map(|token| token.expires_ms).max();
        self.next_expiry_ms = self.signers.values().filter_map(last).min();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    fn token(expires_ms: u64) -> Token {
        Token {
            text: expires_ms.to_string(),
            expires_ms,
        }
    }

    fn leaf(number: usize) -> Signer {
        Signer::Identity(Identity::parse(&format!("leaf{number}")).unwrap())
    }

    #[test]
    fn the_newest_token_of_an_identity_counts_and_names_are_bounded() {
        let mut tokens = Tokens::default();
        for name in 0..TOKENS_MAX {
            let name = name.to_string();
            tokens.put(&name, leaf(1), token(7)).unwrap();
        }
        assert_eq!(tokens.put("x", leaf(1), token(9)), Err(TooMany));
        tokens.put("0", leaf(1), token(9)).unwrap();
        assert!(tokens.of(&leaf(1)) == Some(&token(9)));
        assert!(tokens.of(&leaf(2)).is_none());
    }

    #[test]
    fn tokens_expire_with_their_signer() {
        let mut tokens = Tokens::default();
        let policy = || Signer::Policy("service".to_owned());
        tokens.put("a", leaf(1), token(5)).unwrap();
        tokens.put("b", policy(), token(3)).unwrap();
        tokens.put("c", policy(), token(8)).unwrap();
        assert_eq!(tokens.of_policies().count(), 2);
        assert_eq!(tokens.next_expiry_ms(), Some(5));
        assert_eq!(tokens.expire(4), []);
        assert_eq!(tokens.of_policies().count(), 1);
        assert_eq!(tokens.expire(5), [leaf(1)]);
        assert_eq!(tokens.next_expiry_ms(), Some(8));
        assert_eq!(tokens.expire(8), [policy()]);
        assert_eq!(tokens.next_expiry_ms(), None);
    }
}

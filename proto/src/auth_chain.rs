//! Auth chains: `leaf1;edge3;edge2`, target first, acting edge device last.
//!
//! A receiver uses the first and the last element only and takes the middle from its own tree
//! (spec/auth-hierarchy-http.md section 5).

use std::fmt;
use std::str::FromStr;

use crate::identity::{Identity, IdentityError};
use crate::limits::MAX_AUTH_CHAIN_ELEMENTS;

/// A chain with at least one element.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct AuthChain {
    target: Identity,
    /// Target included.
    elements: Vec<Identity>,
}

/// Why a text is no chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AuthChainError {
    /// Nothing but separators.
    #[error("the auth chain is empty")]
    Empty,
    /// More than [`MAX_AUTH_CHAIN_ELEMENTS`] elements.
    #[error("the auth chain has too many elements")]
    TooLong,
    /// An element is no identity.
    #[error("an element of the auth chain is not an identity: {0}")]
    Element(#[from] IdentityError),
}

impl AuthChain {
    /// A chain of these elements.
    ///
    /// # Errors
    /// When there are none or too many.
    pub fn new(elements: Vec<Identity>) -> Result<Self, AuthChainError> {
        if elements.len() > MAX_AUTH_CHAIN_ELEMENTS {
            return Err(AuthChainError::TooLong);
        }
        let target = elements.first().ok_or(AuthChainError::Empty)?.clone();
        Ok(Self { target, elements })
    }

    /// Reads ids joined by `;`; empty elements are ignored.
    ///
    /// # Errors
    /// When the text is no chain.
    pub fn parse(text: &str) -> Result<Self, AuthChainError> {
        let mut elements = Vec::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            if elements.len() == MAX_AUTH_CHAIN_ELEMENTS {
                return Err(AuthChainError::TooLong);
            }
            elements.push(Identity::parse(part)?);
        }
        Self::new(elements)
    }

    /// For whom.
    #[must_use]
    pub fn target(&self) -> &Identity {
        &self.target
    }

    /// Who acts: the last element. None for a chain of one, which means "on behalf of nobody".
    #[must_use]
    pub fn actor(&self) -> Option<&Identity> {
        if self.elements.len() < 2 {
            None
        } else {
            self.elements.last()
        }
    }

    /// All elements, target first.
    #[must_use]
    pub fn elements(&self) -> &[Identity] {
        &self.elements
    }
}

impl fmt::Display for AuthChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, element) in self.elements.iter().enumerate() {
            if index > 0 {
                f.write_str(";")?;
            }
            f.write_str(element.as_str())?;
        }
        Ok(())
    }
}

impl fmt::Debug for AuthChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for AuthChain {
    type Err = AuthChainError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn target_and_actor_are_the_ends() {
        let chain = AuthChain::parse("edge3/modA;edge3;edge2").unwrap();
        assert_eq!(chain.target().as_str(), "edge3/modA");
        assert_eq!(chain.actor().unwrap().as_str(), "edge2");
        assert_eq!(chain.to_string(), "edge3/modA;edge3;edge2");
        let one = AuthChain::parse(";leaf1;").unwrap();
        assert_eq!(one.target().as_str(), "leaf1");
        assert_eq!(one.actor(), None);
    }

    #[test]
    fn what_is_no_chain_is_refused() {
        assert_eq!(AuthChain::parse(";;"), Err(AuthChainError::Empty));
        assert_eq!(
            AuthChain::parse(&"a;".repeat(100)),
            Err(AuthChainError::TooLong)
        );
        assert!(matches!(
            AuthChain::parse("a b;c"),
            Err(AuthChainError::Element(_))
        ));
        let many = vec![Identity::parse("a").unwrap(); MAX_AUTH_CHAIN_ELEMENTS + 1];
        assert_eq!(AuthChain::new(many), Err(AuthChainError::TooLong));
        let full = AuthChain::parse(&"a;".repeat(MAX_AUTH_CHAIN_ELEMENTS)).unwrap();
        assert_eq!(full.elements().len(), MAX_AUTH_CHAIN_ELEMENTS);
    }

    #[test]
    fn elements_are_compared_whole() {
        let chain = AuthChain::parse("leaf10;edge10").unwrap();
        assert_ne!(chain.actor(), Some(&Identity::parse("edge1").unwrap()));
        assert_ne!(chain.target(), &Identity::parse("leaf1").unwrap());
        assert!(
            !chain
                .elements()
                .contains(&Identity::parse("edge1").unwrap())
        );
        assert!(
            chain
                .elements()
                .contains(&Identity::parse("edge10").unwrap())
        );
    }

    proptest! {
        #[test]
        fn a_chain_survives_its_text(ids in proptest::collection::vec("[a-z0-9]{1,8}(/[$a-zA-Z]{1,8})?", 1..16)) {
            let elements: Vec<_> = ids.iter().map(|id| Identity::parse(id).unwrap()).collect();
            let chain = AuthChain::new(elements.clone()).unwrap();
            let again = AuthChain::parse(&chain.to_string()).unwrap();
            prop_assert_eq!(again.elements(), &elements[..]);
        }
    }
}

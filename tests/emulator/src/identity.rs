//! Identities and auth chains as IoT Hub names them.

use std::fmt;

use crate::limits::{CHAIN_ELEMENTS_MAX, ID_CHARS_MAX};

/// The module through which an edge device speaks for its children.
pub(crate) const EDGE_HUB: &str = "$edgeHub";

/// The module that runs an edge device's deployment.
pub(crate) const EDGE_AGENT: &str = "$edgeAgent";

/// Why a text is no identity or chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    #[error(
        "an id is empty, longer than {ID_CHARS_MAX}, a dot segment, or has characters that IoT Hub \
         does not allow"
    )]
    Id,
    #[error("an identity is neither `device` nor `device/module`")]
    Identity,
    #[error("an auth chain has an empty element or more than {CHAIN_ELEMENTS_MAX} of them")]
    Chain,
}

/// Whether `id` is a device or module id: spec/upstream.md B6, without the dot segments `.` and
/// `..`, which would change the meaning of a path.
pub(crate) fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-.%_*?!(),:=@$'".contains(&byte);
    (1..=ID_CHARS_MAX).contains(&id.len()) && id != "." && id != ".." && id.bytes().all(allowed)
}

/// A device, or a module of a device.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Identity {
    pub(crate) device: String,
    pub(crate) module: Option<String>,
}

impl Identity {
    pub(crate) fn new(device: &str, module: Option<&str>) -> Result<Self, NameError> {
        if !is_id(device) || !module.is_none_or(is_id) {
            return Err(NameError::Id);
        }
        Ok(Self {
            device: device.to_owned(),
            module: module.map(str::to_owned),
        })
    }

    /// Reads `device` or `device/module`.
    pub(crate) fn parse(text: &str) -> Result<Self, NameError> {
        match text.split_once('/') {
            None => Self::new(text, None),
            Some((_, module)) if module.contains('/') => Err(NameError::Identity),
            Some((device, module)) => Self::new(device, Some(module)),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.device)?;
        self.module
            .as_ref()
            .map_or(Ok(()), |module| write!(f, "/{module}"))
    }
}

/// The way from a target (first) up to the edge device that acts for it (last).
///
/// Only the syntax is checked here: [`crate::authorize`] compares it with the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AuthChain {
    target: Identity,
    /// Everything above the target. The last one is the actor.
    above: Vec<Identity>,
}

impl AuthChain {
    pub(crate) fn parse(text: &str) -> Result<Self, NameError> {
        let elements = text.split(';');
        if elements.clone().count() > CHAIN_ELEMENTS_MAX || elements.clone().any(str::is_empty) {
            return Err(NameError::Chain);
        }
        let mut elements = elements.map(Identity::parse);
        let target = elements.next().ok_or(NameError::Chain)??;
        Ok(Self {
            target,
            above: elements.collect::<Result<_, _>>()?,
        })
    }

    pub(crate) fn target(&self) -> &Identity {
        &self.target
    }

    /// The acting edge device; none when the chain has one element and so speaks for itself.
    pub(crate) fn actor(&self) -> Option<&Identity> {
        self.above.last()
    }

    /// Target first.
    pub(crate) fn elements(&self) -> impl Iterator<Item = &Identity> {
        std::iter::once(&self.target).chain(&self.above)
    }
}

impl fmt::Display for AuthChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.target.fmt(f)?;
        self.above
            .iter()
            .try_for_each(|element| write!(f, ";{element}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_keep_to_the_character_set() {
        for good in ["leaf1", "$edgeHub", "a-b.c%d_e*f?g!h(i),j:k=l@m$n'o", "..."] {
            assert!(is_id(good), "{good}");
        }
        let long = "a".repeat(ID_CHARS_MAX + 1);
        for bad in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "a;b",
            "a+b",
            "a#b",
            "\u{e9}",
            long.as_str(),
        ] {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn chains_are_read_target_first() {
        let chain = AuthChain::parse("L3/modA;L3;L4;L5").unwrap();
        assert_eq!(chain.target(), &Identity::new("L3", Some("modA")).unwrap());
        assert_eq!(chain.actor(), Some(&Identity::new("L5", None).unwrap()));
        assert_eq!(chain.to_string(), "L3/modA;L3;L4;L5");
        assert_eq!(AuthChain::parse("leaf1").unwrap().actor(), None);
    }

    #[test]
    fn odd_chains_are_refused() {
        let long = ["a"; CHAIN_ELEMENTS_MAX + 1].join(";");
        for bad in [
            "",
            ";",
            "a;",
            ";a",
            "a;;b",
            "a/b/c;a",
            "a/../b;a",
            "a/;a",
            long.as_str(),
        ] {
            assert!(AuthChain::parse(bad).is_err(), "{bad}");
        }
    }
}

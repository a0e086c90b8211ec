//! Who a client is: a device, or a module of a device.
//!
//! An id that is none of IoT Hub's is refused at the edge, so that inside no id can contain a
//! topic separator, a wildcard or a chain separator (testing.md S8).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::limits::ID_LENGTH_MAX;

/// The module id of the hub itself.
pub const EDGE_HUB_MODULE: &str = "$edgeHub";

/// A device `leaf1` or a module `edge1/modA`. Case-sensitive; cheap to clone.
///
/// Source: spec/auth-hierarchy-http.md 1.1; characters: spec/upstream.md B6.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    id: Arc<str>,
    /// Length of the device id; the module id begins one after it.
    device: u8,
}

/// Why a text is no identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// An id is empty.
    #[error("an id is empty")]
    Empty,
    /// An id is longer than [`ID_LENGTH_MAX`].
    #[error("an id is longer than 128 characters")]
    TooLong,
    /// A character that IoT Hub does not allow in ids.
    #[error("an id contains a character that is not allowed")]
    Character,
    /// More than two parts.
    #[error("an id has more than a device and a module part")]
    TooManyParts,
}

impl Identity {
    /// A device.
    ///
    /// # Errors
    /// When the text is no id.
    pub fn device(device_id: &str) -> Result<Self, IdentityError> {
        Ok(Self {
            device: check(device_id)?,
            id: device_id.into(),
        })
    }

    /// A module of a device.
    ///
    /// # Errors
    /// When one of the texts is no id.
    pub fn module(device_id: &str, module_id: &str) -> Result<Self, IdentityError> {
        let device = check(device_id)?;
        check(module_id)?;
        Ok(Self {
            device,
            id: format!("{device_id}/{module_id}").into(),
        })
    }

    /// `device` or `device/module`.
    ///
    /// # Errors
    /// When the text is neither.
    pub fn parse(id: &str) -> Result<Self, IdentityError> {
        let mut parts = id.split('/');
        let device = check(parts.next().unwrap_or(""))?;
        if let Some(module) = parts.next() {
            check(module)?;
        }
        if parts.next().is_some() {
            return Err(IdentityError::TooManyParts);
        }
        Ok(Self {
            device,
            id: id.into(),
        })
    }

    /// The hub of an edge device: `{device}/$edgeHub`.
    ///
    /// # Errors
    /// When the text is no id.
    pub fn edge_hub(device_id: &str) -> Result<Self, IdentityError> {
        Self::module(device_id, EDGE_HUB_MODULE)
    }

    /// The whole id, as used for keys, client ids and chains.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.id
    }

    /// The device's id.
    #[must_use]
    pub fn device_id(&self) -> &str {
        self.id.get(..usize::from(self.device)).unwrap_or_default()
    }

    /// The module's id, when it is a module.
    #[must_use]
    pub fn module_id(&self) -> Option<&str> {
        self.id.get(usize::from(self.device) + 1..)
    }

    /// Whether it is a module.
    #[must_use]
    pub fn is_module(&self) -> bool {
        self.id.len() > usize::from(self.device)
    }

    /// The device of a module; itself for a device.
    #[must_use]
    pub fn device_identity(&self) -> Self {
        if self.is_module() {
            Self {
                id: self.device_id().into(),
                device: self.device,
            }
        } else {
            self.clone()
        }
    }

    /// Whether it is some edge device's hub.
    #[must_use]
    pub fn is_edge_hub(&self) -> bool {
        self.module_id() == Some(EDGE_HUB_MODULE)
    }
}

fn check(id: &str) -> Result<u8, IdentityError> {
    if id.is_empty() {
        return Err(IdentityError::Empty);
    }
    if id.len() > ID_LENGTH_MAX {
        return Err(IdentityError::TooLong);
    }
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-.%_*?!(),:=@$'".contains(&c);
    if !id.bytes().all(allowed) {
        return Err(IdentityError::Character);
    }
    u8::try_from(id.len()).map_err(|_| IdentityError::TooLong)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        Self::parse(id)
    }
}

impl AsRef<str> for Identity {
    fn as_ref(&self) -> &str {
        &self.id
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_are_compared_whole() {
        let edge1 = Identity::parse("edge1/$edgeHub").unwrap();
        let edge10 = Identity::parse("edge10/$edgeHub").unwrap();
        assert_ne!(edge1, edge10);
        assert_ne!(edge1.device_identity(), edge10.device_identity());
        assert_eq!(edge1.device_id(), "edge1");
        assert!(edge1.is_edge_hub() && edge1.is_module());
        let device = Identity::parse("edge1").unwrap();
        assert_eq!(device.module_id(), None);
        assert_eq!(device, edge1.device_identity());
        assert_ne!(
            Identity::parse("Edge1").unwrap(),
            device,
            "ids are case-sensitive"
        );
    }

    #[test]
    fn what_could_be_more_than_an_id_is_refused() {
        for bad in [
            "", "/", "a/", "/m", "a/b/c", "a b", "a+", "#", "a;b", "ä", "a\0", "a\\b",
        ] {
            assert!(Identity::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(
            Identity::parse(&"x".repeat(129)),
            Err(IdentityError::TooLong)
        );
        assert!(Identity::parse(&"x".repeat(128)).is_ok());
        assert!(Identity::device("a/b").is_err());
    }

    proptest! {
        #[test]
        fn an_identity_is_its_text(
            device in "[A-Za-z0-9.%_*?!(),:=@$'-]{1,128}",
            module in proptest::option::of("[A-Za-z0-9.%_*?!(),:=@$'-]{1,128}"),
        ) {
            let identity = match &module {
                Some(module) => Identity::module(&device, module).unwrap(),
                None => Identity::device(&device).unwrap(),
            };
            prop_assert_eq!(identity.device_id(), device.as_str());
            prop_assert_eq!(identity.module_id(), module.as_deref());
            prop_assert_eq!(&Identity::parse(identity.as_str()).unwrap(), &identity);
        }
    }
}

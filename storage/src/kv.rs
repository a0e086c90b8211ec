//! Small values beside the queues: twins, sessions, scope, settings.

use crate::layout::Cf;

/// Where a value belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Column {
    /// Twins.
    Twins,
    /// MQTT sessions.
    Sessions,
    /// Identities of the device scope; always sealed.
    Scope,
    /// The hub's own notes. Apart from the store's own `meta`, so that no key can collide.
    Meta,
}

impl Column {
    /// Whether its values are sealed whatever the caller says: the scope holds keys.
    pub(crate) fn is_secret(self) -> bool {
        self == Self::Scope
    }

    pub(crate) fn cf(self) -> Cf {
        match self {
            Self::Twins => Cf::Twins,
            Self::Sessions => Cf::Sessions,
            Self::Scope => Cf::Scope,
            Self::Meta => Cf::Settings,
        }
    }
}

/// One change of a value.
#[derive(Clone)]
pub enum KvOp {
    /// Sets a value.
    Put {
        /// Where.
        column: Column,
        /// Its key.
        key: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
        /// Whether it is a secret: sealed before it is written. [`Column::Scope`] always is.
        sealed: bool,
    },
    /// Removes a value; nothing when there is none.
    Delete {
        /// Where.
        column: Column,
        /// Its key.
        key: Vec<u8>,
    },
}

impl std::fmt::Debug for KvOp {
    /// Without values: they may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put {
                column,
                key,
                value,
                sealed,
            } => f
                .debug_struct("Put")
                .field("column", column)
                .field("key", &String::from_utf8_lossy(key))
                .field("value_bytes", &value.len())
                .field("sealed", sealed)
                .finish(),
            Self::Delete { column, key } => f
                .debug_struct("Delete")
                .field("column", column)
                .field("key", &String::from_utf8_lossy(key))
                .finish(),
        }
    }
}

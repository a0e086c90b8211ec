//! What travels: identities, messages, topics, tokens, scope JSON and stored records.
//!
//! Pure data and pure functions: no I/O and no clock of its own (the [`clock`] is a trait that
//! is passed in). Everything here that reads bytes from a peer is fuzzed ([`fuzz`]).

#![deny(missing_docs)]

pub mod amqp_address;
pub mod auth_chain;
pub mod bag;
pub mod clock;
pub mod fuzz;
pub mod hub;
pub mod identity;
pub mod limits;
pub mod message;
pub mod sas;
pub mod scope;
pub mod stored;
pub mod timestamp;
pub mod topic;
pub mod username;

/// Records of the store, generated from `records/records.proto`.
///
/// Unknown fields survive because no record is ever written from one that was read: prost drops
/// what it does not know, so a message and a queue entry are written once and later only moved
/// as bytes or deleted, while a checkpoint, a queue's name and an identity are written from the
/// program's own state. A store whose `meta` carries a newer format version is refused before
/// anything is written, so an older program cannot thin out a newer one's records either.
pub mod records {
    #![allow(missing_docs, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/edgehub.v1.rs"));

    impl std::fmt::Debug for StoredIdentity {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("StoredIdentity")
                .field("device_id", &self.device_id)
                .field("module_id", &self.module_id)
                .field("keys", &"***")
                .finish_non_exhaustive()
        }
    }

    impl std::fmt::Debug for StoredTwin {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("StoredTwin")
                .field("properties", &"***")
                .finish_non_exhaustive()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::records::StoredIdentity;

    #[test]
    fn a_stored_identity_does_not_show_its_keys() {
        let record = StoredIdentity {
            device_id: "leaf1".into(),
            primary_key: "c2VjcmV0".into(),
            ..StoredIdentity::default()
        };
        let text = format!("{record:?}");
        assert!(
            text.contains("leaf1") && !text.contains("c2VjcmV0"),
            "{text}"
        );
    }
}

//! Who may: identities, credentials and the hierarchy.
//!
//! This crate decides whether a client is who it says it is, and on whose behalf an edge device
//! may act. It opens no socket, stores nothing and reads no clock of its own: scope records come
//! from the bridge, the time from a [`Clock`](edgehub_proto::clock::Clock), and what the answer
//! looks like on the wire is the protocol heads' business.
//!
//! Read first [`scope_tree::ScopeTree`] (who is below whom) and [`authenticator::verify`] (the
//! rules); [`authenticator::Authenticator`] adds when upstream is asked and when the answer is a
//! definite no. [`scope_server`] decides which records a child hub is given.
//!
//! # Secrets
//! Keys and tokens never appear in `Debug` or `Display` of any type here, nor in a log line.
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md sections 1-7 and 11.3, with the corrections of its section 13;
//! design.md D6 and D12.
#![deny(missing_docs)]

pub mod authenticator;
pub mod limits;
pub mod sas_signer;
pub mod scope_cache;
pub mod scope_server;
pub mod scope_tree;
pub mod tls;

#[cfg(test)]
mod test_support;

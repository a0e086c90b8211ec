//! Who is connected: one live connection for each identity, over all protocols.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use edgehub_auth::authenticator::Claim;
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::telemetry::metrics;

/// The live connections of a hub.
#[derive(Debug)]
pub struct Registry {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    slots: HashMap<Identity, Slot>,
    generation: u64,
    takeovers: u64,
}

#[derive(Debug)]
struct Slot {
    generation: u64,
    close: CancellationToken,
    claim: Arc<Claim>,
}

/// The limit of `MaxConnectedClients` is reached (design.md D6).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0} clients are connected, which is MaxConnectedClients")]
pub struct RegistryFull(pub usize);

/// A live connection as seen from outside of it.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) claim: Arc<Claim>,
    pub(super) close: CancellationToken,
}

impl Registry {
    /// A registry for `limit` connections at once.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            state: Mutex::new(State::default()),
        })
    }

    /// Registers a connection that was authenticated. A live one of the same identity is told
    /// to close (spec/mqtt.md 2.7).
    ///
    /// # Errors
    /// When the limit is reached and the identity has no connection to take over.
    pub fn register(self: &Arc<Self>, claim: Claim) -> Result<Registration, RegistryFull> {
        let mut state = self.state.lock();
        if state.slots.len() >= self.limit && !state.slots.contains_key(&claim.identity) {
            return Err(RegistryFull(state.slots.len()));
        }
        state.generation += 1;
        let generation = state.generation;
        let identity = claim.identity.clone();
        let close = CancellationToken::new();
        let slot = Slot {
            generation,
            close: close.clone(),
            claim: Arc::new(claim),
        };
        if let Some(previous) = state.slots.insert(identity.clone(), slot) {
            previous.close.cancel();
            state.takeovers += 1;
            // A pair of clients that kick each other would fill the log.
            if state.takeovers.is_power_of_two() {
                tracing::warn!(
                    "A second connection of {identity} took over ({} take-overs so far)",
                    state.takeovers
                );
            }
        }
        metrics::connected_clients().set(count(&state));
        Ok(Registration {
            registry: Arc::clone(self),
            identity,
            generation,
            close,
        })
    }

    /// How many connections are live.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.lock().slots.len()
    }

    /// Whether nobody is connected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn live(&self) -> Vec<Live> {
        let state = self.state.lock();
        let live = |slot: &Slot| Live {
            claim: Arc::clone(&slot.claim),
            close: slot.close.clone(),
        };
        state.slots.values().map(live).collect()
    }

    fn unregister(&self, identity: &Identity, generation: u64) {
        let mut state = self.state.lock();
        if let Entry::Occupied(slot) = state.slots.entry(identity.clone())
            && slot.get().generation == generation
        {
            slot.remove();
        }
        metrics::connected_clients().set(count(&state));
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a gauge; exact up to 2^53 connections"
)]
fn count(state: &State) -> f64 {
    state.slots.len() as f64
}

/// The place of one connection. Dropping it gives the place up, unless a newer connection of
/// the same identity has it by then.
#[derive(Debug)]
pub struct Registration {
    registry: Arc<Registry>,
    identity: Identity,
    generation: u64,
    close: CancellationToken,
}

impl Registration {
    /// Fires when this connection must end: taken over or revoked.
    #[must_use]
    pub fn closed(&self) -> &CancellationToken {
        &self.close
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.unregister(&self.identity, self.generation);
    }
}

#[cfg(test)]
mod tests {
    use edgehub_auth::authenticator::Credential;

    use super::*;

    fn claim(id: &str) -> Claim {
        let identity = Identity::parse(id).unwrap();
        Claim {
            identity,
            chain: None,
            credential: Credential::None,
        }
    }

    #[test]
    fn the_newest_connection_of_an_identity_wins() {
        let registry = Registry::new(10);
        let old = registry.register(claim("d1")).unwrap();
        let new = registry.register(claim("d1")).unwrap();
        assert!(old.closed().is_cancelled());
        assert!(!new.closed().is_cancelled());
        assert_eq!(registry.len(), 1);
        drop(old);
        assert_eq!(
            registry.len(),
            1,
            "the end of the old one must not remove the new one"
        );
        drop(new);
        assert!(registry.is_empty());
    }

    #[test]
    fn the_limit_counts_live_connections_and_not_take_overs() {
        let registry = Registry::new(2);
        let first = registry.register(claim("d1")).unwrap();
        let _second = registry.register(claim("d2")).unwrap();
        assert_eq!(registry.register(claim("d3")).unwrap_err(), RegistryFull(2));
        let _again = registry.register(claim("d1")).unwrap();
        drop(first);
        assert_eq!(registry.register(claim("d3")).unwrap_err(), RegistryFull(2));
    }

    #[test]
    fn ids_that_begin_alike_are_different() {
        let registry = Registry::new(10);
        let one = registry.register(claim("edge1")).unwrap();
        let _ten = registry.register(claim("edge10")).unwrap();
        assert!(!one.closed().is_cancelled());
        assert_eq!(registry.len(), 2);
    }
}

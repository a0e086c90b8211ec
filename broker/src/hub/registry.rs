//! Who is connected: one live connection for each identity, over all protocols.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use edgehub_auth::authenticator::Claim;
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::outlet::{Features, OUTBOX_EVENTS_MAX, OfferError, Outlet, ToClient};
use super::services::TWIN_REQUESTS_MAX;
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
    outbox: mpsc::Sender<ToClient>,
    features: Features,
    announced: Arc<AtomicBool>,
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
    /// to close (spec/mqtt.md 2.7). The receiver is the new connection's outbox.
    ///
    /// # Errors
    /// When the limit is reached and the identity has no connection to take over.
    pub fn register(
        self: &Arc<Self>,
        claim: Claim,
        clean_session: bool,
    ) -> Result<(Registration, mpsc::Receiver<ToClient>), RegistryFull> {
        let mut state = self.state.lock();
        if state.slots.len() >= self.limit && !state.slots.contains_key(&claim.identity) {
            return Err(RegistryFull(state.slots.len()));
        }
        state.generation += 1;
        let generation = state.generation;
        let identity = claim.identity.clone();
        let close = CancellationToken::new();
        let (outbox, events) = mpsc::channel(OUTBOX_EVENTS_MAX);
        let announced = Arc::new(AtomicBool::new(false));
        let slot = Slot {
            announced: Arc::clone(&announced),
            generation,
            close: close.clone(),
            claim: Arc::new(claim),
            outbox,
            features: Features::default(),
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
        let registration = Registration {
            registry: Arc::clone(self),
            identity,
            generation,
            close,
            clean_session,
            announced,
            twin_requests: Arc::new(Semaphore::new(TWIN_REQUESTS_MAX)),
        };
        Ok((registration, events))
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

    /// Sets what a connection is subscribed to; nothing when it is not the live one any more.
    fn set_features(&self, identity: &Identity, generation: u64, features: Features) -> bool {
        let mut state = self.state.lock();
        match state.slots.get_mut(identity) {
            Some(slot) if slot.generation == generation => {
                slot.features = features;
                true
            }
            _ => false,
        }
    }

    /// Acts when the identity has no live connection, and while it cannot get one.
    pub(super) fn if_absent(&self, identity: &Identity, act: impl FnOnce()) {
        let state = self.state.lock();
        if !state.slots.contains_key(identity) {
            act();
        }
    }

    /// What is judged when the scope changes: a credential was renewed. Nothing when the connection
    /// is not the live one any more.
    fn renew(&self, generation: u64, claim: Claim) {
        let mut state = self.state.lock();
        if let Some(slot) = state.slots.get_mut(&claim.identity)
            && slot.generation == generation
        {
            slot.claim = Arc::new(claim);
        }
    }

    /// Whether the identity's live connection was announced to the services.
    pub(super) fn is_announced(&self, identity: &Identity) -> bool {
        let state = self.state.lock();
        let slot = state.slots.get(identity);
        slot.is_some_and(|slot| slot.announced.load(Ordering::Acquire))
    }

    fn is_live(&self, identity: &Identity, generation: u64) -> bool {
        let state = self.state.lock();
        state
            .slots
            .get(identity)
            .is_some_and(|slot| slot.generation == generation)
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

impl Outlet for Registry {
    fn offer(&self, to: &Identity, event: ToClient) -> Result<(), OfferError> {
        let state = self.state.lock();
        let slot = state.slots.get(to).ok_or(OfferError::NotConnected)?;
        let features = slot.features;
        let subscribed = match &event {
            // The answer to a request is offered whatever the filters are: the head knows whether
            // one matches its topic.
            ToClient::TwinResponse(_) => true,
            ToClient::Desired { .. } => features.desired,
            ToClient::Method { .. } => features.methods,
            ToClient::CloudToDevice(_) => features.cloud_to_device,
            ToClient::Inputs(_) => features.inputs,
        };
        if !subscribed {
            return Err(OfferError::NotSubscribed);
        }
        slot.outbox.try_send(event).map_err(|error| match error {
            TrySendError::Full(_) => OfferError::Full,
            // The connection's task has ended and gives its place up in a moment.
            TrySendError::Closed(_) => OfferError::NotConnected,
        })
    }

    fn features(&self, of: &Identity) -> Option<Features> {
        self.state.lock().slots.get(of).map(|slot| slot.features)
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
    clean_session: bool,
    announced: Arc<AtomicBool>,
    twin_requests: Arc<Semaphore>,
}

impl Registration {
    /// Whose connection it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether this is still the identity's live connection: no newer one took its place.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.registry.is_live(&self.identity, self.generation)
    }

    /// The client has presented a newer credential, which was found good.
    pub fn renew(&self, claim: Claim) {
        if claim.identity == self.identity {
            self.registry.renew(self.generation, claim);
        }
    }

    /// Whether its session is clean.
    #[must_use]
    pub fn clean_session(&self) -> bool {
        self.clean_session
    }

    /// Whether its session is clean, the first time that this is asked; then none.
    pub(super) fn announce(&self) -> Option<bool> {
        let first = !self.announced.swap(true, Ordering::AcqRel);
        first.then_some(self.clean_session)
    }

    /// Bounds the twin requests of this connection.
    pub(super) fn twin_requests(&self) -> &Arc<Semaphore> {
        &self.twin_requests
    }

    /// States what the connection is subscribed to; false when it is not the live one any more.
    pub(super) fn set_features(&self, features: Features) -> bool {
        self.registry
            .set_features(&self.identity, self.generation, features)
    }

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

    type Client = (Registration, mpsc::Receiver<ToClient>);

    fn register(registry: &Arc<Registry>, id: &str) -> Result<Client, RegistryFull> {
        registry.register(claim(id), false)
    }

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
        let (old, _) = register(&registry, "d1").unwrap();
        let (new, _) = register(&registry, "d1").unwrap();
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
        let (first, _) = register(&registry, "d1").unwrap();
        let _second = register(&registry, "d2").unwrap();
        assert_eq!(register(&registry, "d3").unwrap_err(), RegistryFull(2));
        let _again = register(&registry, "d1").unwrap();
        drop(first);
        assert_eq!(register(&registry, "d3").unwrap_err(), RegistryFull(2));
    }

    #[test]
    fn ids_that_begin_alike_are_different() {
        let registry = Registry::new(10);
        let (one, _) = register(&registry, "edge1").unwrap();
        let _ten = register(&registry, "edge10").unwrap();
        assert!(!one.closed().is_cancelled());
        assert_eq!(registry.len(), 2);
    }

    #[test]
    fn events_reach_the_live_connection_that_is_subscribed() {
        let registry = Registry::new(10);
        let desired = || ToClient::Desired {
            version: 2,
            patch: "{}".into(),
        };
        let offer = |event| registry.offer(&Identity::parse("d1").unwrap(), event);
        assert_eq!(offer(desired()), Err(OfferError::NotConnected));
        let (old, mut old_events) = register(&registry, "d1").unwrap();
        assert_eq!(offer(desired()), Err(OfferError::NotSubscribed));
        let features = Features {
            desired: true,
            ..Features::default()
        };
        assert!(old.set_features(features));
        assert_eq!(offer(desired()), Ok(()));
        assert!(old_events.try_recv().is_ok());

        // The newer connection has subscriptions of its own, and the older one's say is over.
        let (new, mut new_events) = register(&registry, "d1").unwrap();
        assert!(!old.is_live() && new.is_live());
        assert!(!old.set_features(features));
        assert_eq!(offer(desired()), Err(OfferError::NotSubscribed));
        assert!(new.set_features(features));
        for _ in 0..OUTBOX_EVENTS_MAX {
            assert_eq!(offer(desired()), Ok(()));
        }
        assert_eq!(offer(desired()), Err(OfferError::Full));
        assert!(old_events.try_recv().is_err() && new_events.try_recv().is_ok());
        drop(new);
        assert_eq!(offer(desired()), Err(OfferError::NotConnected));
    }
}

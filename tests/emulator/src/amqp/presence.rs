//! An identity that a connection serves, from its first link to its last.

use std::collections::VecDeque;
use std::sync::Arc;

use edgehub_amqp::connection::{LinkId, Received};

use crate::authorize::{Claim, Signer};
use crate::connections::Connection;
use crate::counters::Counter;
use crate::hub::Hub;
use crate::ledger::Batch;
use crate::sessions::{Outbox, Push, SessionError};

/// The most pushes that are taken out of the outbox before they can be sent.
const PUSHES_MAX: usize = 1_000;

/// An identity's place in the hub while a connection serves it. When it is dropped, the identity
/// is not connected any more.
pub(super) struct Presence<'a> {
    hub: &'a Hub,
    pub(super) claim: Claim,
    /// Whose token admitted it.
    pub(super) signer: Signer,
    /// Its entry among the connections.
    pub(super) member: Connection,
    pub(super) outbox: Arc<Outbox>,
    pub(super) links: Vec<LinkId>,
    pub(super) methods: VecDeque<Push>,
    pub(super) desired: VecDeque<Push>,
    /// Telemetry of this turn, and the deliveries that it came in.
    pub(super) batch: Batch,
    pub(super) received: Vec<Received>,
}

impl<'a> Presence<'a> {
    /// Takes the identity over from whoever had it.
    ///
    /// # Errors
    /// The connection is closed already.
    pub(super) fn open(
        hub: &'a Hub,
        claim: Claim,
        signer: Signer,
        member: Connection,
        outbox: Arc<Outbox>,
    ) -> Result<Self, SessionError> {
        hub.sessions
            .attach(&claim.identity, member.actor(), outbox.clone())?;
        hub.counters.add(&claim.identity, Counter::Connects);
        Ok(Self {
            hub,
            claim,
            signer,
            member,
            outbox,
            links: Vec::new(),
            methods: VecDeque::new(),
            desired: VecDeque::new(),
            batch: Batch::default(),
            received: Vec::new(),
        })
    }

    /// Sorts what is in the outbox by the link that it goes to. What is not taken yet still counts
    /// against the outbox's bound.
    pub(super) fn take_pushes(&mut self) {
        if self.methods.len().max(self.desired.len()) >= PUSHES_MAX {
            return;
        }
        for push in self.outbox.take() {
            match push {
                Push::Desired { .. } => self.desired.push_back(push),
                Push::Method { .. } => self.methods.push_back(push),
            }
        }
    }
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        let sessions = &self.hub.sessions;
        sessions.disconnect(&self.claim.identity, self.member.id());
    }
}

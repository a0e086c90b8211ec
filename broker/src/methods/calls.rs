//! Which calls wait, for what, and until when. No clock, no socket, no lock.
//!
//! A call is *parked* until its target takes it, then *sent* until its answer comes. What happens
//! to a call is the caller's handle `R` coming back with a [`MethodOutcome`]; that happens once.
//!
//! # Invariants
//! - Parked calls of one target are offered in the order in which they came.
//! - A call counts as sent only when its target's outbox has it, and only an answer of that target
//!   ends it.
//! - The number of calls and the bytes of parked payloads are bounded ([`super::limits`]).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use bytes::Bytes;
use edgehub_proto::identity::Identity;

use super::limits::{CALLS_MAX, CALLS_PER_CLIENT_MAX, PARKED_BYTES_MAX};
use super::request::{MethodOutcome, MethodRequest, RequestId};
use crate::hub::OfferError;

/// A call that is over.
pub(super) type Finished<R> = (R, MethodOutcome);

/// Calls that wait.
#[derive(Debug)]
pub(super) struct Calls<R> {
    calls: HashMap<RequestId, Call<R>>,
    clients: HashMap<Identity, Client>,
    parked_bytes: usize,
}

#[derive(Debug)]
struct Call<R> {
    target: Identity,
    /// Until it is sent.
    parked: Option<MethodRequest>,
    /// When waiting is over, for the client or for its answer.
    deadline: Instant,
    reply: R,
}

/// The calls of one target. Kept only while there are any.
#[derive(Debug, Default)]
struct Client {
    parked: VecDeque<RequestId>,
    sent: Vec<RequestId>,
}

/// What has become of a call whose time may be over.
#[derive(Debug)]
pub(super) enum Expiry<R> {
    /// It waits on.
    Later,
    /// It is over now.
    Over(Finished<R>),
    /// It was over before.
    Gone,
}

impl<R> Calls<R> {
    pub(super) fn new() -> Self {
        Self {
            calls: HashMap::new(),
            clients: HashMap::new(),
            parked_bytes: 0,
        }
    }

    /// How many calls wait.
    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    /// Takes a call, as the last one of its target. To be followed by [`Self::release`].
    pub(super) fn park(
        &mut self,
        id: RequestId,
        target: &Identity,
        request: MethodRequest,
        reply: R,
        now: Instant,
    ) -> Result<(), Finished<R>> {
        let bytes = request.payload.len();
        if self.calls.len() >= CALLS_MAX || self.parked_bytes + bytes > PARKED_BYTES_MAX {
            return Err((reply, MethodOutcome::Busy));
        }
        let client = self.clients.entry(target.clone()).or_default();
        if client.parked.len() + client.sent.len() >= CALLS_PER_CLIENT_MAX {
            return Err((reply, MethodOutcome::TooManyCalls(target.clone())));
        }
        client.parked.push_back(id);
        self.parked_bytes += bytes;
        let call = Call {
            target: target.clone(),
            deadline: now + request.connect_timeout,
            parked: Some(request),
            reply,
        };
        self.calls.insert(id, call);
        Ok(())
    }

    /// Offers the target its parked calls, in order, until it does not take one.
    pub(super) fn release(
        &mut self,
        target: &Identity,
        now: Instant,
        mut offer: impl FnMut(RequestId, &MethodRequest, &R) -> Result<(), OfferError>,
    ) -> Vec<Finished<R>> {
        let mut finished = Vec::new();
        let Some(client) = self.clients.get_mut(target) else {
            return finished;
        };
        while let Some(id) = client.parked.front().copied() {
            let Some(call) = self.calls.get_mut(&id) else {
                client.parked.pop_front();
                continue;
            };
            let Some(request) = call.parked.take() else {
                client.parked.pop_front();
                continue;
            };
            let taken = offer(id, &request, &call.reply);
            if let Err(OfferError::NotConnected | OfferError::NotSubscribed) = taken {
                call.parked = Some(request);
                break;
            }
            client.parked.pop_front();
            self.parked_bytes -= request.payload.len();
            if taken.is_ok() {
                call.deadline = now + request.response_timeout;
                client.sent.push(id);
            } else if let Some(call) = self.calls.remove(&id) {
                finished.push((call.reply, MethodOutcome::Busy));
            }
        }
        if client.parked.is_empty() && client.sent.is_empty() {
            self.clients.remove(target);
        }
        finished
    }

    /// Takes an answer. None when nobody waits for it from this client.
    pub(super) fn responded(
        &mut self,
        from: &Identity,
        id: RequestId,
        status: i32,
        payload: Bytes,
    ) -> Option<Finished<R>> {
        let call = self.calls.get(&id)?;
        if call.target != *from || call.parked.is_some() {
            return None;
        }
        let call = self.remove(id)?;
        Some((call.reply, MethodOutcome::Answered { status, payload }))
    }

    /// The client's connection is over: what was sent over it will not be answered. What is parked
    /// waits for the next one.
    pub(super) fn disconnected(&mut self, client: &Identity) -> Vec<Finished<R>> {
        let Some(state) = self.clients.get_mut(client) else {
            return Vec::new();
        };
        let sent = std::mem::take(&mut state.sent);
        if state.parked.is_empty() {
            self.clients.remove(client);
        }
        let over = |id: &RequestId| {
            let call = self.calls.remove(id)?;
            Some((call.reply, MethodOutcome::TimedOut(*id)))
        };
        sent.iter().filter_map(over).collect()
    }

    /// Ends a call if its time is over.
    pub(super) fn expire(&mut self, id: RequestId, now: Instant) -> Expiry<R> {
        let Some(call) = self.calls.get(&id) else {
            return Expiry::Gone;
        };
        if call.deadline > now {
            return Expiry::Later;
        }
        let outcome = if call.parked.is_some() {
            MethodOutcome::NotFound(call.target.clone())
        } else {
            MethodOutcome::TimedOut(id)
        };
        match self.remove(id) {
            Some(call) => Expiry::Over((call.reply, outcome)),
            None => Expiry::Gone,
        }
    }

    /// Nobody waits for this call any more.
    pub(super) fn forget(&mut self, id: RequestId) {
        self.remove(id);
    }

    fn remove(&mut self, id: RequestId) -> Option<Call<R>> {
        let call = self.calls.remove(&id)?;
        if let Entry::Occupied(mut client) = self.clients.entry(call.target.clone()) {
            let Client { parked, sent } = client.get_mut();
            match &call.parked {
                Some(request) => {
                    self.parked_bytes -= request.payload.len();
                    parked.retain(|parked| *parked != id);
                }
                None => sent.retain(|sent| *sent != id),
            }
            if parked.is_empty() && sent.is_empty() {
                client.remove();
            }
        }
        Some(call)
    }

    /// Checks what must hold at any time.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let parked = self.clients.values().map(|client| client.parked.len());
        let sent = self.clients.values().map(|client| client.sent.len());
        assert_eq!(
            parked.sum::<usize>() + sent.sum::<usize>(),
            self.calls.len()
        );
        assert!(
            self.clients
                .values()
                .all(|client| !client.parked.is_empty() || !client.sent.is_empty()),
            "a client without calls is kept"
        );
        let bytes = self.calls.values().filter_map(|call| call.parked.as_ref());
        let bytes: usize = bytes.map(|request| request.payload.len()).sum();
        assert_eq!(bytes, self.parked_bytes);
    }
}

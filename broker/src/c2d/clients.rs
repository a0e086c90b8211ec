//! What every client has and gets of its cloud-to-device messages. No clock, no socket, no lock.
//!
//! A message is *waiting* or *out* (with the client, not acknowledged). It leaves by being settled
//! or by its handle being dropped, which gives it back to upstream.
//!
//! # Invariants
//! - Messages go out in the order in which they came; what comes back goes out again first, with
//!   the same token.
//! - At most [`Config::window`] are out; [`Config::waiting_max`] and [`HELD_BYTES_MAX`] bound the
//!   rest.
//! - A message is completed only when the client has acknowledged it.
//! - A number names one message of a client and never another one: below may be a hub that takes a
//!   message under a known lock token for the same message (spec/core.md 7).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use edgehub_proto::hub::CloudToDeviceOutcome;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{Message, SystemProperty};
use edgehub_proto::timestamp::Timestamp;
use smallvec::{SmallVec, smallvec};

use super::limits::{COPIES_MAX, FULL_RETRY, GRACE, HELD_BYTES_MAX, WAITING_MAX, WINDOW_DEFAULT};
use crate::hub::{C2D_STREAM, Delivery, DeliveryToken, OfferError, Settlement};

/// What tells upstream about a message. Dropped instead, the message is not settled.
pub(super) trait SettleHandle {
    /// Nobody listens any more: upstream has taken the message back.
    fn is_dead(&self) -> bool;
    /// Tells what became of the message.
    fn settle(self, outcome: CloudToDeviceOutcome);
}

/// How clients are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Messages that a client may have unacknowledged; 1 is the strict mode.
    pub window: usize,
    /// Messages that wait behind the window.
    pub waiting_max: usize,
    /// How long messages are held for a client that went away.
    pub grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window: WINDOW_DEFAULT,
            waiting_max: WAITING_MAX,
            grace: GRACE,
        }
    }
}

/// The time, both kinds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    pub(super) unix_ms: u64,
}

/// Puts deliveries into a client's outbox.
pub(super) type Offer<'a> = &'a mut dyn FnMut(&Identity, Vec<Delivery>) -> Result<(), OfferError>;

/// A message as it arrived.
#[derive(Debug)]
pub(super) struct Arrival<H> {
    pub(super) message: Message,
    pub(super) redelivered: bool,
    pub(super) handle: H,
}

/// How many messages ended how, since it was asked last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) completed: u64,
    pub(super) expired: u64,
    pub(super) undeliverable: u64,
    /// The client does not want them.
    pub(super) rejected: u64,
    /// Given back to upstream, which delivers them again.
    pub(super) returned: u64,
    /// Settlements of what is not out.
    pub(super) ignored: u64,
}

/// All clients that have messages.
#[derive(Debug)]
pub(super) struct Clients<H> {
    config: Config,
    clients: HashMap<Identity, Client<H>>,
    /// Above all numbers of clients that were forgotten.
    first_number: u64,
    held_bytes: usize,
    tally: Tally,
    /// A timer was set since [`Self::deadline`] was asked.
    timer_set: bool,
}

#[derive(Debug)]
struct Client<H> {
    reach: Reach,
    /// Of the next message.
    next_number: u64,
    /// By number.
    entries: VecDeque<Entry<H>>,
    /// A message was refused: those behind it are too, until upstream begins anew.
    refusing: bool,
}

#[derive(Clone, Copy, Debug)]
enum Reach {
    /// It takes messages, as far as is known.
    Ready,
    /// Its outbox was full.
    Full { retry_at: Instant },
    /// It is not connected or not subscribed, and messages wait for it until then.
    Away { until: Instant },
    /// It did not subscribe in time. What is out may still be acknowledged.
    Silent,
}

#[derive(Debug)]
struct Entry<H> {
    number: u64,
    message: Arc<Message>,
    bytes: usize,
    redelivered: bool,
    out: bool,
    expires_at_ms: Option<u64>,
    /// One for each time that upstream delivered it.
    handles: SmallVec<[H; 1]>,
}

impl<H: SettleHandle> Entry<H> {
    fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }

    fn is_taken_back(&self) -> bool {
        self.handles.iter().all(H::is_dead)
    }

    fn settle(self, outcome: CloudToDeviceOutcome) {
        for handle in self.handles {
            handle.settle(outcome);
        }
    }

    fn is_same(&self, other: &Message) -> bool {
        use SystemProperty::{LockToken, MessageId, SequenceNumber};
        let equal = |property| {
            let value = self.message.system.get(property);
            value.is_some() && value == other.system.get(property)
        };
        // IoT Hub's lock token is another one each time, and the place in its queue stays; a parent
        // has perhaps lock tokens only. Its messages may all be without ids.
        let alike = |property| {
            let (ours, others) = (
                self.message.system.get(property),
                other.system.get(property),
            );
            ours == others
        };
        let same_place = alike(MessageId) && alike(SequenceNumber);
        same_place && (equal(LockToken) || equal(SequenceNumber))
    }
}

impl<H: SettleHandle> Clients<H> {
    /// Numbers begin at `first_number`: above those of earlier runs.
    pub(super) fn new(config: Config, first_number: u64) -> Self {
        Self {
            config,
            clients: HashMap::new(),
            first_number,
            held_bytes: 0,
            tally: Tally::default(),
            timer_set: false,
        }
    }

    /// Takes a message from upstream and sends it if the client can have it now.
    pub(super) fn arrived(
        &mut self,
        to: &Identity,
        arrival: Arrival<H>,
        now: Now,
        offer: Offer<'_>,
    ) {
        let client = self.clients.entry(to.clone()).or_insert_with(|| Client {
            // It is not known whether it is there: the offer will tell.
            reach: Reach::Ready,
            next_number: self.first_number,
            entries: VecDeque::new(),
            refusing: false,
        });
        retire(client, now, &mut self.held_bytes, &mut self.tally);
        let Arrival {
            message,
            redelivered,
            handle,
        } = arrival;
        if let Some(entry) = client.entries.iter_mut().find(|e| e.is_same(&message)) {
            // The client has it, or will have it: one acknowledgement settles all copies.
            entry.handles.retain(|handle| !handle.is_dead());
            if entry.handles.len() >= COPIES_MAX {
                entry.handles.remove(0);
            }
            entry.handles.push(handle);
            return;
        }
        let bytes = message.size();
        let waiting = client.entries.iter().filter(|entry| !entry.out).count();
        client.refusing &= !client.entries.is_empty();
        if client.refusing
            || waiting >= self.config.waiting_max
            || self.held_bytes + bytes > HELD_BYTES_MAX
        {
            client.refusing = true;
            self.tally.returned += 1;
            return;
        }
        if let Reach::Silent = client.reach {
            let until = now.instant + self.config.grace;
            client.reach = Reach::Away { until };
            self.timer_set = true;
        }
        let number = client.next_number;
        client.next_number += 1;
        self.held_bytes += bytes;
        client.entries.push_back(Entry {
            number,
            expires_at_ms: expiry(&message),
            message: Arc::new(message),
            bytes,
            redelivered,
            out: false,
            handles: smallvec![handle],
        });
        self.send(to, now, offer);
    }

    /// A new connection of the client, in place of an older one if there is one. Nothing is sent
    /// before [`Self::subscribed`].
    pub(super) fn connected(&mut self, client: &Identity, clean_session: bool, now: Now) {
        self.left(client, !clean_session, now);
    }

    /// The client's live connection is over; `kept`: its session goes on.
    pub(super) fn disconnected(&mut self, client: &Identity, kept: bool, now: Now) {
        self.left(client, kept, now);
    }

    fn left(&mut self, identity: &Identity, kept: bool, now: Now) {
        let Some(client) = self.clients.get_mut(identity) else {
            return;
        };
        for entry in &mut client.entries {
            entry.redelivered |= entry.out;
            entry.out = false;
        }
        client.reach = Reach::Away {
            until: now.instant + self.config.grace,
        };
        self.timer_set = true;
        if !kept {
            self.give_back(identity);
        }
    }

    /// The client is subscribed, perhaps as before.
    pub(super) fn subscribed(&mut self, client: &Identity, now: Now, offer: Offer<'_>) {
        if let Some(client) = self.clients.get_mut(client) {
            client.reach = Reach::Ready;
        }
        self.send(client, now, offer);
    }

    /// Upstream's session of the client begins anew: what it delivers is complete and in order.
    pub(super) fn established(&mut self, client: &Identity) {
        if let Some(client) = self.clients.get_mut(client) {
            client.refusing = false;
        }
    }

    /// The client, or its connection, has dealt with deliveries.
    pub(super) fn settled(
        &mut self,
        from: &Identity,
        settled: &[(DeliveryToken, Settlement)],
        now: Now,
        offer: Offer<'_>,
    ) {
        for (token, settlement) in settled {
            if token.stream == C2D_STREAM {
                self.settle(from, token.number, *settlement, now);
            }
        }
        if let Some(client) = self.clients.get_mut(from)
            && let Reach::Full { .. } = client.reach
        {
            client.reach = Reach::Ready;
        }
        self.send(from, now, offer);
    }

    fn settle(&mut self, from: &Identity, number: u64, settlement: Settlement, now: Now) {
        let client = self.clients.get_mut(from);
        let found = client.and_then(|client| {
            let index = client
                .entries
                .iter()
                .position(|entry| entry.number == number && entry.out)?;
            Some((client, index))
        });
        let Some((client, index)) = found else {
            self.tally.ignored += 1;
            return;
        };
        if settlement == Settlement::NotSubscribed {
            if let Some(entry) = client.entries.get_mut(index) {
                entry.out = false;
            }
            client.reach = Reach::Away {
                until: now.instant + self.config.grace,
            };
            self.timer_set = true;
            return;
        }
        let Some(entry) = client.entries.remove(index) else {
            return;
        };
        self.held_bytes -= entry.bytes;
        match settlement {
            Settlement::Done => {
                self.tally.completed += 1;
                entry.settle(CloudToDeviceOutcome::Completed);
            }
            // How often it comes again is the upstream's to say.
            Settlement::Released => {
                self.tally.returned += 1;
                entry.settle(CloudToDeviceOutcome::Abandoned);
            }
            Settlement::Rejected => {
                self.tally.rejected += 1;
                entry.settle(CloudToDeviceOutcome::Rejected);
            }
            Settlement::Undeliverable | Settlement::NotSubscribed => {
                self.tally.undeliverable += 1;
                tracing::warn!(
                    "Rejected a cloud-to-device message of {} bytes for {from}: it is too large \
                     for the device's protocol",
                    entry.bytes
                );
                entry.settle(CloudToDeviceOutcome::Rejected);
            }
        }
    }

    /// When [`Self::tick`] has something to do.
    pub(super) fn deadline(&mut self) -> Option<Instant> {
        self.timer_set = false;
        let deadlines = self
            .clients
            .values()
            .filter_map(|client| match client.reach {
                Reach::Ready | Reach::Silent => None,
                Reach::Full { retry_at: at } | Reach::Away { until: at } => Some(at),
            });
        deadlines.min()
    }

    /// Whether [`Self::deadline`] may have become earlier.
    pub(super) fn timer_set(&self) -> bool {
        self.timer_set
    }

    /// Gives back what is held for clients that stayed away, and tries full outboxes again.
    pub(super) fn tick(&mut self, now: Now, offer: Offer<'_>) {
        let due = |client: &Client<H>| match client.reach {
            Reach::Ready | Reach::Silent => false,
            Reach::Full { retry_at: at } | Reach::Away { until: at } => at <= now.instant,
        };
        let clients = self.clients.iter().filter(|(_, client)| due(client));
        let due: Vec<_> = clients
            .map(|(identity, client)| (identity.clone(), client.reach))
            .collect();
        for (identity, reach) in due {
            if let Reach::Away { .. } = reach {
                self.give_back(&identity);
            } else {
                self.subscribed(&identity, now, offer);
            }
        }
    }

    pub(super) fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    /// Drops what waits for a client: upstream delivers it again. A client that has nothing is
    /// forgotten; otherwise its numbers go on, because it may still acknowledge the last ones.
    fn give_back(&mut self, identity: &Identity) {
        let Some(client) = self.clients.get_mut(identity) else {
            return;
        };
        client.reach = Reach::Silent;
        client.entries.retain(|entry| {
            if !entry.out {
                self.held_bytes -= entry.bytes;
                self.tally.returned += 1;
            }
            entry.out
        });
        if client.entries.is_empty() {
            self.first_number = self.first_number.max(client.next_number);
            self.clients.remove(identity);
        }
    }

    /// Sends what the window has room for.
    fn send(&mut self, to: &Identity, now: Now, offer: Offer<'_>) {
        let Some(client) = self.clients.get_mut(to) else {
            return;
        };
        let Reach::Ready = client.reach else {
            return;
        };
        // Again right before the send: it may have waited long.
        retire(client, now, &mut self.held_bytes, &mut self.tally);
        let out = client.entries.iter().filter(|entry| entry.out).count();
        let room = self.config.window.saturating_sub(out);
        let waiting = |entry: &&mut Entry<H>| !entry.out;
        let delivery = |entry: &mut Entry<H>| Delivery {
            token: DeliveryToken {
                stream: C2D_STREAM,
                number: entry.number,
            },
            input: Arc::from(""),
            redelivered: entry.redelivered,
            sender: to.clone(),
            message: Arc::clone(&entry.message),
        };
        let next = client.entries.iter_mut().filter(waiting).take(room);
        let batch: Vec<_> = next.map(delivery).collect();
        if batch.is_empty() {
            return;
        }
        match offer(to, batch) {
            Ok(()) => {
                let next = client.entries.iter_mut().filter(waiting).take(room);
                next.for_each(|entry| entry.out = true);
            }
            Err(OfferError::Full) => {
                let retry_at = now.instant + FULL_RETRY;
                client.reach = Reach::Full { retry_at };
                self.timer_set = true;
            }
            Err(OfferError::NotConnected | OfferError::NotSubscribed) => {
                let until = now.instant + self.config.grace;
                client.reach = Reach::Away { until };
                self.timer_set = true;
            }
        }
    }

    /// Checks what must hold at any time.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let entries = self.clients.values().flat_map(|client| &client.entries);
        assert_eq!(
            entries.map(|entry| entry.bytes).sum::<usize>(),
            self.held_bytes
        );
        for client in self.clients.values() {
            let numbers: Vec<_> = client.entries.iter().map(|entry| entry.number).collect();
            assert!(numbers.is_sorted_by(|a, b| a < b));
            let out = client.entries.iter().filter(|entry| entry.out).count();
            assert!(out <= self.config.window);
            assert!(client.entries.len() <= self.config.window + self.config.waiting_max);
        }
    }
}

/// Lets go of waiting messages that upstream took back or whose time is over.
fn retire<H: SettleHandle>(
    client: &mut Client<H>,
    now: Now,
    held_bytes: &mut usize,
    tally: &mut Tally,
) {
    let over =
        |entry: &Entry<H>| !entry.out && (entry.is_taken_back() || entry.is_expired(now.unix_ms));
    if !client.entries.iter().any(over) {
        return;
    }
    for entry in std::mem::take(&mut client.entries) {
        if !over(&entry) {
            client.entries.push_back(entry);
            continue;
        }
        *held_bytes -= entry.bytes;
        if entry.is_taken_back() {
            tally.returned += 1;
        } else {
            tally.expired += 1;
            entry.settle(CloudToDeviceOutcome::Rejected);
        }
    }
}

/// When the message is worth nothing any more. .NET writes the year 1 for "never".
fn expiry(message: &Message) -> Option<u64> {
    let time = message.system.get(SystemProperty::ExpiryTime)?;
    let at = Timestamp::parse(time)?.unix_ms();
    (at > 0).then_some(at)
}

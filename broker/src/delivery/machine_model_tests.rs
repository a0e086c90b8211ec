//! The machine against a simulated store and a simulated client: random appends, connections,
//! subscriptions, settlements, crashes and time, each delivery judged by what was promised.

use std::collections::{BTreeMap, BTreeSet};

use edgehub_proto::message::Message;
use edgehub_proto::stored;
use edgehub_storage::{Entry, Outcome, QueueId, ReadBatch, Settled};
use proptest::prelude::*;
use proptest::sample::Index;

use super::limits::{DELIVERIES_MAX, SHARED_SLOT};
use super::machine::Machine;
use super::stream::Source;
use crate::hub::{DeliveryToken, OfferError, Settlement};
use crate::test_support::id;

/// Input, priority and slot of each queue.
const QUEUES: [(&str, u32, u16); 5] = [
    ("a", 0, 0),
    ("a", 9, SHARED_SLOT),
    ("b", 5, SHARED_SLOT),
    ("b", 7, 3),
    ("c", 5, 4),
];
const INPUTS: [&str; 3] = ["a", "b", "c"];
/// Entries that one read brings.
const READ: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    Append {
        queue: usize,
        count: usize,
        ttl_ms: Option<u64>,
    },
    Connect {
        clean: bool,
    },
    Disconnect,
    Subscribe {
        inputs: [bool; INPUTS.len()],
    },
    Settle(Index, Settlement),
    /// The client gives one back so often.
    GiveBack(Index, u8),
    /// Settles what is not out.
    Stray(u16, u64),
    Full(bool),
    Wait(u64),
    /// The store commits what was handed over.
    Commit,
    /// The store's own sweep settles what has expired.
    Sweep,
    Configure([bool; QUEUES.len()]),
    /// The process is killed: what was not committed is not settled.
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let append = (
        0..QUEUES.len(),
        1usize..5,
        proptest::option::weighted(0.3, 1u64..100),
    );
    let settlement = prop_oneof![
        9 => Just(Settlement::Done),
        1 => Just(Settlement::Undeliverable),
        1 => Just(Settlement::Rejected),
        // Often enough that some messages are given back too often.
        6 => Just(Settlement::Released),
    ];
    let inputs = proptest::array::uniform3(prop::bool::weighted(0.8));
    let queues = proptest::array::uniform5(prop::bool::weighted(0.8));
    let connect = prop::bool::weighted(0.2);
    prop_oneof![
        8 => append.prop_map(|(queue, count, ttl_ms)| Step::Append { queue, count, ttl_ms }),
        2 => connect.prop_map(|clean| Step::Connect { clean }),
        1 => Just(Step::Disconnect),
        4 => inputs.prop_map(|inputs| Step::Subscribe { inputs }),
        12 => (any::<Index>(), settlement).prop_map(|(out, how)| Step::Settle(out, how)),
        1 => (any::<Index>(), 1u8..12).prop_map(|(out, times)| Step::GiveBack(out, times)),
        1 => (0..=SHARED_SLOT, 0u64..40).prop_map(|(slot, number)| Step::Stray(slot, number)),
        1 => any::<bool>().prop_map(Step::Full),
        2 => (1u64..60).prop_map(Step::Wait),
        2 => Just(Step::Commit),
        1 => Just(Step::Sweep),
        1 => queues.prop_map(Step::Configure),
        1 => Just(Step::Crash),
    ]
}

#[derive(Debug, Default)]
struct Stored {
    expires_at_ms: Option<u64>,
    /// In the store's eyes.
    committed: Option<Outcome>,
    handed_over: Option<Outcome>,
    /// What the client said last that ends it.
    said: Option<Settlement>,
    /// It was out when a connection ended, and no session began anew since.
    sent: bool,
    /// The client gave it back so often, on this connection.
    releases: u8,
    /// Those of them that must be remembered: a queue that goes is forgotten with its counts, or
    /// not, when it comes again soon.
    releases_kept: u8,
}

#[derive(Debug, Default)]
struct SimQueue {
    entries: Vec<Stored>,
    /// Where it ended when the process began, if it did not begin with it.
    opened_end: u64,
    configured: bool,
}

impl SimQueue {
    fn is_pending(&self, offset: usize, now_ms: u64) -> bool {
        let entry = &self.entries[offset];
        let expired = entry.expires_at_ms.is_some_and(|at| at <= now_ms);
        entry.committed.is_none() && entry.handed_over.is_none() && entry.said.is_none() && !expired
    }
}

struct World {
    machine: Machine<usize>,
    window: usize,
    now_ms: u64,
    queues: Vec<SimQueue>,
    connected: bool,
    subscribed: [bool; INPUTS.len()],
    /// Inputs that were reported as not subscribed, and nothing since.
    paused: [bool; INPUTS.len()],
    /// The machine was told of subscriptions on this connection.
    open: bool,
    full: bool,
    /// With the client: token to queue and offset.
    out: BTreeMap<DeliveryToken, (usize, usize)>,
    /// The number that each unsettled entry was sent with in this process.
    numbers: BTreeMap<(usize, usize), u64>,
}

impl World {
    fn new(window: usize) -> Self {
        let queue = |_| SimQueue {
            configured: true,
            ..SimQueue::default()
        };
        let mut world = Self {
            machine: Machine::new(window),
            window,
            now_ms: 1_000,
            queues: (0..QUEUES.len()).map(queue).collect(),
            connected: false,
            subscribed: [false; INPUTS.len()],
            paused: [false; INPUTS.len()],
            open: false,
            full: false,
            out: BTreeMap::new(),
            numbers: BTreeMap::new(),
        };
        world.configure();
        world
    }

    fn configure(&mut self) {
        let queues = self.queues.iter().enumerate();
        let sources = queues
            .filter(|(_, queue)| queue.configured)
            .map(|(index, queue)| {
                let (input, priority, slot) = QUEUES[index];
                Source {
                    id: QueueId {
                        endpoint: format!("edge1/modA/{input}"),
                        priority,
                    },
                    input: input.into(),
                    slot,
                    opened_end: queue.opened_end,
                    queue: index,
                }
            });
        self.machine.configure(sources.collect());
        self.paused = [false; INPUTS.len()];
    }

    fn input(queue: usize) -> usize {
        INPUTS.iter().position(|i| *i == QUEUES[queue].0).unwrap()
    }

    fn share(&self) -> usize {
        let inputs: BTreeSet<usize> = (0..QUEUES.len())
            .filter(|queue| self.queues[*queue].configured)
            .map(Self::input)
            .collect();
        self.window - inputs.len().saturating_sub(1).min(self.window / 4)
    }

    fn out_of(&self, input: usize) -> usize {
        let of_input = |(queue, _): &&(usize, usize)| Self::input(*queue) == input;
        self.out.values().filter(of_input).count()
    }

    fn read(&self, queue: usize, from: u64) -> ReadBatch {
        let stored = &self.queues[queue].entries;
        let mut batch = ReadBatch {
            entries: Vec::new(),
            next: from,
        };
        while (batch.next as usize) < stored.len() && batch.entries.len() < READ {
            let offset = batch.next;
            let entry = &stored[offset as usize];
            if entry.committed.is_none() {
                let message = Message {
                    body: format!("{queue} {offset}").into(),
                    ..Message::default()
                };
                batch.entries.push(Entry {
                    offset,
                    sender: id(if offset.is_multiple_of(3) {
                        "leaf0"
                    } else {
                        "edge1/modB"
                    }),
                    message: stored::encode_message(&message),
                    enqueued_ms: 0,
                    expires_at_ms: entry.expires_at_ms,
                    shared: Some(offset),
                });
            }
            batch.next += 1;
        }
        batch
    }

    /// Does what the pump does in its turns, and what the head does with what it gets.
    fn drive(&mut self) {
        for turn in 0.. {
            assert!(turn < 1_000, "the pump never rests");
            if self.machine.wants_barrier() {
                self.hand_over();
                self.commit();
                self.machine.barrier();
            }
            for stream in self.machine.streams_mut() {
                stream.end = self.queues[stream.source.queue].entries.len() as u64;
            }
            while let Some((index, from)) = self.machine.next_read() {
                let queue = self.machine.streams_mut()[index].source.queue;
                let batch = self.read(queue, from);
                self.machine.filled(index, batch);
            }
            let batch = self.machine.batch(self.now_ms);
            if !batch.is_empty() {
                let taken = match (self.connected, self.full) {
                    (false, _) => Err(OfferError::NotConnected),
                    _ if self.subscribed == [false; INPUTS.len()] => Err(OfferError::NotSubscribed),
                    (true, true) => Err(OfferError::Full),
                    (true, false) => Ok(()),
                };
                match taken {
                    Ok(()) => {
                        self.machine.offered();
                        let refused = self.deliver(batch);
                        self.machine.settled(&refused);
                    }
                    Err(error) => {
                        self.open &= error == OfferError::Full;
                        self.machine.refused(error);
                    }
                }
            }
            self.machine.check();
            self.hand_over();
            if !self.machine.has_work() {
                break;
            }
        }
        self.is_idle_for_a_reason();
    }

    /// Judges deliveries; gives those that the head does not pass on.
    fn deliver(&mut self, batch: Vec<crate::hub::Delivery>) -> Vec<(DeliveryToken, Settlement)> {
        let mut refused = Vec::new();
        for delivery in batch {
            let text = std::str::from_utf8(&delivery.message.body).unwrap();
            let (queue, offset) = text.split_once(' ').unwrap();
            let (queue, offset): (usize, usize) = (queue.parse().unwrap(), offset.parse().unwrap());
            let (input, priority, slot) = QUEUES[queue];
            assert_eq!((&*delivery.input, delivery.token.stream), (input, slot));
            let sim = &self.queues[queue];
            assert!(sim.configured, "nothing new of a queue that is gone");
            assert!(sim.is_pending(offset, self.now_ms), "{text} is over");
            let is_out = |queue, offset| self.out.values().any(|out| *out == (queue, offset));
            assert!(!is_out(queue, offset), "{text} is out already");
            for lower in 0..offset {
                let waits = sim.is_pending(lower, self.now_ms) && !is_out(queue, lower);
                assert!(!waits, "{text} overtakes {lower}");
            }
            for better in (0..QUEUES.len()).filter(|q| QUEUES[*q].0 == input) {
                let sim = &self.queues[better];
                if QUEUES[better].1 < priority && sim.configured {
                    let mut offsets = 0..sim.entries.len();
                    let waits =
                        offsets.any(|o| sim.is_pending(o, self.now_ms) && !is_out(better, o));
                    assert!(!waits, "{text} goes before a better priority");
                }
            }
            if slot != SHARED_SLOT {
                assert_eq!(delivery.token.number, offset as u64);
            }
            let number = *self
                .numbers
                .entry((queue, offset))
                .or_insert(delivery.token.number);
            assert_eq!(number, delivery.token.number, "{text} has another token");
            let entry = &sim.entries[offset];
            assert!(
                entry.releases_kept < DELIVERIES_MAX,
                "{text} comes too often"
            );
            let may_be = (offset as u64) < sim.opened_end
                || entry.releases > 0
                || sim.entries[offset..].iter().any(|later| later.sent);
            assert!(
                !(entry.sent || entry.releases > 0) || delivery.redelivered,
                "{text} is not marked"
            );
            assert!(
                !delivery.redelivered || may_be,
                "{text} is marked for no reason"
            );
            let before = self.out.insert(delivery.token, (queue, offset));
            assert_eq!(before, None, "two are out with one token");
            if !self.subscribed[Self::input(queue)] {
                refused.push((delivery.token, Settlement::NotSubscribed));
            }
        }
        assert!(self.out.len() <= self.window);
        for (token, _) in &refused {
            let place = self.out.remove(token).unwrap();
            // The client has never seen the token.
            self.numbers.remove(&place);
            self.paused[Self::input(place.0)] = true;
        }
        refused
    }

    /// Work that could be done is done.
    fn is_idle_for_a_reason(&self) {
        if !self.connected || !self.open || self.full || self.out.len() >= self.window {
            return;
        }
        for (index, queue) in self.queues.iter().enumerate() {
            let input = Self::input(index);
            let has_room = self.out_of(input) < self.share();
            if !queue.configured || self.paused[input] || !has_room {
                continue;
            }
            for offset in 0..queue.entries.len() {
                let is_out = self.out.values().any(|out| *out == (index, offset));
                let waits = queue.is_pending(offset, self.now_ms) && !is_out;
                assert!(!waits, "{index} {offset} could go out");
            }
        }
    }

    fn hand_over(&mut self) {
        let mut handed_over = false;
        for stream in self.machine.streams_mut() {
            let queue = &mut self.queues[stream.source.queue];
            for Settled {
                offset,
                shared,
                outcome,
            } in std::mem::take(&mut stream.settled)
            {
                handed_over = true;
                assert_eq!(shared, Some(offset));
                let entry = &mut queue.entries[offset as usize];
                let expected = match (outcome, entry.said) {
                    (Outcome::Done, Some(Settlement::Done))
                    | (Outcome::Dropped, Some(Settlement::Undeliverable | Settlement::Rejected)) => {
                        true
                    }
                    (Outcome::Dropped, Some(Settlement::Released)) => {
                        entry.releases >= DELIVERIES_MAX
                    }
                    (Outcome::Expired, None) => {
                        entry.expires_at_ms.is_some_and(|at| at <= self.now_ms)
                    }
                    _ => false,
                };
                assert!(expected, "{outcome:?} of {entry:?}");
                entry.handed_over = Some(outcome);
            }
        }
        if handed_over {
            self.machine.handed_over();
        }
        self.machine.drain_ended().for_each(drop);
    }

    fn commit(&mut self) {
        for entry in self.queues.iter_mut().flat_map(|q| &mut q.entries) {
            entry.committed = entry.committed.or(entry.handed_over);
        }
    }

    /// What is out when a connection ends was perhaps received.
    fn end_connection(&mut self) {
        for (queue, offset) in std::mem::take(&mut self.out).into_values() {
            self.queues[queue].entries[offset].sent = true;
        }
        for entry in self.queues.iter_mut().flat_map(|q| &mut q.entries) {
            // The client had it, and its count begins anew unless it is over.
            entry.sent |= entry.releases > 0;
            if entry.said.is_none() {
                (entry.releases, entry.releases_kept) = (0, 0);
            }
        }
        // Of a queue that is gone only this connection knew the tokens.
        let queues = &self.queues;
        self.numbers
            .retain(|(queue, _), _| queues[*queue].configured);
        self.paused = [false; INPUTS.len()];
        self.subscribed = [false; INPUTS.len()];
        self.open = false;
    }

    /// The client says what became of a delivery that is out.
    fn settle(&mut self, token: DeliveryToken, settlement: Settlement) {
        let (queue, offset) = self.out.remove(&token).unwrap();
        self.machine.settled(&[(token, settlement)]);
        assert_eq!(self.machine.take_ignored(), 0);
        let streams = self.machine.streams_mut().iter();
        let mut settled = streams
            .filter(|stream| stream.source.queue == queue)
            .flat_map(|stream| &stream.settled);
        let is_over = settled.any(|settled| settled.offset == offset as u64);
        let is_configured = self.queues[queue].configured;
        let entry = &mut self.queues[queue].entries[offset];
        if settlement == Settlement::Released {
            entry.releases += 1;
            entry.releases_kept += 1;
            assert!(is_over || entry.releases_kept < DELIVERIES_MAX);
            if !is_configured {
                // All that was known of it may be forgotten with the queue.
                entry.sent = true;
                entry.releases_kept = 0;
                self.numbers.remove(&(queue, offset));
            }
        } else {
            assert!(is_over);
        }
        if is_over {
            entry.said = Some(settlement);
            self.numbers.remove(&(queue, offset));
        }
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Append {
                queue,
                count,
                ttl_ms,
            } => {
                for _ in 0..*count {
                    self.queues[*queue].entries.push(Stored {
                        expires_at_ms: ttl_ms.map(|ttl_ms| self.now_ms + ttl_ms),
                        ..Stored::default()
                    });
                }
            }
            Step::Connect { clean } => {
                self.end_connection();
                self.connected = true;
                if *clean {
                    self.queues.iter_mut().for_each(|queue| {
                        queue.opened_end = 0;
                        queue.entries.iter_mut().for_each(|e| e.sent = false);
                    });
                    self.numbers.clear();
                }
                self.machine.connected(*clean);
            }
            Step::Disconnect => {
                self.end_connection();
                self.connected = false;
                self.machine.disconnected();
            }
            Step::Subscribe { inputs } => {
                if self.connected {
                    self.subscribed = *inputs;
                    self.paused = [false; INPUTS.len()];
                    self.open = true;
                    self.machine.subscribed();
                }
            }
            Step::Settle(index, settlement) => {
                if !self.out.is_empty() {
                    let tokens: Vec<_> = self.out.keys().copied().collect();
                    self.settle(*index.get(&tokens), *settlement);
                }
            }
            Step::GiveBack(index, times) => {
                if self.out.is_empty() {
                    return;
                }
                let places: Vec<_> = self.out.values().copied().collect();
                let place = *index.get(&places);
                for _ in 0..*times {
                    let token = self.out.iter().find(|(_, out)| **out == place);
                    let Some((token, _)) = token else { return };
                    self.settle(*token, Settlement::Released);
                    self.drive();
                }
            }
            Step::Stray(stream, number) => {
                let token = DeliveryToken {
                    stream: *stream,
                    number: *number,
                };
                if !self.out.contains_key(&token) {
                    self.machine.settled(&[(token, Settlement::Done)]);
                    assert_eq!(self.machine.take_ignored(), 1);
                }
            }
            Step::Full(full) => {
                self.full = *full;
                self.machine.retry();
            }
            Step::Wait(ms) => self.now_ms += ms,
            Step::Commit => self.commit(),
            Step::Sweep => {
                let now_ms = self.now_ms;
                let entries = self.queues.iter_mut().flat_map(|q| &mut q.entries);
                for entry in entries.filter(|e| e.expires_at_ms.is_some_and(|at| at <= now_ms)) {
                    entry.committed.get_or_insert(Outcome::Expired);
                }
            }
            Step::Configure(configured) => {
                for (queue, configured) in self.queues.iter_mut().zip(configured) {
                    queue.configured = *configured;
                    for entry in queue.entries.iter_mut().filter(|_| !configured) {
                        entry.sent |= entry.releases > 0;
                        entry.releases_kept = 0;
                    }
                }
                let (queues, out) = (&self.queues, &self.out);
                self.numbers.retain(|place, _| {
                    queues[place.0].configured || out.values().any(|out| out == place)
                });
                self.configure();
            }
            Step::Crash => {
                self.end_connection();
                self.connected = false;
                self.numbers.clear();
                for queue in &mut self.queues {
                    for entry in &mut queue.entries {
                        entry.handed_over = entry.committed;
                        if entry.committed.is_none() {
                            entry.said = None;
                            (entry.releases, entry.releases_kept) = (0, 0);
                        }
                    }
                    queue.opened_end = queue.entries.len() as u64;
                }
                self.machine = Machine::new(self.window);
                self.configure();
            }
        }
    }

    fn run_and_drive(&mut self, step: &Step) {
        self.run(step);
        self.drive();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn every_delivery_is_as_promised_and_nothing_is_forgotten(
        window in 1usize..10,
        // Several things may happen before the pump has its turn.
        steps in proptest::collection::vec((step(), prop::bool::weighted(0.8)), 1..120),
    ) {
        let mut world = World::new(window);
        for (step, turn) in &steps {
            world.run(step);
            if *turn {
                world.drive();
            }
        }
        // In the end the client is there for all and takes everything.
        world.run_and_drive(&Step::Full(false));
        world.run_and_drive(&Step::Configure([true; QUEUES.len()]));
        world.run_and_drive(&Step::Connect { clean: false });
        world.run_and_drive(&Step::Subscribe { inputs: [true; INPUTS.len()] });
        while let Some(token) = world.out.keys().next().copied() {
            let (queue, offset) = world.out.remove(&token).unwrap();
            world.numbers.remove(&(queue, offset));
            world.queues[queue].entries[offset].said = Some(Settlement::Done);
            world.machine.settled(&[(token, Settlement::Done)]);
            world.drive();
        }
        world.commit();
        for queue in &world.queues {
            prop_assert!(queue.entries.iter().all(|entry| entry.committed.is_some()));
        }
    }
}

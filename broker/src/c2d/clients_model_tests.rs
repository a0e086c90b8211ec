//! Random arrivals, connections, acknowledgements and time against what was promised: order,
//! window, tokens, marks, and that every message ends once and for the right reason.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use edgehub_proto::hub::CloudToDeviceOutcome;
use proptest::prelude::*;
use proptest::sample::Index;

use super::clients::{Arrival, Config};
use super::clients_tests::{Fate, Wire, World, handle, message};
use crate::hub::{C2D_STREAM, DeliveryToken, OfferError, Settlement};
use crate::test_support::id;

#[derive(Clone, Debug)]
enum Step {
    Arrive,
    /// Upstream loses its session: all its open handles are dead.
    UpstreamLost,
    Connect {
        clean: bool,
    },
    Subscribe,
    Disconnect {
        kept: bool,
    },
    Settle(Index, Settlement),
    /// Settles what is not out.
    Stray(u64),
    /// The outbox is full from now on, or not.
    Full(bool),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let settlement = prop_oneof![
        8 => Just(Settlement::Done),
        1 => Just(Settlement::Undeliverable),
        1 => Just(Settlement::Rejected),
        1 => Just(Settlement::Released),
        1 => Just(Settlement::NotSubscribed),
    ];
    prop_oneof![
        8 => Just(Step::Arrive),
        1 => Just(Step::UpstreamLost),
        1 => prop::bool::weighted(0.2).prop_map(|clean| Step::Connect { clean }),
        4 => Just(Step::Subscribe),
        1 => prop::bool::weighted(0.8).prop_map(|kept| Step::Disconnect { kept }),
        8 => (any::<Index>(), settlement).prop_map(|(out, how)| Step::Settle(out, how)),
        1 => (0u64..100).prop_map(Step::Stray),
        1 => any::<bool>().prop_map(Step::Full),
        3 => (1u64..6).prop_map(Step::Wait),
    ]
}

/// What the world knows of a message that arrived.
#[derive(Debug)]
struct Sent {
    wire: Wire,
    /// The token it was delivered with.
    number: Option<u64>,
    /// It was out when a connection ended.
    marked: bool,
    /// How the client settled it.
    settled: Option<Settlement>,
}

struct Oracle {
    world: World,
    config: Config,
    messages: Vec<Sent>,
    /// Out on this connection: message, by token.
    out: BTreeMap<u64, usize>,
    full: bool,
    connected: bool,
}

impl Oracle {
    fn new(config: Config) -> Self {
        Self {
            world: World::new(config),
            config,
            messages: Vec::new(),
            out: BTreeMap::new(),
            full: false,
            connected: false,
        }
    }

    /// Takes what was delivered and judges it.
    fn deliveries(&mut self) {
        let mut last = None;
        for (_, delivery) in self.world.taken.take() {
            assert_eq!(delivery.token.stream, C2D_STREAM);
            let number = delivery.token.number;
            let text = std::str::from_utf8(&delivery.message.body).unwrap();
            let index: usize = text.parse().unwrap();
            let sent = &mut self.messages[index];
            assert_eq!(sent.wire.fate.get(), Fate::Open, "it is over");
            assert_eq!(sent.settled, None);
            assert_eq!(*sent.number.get_or_insert(number), number, "another token");
            assert_eq!(delivery.redelivered, sent.marked);
            assert!(
                self.out.insert(number, index).is_none(),
                "it is out already"
            );
            assert!(last < Some(index), "out of order");
            last = Some(index);
        }
        // Nothing that waits is older than anything that went out on this connection.
        if let Some(last) = last {
            for (older, sent) in self.messages[..last].iter().enumerate() {
                let is_out = self.out.values().any(|out| *out == older);
                let open = sent.wire.fate.get() == Fate::Open;
                assert!(is_out || !open, "message {older} was overtaken by {last}");
            }
        }
        assert!(self.out.len() <= self.config.window);
    }

    /// Nothing is over without a reason.
    fn fates(&self) {
        for sent in &self.messages {
            let outcome = match sent.wire.fate.get() {
                Fate::Settled(outcome) => Some(outcome),
                Fate::Open | Fate::Dropped => None,
            };
            let expected = sent.settled.map(|settled| match settled {
                Settlement::Done => CloudToDeviceOutcome::Completed,
                Settlement::Released => CloudToDeviceOutcome::Abandoned,
                Settlement::Undeliverable | Settlement::Rejected => CloudToDeviceOutcome::Rejected,
                Settlement::NotSubscribed => panic!("that settles nothing"),
            });
            assert_eq!(outcome, expected);
        }
    }

    fn answer(&mut self) {
        let answer = match (self.connected, self.full) {
            (false, _) => Err(OfferError::NotConnected),
            (true, true) => Err(OfferError::Full),
            (true, false) => Ok(()),
        };
        self.world.answers.insert(id("leaf1"), answer);
    }

    fn run(&mut self, step: &Step) {
        let leaf = id("leaf1");
        match *step {
            Step::Arrive => {
                let (handle, wire) = handle();
                let text = self.messages.len().to_string();
                self.messages.push(Sent {
                    wire,
                    number: None,
                    marked: false,
                    settled: None,
                });
                let arrival = Arrival {
                    message: message(&text),
                    redelivered: false,
                    handle,
                };
                self.world
                    .act(|clients, now, offer| clients.arrived(&leaf, arrival, now, offer));
            }
            Step::UpstreamLost => {
                for sent in &self.messages {
                    sent.wire.dead.set(true);
                }
                self.world.act(|clients, _, _| clients.established(&leaf));
            }
            Step::Connect { clean } => {
                self.end_connection();
                self.world
                    .act(|clients, now, _| clients.connected(&leaf, clean, now));
            }
            Step::Subscribe => {
                self.connected = true;
                self.answer();
                self.world
                    .act(|clients, now, offer| clients.subscribed(&leaf, now, offer));
            }
            Step::Disconnect { kept } => {
                self.end_connection();
                self.world
                    .act(|clients, now, _| clients.disconnected(&leaf, kept, now));
            }
            Step::Settle(index, settlement) => {
                if self.out.is_empty() {
                    return;
                }
                let tokens: Vec<u64> = self.out.keys().copied().collect();
                let number = *index.get(&tokens);
                let message = self.out.remove(&number).unwrap();
                if settlement == Settlement::NotSubscribed {
                    // A head that says so of one says so of all that follow.
                    let later = self.out.split_off(&number);
                    self.settle(number, settlement);
                    for number in later.into_keys() {
                        self.settle(number, settlement);
                    }
                } else {
                    self.messages[message].settled = Some(settlement);
                    self.settle(number, settlement);
                }
            }
            Step::Stray(number) => {
                if !self.out.contains_key(&number) {
                    let before = self.world.clients.take_tally();
                    self.settle(number, Settlement::Done);
                    let after = self.world.clients.take_tally();
                    assert_eq!(after.ignored, 1, "{before:?}");
                }
            }
            Step::Full(full) => {
                self.full = full;
                self.answer();
            }
            Step::Wait(secs) => {
                self.world.clock.advance(Duration::from_secs(secs));
                self.world.act(|clients, now, offer| {
                    while clients.deadline().is_some_and(|at| at <= now.instant) {
                        clients.tick(now, offer);
                        // A full outbox sets the timer again, later.
                    }
                });
            }
        }
        self.deliveries();
        self.fates();
    }

    fn settle(&mut self, number: u64, settlement: Settlement) {
        let token = DeliveryToken {
            stream: C2D_STREAM,
            number,
        };
        self.world.act(|clients, now, offer| {
            clients.settled(&id("leaf1"), &[(token, settlement)], now, offer);
        });
    }

    /// A connection ends, if there was one: what is out may have been received.
    fn end_connection(&mut self) {
        for message in std::mem::take(&mut self.out).into_values() {
            self.messages[message].marked = true;
        }
        self.connected = false;
        self.answer();
    }
}

proptest! {
    #[test]
    fn order_window_tokens_and_fates_are_as_promised(
        window in 1usize..6,
        waiting_max in 1usize..6,
        steps in proptest::collection::vec(step(), 1..150),
    ) {
        let config = Config { window, waiting_max, ..Config::default() };
        let mut oracle = Oracle::new(config);
        for step in &steps {
            oracle.run(step);
        }
        // In the end the client is there and takes everything that is still upstream's.
        oracle.full = false;
        oracle.run(&Step::Subscribe);
        let mut left: VecDeque<usize> = oracle.out.values().copied().collect();
        while let Some(message) = left.pop_front() {
            let number = oracle.messages[message].number.unwrap();
            oracle.out.remove(&number);
            oracle.messages[message].settled = Some(Settlement::Done);
            oracle.settle(number, Settlement::Done);
            oracle.deliveries();
            oracle.fates();
            left = oracle.out.values().copied().collect();
        }
        let open = oracle.messages.iter().filter(|sent| sent.wire.fate.get() == Fate::Open);
        prop_assert_eq!(open.count(), 0, "a message was forgotten");
    }
}

//! The calls against an oracle that is a plain list: random calls, subscriptions, answers, ends of
//! connections and time.

use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_proto::clock::{Clock as _, ManualClock};
use proptest::prelude::*;
use proptest::sample::Index;

use super::calls::{Calls, Expiry};
use super::limits::{CALLS_MAX, CALLS_PER_CLIENT_MAX, PARKED_BYTES_MAX};
use super::request::{MethodOutcome, MethodRequest, RequestId};
use crate::hub::OfferError;
use crate::test_support::id;

/// How a client takes an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Gone,
    NotSubscribed,
    Ready,
    Full,
}

impl Reach {
    fn offer(self) -> Result<(), OfferError> {
        match self {
            Self::Gone => Err(OfferError::NotConnected),
            Self::NotSubscribed => Err(OfferError::NotSubscribed),
            Self::Ready => Ok(()),
            Self::Full => Err(OfferError::Full),
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Call {
        client: usize,
        connect_s: u64,
        response_s: u64,
        bytes: usize,
    },
    /// The client changes, and the calls hear of it.
    Reach(usize, Reach),
    /// The client's connection ends.
    Disconnect(usize),
    /// A client answers some call, its own or not, waiting or not.
    Answer { from: usize, call: Index },
    /// A caller goes.
    Forget(Index),
    /// Time passes, and every timer that is due fires.
    Wait(u64),
}

const CLIENTS: [&str; 3] = ["leaf1", "edge1/modA", "edge1/modAB"];

fn step() -> impl Strategy<Value = Step> {
    let client = 0..CLIENTS.len();
    let reach = prop_oneof![
        1 => Just(Reach::Gone),
        1 => Just(Reach::NotSubscribed),
        4 => Just(Reach::Ready),
        1 => Just(Reach::Full),
    ];
    let call = (client.clone(), 0u64..20, 5u64..20, 0usize..100);
    prop_oneof![
        6 => call.prop_map(|(client, connect_s, response_s, bytes)| Step::Call {
            client, connect_s: connect_s / 2, response_s, bytes }),
        3 => (client.clone(), reach).prop_map(|(client, reach)| Step::Reach(client, reach)),
        1 => client.clone().prop_map(Step::Disconnect),
        4 => (client, any::<Index>()).prop_map(|(from, call)| Step::Answer { from, call }),
        1 => any::<Index>().prop_map(Step::Forget),
        2 => (1u64..8).prop_map(Step::Wait),
    ]
}

/// A call as the oracle sees it.
#[derive(Clone, Debug)]
struct Expected {
    id: RequestId,
    client: usize,
    deadline: Instant,
    response: Duration,
    sent: bool,
}

struct World {
    calls: Calls<u32>,
    clock: ManualClock,
    reach: [Reach; CLIENTS.len()],
    next: u32,
    /// Waiting calls, oldest first, by their handle.
    waiting: Vec<(u32, Expected)>,
    /// Ids of all calls ever made.
    made: Vec<RequestId>,
}

impl World {
    fn new() -> Self {
        Self {
            calls: Calls::new(),
            clock: ManualClock::new(0),
            reach: [Reach::Gone; CLIENTS.len()],
            next: 0,
            waiting: Vec::new(),
            made: Vec::new(),
        }
    }

    /// Lets the calls offer, and does the same by the oracle; gives what must be over.
    fn release(&mut self, client: usize) {
        let reach = self.reach[client];
        let now = self.clock.instant();
        let mut offered = Vec::new();
        let mut finished = self
            .calls
            .release(&id(CLIENTS[client]), now, |id, _, handle| {
                offered.push((*handle, id));
                reach.offer()
            });
        let parked = |(_, call): &&mut (u32, Expected)| call.client == client && !call.sent;
        let mut expected_offers = Vec::new();
        let mut expected = Vec::new();
        for (handle, call) in self.waiting.iter_mut().filter(parked) {
            expected_offers.push((*handle, call.id));
            match reach {
                Reach::Gone | Reach::NotSubscribed => break,
                Reach::Ready => {
                    call.sent = true;
                    call.deadline = now + call.response;
                }
                Reach::Full => expected.push((*handle, MethodOutcome::Busy)),
            }
        }
        assert_eq!(
            offered, expected_offers,
            "offers keep the order of the calls"
        );
        self.over(&mut finished, expected);
    }

    /// Compares what is over, in any order, and forgets it.
    fn over(
        &mut self,
        finished: &mut Vec<(u32, MethodOutcome)>,
        mut expected: Vec<(u32, MethodOutcome)>,
    ) {
        finished.sort_by_key(|(handle, _)| *handle);
        expected.sort_by_key(|(handle, _)| *handle);
        assert_eq!(*finished, expected);
        self.waiting
            .retain(|(handle, _)| expected.iter().all(|(over, _)| over != handle));
    }

    fn expire(&mut self, call: RequestId) {
        let now = self.clock.instant();
        let expected = self
            .waiting
            .iter()
            .find(|(_, waiting)| waiting.id == call)
            .cloned();
        match (self.calls.expire(call, now), expected) {
            (Expiry::Gone, None) => {}
            (Expiry::Later, Some((_, call))) => assert!(call.deadline > now),
            (Expiry::Over(finished), Some((handle, call))) => {
                assert!(call.deadline <= now);
                let outcome = if call.sent {
                    MethodOutcome::TimedOut(call.id)
                } else {
                    MethodOutcome::NotFound(id(CLIENTS[call.client]))
                };
                self.over(&mut vec![finished], vec![(handle, outcome)]);
            }
            (expiry, expected) => panic!("{expiry:?} instead of {expected:?}"),
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Call {
                client,
                connect_s,
                response_s,
                bytes,
            } => {
                self.next += 1;
                let handle = self.next;
                let call = RequestId::from_bits(u128::from(handle));
                let connect_timeout = Duration::from_secs(connect_s);
                let response_timeout = Duration::from_secs(response_s);
                let request = MethodRequest {
                    name: "m".into(),
                    payload: vec![0; bytes].into(),
                    response_timeout,
                    connect_timeout,
                };
                let now = self.clock.instant();
                let target = id(CLIENTS[client]);
                self.calls
                    .park(call, &target, request, handle, now)
                    .unwrap();
                self.made.push(call);
                let expected = Expected {
                    id: call,
                    client,
                    deadline: now + connect_timeout,
                    response: response_timeout,
                    sent: false,
                };
                self.waiting.push((handle, expected));
                self.release(client);
                self.expire(call);
            }
            Step::Reach(client, reach) => {
                self.reach[client] = reach;
                self.release(client);
            }
            Step::Disconnect(client) => {
                self.reach[client] = Reach::Gone;
                let mut finished = self.calls.disconnected(&id(CLIENTS[client]));
                let sent = self
                    .waiting
                    .iter()
                    .filter(|(_, call)| call.client == client && call.sent);
                let expected = sent
                    .map(|(handle, call)| (*handle, MethodOutcome::TimedOut(call.id)))
                    .collect();
                self.over(&mut finished, expected);
            }
            Step::Answer { from, call } => {
                if self.made.is_empty() {
                    return;
                }
                let call = *call.get(&self.made);
                let payload = Bytes::from_static(b"{}");
                let finished = self
                    .calls
                    .responded(&id(CLIENTS[from]), call, 7, payload.clone());
                let right = self.waiting.iter().find(|(_, waiting)| {
                    waiting.id == call && waiting.client == from && waiting.sent
                });
                let outcome = MethodOutcome::Answered { status: 7, payload };
                let expected = right.map(|(handle, _)| (*handle, outcome));
                self.over(
                    &mut finished.into_iter().collect(),
                    expected.into_iter().collect(),
                );
            }
            Step::Forget(call) => {
                if self.made.is_empty() {
                    return;
                }
                let call = *call.get(&self.made);
                self.calls.forget(call);
                self.waiting.retain(|(_, waiting)| waiting.id != call);
            }
            Step::Wait(secs) => {
                self.clock.advance(Duration::from_secs(secs));
                for call in self.made.clone() {
                    self.expire(call);
                }
            }
        }
        self.calls.check();
        assert_eq!(self.calls.len(), self.waiting.len());
    }
}

proptest! {
    #[test]
    fn every_call_ends_once_and_as_it_should(
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new();
        for step in &steps {
            world.run(step);
        }
    }
}

fn request(bytes: usize) -> MethodRequest {
    MethodRequest {
        name: "m".into(),
        payload: vec![0; bytes].into(),
        response_timeout: Duration::from_secs(30),
        connect_timeout: Duration::from_secs(30),
    }
}

#[test]
fn the_number_of_calls_is_bounded_for_each_client_and_in_all() {
    let now = ManualClock::new(0).instant();
    let mut calls = Calls::new();
    let mut number = 0;
    let mut park = |calls: &mut Calls<()>, target: &str, bytes| {
        number += 1;
        let parked = calls.park(
            RequestId::from_bits(number),
            &id(target),
            request(bytes),
            (),
            now,
        );
        parked.err().map(|((), outcome)| outcome)
    };
    for _ in 0..CALLS_PER_CLIENT_MAX {
        assert_eq!(park(&mut calls, "leaf0", 0), None);
    }
    let too_many = MethodOutcome::TooManyCalls(id("leaf0"));
    assert_eq!(park(&mut calls, "leaf0", 0), Some(too_many.clone()));
    // Those that wait for an answer count as well.
    assert!(
        calls
            .release(&id("leaf0"), now, |_, _, ()| Ok(()))
            .is_empty()
    );
    assert_eq!(park(&mut calls, "leaf0", 0), Some(too_many));
    let mut client = 0;
    while calls.len() < CALLS_MAX {
        client += 1;
        for _ in 0..CALLS_PER_CLIENT_MAX.min(CALLS_MAX - calls.len()) {
            assert_eq!(park(&mut calls, &format!("leaf{client}"), 0), None);
        }
    }
    assert_eq!(park(&mut calls, "other", 0), Some(MethodOutcome::Busy));
    assert_eq!(calls.disconnected(&id("leaf0")).len(), CALLS_PER_CLIENT_MAX);
    assert_eq!(park(&mut calls, "other", 0), None);
    calls.check();
}

#[test]
fn the_bytes_of_calls_that_wait_for_a_client_are_bounded() {
    let now = ManualClock::new(0).instant();
    let mut calls = Calls::new();
    let half = PARKED_BYTES_MAX / 2;
    let park = |calls: &mut Calls<()>, number, bytes| {
        let id = RequestId::from_bits(number);
        let parked = calls.park(id, &crate::test_support::id("d"), request(bytes), (), now);
        parked.err().map(|((), outcome)| outcome)
    };
    assert_eq!(park(&mut calls, 1, half), None);
    assert_eq!(park(&mut calls, 2, half), None);
    assert_eq!(park(&mut calls, 3, 1), Some(MethodOutcome::Busy));
    // What was sent does not wait here any more.
    assert!(calls.release(&id("d"), now, |_, _, ()| Ok(())).is_empty());
    assert_eq!(park(&mut calls, 4, half), None);
    calls.forget(RequestId::from_bits(4));
    assert_eq!(park(&mut calls, 5, PARKED_BYTES_MAX), None);
    calls.check();
}

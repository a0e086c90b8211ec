//! Single situations, in words. The fakes are used by the model test too.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use edgehub_proto::clock::{Clock as _, ManualClock};
use edgehub_proto::hub::CloudToDeviceOutcome;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::{Message, SystemProperty};

use super::clients::{Arrival, Clients, Config, Now, SettleHandle, Tally};
use super::limits::{FULL_RETRY, HELD_BYTES_MAX};
use crate::hub::{Delivery, DeliveryToken, OfferError, Settlement};
use crate::test_support::{NOW_S, id};

/// What upstream hears of one delivery of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Open,
    Settled(CloudToDeviceOutcome),
    /// Not settled: upstream will deliver it again.
    Dropped,
}

/// Upstream's end of a handle.
#[derive(Clone, Debug)]
pub(super) struct Wire {
    pub(super) fate: Rc<Cell<Fate>>,
    pub(super) dead: Rc<Cell<bool>>,
}

#[derive(Debug)]
pub(super) struct Handle(Wire);

impl SettleHandle for Handle {
    fn is_dead(&self) -> bool {
        self.0.dead.get()
    }

    fn settle(self, outcome: CloudToDeviceOutcome) {
        assert_eq!(self.0.fate.get(), Fate::Open);
        self.0.fate.set(Fate::Settled(outcome));
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.0.fate.get() == Fate::Open {
            self.0.fate.set(Fate::Dropped);
        }
    }
}

pub(super) fn handle() -> (Handle, Wire) {
    let wire = Wire {
        fate: Rc::new(Cell::new(Fate::Open)),
        dead: Rc::new(Cell::new(false)),
    };
    (Handle(wire.clone()), wire)
}

/// A message whose id is its text.
pub(super) fn message(text: &str) -> Message {
    let mut message = Message {
        body: text.to_owned().into(),
        ..Message::default()
    };
    message.system.set(SystemProperty::MessageId, text);
    message
}

/// Clients behind an outlet that can be told what to answer.
pub(super) struct World {
    pub(super) clients: Clients<Handle>,
    pub(super) clock: ManualClock,
    pub(super) answers: HashMap<Identity, Result<(), OfferError>>,
    pub(super) taken: RefCell<Vec<(Identity, Delivery)>>,
}

impl World {
    pub(super) fn new(config: Config) -> Self {
        Self {
            clients: Clients::new(config, 0),
            clock: ManualClock::new(NOW_S * 1000),
            answers: HashMap::new(),
            taken: RefCell::default(),
        }
    }

    /// Does something to the clients, and checks them.
    pub(super) fn act<R>(
        &mut self,
        act: impl FnOnce(
            &mut Clients<Handle>,
            Now,
            &mut dyn FnMut(&Identity, Vec<Delivery>) -> Result<(), OfferError>,
        ) -> R,
    ) -> R {
        let now = Now {
            instant: self.clock.instant(),
            unix_ms: self.clock.unix_ms(),
        };
        let (answers, taken) = (&self.answers, &self.taken);
        let mut offer = |to: &Identity, batch: Vec<Delivery>| {
            assert!(!batch.is_empty());
            let answer = answers.get(to).copied();
            answer.unwrap_or(Err(OfferError::NotConnected))?;
            let batch = batch.into_iter().map(|delivery| (to.clone(), delivery));
            taken.borrow_mut().extend(batch);
            Ok(())
        };
        let result = act(&mut self.clients, now, &mut offer);
        self.clients.check();
        result
    }

    fn answers(&mut self, client: &str, answer: Result<(), OfferError>) {
        self.answers.insert(id(client), answer);
    }

    fn arrive(&mut self, to: &str, message: Message) -> Wire {
        let (handle, wire) = handle();
        let arrival = Arrival {
            message,
            redelivered: false,
            handle,
        };
        self.act(|clients, now, offer| clients.arrived(&id(to), arrival, now, offer));
        wire
    }

    /// Numbers and texts of what was taken since it was asked last; `+` marks a redelivery.
    fn taken(&self) -> Vec<String> {
        let taken = self.taken.take();
        let show = |(_, delivery): (Identity, Delivery)| {
            let text = String::from_utf8(delivery.message.body.to_vec()).unwrap();
            let mark = if delivery.redelivered { "+" } else { "" };
            format!("{}{mark} {text}", delivery.token.number)
        };
        taken.into_iter().map(show).collect()
    }

    fn settle(&mut self, from: &str, number: u64, settlement: Settlement) {
        let token = DeliveryToken {
            stream: crate::hub::C2D_STREAM,
            number,
        };
        self.act(|clients, now, offer| {
            clients.settled(&id(from), &[(token, settlement)], now, offer);
        });
    }

    fn subscribe(&mut self, client: &str) {
        self.answers(client, Ok(()));
        self.act(|clients, now, offer| clients.subscribed(&id(client), now, offer));
    }

    fn leave(&mut self, client: &str, kept: bool) {
        self.answers(client, Err(OfferError::NotConnected));
        self.act(|clients, now, _| clients.disconnected(&id(client), kept, now));
    }

    fn wait(&mut self, duration: Duration) {
        self.clock.advance(duration);
        self.act(|clients, now, offer| {
            if clients.deadline().is_some_and(|at| at <= now.instant) {
                clients.tick(now, offer);
            }
        });
    }
}

fn fates(wires: &[Wire]) -> Vec<Fate> {
    wires.iter().map(|wire| wire.fate.get()).collect()
}

const COMPLETED: Fate = Fate::Settled(CloudToDeviceOutcome::Completed);
const REJECTED: Fate = Fate::Settled(CloudToDeviceOutcome::Rejected);
const ABANDONED: Fate = Fate::Settled(CloudToDeviceOutcome::Abandoned);

#[test]
fn the_window_holds_and_what_waits_follows_in_order() {
    let config = Config {
        window: 2,
        waiting_max: 2,
        ..Config::default()
    };
    let mut world = World::new(config);
    world.subscribe("leaf1");
    let wires: Vec<_> = ["a", "b", "c", "d", "e"]
        .map(|text| world.arrive("leaf1", message(text)))
        .into();
    assert_eq!(world.taken(), ["0 a", "1 b"]);
    assert_eq!(
        wires[4].fate.get(),
        Fate::Dropped,
        "the waiting room is full"
    );
    // Out of order is fine.
    world.settle("leaf1", 1, Settlement::Done);
    assert_eq!(world.taken(), ["2 c"]);
    // What follows the refused one would overtake it.
    let late = world.arrive("leaf1", message("f"));
    assert_eq!(late.fate.get(), Fate::Dropped);
    world.act(|clients, _, _| clients.established(&id("leaf1")));
    world.arrive("leaf1", message("e"));
    world.settle("leaf1", 0, Settlement::Done);
    world.settle("leaf1", 2, Settlement::Done);
    assert_eq!(world.taken(), ["3 d", "4 e"]);
    assert_eq!(fates(&wires)[..3], [COMPLETED; 3]);
    assert_eq!(fates(&wires)[3], Fate::Open);
}

/// When an abandoned one comes again, and how often, is the upstream's to say.
#[test]
fn what_is_released_is_abandoned_and_what_is_rejected_is_rejected() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    let wires = ["a", "b", "c"].map(|text| world.arrive("leaf1", message(text)));
    world.taken();
    world.settle("leaf1", 1, Settlement::Released);
    world.settle("leaf1", 2, Settlement::Rejected);
    world.settle("leaf1", 0, Settlement::Done);
    assert_eq!(fates(&wires), [COMPLETED, ABANDONED, REJECTED]);
    let tally = world.clients.take_tally();
    assert_eq!((tally.completed, tally.returned, tally.rejected), (1, 1, 1));
    let again = world.arrive("leaf1", message("b"));
    assert_eq!(world.taken(), ["3 b"]);
    world.settle("leaf1", 3, Settlement::Done);
    assert_eq!(again.fate.get(), COMPLETED);
}

#[test]
fn a_number_is_never_given_to_another_message() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    world.arrive("leaf1", message("a"));
    assert_eq!(world.taken(), ["0 a"]);
    // The client is forgotten with all that it had.
    world.leave("leaf1", false);
    world.subscribe("leaf1");
    world.arrive("leaf1", message("b"));
    assert_eq!(world.taken(), ["1 b"]);
}

#[test]
fn a_known_lock_token_of_another_message_is_no_reason_to_keep_it_back() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    let locked = |text: &str, sequence: Option<&str>| {
        let mut message = message(text);
        message.system.set(SystemProperty::LockToken, "l1");
        if let Some(sequence) = sequence {
            message.system.set(SystemProperty::SequenceNumber, sequence);
            message.system.set(SystemProperty::MessageId, "same");
        }
        message
    };
    world.arrive("leaf1", locked("a", None));
    world.arrive("leaf1", locked("b", None));
    world.arrive("leaf1", locked("a", None));
    world.arrive("leaf1", locked("c", Some("1")));
    world.arrive("leaf1", locked("d", Some("2")));
    assert_eq!(world.taken(), ["0 a", "1 b", "2 c", "3 d"]);
}

#[test]
fn a_token_renewal_gets_the_same_again_and_marked() {
    let mut world = World::new(Config {
        window: 2,
        ..Config::default()
    });
    world.subscribe("leaf1");
    let wires = ["a", "b", "c"].map(|text| world.arrive("leaf1", message(text)));
    assert_eq!(world.taken(), ["0 a", "1 b"]);
    world.leave("leaf1", true);
    world.wait(Duration::from_secs(9));
    world.act(|clients, now, _| clients.connected(&id("leaf1"), false, now));
    assert_eq!(world.taken(), [""; 0], "not before it is subscribed");
    world.subscribe("leaf1");
    assert_eq!(world.taken(), ["0+ a", "1+ b"]);
    for number in 0..3 {
        world.settle("leaf1", number, Settlement::Done);
    }
    assert_eq!(world.taken(), ["2 c"]);
    assert_eq!(fates(&wires), [COMPLETED; 3]);
    // An acknowledgement that comes twice is ignored.
    world.settle("leaf1", 2, Settlement::Done);
    let tally = world.clients.take_tally();
    assert_eq!((tally.completed, tally.ignored), (3, 1));
}

#[test]
fn who_stays_away_gives_everything_back() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    let wires = ["a", "b"].map(|text| world.arrive("leaf1", message(text)));
    world.leave("leaf1", true);
    let meanwhile = world.arrive("leaf1", message("c"));
    world.wait(Duration::from_millis(9_999));
    assert_eq!(fates(&wires), [Fate::Open; 2]);
    world.wait(Duration::from_millis(1));
    assert_eq!(fates(&wires), [Fate::Dropped; 2]);
    assert_eq!(meanwhile.fate.get(), Fate::Dropped);
    assert_eq!(world.clients.take_tally().returned, 3);
    // Nobody is there for the next one either; it is held as long.
    let next = world.arrive("leaf1", message("d"));
    world.wait(Duration::from_secs(9));
    assert_eq!(next.fate.get(), Fate::Open);
    world.subscribe("leaf1");
    assert_eq!(world.taken(), ["0 a", "1 b", "3 d"]);
}

#[test]
fn a_session_that_ends_or_begins_clean_gives_everything_back_at_once() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    let first = world.arrive("leaf1", message("a"));
    world.leave("leaf1", false);
    assert_eq!(first.fate.get(), Fate::Dropped);
    world.subscribe("leaf1");
    let second = world.arrive("leaf1", message("a"));
    world.leave("leaf1", true);
    assert_eq!(second.fate.get(), Fate::Open);
    world.act(|clients, now, _| clients.connected(&id("leaf1"), true, now));
    assert_eq!(second.fate.get(), Fate::Dropped);
}

#[test]
fn what_the_client_cannot_take_is_rejected_and_what_it_does_not_want_now_waits() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    let wires = ["a", "b", "c"].map(|text| world.arrive("leaf1", message(text)));
    world.settle("leaf1", 0, Settlement::Undeliverable);
    world.settle("leaf1", 1, Settlement::NotSubscribed);
    world.settle("leaf1", 2, Settlement::NotSubscribed);
    assert_eq!(fates(&wires), [REJECTED, Fate::Open, Fate::Open]);
    assert_eq!(world.taken(), ["0 a", "1 b", "2 c"]);
    world.subscribe("leaf1");
    assert_eq!(world.taken(), ["1 b", "2 c"], "it never had them");
    assert_eq!(world.clients.take_tally().undeliverable, 1);
}

#[test]
fn an_expired_message_is_rejected_whenever_that_is_found() {
    let expiring = |text: &str, at: &str| {
        let mut message = message(text);
        message.system.set(SystemProperty::ExpiryTime, at);
        message
    };
    let mut world = World::new(Config {
        window: 1,
        ..Config::default()
    });
    world.subscribe("leaf1");
    // NOW_S is 2026-08-21T08:13:20Z.
    let past = world.arrive("leaf1", expiring("past", "2026-08-21T08:13:20.0000000Z"));
    assert_eq!(past.fate.get(), REJECTED);
    let out = world.arrive("leaf1", expiring("out", "2026-08-21T08:13:21Z"));
    let waits = world.arrive("leaf1", expiring("waits", "2026-08-21T08:13:21"));
    let never = world.arrive("leaf1", expiring("never", "0001-01-01T00:00:00"));
    let odd = world.arrive("leaf1", expiring("odd", "soon"));
    world.wait(Duration::from_secs(1));
    // The client has it and may still acknowledge it.
    world.settle("leaf1", 1, Settlement::Done);
    world.settle("leaf1", 3, Settlement::Done);
    assert_eq!(world.taken(), ["1 out", "3 never", "4 odd"]);
    let fates = fates(&[out, waits, never, odd]);
    assert_eq!(fates, [COMPLETED, REJECTED, COMPLETED, Fate::Open]);
    let tally = world.clients.take_tally();
    assert_eq!((tally.expired, tally.completed), (2, 2));
}

#[test]
fn a_message_that_upstream_repeats_is_delivered_once_and_settled_for_all() {
    let numbered = |text: &str, number: &str, lock: &str| {
        let mut message = message(text);
        message.system.set(SystemProperty::SequenceNumber, number);
        message.system.set(SystemProperty::LockToken, lock);
        message
    };
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    let first = world.arrive("leaf1", numbered("a", "7", "x"));
    let again = world.arrive("leaf1", numbered("a", "7", "y"));
    let other = world.arrive("leaf1", numbered("b", "8", "z"));
    assert_eq!(world.taken(), ["0 a", "1 b"]);
    world.settle("leaf1", 0, Settlement::Done);
    assert_eq!(
        fates(&[first, again, other]),
        [COMPLETED, COMPLETED, Fate::Open]
    );
    // Once it is settled the same number is another delivery.
    world.arrive("leaf1", numbered("a", "7", "v"));
    assert_eq!(world.taken(), ["2 a"]);
}

#[test]
fn what_upstream_took_back_is_not_sent_any_more() {
    let mut world = World::new(Config {
        window: 1,
        ..Config::default()
    });
    world.subscribe("leaf1");
    let wires = ["a", "b", "c"].map(|text| world.arrive("leaf1", message(text)));
    wires.iter().for_each(|wire| wire.dead.set(true));
    let fresh = world.arrive("leaf1", message("b"));
    world.settle("leaf1", 0, Settlement::Done);
    assert_eq!(world.taken(), ["0 a", "3 b"]);
    assert_eq!(fresh.fate.get(), Fate::Open);
    assert_eq!(world.clients.take_tally().returned, 2);
}

#[test]
fn a_full_outbox_is_tried_again_after_a_while_or_a_settlement() {
    let mut world = World::new(Config::default());
    world.subscribe("leaf1");
    world.arrive("leaf1", message("a"));
    world.answers("leaf1", Err(OfferError::Full));
    world.arrive("leaf1", message("b"));
    world.answers("leaf1", Ok(()));
    world.arrive("leaf1", message("c"));
    assert_eq!(world.taken(), ["0 a"], "not with every arrival");
    world.wait(FULL_RETRY);
    assert_eq!(world.taken(), ["1 b", "2 c"]);
    world.answers("leaf1", Err(OfferError::Full));
    world.arrive("leaf1", message("d"));
    world.answers("leaf1", Ok(()));
    world.settle("leaf1", 0, Settlement::Done);
    assert_eq!(world.taken(), ["3 d"]);
}

#[test]
fn the_bytes_that_are_held_are_bounded_over_all_clients() {
    let mut world = World::new(Config::default());
    let large = || Message {
        body: vec![0; HELD_BYTES_MAX / 4].into(),
        ..Message::default()
    };
    let wires: Vec<_> = (0..5)
        .map(|n| world.arrive(&format!("leaf{n}"), large()))
        .collect();
    let [held @ .., refused] = &fates(&wires)[..] else {
        panic!()
    };
    assert_eq!(held, [Fate::Open; 4]);
    assert_eq!(*refused, Fate::Dropped);
    world.wait(Duration::from_secs(10));
    assert_eq!(fates(&wires), [Fate::Dropped; 5]);
    assert_eq!(world.arrive("leaf4", large()).fate.get(), Fate::Open);
    let expected = Tally {
        returned: 5,
        ..Tally::default()
    };
    assert_eq!(world.clients.take_tally(), expected);
}

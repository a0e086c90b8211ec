//! Whatever happens in between, in the end everybody has the same twin.
//!
//! The model is one identity: an upstream with a twin, a client that keeps its own copy of the
//! desired properties, and a hub that loses requests, answers, notices, writes and itself. When the
//! storm is over, the upstream's reported properties are all that was accepted, in order, and what
//! hub and client hold is what the upstream has.

use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::clock::{Clock, ManualClock};
use edgehub_proto::hub::UpstreamError;
use proptest::prelude::*;

use super::document::{Twin, body, version};
use super::json::{Object, Value};
use super::outcome::{Answer, Forward, Next, ReportOutcome};
use super::pace::Now;
use super::patch::{merge, without_nulls};
use super::sync::{Timing, TwinSync};
use super::test_support::{document, json, patch};
use crate::hub::OfferError;

const TIMING: Timing = Timing {
    fetch_period: Duration::from_secs(120),
    report_period: Duration::from_secs(5),
};

#[derive(Clone, Debug)]
enum Step {
    /// The client reports.
    Report(Object),
    /// It asks for its twin.
    Get,
    /// The hub does what is next, if it is due.
    Act,
    /// The upstream answers what is under way.
    Answer(Fate),
    /// The service changes the desired properties; the hub is told, or not.
    Desire {
        patch: Object,
        told: bool,
    },
    /// Notices that are under way arrive.
    Notices,
    /// The client's place: there and listening or not.
    Client(Result<(), OfferError>),
    /// The hub's session upstream stands anew; what was under way is lost.
    Session,
    /// The hub is killed; what was under way may have arrived.
    Kill {
        arrived: bool,
    },
    /// The next write fails.
    BadDisk,
    Wait(u64),
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answered,
    /// A fetch that was made when it was asked, not when it is answered.
    AnsweredLate,
    Lost,
    /// It arrived, but the answer is lost.
    AnswerLost,
    Busy,
}

fn step() -> impl Strategy<Value = Step> {
    let fate = prop_oneof![
        4 => Just(Fate::Answered),
        2 => Just(Fate::AnsweredLate),
        1 => Just(Fate::Lost),
        1 => Just(Fate::AnswerLost),
        1 => Just(Fate::Busy),
    ];
    let place = prop_oneof![
        2 => Just(Ok(())),
        1 => Just(Err(OfferError::NotConnected)),
        1 => Just(Err(OfferError::NotSubscribed)),
        1 => Just(Err(OfferError::Full)),
    ];
    prop_oneof![
        5 => patch().prop_map(Step::Report),
        2 => Just(Step::Get),
        6 => Just(Step::Act),
        5 => fate.prop_map(Step::Answer),
        3 => (patch(), any::<bool>()).prop_map(|(patch, told)| Step::Desire { patch, told }),
        3 => Just(Step::Notices),
        2 => place.prop_map(Step::Client),
        1 => Just(Step::Session),
        1 => any::<bool>().prop_map(|arrived| Step::Kill { arrived }),
        1 => Just(Step::BadDisk),
        2 => (0u64..200).prop_map(Step::Wait),
    ]
}

enum Request {
    /// What the upstream had when it was asked.
    Fetch(Bytes),
    Report(Bytes),
}

struct World {
    clock: ManualClock,
    // Upstream.
    desired: Object,
    reported: Object,
    // Hub.
    sync: TwinSync,
    /// What the store holds.
    stored: Option<Vec<u8>>,
    bad_disk: bool,
    request: Option<Request>,
    asking: usize,
    waiting: usize,
    notices: Vec<Bytes>,
    // Client.
    place: Result<(), OfferError>,
    known: Option<Object>,
    // Oracle.
    accepted: Object,
}

impl World {
    fn new(desired: Object, reported: Object) -> Self {
        let versioned = |mut properties: Object| {
            merge(&mut properties, &json(r#"{"$version":1}"#));
            properties
        };
        Self {
            clock: ManualClock::new(0),
            desired: versioned(desired),
            accepted: reported.clone(),
            reported: versioned(reported),
            sync: TwinSync::new(TIMING, false, false),
            stored: None,
            bad_disk: false,
            request: None,
            asking: 0,
            waiting: 0,
            notices: Vec::new(),
            place: Ok(()),
            known: None,
        }
    }

    fn twin(&self) -> Twin {
        let twin = self
            .stored
            .as_deref()
            .map(|record| Twin::decode(record).unwrap());
        twin.unwrap_or_default()
    }

    fn now(&self) -> Now {
        Now {
            instant: self.clock.instant(),
            online: true,
            jitter: 1.0,
        }
    }

    /// Stores a twin after the client may have been told something of it. When that fails, the
    /// store does not know what the client knows, and the client may keep what is deleted next.
    fn store_told(&mut self, twin: &Twin) {
        if !self.store(twin) {
            self.known = None;
        }
    }

    /// Stores a twin as the worker does; false when the disk is bad.
    fn store(&mut self, twin: &Twin) -> bool {
        let record = twin.encode();
        if record == self.stored {
            return true;
        }
        if std::mem::take(&mut self.bad_disk) {
            let now = self.now();
            self.sync.not_stored(now);
            return false;
        }
        self.stored = record;
        true
    }

    fn upstream_body(&self) -> Bytes {
        body(Some(&self.desired), &self.reported)
    }

    /// The upstream takes a patch of reported properties.
    fn arrive(&mut self, patch: &Bytes) {
        merge(&mut self.reported, &Object::parse(patch, 20).unwrap());
        count_up(&mut self.reported);
    }

    fn offer(&mut self, twin: &mut Twin, forward: Option<Forward>) {
        let Some(Forward {
            version: number,
            patch,
        }) = forward
        else {
            return;
        };
        if self.place.is_ok() {
            let patch = Object::parse(&patch, 20).unwrap();
            assert_eq!(version(&patch), Some(number), "SDKs read it from the patch");
            if let Some(known) = &mut self.known {
                merge(known, &patch);
            }
        }
        let (place, now) = (self.place, self.now());
        self.sync.forwarded(twin, place, now);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Report(patch) => self.report(&patch),
            Step::Get => {
                self.asking += 1;
                self.sync.ask();
            }
            Step::Act => self.act(),
            Step::Answer(fate) => self.answer(fate),
            Step::Desire { patch, told } => self.desire(patch, told),
            Step::Notices => {
                for notice in std::mem::take(&mut self.notices) {
                    let mut twin = self.twin();
                    let forward = self.sync.desired(&mut twin, notice);
                    self.offer(&mut twin, forward);
                    self.store_told(&twin);
                }
            }
            Step::Client(place) => {
                self.place = place;
                if place.is_ok() {
                    self.subscribed();
                }
            }
            Step::Session => self.session(),
            Step::Kill { arrived } => self.kill(arrived),
            Step::BadDisk => self.bad_disk = true,
            Step::Wait(seconds) => self.clock.advance(Duration::from_secs(seconds)),
        }
    }

    fn report(&mut self, patch: &Object) {
        let mut twin = self.twin();
        if self.sync.report(&mut twin, patch).is_ok() && self.store(&twin) {
            merge(&mut self.accepted, patch);
        }
    }

    fn subscribed(&mut self) {
        let mut twin = self.twin();
        let forward = self.sync.forward(&mut twin);
        self.offer(&mut twin, forward);
        self.store_told(&twin);
    }

    fn session(&mut self) {
        self.notices.clear();
        if self.request.is_some() {
            self.answer(Fate::Lost);
        }
        self.sync.established();
    }

    fn kill(&mut self, arrived: bool) {
        if let Some(Request::Report(patch)) = self.request.take()
            && arrived
        {
            self.arrive(&patch);
        }
        let unsynced = !self.twin().unsynced.is_empty();
        self.sync = TwinSync::new(TIMING, false, unsynced);
        self.sync.established();
        self.notices.clear();
        (self.asking, self.waiting) = (0, 0);
    }

    fn desire(&mut self, patch: Object, told: bool) {
        let patch = Value::Object(patch);
        // An array with nulls or an object with a version is nothing to test here.
        let mut notice = json("{}");
        notice.insert("s", patch);
        merge(&mut self.desired, &notice);
        count_up(&mut self.desired);
        let number = self.desired.get("$version").unwrap().clone();
        notice.insert("$version", number);
        if told {
            self.notices.push(notice.to_bytes());
        }
    }

    fn act(&mut self) {
        match self.sync.next(self.clock.instant()) {
            Next::Fetch { .. } => {
                self.sync.begin_fetch();
                self.waiting += std::mem::take(&mut self.asking);
                self.request = Some(Request::Fetch(self.upstream_body()));
            }
            Next::Report => {
                let patch = self.sync.begin_report(&self.twin());
                self.request = patch.map(Request::Report);
            }
            Next::Forward => self.subscribed(),
            Next::At(_) | Next::Idle => {}
        }
    }

    fn answer(&mut self, fate: Fate) {
        let lost = || UpstreamError::Unavailable("lost".to_owned());
        match self.request.take() {
            None => {}
            Some(Request::Fetch(then)) => {
                let result = match fate {
                    Fate::Answered => Ok(self.upstream_body()),
                    Fate::AnsweredLate => Ok(then),
                    Fate::Busy => Err(UpstreamError::Busy { status: 429 }),
                    Fate::Lost | Fate::AnswerLost => Err(lost()),
                };
                self.fetched(result);
            }
            Some(Request::Report(patch)) => {
                let result = match fate {
                    Fate::Answered | Fate::AnsweredLate => {
                        self.arrive(&patch);
                        Ok(version(&self.reported))
                    }
                    Fate::AnswerLost => {
                        self.arrive(&patch);
                        Err(lost())
                    }
                    Fate::Busy => Err(UpstreamError::Busy { status: 429 }),
                    Fate::Lost => Err(lost()),
                };
                let (mut twin, now) = (self.twin(), self.now());
                let outcome = self.sync.reported(&mut twin, result, now);
                if let ReportOutcome::Continue(patch) = outcome {
                    self.request = Some(Request::Report(patch));
                }
                self.store(&twin);
            }
        }
    }

    fn fetched(&mut self, result: Result<Bytes, UpstreamError>) {
        let (mut twin, now) = (self.twin(), self.now());
        let outcome = self.sync.fetched(&mut twin, result, now);
        if outcome.forward {
            let forward = self.sync.forward(&mut twin);
            self.offer(&mut twin, forward);
        }
        if let Answer::Twin(body) = outcome.answer
            && std::mem::take(&mut self.waiting) > 0
        {
            let mut body = Object::parse(&body, 20).unwrap();
            match body.remove("desired") {
                Some(Value::Object(desired)) => self.known = Some(desired),
                other => panic!("{other:?}"),
            }
            self.sync.answered(&mut twin);
        }
        self.waiting = 0;
        self.store_told(&twin);
    }

    /// The storm is over: everything is answered until nothing is left to do.
    fn settle(&mut self) {
        self.bad_disk = false;
        self.place = Ok(());
        self.session();
        self.subscribed();
        for _ in 0..200 {
            self.answer(Fate::Answered);
            match self.sync.next(self.clock.instant()) {
                Next::Idle if self.request.is_some() => {}
                Next::Idle => return,
                Next::At(at) => self.clock.advance(at - self.clock.instant()),
                _ => self.act(),
            }
        }
        panic!("it does not come to rest");
    }
}

fn count_up(properties: &mut Object) {
    let next = version(properties).unwrap() + 1;
    merge(properties, &json(&format!(r#"{{"$version":{next}}}"#)));
}

/// Without `$version`.
fn plain(properties: &Object) -> Object {
    let mut plain = without_nulls(properties);
    plain.remove("$version");
    plain
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn in_the_end_everybody_has_the_same_twin(
        desired in document(),
        reported in document(),
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let mut world = World::new(desired, reported);
        for step in steps {
            world.step(step);
        }
        world.settle();
        prop_assert_eq!(&plain(&world.reported), &world.accepted, "nothing accepted is lost");
        let twin = world.twin();
        prop_assert!(twin.unsynced.is_empty());
        prop_assert_eq!(plain(&twin.reported), plain(&world.reported));
        prop_assert_eq!(twin.desired.as_ref(), Some(&world.desired));
        prop_assert_eq!(&twin.missed, &None);
        if let Some(known) = &world.known {
            prop_assert_eq!(known, &world.desired, "the client is told of everything");
        }
    }
}

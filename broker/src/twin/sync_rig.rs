//! One identity whose events come by hand, for the tests of [`TwinSync`].

use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::clock::{Clock, ManualClock};
use edgehub_proto::hub::UpstreamError;

use super::document::{Twin, body};
use super::json::Object;
use super::outcome::{Answer, FetchOutcome, Forward, Next, ReportOutcome};
use super::pace::Now;
use super::sync::{Timing, TwinSync};
use super::test_support::json;
use crate::hub::OfferError;

pub(super) const FETCH_PERIOD: Duration = Duration::from_secs(120);
pub(super) const REPORT_PERIOD: Duration = Duration::from_secs(5);
pub(super) const TIMING: Timing = Timing {
    fetch_period: FETCH_PERIOD,
    report_period: REPORT_PERIOD,
};

pub(super) struct Rig {
    pub(super) sync: TwinSync,
    pub(super) twin: Twin,
    pub(super) clock: ManualClock,
    pub(super) online: bool,
}

pub(super) fn unavailable() -> UpstreamError {
    UpstreamError::Unavailable("a test".to_owned())
}

pub(super) fn twin(desired: &str, reported: &str) -> Bytes {
    body(Some(&json(desired)), &json(reported))
}

impl Rig {
    pub(super) fn new() -> Self {
        Self {
            sync: TwinSync::new(TIMING, false, false),
            twin: Twin::default(),
            clock: ManualClock::new(0),
            online: true,
        }
    }

    /// One whose twin was fetched.
    pub(super) fn fetched(desired: &str, reported: &str) -> Self {
        let mut rig = Self::new();
        rig.fetch(Ok(twin(desired, reported)));
        rig
    }

    pub(super) fn now(&self) -> Now {
        Now {
            instant: self.clock.instant(),
            online: self.online,
            jitter: 1.0,
        }
    }

    pub(super) fn next(&self) -> Next {
        self.sync.next(self.clock.instant())
    }

    /// How long nothing is to be done.
    pub(super) fn pause(&self) -> Duration {
        match self.next() {
            Next::At(at) => at - self.clock.instant(),
            next => panic!("{next:?}"),
        }
    }

    pub(super) fn report(&mut self, patch: &str) {
        self.sync.report(&mut self.twin, &json(patch)).unwrap();
    }

    pub(super) fn send(&mut self) -> String {
        assert_eq!(self.next(), Next::Report);
        let patch = self.sync.begin_report(&self.twin).unwrap();
        String::from_utf8(patch.to_vec()).unwrap()
    }

    pub(super) fn sent(&mut self, result: Result<Option<u64>, UpstreamError>) -> ReportOutcome {
        let now = self.now();
        self.sync.reported(&mut self.twin, result, now)
    }

    pub(super) fn answer(&mut self, result: Result<Bytes, UpstreamError>) -> FetchOutcome {
        let now = self.now();
        self.sync.fetched(&mut self.twin, result, now)
    }

    pub(super) fn fetch(&mut self, result: Result<Bytes, UpstreamError>) -> FetchOutcome {
        self.sync.begin_fetch();
        self.answer(result)
    }

    /// A client's GET from its beginning to its end.
    pub(super) fn get(&mut self, result: Result<Bytes, UpstreamError>) -> Answer {
        self.sync.ask();
        assert_eq!(self.next(), Next::Fetch { for_client: true });
        let outcome = self.fetch(result);
        assert!(!outcome.forward, "who asks is told by the answer");
        self.sync.answered(&mut self.twin);
        outcome.answer
    }

    pub(super) fn desired(&mut self, patch: &str) -> Option<Forward> {
        let patch = Bytes::copy_from_slice(patch.as_bytes());
        self.sync.desired(&mut self.twin, patch)
    }

    pub(super) fn forwarded(&mut self, result: Result<(), OfferError>) {
        let now = self.now();
        self.sync.forwarded(&mut self.twin, result, now);
    }

    pub(super) fn forward(&mut self) -> Option<Forward> {
        self.sync.forward(&mut self.twin)
    }

    pub(super) fn stored_desired(&self) -> &Object {
        self.twin.desired.as_ref().unwrap()
    }
}

pub(super) fn forward(version: u64, patch: &str) -> Option<Forward> {
    let patch = Bytes::copy_from_slice(patch.as_bytes());
    Some(Forward { version, patch })
}

pub(super) fn answered(desired: &str, reported: &str) -> Answer {
    Answer::Twin(twin(desired, reported))
}

//! How one identity's twin is kept the same here, upstream and at its client: the decisions.
//!
//! Pure: what happens comes in with the time, what is to be done is returned. [`TwinSync`] is what
//! stays in memory between two events; the [`Twin`] is read from the store for each and written
//! back, so a restart loses a `TwinSync` and nothing else.
//!
//! # Invariants
//! - One request to the upstream at a time: what is fetched holds every confirmed report.
//! - A report leaves [`Twin::unsynced`] only when the upstream confirmed it or refused it for
//!   good. After a failure everything unconfirmed is sent again, which changes nothing where it
//!   had arrived (see [`super::patch`]).
//! - [`Twin::missed`] is there exactly while the client may be behind.
//!
//! Where this comes from: spec/core.md 5.2 to 5.5 and 10 item 16.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use edgehub_proto::hub::UpstreamError;

use super::TwinError;
use super::document::{self, Fetched, Twin};
use super::json::Object;
use super::limits::{DOCUMENT_BYTES_MAX, ERASED_BYTES_MAX, HELD_PATCHES_MAX, RETRY_MAX};
use super::outcome::{Answer, FetchOutcome, Forward, Next, ReportOutcome};
use super::pace::{Now, Pace};
use super::patch::{Unsynced, diff, merge};
use super::validate;
use crate::hub::OfferError;

/// Times of the synchronisation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Between two fetches without a cause of their own.
    pub(super) fetch_period: Duration,
    /// Between two patches to the upstream.
    pub(super) report_period: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Want {
    /// As soon as the period allows.
    Periodic,
    /// At once: changes are known to be missing here.
    Gap,
}

#[derive(Debug)]
enum Request {
    Fetch {
        /// Why, beside clients that wait for it.
        want: Option<Want>,
    },
    Report {
        /// What is still to be sent.
        rest: VecDeque<Bytes>,
        /// What was reported since the sending began; none when that is not known any more.
        since: Option<Unsynced>,
    },
}

/// The state of one identity between events.
#[derive(Debug)]
pub(super) struct TwinSync {
    timing: Timing,
    /// The hub's own twin has no client to forward to.
    own: bool,
    request: Option<Request>,
    /// Clients that wait for the next fetch.
    asked: bool,
    unsynced: bool,
    want: Option<Want>,
    /// The client subscribed to desired properties, and its upstream session may not have yet.
    subscribing: bool,
    fetched_at: Option<Instant>,
    held: VecDeque<Bytes>,
    fetching: Pace,
    reporting: Pace,
    forwarding: Pace,
}

impl TwinSync {
    /// A new one; `unsynced` when the store has reports for the upstream.
    pub(super) fn new(timing: Timing, own: bool, unsynced: bool) -> Self {
        Self {
            timing,
            own,
            request: None,
            asked: false,
            unsynced,
            want: None,
            subscribing: false,
            fetched_at: None,
            held: VecDeque::new(),
            fetching: Pace::default(),
            reporting: Pace::default(),
            forwarding: Pace::idle(),
        }
    }

    /// A client asks for the twin: it gets one that is fetched after this.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// The identity's upstream session stands: what was missed has to be fetched, what waits to
    /// be sent.
    ///
    /// After a client subscribed it is fetched at once, however lately it was: a change between its
    /// subscription and that of the session went nowhere.
    pub(super) fn established(&mut self) {
        let want = if std::mem::take(&mut self.subscribing) {
            Want::Gap
        } else {
            Want::Periodic
        };
        self.want = self.want.max(Some(want));
        self.online();
    }

    /// A client subscribed to desired properties.
    pub(super) fn subscribed(&mut self) {
        self.subscribing = true;
    }

    /// The upstream can be reached again.
    pub(super) fn online(&mut self) {
        self.fetching = Pace::default();
        self.reporting.forget_failures();
    }

    /// Whether a new `TwinSync` would do as well.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        let over = |at: Option<Instant>| at.is_none_or(|at| at <= now);
        let fetch_at = self.fetched_at.map(|at| at + self.timing.fetch_period);
        self.request.is_none()
            && !self.asked
            && self.want.is_none()
            && over(fetch_at)
            && over(self.reporting.not_before())
    }

    /// Whether it matters here that the upstream can be reached again.
    pub(super) fn waits_for_upstream(&self) -> bool {
        self.unsynced || self.want.is_some()
    }

    /// What is to be done now.
    pub(super) fn next(&self, now: Instant) -> Next {
        let forward = self.forwarding.due(now);
        if forward.is_some_and(|at| at <= now) {
            return Next::Forward;
        }
        if self.request.is_some() {
            return forward.map_or(Next::Idle, Next::At);
        }
        if self.asked {
            return Next::Fetch { for_client: true };
        }
        let report = self.unsynced.then(|| self.reporting.due(now)).flatten();
        if report.is_some_and(|at| at <= now) {
            return Next::Report;
        }
        let fetch = self.fetch_due(now);
        if fetch.is_some_and(|at| at <= now) {
            return Next::Fetch { for_client: false };
        }
        let earliest = [forward, report, fetch].into_iter().flatten().min();
        earliest.map_or(Next::Idle, Next::At)
    }

    fn fetch_due(&self, now: Instant) -> Option<Instant> {
        let allowed = match self.want? {
            Want::Gap => now,
            Want::Periodic => self
                .fetched_at
                .map_or(now, |at| at + self.timing.fetch_period),
        };
        self.fetching.due(now).map(|at| at.max(allowed))
    }

    /// Takes what the client reported: it counts here at once, and upstream when it can.
    pub(super) fn report(&mut self, twin: &mut Twin, patch: &Object) -> Result<(), TwinError> {
        let mut reported = twin.reported.clone();
        merge(&mut reported, patch);
        validate::reported_weight(&twin.reported, &reported)?;
        let mut unsynced = twin.unsynced.clone();
        unsynced.add(patch);
        if unsynced.erase().text_length() > ERASED_BYTES_MAX {
            return Err(TwinError::TooMuchUnsynced);
        }
        twin.reported = reported;
        twin.unsynced = unsynced;
        self.unsynced = true;
        if let Some(Request::Report {
            since: Some(since), ..
        }) = &mut self.request
        {
            since.add(patch);
        }
        Ok(())
    }

    /// Begins to send reports and returns the first patch; none when there is nothing to send.
    pub(super) fn begin_report(&mut self, twin: &Twin) -> Option<Bytes> {
        let mut rest: VecDeque<Bytes> = twin.unsynced.patches().into();
        let Some(first) = rest.pop_front() else {
            self.unsynced = false;
            return None;
        };
        self.request = Some(Request::Report {
            rest,
            since: Some(Unsynced::default()),
        });
        Some(first)
    }

    /// The upstream answered a patch of reports.
    pub(super) fn reported(
        &mut self,
        twin: &mut Twin,
        result: Result<Option<u64>, UpstreamError>,
        now: Now,
    ) -> ReportOutcome {
        let Some(Request::Report { mut rest, since }) = self.request.take() else {
            return ReportOutcome::Failed;
        };
        match result {
            Ok(version) => {
                if let Some(next) = rest.pop_front() {
                    self.request = Some(Request::Report { rest, since });
                    return ReportOutcome::Continue(next);
                }
                if let Some(version) = version {
                    twin.set_reported_version(version);
                }
                self.settled(twin, since, now);
                ReportOutcome::Confirmed
            }
            Err(UpstreamError::Refused { status }) if blames_request(status) => {
                self.settled(twin, since, now);
                // What is reported here is not what the upstream has any more.
                self.want = Some(Want::Gap);
                ReportOutcome::Dropped { status }
            }
            Err(error) => {
                self.reporting.failed(&error, now);
                ReportOutcome::Failed
            }
        }
    }

    /// What was sent is done with: what came since stays. If that is not known, everything stays
    /// and is sent once more.
    fn settled(&mut self, twin: &mut Twin, since: Option<Unsynced>, now: Now) {
        if let Some(since) = since {
            twin.unsynced = since;
        }
        self.reporting = Pace::until(now.instant + self.timing.report_period);
        self.unsynced = !twin.unsynced.is_empty();
    }

    /// Begins to fetch the twin.
    pub(super) fn begin_fetch(&mut self) {
        self.asked = false;
        self.request = Some(Request::Fetch {
            want: self.want.take(),
        });
    }

    /// The upstream answered a fetch.
    pub(super) fn fetched(
        &mut self,
        twin: &mut Twin,
        result: Result<Bytes, UpstreamError>,
        now: Now,
    ) -> FetchOutcome {
        let want = match self.request.take() {
            Some(Request::Fetch { want }) => want,
            _ => None,
        };
        let (answer, fresh) = match result.and_then(read) {
            Ok((body, fetched)) => {
                self.fetched_at = Some(now.instant);
                self.fetching = Pace::default();
                let complete = document::version(&fetched.reported).is_some();
                self.adopt(twin, fetched);
                // As it came, unless something has to be added.
                let as_it_came = complete && twin.unsynced.is_empty();
                (as_it_came.then_some(Answer::Twin(body)), true)
            }
            Err(error) => {
                self.fetching.failed(&error, now);
                if error.is_transient() {
                    self.want = self.want.max(want);
                }
                let answer = match error {
                    UpstreamError::Refused { status }
                    | UpstreamError::Busy {
                        status: status @ 429,
                    } => Some(Answer::Refused { status }),
                    _ => None,
                };
                (answer, false)
            }
        };
        let changed = self.release(twin, fresh);
        let answer = match answer {
            Some(Answer::Twin(body)) if !changed => Answer::Twin(body),
            Some(Answer::Refused { status }) => Answer::Refused { status },
            _ => Answer::Twin(twin.body()),
        };
        FetchOutcome {
            answer,
            forward: changed || (fresh && want.is_some()),
        }
    }

    /// Takes over what the upstream has. Lower versions, too: an identity that was made anew
    /// counts from 1.
    fn adopt(&self, twin: &mut Twin, fetched: Fetched) {
        twin.reported = fetched.reported;
        twin.unsynced.apply(&mut twin.reported);
        let old = twin.desired.replace(fetched.desired);
        if self.own {
            return;
        }
        if twin.missed.is_none() {
            twin.missed = old;
        }
        if twin.missed == twin.desired {
            twin.missed = None;
        }
    }

    /// Takes the patches that waited for a fetch; true when one of them changed the twin.
    fn release(&mut self, twin: &mut Twin, fresh: bool) -> bool {
        let mut changed = false;
        for patch in std::mem::take(&mut self.held) {
            let version = document::parse_object(&patch)
                .ok()
                .and_then(|patch| document::version(&patch));
            // What was just fetched has them in it.
            if fresh && version.is_some() && version <= twin.desired_version() {
                continue;
            }
            changed |= self.take_desired(twin, &patch).is_some();
        }
        changed
    }

    /// A change of the desired properties came from upstream; returns what the client is to be
    /// told of it.
    pub(super) fn desired(&mut self, twin: &mut Twin, patch: Bytes) -> Option<Forward> {
        if matches!(self.request, Some(Request::Fetch { .. })) && twin.desired.is_some() {
            self.hold(patch);
            return None;
        }
        let behind = twin.missed.is_some();
        let version = self.take_desired(twin, &patch)?;
        if self.own {
            return None;
        }
        if behind {
            return self.forward(twin);
        }
        Some(Forward { version, patch })
    }

    fn hold(&mut self, patch: Bytes) {
        let bytes: usize = self.held.iter().map(Bytes::len).sum();
        if self.held.len() < HELD_PATCHES_MAX && bytes + patch.len() <= DOCUMENT_BYTES_MAX {
            self.held.push_back(patch);
        } else {
            self.held.clear();
            self.want = Some(Want::Gap);
        }
    }

    /// Merges a patch if it is the next one; its version then. Otherwise the twin is wanted.
    fn take_desired(&mut self, twin: &mut Twin, patch: &Bytes) -> Option<u64> {
        let Ok(patch) = document::parse_object(patch) else {
            self.want = Some(Want::Gap);
            return None;
        };
        let Some(version) = document::version(&patch) else {
            self.want = Some(Want::Gap);
            return None;
        };
        let Some(desired) = &mut twin.desired else {
            // Never fetched: it goes to the client as it is.
            return Some(version);
        };
        if document::version(desired).and_then(|known| known.checked_add(1)) != Some(version) {
            self.want = Some(Want::Gap);
            return None;
        }
        if twin.missed.is_none() && !self.own {
            twin.missed = Some(desired.clone());
        }
        merge(desired, &patch);
        Some(version)
    }

    /// Changes from upstream were lost on their way here.
    pub(super) fn lost(&mut self) {
        self.want = Some(Want::Gap);
    }

    /// What the client has to be told to know all of the desired properties; none when it does.
    pub(super) fn forward(&mut self, twin: &mut Twin) -> Option<Forward> {
        self.forwarding.hold();
        let (desired, missed) = (twin.desired.as_ref()?, twin.missed.as_ref()?);
        let mut patch = diff(missed, desired);
        let (Some(version), false) = (document::version(desired), patch.is_empty()) else {
            twin.missed = None;
            return None;
        };
        // Python reads it from every patch, also when only the rest changed.
        if let Some(number) = desired.get("$version") {
            patch.insert("$version", number.clone());
        }
        Some(Forward {
            version,
            patch: patch.to_bytes(),
        })
    }

    /// What became of a [`Forward`].
    pub(super) fn forwarded(&mut self, twin: &mut Twin, result: Result<(), OfferError>, now: Now) {
        match result {
            Ok(()) => {
                // Of a twin that was never fetched a patch is not all.
                if twin.desired.is_some() {
                    twin.missed = None;
                }
                self.forwarding = Pace::idle();
            }
            Err(OfferError::Full) => {
                twin.missed.get_or_insert_default();
                self.forwarding.pause(now);
            }
            // It is told when it subscribes.
            Err(_) => self.forwarding = Pace::idle(),
        }
    }

    /// The clients that asked were answered with the whole twin. One that was never fetched was
    /// empty: they are told when it is known.
    pub(super) fn answered(&self, twin: &mut Twin) {
        twin.missed = match twin.desired {
            None if !self.own => Some(Object::default()),
            _ => None,
        };
    }

    /// What was last done could not be stored: the twin in the store is the one before it.
    pub(super) fn not_stored(&mut self, now: Now) {
        self.unsynced = true;
        self.want = Some(Want::Gap);
        if let Some(Request::Report { since, .. }) = &mut self.request {
            // There are reports in it that were not stored.
            *since = None;
        }
        // The upstream must not pay for a disk that fails.
        self.fetching = Pace::until(now.instant + RETRY_MAX);
        self.reporting = Pace::until(now.instant + RETRY_MAX);
    }

    /// The twin cannot be read now: whatever is under way ends, and is tried again later.
    pub(super) fn abandon(&mut self, now: Now) {
        if let Some(Request::Fetch { want }) = self.request.take() {
            self.want = self.want.max(want);
        }
        self.fetching.pause(now);
        self.reporting.pause(now);
        self.forwarding = Pace::idle();
    }
}

/// Reads a twin. One that cannot be read, or that the upstream does not know, is none.
fn read(body: Bytes) -> Result<(Bytes, Fetched), UpstreamError> {
    let unusable = |why: &str| UpstreamError::Unavailable(format!("its answer is no twin: {why}"));
    let fetched = Fetched::parse(&body).map_err(|error| unusable(&error.to_string()))?;
    if !fetched.is_known() {
        return Err(unusable("it does not know it"));
    }
    Ok((body, fetched))
}

/// Whether a refusal is about the request. The others are about the identity, which may be
/// enabled, moved or given its key back: what it reported is kept.
fn blames_request(status: u16) -> bool {
    (400..500).contains(&status) && !matches!(status, 401 | 403 | 404 | 408 | 429)
}

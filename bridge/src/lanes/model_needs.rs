//! Needs and requests in the world of `model_tests`.

use std::collections::BTreeMap;
use std::time::Duration;

use super::model_tests::{Nature, World, sender};
use super::*;
use edgehub_proto::{hub::Needs, identity::Identity};

/// A request of an identity.
#[derive(Debug)]
pub(super) struct Asked {
    identity: Identity,
    deadline_ms: u64,
    session: Option<SessionId>,
    /// None as long as it is not over.
    pub(super) end: Option<Result<(), RequestFault>>,
}

/// What is asked of the scheduler beside sending.
#[derive(Debug, Default)]
pub(super) struct Asks {
    needs: BTreeMap<Identity, Needs>,
    pub(super) requests: Vec<Asked>,
}

pub(super) fn needs(bits: u8) -> Needs {
    Needs {
        desired: bits & 1 != 0,
        methods: bits & 2 != 0,
        cloud_to_device: bits & 4 != 0,
    }
}

impl World {
    pub(super) fn need(&mut self, who: usize, bits: u8) {
        let needs = needs(bits);
        self.asks.needs.insert(sender(who), needs);
        self.scheduler.need(&sender(who), needs);
    }

    /// What the upstream is told of the identity is another from now on.
    pub(super) fn renew(&mut self, who: usize) {
        let now = self.now();
        self.scheduler.renew(&sender(who), now);
    }

    fn needs_of(&self, identity: &Identity) -> Needs {
        self.asks.needs.get(identity).copied().unwrap_or_default()
    }

    /// Asks for something that is worth an answer for `patience_ms`. Gives its number.
    pub(super) fn request(&mut self, who: usize, patience_ms: u64) -> usize {
        let number = self.asks.requests.len();
        let deadline_ms = self.now_ms + patience_ms;
        self.asks.requests.push(Asked {
            identity: sender(who),
            deadline_ms,
            session: None,
            end: None,
        });
        let now = self.now();
        let deadline = self.start + Duration::from_millis(deadline_ms);
        self.scheduler
            .request(&sender(who), RequestId(number as u64), deadline, now);
        number
    }

    pub(super) fn end_of(&self, request: usize) -> Option<Result<(), RequestFault>> {
        self.asks.requests[request].end
    }

    /// Answers everything that a living session was asked.
    pub(super) fn answer_requests(&mut self) {
        let answered: Vec<usize> = (0..self.asks.requests.len())
            .filter(|number| {
                let asked = &self.asks.requests[*number];
                let session = asked
                    .session
                    .and_then(|session| self.sessions.get(&session));
                asked.end.is_none() && session.is_some_and(|session| session.opened)
            })
            .collect();
        for number in answered {
            self.asks.requests[number].end = Some(Ok(()));
            self.scheduler.answered(RequestId(number as u64));
        }
    }

    pub(super) fn check_fail(&mut self, request: RequestId, fault: RequestFault) {
        let asked = &mut self.asks.requests[request.0 as usize];
        assert_eq!(asked.end, None, "over twice: {asked:?}");
        match fault {
            RequestFault::TimedOut => assert!(asked.deadline_ms <= self.now_ms, "{asked:?}"),
            RequestFault::Lost => {
                let session = asked.session.expect("lost before it was sent");
                assert!(!self.sessions.contains_key(&session), "{asked:?}");
            }
            _ => assert_eq!(asked.session, None, "{fault:?} after it was sent"),
        }
        asked.end = Some(Err(fault));
    }

    pub(super) fn check_needs(&mut self, session: SessionId, needs: Needs) {
        let session = self.sessions.get_mut(&session).expect("a dead session");
        assert_ne!(session.needs, needs, "no news");
        session.needs = needs;
    }

    pub(super) fn check_request(&mut self, id: SessionId, requests: &[RequestId]) {
        let session = &self.sessions[&id];
        assert!(session.opened && !session.close_asked);
        for request in requests {
            let asked = &mut self.asks.requests[request.0 as usize];
            assert_eq!(asked.identity, session.sender);
            assert_eq!(asked.session.replace(id), None, "sent twice");
            assert_eq!(asked.end, None, "sent after its end");
        }
    }

    /// After each turn: sessions know what is needed, and nothing waits beyond its deadline.
    pub(super) fn check_asks(&self) {
        for session in self.sessions.values().filter(|one| !one.close_asked) {
            assert_eq!(session.needs, self.needs_of(&session.sender));
        }
        for asked in self.asks.requests.iter().filter(|one| one.end.is_none()) {
            assert!(asked.deadline_ms > self.now_ms, "{asked:?}");
        }
    }

    /// Open sessions that know what their identity needs.
    pub(super) fn listens(&self, who: usize) -> bool {
        let sender = sender(who);
        self.sessions.values().any(|session| {
            session.sender == sender
                && session.opened
                && !session.close_asked
                && session.needs == self.needs_of(&sender)
        })
    }

    /// Good identities with needs that are not connected.
    pub(super) fn deaf(&self) -> Vec<usize> {
        (0..self.natures.len())
            .filter(|who| {
                let is_good = self.natures[*who].1 == Nature::Good;
                is_good && self.needs_of(&sender(*who)).any() && !self.listens(*who)
            })
            .collect()
    }

    /// Rounds until `condition` holds, for at most `patience`. Gives how long it took.
    pub(super) fn run_until(
        &mut self,
        patience: Duration,
        what: &str,
        condition: impl Fn(&Self) -> bool,
    ) -> Duration {
        let begin = self.now_ms;
        loop {
            self.round();
            if condition(self) {
                return Duration::from_millis(self.now_ms - begin);
            }
            self.wait_a_little();
            let waited = Duration::from_millis(self.now_ms - begin);
            assert!(waited <= patience, "{what}: {:#?}", self.scheduler);
        }
    }

    /// Moves the clock to the next thing that is due.
    pub(super) fn wait_a_little(&mut self) {
        let now = self.now();
        let next = self.scheduler.next_wakeup(now).map_or(250, |at| {
            at.saturating_duration_since(now.instant).as_millis() as u64
        });
        self.now_ms += next.clamp(1, 250);
    }

    /// Lets `duration` pass in a world in which everything that is asked for happens.
    pub(super) fn run_for(&mut self, duration: Duration) {
        let end = self.now_ms + duration.as_millis() as u64;
        while self.now_ms < end {
            self.round();
            self.wait_a_little();
        }
        self.round();
    }
}

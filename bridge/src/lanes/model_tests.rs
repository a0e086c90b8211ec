//! The scheduler against a simulated store and upstream: random interleavings of appends, reads,
//! acknowledgements, losses and the passing of time, each step checked against what was promised.
//! `property_tests` and `scenario_tests` let things happen in it.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::model_needs::Asks;
use super::*;
use bytes::Bytes;
use edgehub_proto::{hub::Needs, identity::Identity};

/// How the upstream treats a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nature {
    Good,
    /// We have no chain for it: no connect is tried.
    OutOfScope,
    /// Every connect is refused.
    Refused,
    /// Accepts and never acknowledges.
    Slow,
    /// Loses the connection at every publish.
    Poison,
}

pub(super) struct Stored {
    pub(super) sender: Identity,
    size: usize,
    pub(super) expires_at_ms: Option<u64>,
    pub(super) settled: Option<Outcome>,
}

pub(super) struct OpenSession {
    pub(super) sender: Identity,
    pub(super) since_ms: u64,
    pub(super) needs: Needs,
    pub(super) opened: bool,
    pub(super) close_asked: bool,
    pub(super) next_token: u64,
    /// Unacknowledged: token, queue, offset.
    pub(super) pending: VecDeque<(u64, usize, u64)>,
    /// Everything sent in this session.
    pub(super) sent: HashSet<(usize, u64)>,
    pub(super) last: BTreeMap<usize, u64>,
}

pub(super) struct World {
    pub(super) scheduler: Scheduler,
    pub(super) config: LaneConfig,
    pub(super) start: Instant,
    pub(super) now_ms: u64,
    pub(super) stored: Vec<Vec<Stored>>,
    /// What the scheduler knows of each queue's end.
    pub(super) known_tail: Vec<u64>,
    /// Reads under way; the last value is what was settled when each began.
    pub(super) reads: Vec<(usize, u64, ReadFilter, HashSet<u64>)>,
    pub(super) settles: Vec<(usize, Vec<Settled>)>,
    pub(super) sessions: BTreeMap<SessionId, OpenSession>,
    /// Settle actions that were given out, before the store heard of them.
    pub(super) given_settles: BTreeSet<(usize, u64)>,
    pub(super) ever_sent: HashSet<(usize, u64)>,
    pub(super) natures: Vec<(Identity, Nature)>,
    pub(super) link_up: bool,
    pub(super) opens: Vec<u64>,
    pub(super) refreshes: Vec<Identity>,
    pub(super) max_message: usize,
    /// How long the credential of a new session is good.
    pub(super) credential_ms: Option<u64>,
    pub(super) asks: Asks,
}

pub(super) const UNIX_MS: u64 = 1_800_000_000_000;

pub(super) fn small_config() -> LaneConfig {
    LaneConfig {
        window: 4,
        lane_entries_max: 6,
        lane_bytes_max: 2500,
        bytes_max: 6000,
        lanes_max: 64,
        connections_max: 4,
        connects_per_second: 20.0,
        connects_burst: 3,
        read_entries: 5,
        read_scan: 9,
        unconfirmed_max: 24,
        lease: Duration::from_secs(2),
        drain_timeout: Duration::from_secs(3),
        seed: 42,
        ..LaneConfig::default()
    }
}

pub(super) fn sender(index: usize) -> Identity {
    Identity::device(&format!("leaf{index}")).unwrap()
}

impl World {
    pub(super) fn new(config: LaneConfig, queues: usize, natures: &[Nature]) -> Self {
        let start = tokio::time::Instant::now().into_std();
        let starts: Vec<QueueStart> = (0..queues)
            .map(|index| QueueStart {
                priority: index as u32,
                mark: 0,
                next_offset: 0,
            })
            .collect();
        let now = Now {
            instant: start,
            unix_ms: UNIX_MS,
        };
        Self {
            scheduler: Scheduler::new(config.clone(), &starts, now),
            config,
            start,
            now_ms: 0,
            stored: (0..queues).map(|_| Vec::new()).collect(),
            known_tail: vec![0; queues],
            reads: Vec::new(),
            settles: Vec::new(),
            sessions: BTreeMap::new(),
            given_settles: BTreeSet::new(),
            ever_sent: HashSet::new(),
            natures: natures
                .iter()
                .enumerate()
                .map(|(i, nature)| (sender(i), *nature))
                .collect(),
            link_up: true,
            opens: Vec::new(),
            refreshes: Vec::new(),
            max_message: 0,
            credential_ms: Some(60_000),
            asks: Asks::default(),
        }
    }

    pub(super) fn now(&self) -> Now {
        Now {
            instant: self.start + Duration::from_millis(self.now_ms),
            unix_ms: UNIX_MS + self.now_ms,
        }
    }

    pub(super) fn nature(&self, sender: &Identity) -> Nature {
        self.natures.iter().find(|(id, _)| id == sender).unwrap().1
    }

    pub(super) fn append(&mut self, queue: usize, who: usize, size: usize, ttl_ms: Option<u64>) {
        self.max_message = self.max_message.max(size);
        self.stored[queue].push(Stored {
            sender: sender(who),
            size,
            expires_at_ms: ttl_ms.map(|ttl| UNIX_MS + self.now_ms + ttl),
            settled: None,
        });
    }

    pub(super) fn announce(&mut self, queue: usize) {
        self.known_tail[queue] = self.stored[queue].len() as u64;
        self.scheduler.queue_grew(queue, self.known_tail[queue]);
    }

    pub(super) fn turn(&mut self) {
        let mut actions = Vec::new();
        self.scheduler.turn(self.now(), &mut actions);
        for action in actions {
            match action {
                Action::Read {
                    queue,
                    from,
                    filter,
                } => {
                    assert!(
                        self.reads.iter().all(|(q, ..)| *q != queue),
                        "two reads at once"
                    );
                    self.start_read(queue, from, filter);
                }
                Action::Settle { queue, settled } => {
                    assert!(
                        self.settles.iter().all(|(q, _)| *q != queue),
                        "two settles at once"
                    );
                    self.settles.push((queue, settled));
                }
                Action::Open {
                    session,
                    identity,
                    needs,
                } => self.open(session, identity, needs),
                Action::Fail { request, fault } => self.check_fail(request, fault),
                Action::Needs { session, needs } => self.check_needs(session, needs),
                Action::Request { session, requests } => self.check_request(session, &requests),
                Action::Close { session } => {
                    let session = self
                        .sessions
                        .get_mut(&session)
                        .expect("close of a dead session");
                    assert!(
                        !std::mem::replace(&mut session.close_asked, true),
                        "two closes"
                    );
                }
                Action::Send { session, batch } => self.check_send(session, batch),
                Action::Discarded(list) => {
                    for discarded in list {
                        self.check_discard(&discarded);
                    }
                }
                Action::Refresh { identity } => self.refreshes.push(identity),
                Action::Report(_) => {}
            }
        }
        self.check_bounds();
        self.check_asks();
    }

    pub(super) fn open(&mut self, session: SessionId, sender: Identity, needs: Needs) {
        assert!(
            self.sessions.values().all(|other| other.sender != sender),
            "two sessions"
        );
        self.opens.push(self.now_ms);
        let session_state = OpenSession {
            sender,
            since_ms: self.now_ms,
            needs,
            opened: false,
            close_asked: false,
            next_token: 0,
            pending: VecDeque::new(),
            sent: HashSet::new(),
            last: BTreeMap::new(),
        };
        self.sessions.insert(session, session_state);
    }

    pub(super) fn start_read(&mut self, queue: usize, from: u64, filter: ReadFilter) {
        let settled = self.stored[queue].iter().enumerate();
        let settled = settled.filter(|(_, stored)| stored.settled.is_some());
        let settled = settled.map(|(offset, _)| offset as u64).collect();
        self.reads.push((queue, from, filter, settled));
    }

    /// Answers the read at `index`: with all that is stored now, except for what was settled when
    /// the read began. A store may be as late as that.
    pub(super) fn answer_read(&mut self, index: usize) {
        if self.reads.is_empty() {
            return;
        }
        let (queue, from, filter, settled) = self.reads.remove(index % self.reads.len());
        let mut entries = Vec::new();
        let mut next = from;
        let mut scanned = 0;
        let all = &self.stored[queue];
        while (next as usize) < all.len()
            && scanned < self.config.read_scan
            && entries.len() < self.config.read_entries
        {
            let stored = &all[next as usize];
            if !settled.contains(&next) && filter.admits(next, stored.sender.as_str()) {
                entries.push(Entry {
                    offset: next,
                    sender: stored.sender.clone(),
                    message: Bytes::from(vec![0; stored.size]),
                    enqueued_ms: UNIX_MS,
                    expires_at_ms: stored.expires_at_ms,
                    shared: None,
                });
            }
            next += 1;
            scanned += 1;
        }
        let now = self.now();
        self.scheduler.read_done(queue, entries, next, now);
    }

    pub(super) fn fail_read(&mut self) {
        if let Some((queue, ..)) = self.reads.pop() {
            let now = self.now();
            self.scheduler.read_failed(queue, now);
        }
    }

    pub(super) fn answer_settle(&mut self, ok: bool) {
        let Some((queue, settled)) = self.settles.pop() else {
            return;
        };
        if !ok {
            let now = self.now();
            self.scheduler.settle_failed(queue, settled, now);
            return;
        }
        for one in &settled {
            let stored = &mut self.stored[queue][one.offset as usize];
            assert!(
                stored.settled.replace(one.outcome).is_none(),
                "settled twice"
            );
        }
        self.scheduler.settled(queue, &settled);
    }

    pub(super) fn pick(&self, index: usize, opened: bool) -> Option<SessionId> {
        let fits: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|(_, session)| session.opened == opened)
            .map(|(id, _)| *id)
            .collect();
        (!fits.is_empty()).then(|| fits[index % fits.len()])
    }

    pub(super) fn answer_open(&mut self, index: usize) {
        let Some(id) = self.pick(index, false) else {
            return;
        };
        let now = self.now();
        let session = self.sessions.get_mut(&id).unwrap();
        let sender = session.sender.clone();
        if session.close_asked {
            self.end(id, &CloseCause::Requested);
        } else if self.nature(&sender) == Nature::OutOfScope {
            self.end(id, &CloseCause::OutOfScope);
        } else if !self.link_up {
            self.end(id, &CloseCause::Unreachable("down".into()));
        } else if self.nature(&sender) == Nature::Refused {
            self.end(id, &CloseCause::Refused("no".into()));
        } else {
            self.sessions.get_mut(&id).unwrap().opened = true;
            let expires_at_ms = self.credential_ms.map(|life| now.unix_ms + life);
            self.scheduler.opened(id, expires_at_ms, now);
        }
    }

    /// Acknowledges up to `count` messages of a session, the newest first if `reversed`.
    pub(super) fn acknowledge(&mut self, index: usize, count: usize, reversed: bool) {
        let Some(id) = self.pick(index, true) else {
            return;
        };
        let sender = self.sessions[&id].sender.clone();
        match self.nature(&sender) {
            Nature::Good => {}
            Nature::OutOfScope | Nature::Refused | Nature::Slow => return,
            Nature::Poison => {
                if !self.sessions[&id].pending.is_empty() {
                    self.end(id, &CloseCause::Lost("poison".into()));
                }
                return;
            }
        }
        let session = self.sessions.get_mut(&id).unwrap();
        let mut dispositions = Vec::new();
        for _ in 0..count.min(session.pending.len()) {
            let taken = if reversed {
                session.pending.pop_back()
            } else {
                session.pending.pop_front()
            };
            let (token, queue, offset) = taken.unwrap();
            self.given_settles.insert((queue, offset));
            dispositions.push((token, Disposition::Accepted));
        }
        // A session does not speak when there is nothing to tell.
        if !dispositions.is_empty() {
            self.scheduler.disposed(id, &dispositions);
        }
    }

    pub(super) fn lose(&mut self, index: usize) {
        if let Some(id) = self.pick(index, true) {
            self.end(id, &CloseCause::Lost("cut".into()));
        }
    }

    pub(super) fn honour_closes(&mut self) {
        let asked: Vec<SessionId> = self
            .sessions
            .iter()
            .filter(|(_, s)| s.close_asked)
            .map(|(id, _)| *id)
            .collect();
        for id in asked {
            self.end(id, &CloseCause::Requested);
        }
    }

    pub(super) fn end(&mut self, id: SessionId, cause: &CloseCause) {
        self.sessions.remove(&id);
        let now = self.now();
        self.scheduler.closed(id, cause, now);
    }

    pub(super) fn unsettled(&self, nature: Nature) -> usize {
        self.stored
            .iter()
            .flatten()
            .filter(|stored| stored.settled.is_none() && self.nature(&stored.sender) == nature)
            .count()
    }

    /// One round of a world in which everything that is asked for happens at once.
    pub(super) fn round(&mut self) {
        for queue in 0..self.stored.len() {
            self.announce(queue);
        }
        self.turn();
        self.honour_closes();
        for _ in 0..self.reads.len() {
            self.answer_read(0);
        }
        for index in 0..self.config.connections_max {
            self.answer_open(index);
        }
        self.turn();
        for index in 0..self.sessions.len() {
            self.acknowledge(index, usize::MAX, false);
        }
        self.answer_requests();
        for _ in 0..self.settles.len() {
            self.answer_settle(true);
        }
        self.turn();
    }

    /// Lets time pass until every good sender's messages are settled.
    pub(super) fn run_until_good_are_settled(&mut self, patience: Duration) {
        let deadline = self.now_ms + patience.as_millis() as u64;
        while self.unsettled(Nature::Good) > 0 {
            self.round();
            let busy = !self.reads.is_empty() || !self.settles.is_empty();
            if !busy {
                let now = self.now();
                let next = self.scheduler.next_wakeup(now).map_or(10, |at| {
                    at.saturating_duration_since(now.instant).as_millis() as u64
                });
                self.now_ms += next.clamp(1, 250);
            }
            assert!(
                self.now_ms <= deadline,
                "{} messages of good senders are stuck; {:#?}",
                self.unsettled(Nature::Good),
                self.scheduler,
            );
        }
    }
}

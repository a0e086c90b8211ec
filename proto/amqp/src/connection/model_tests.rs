//! Links, settlement, credit and windows against a model: a peer that keeps the standard, whose
//! frames are written with fe2o3's types and arrive in pieces, and that reads what the engine says
//! late. The model knows what each side may do and what it must hear.

use bytes::Bytes;
use fe2o3_amqp_types::definitions::{DeliveryTag, Handle, Role};
use fe2o3_amqp_types::performatives as wire;
use proptest::collection::vec;
use proptest::prelude::*;

use super::rig::{Rig, Written, attach, begin, framed};
use super::tests::detach_frame;
use super::*;
use crate::performative::{DeliveryState, Disposition, Performative, Transfer};

mod peer;

use self::peer::{
    FRAME_BYTES, IN, OUT, PART, PeerReceiver, PeerSender, PeerSession, SESSIONS, Step, WINDOW,
    outcome, step, wire_outcome,
};

struct World {
    rig: Rig,
    sessions: Vec<PeerSession>,
    pieces: Vec<usize>,
    turn: usize,
    /// Unsettled deliveries at the driver: the session, its link, its id.
    received: Vec<(u16, Received, u32)>,
    sent: Vec<(u16, LinkId, Sent)>,
}

fn number(value: usize) -> u32 {
    u32::try_from(value).unwrap()
}

impl World {
    fn new(pieces: Vec<usize>) -> Self {
        let config = Config {
            incoming_window: WINDOW,
            ..Config::new("hub")
        };
        let mut rig = Rig::new(config);
        rig.open(|open| open.max_frame_size = wire::MaxFrameSize(FRAME_BYTES));
        rig.events();
        rig.written();
        let mut world = Self {
            rig,
            sessions: Vec::new(),
            pieces,
            turn: 0,
            received: Vec::new(),
            sent: Vec::new(),
        };
        for session in 0..SESSIONS {
            world.sessions.push(PeerSession::default());
            world.begin(session);
        }
        world
    }

    /// A frame of the peer, in pieces.
    fn feed(&mut self, channel: u16, performative: &impl serde::Serialize, payload: &[u8]) {
        let mut body = serde_amqp::to_vec(performative).unwrap();
        body.extend_from_slice(payload);
        let frame = framed(channel, &body);
        let mut rest = &frame[..];
        while !rest.is_empty() {
            self.turn += 1;
            let piece = self.pieces[self.turn % self.pieces.len()].min(rest.len());
            self.rig.bytes(&rest[..piece]);
            rest = &rest[piece..];
        }
    }

    fn begin(&mut self, channel: u16) {
        let first = wire::Begin {
            next_outgoing_id: 7,
            incoming_window: 3,
            ..begin()
        };
        self.feed(channel, &first, &[]);
        self.sessions[usize::from(channel)] = PeerSession {
            next_outgoing: 7,
            may_send_to: 7 + WINDOW,
            next_incoming: 1,
            window: 4,
            window_max: 4,
            engine_sent: 1,
            ..PeerSession::default()
        };
        self.rig.written();
        self.attach(channel, IN);
        self.attach(channel, OUT);
    }

    /// Attaches a link whose predecessor both sides have forgotten.
    fn attach(&mut self, channel: u16, handle: u32) {
        self.feed(channel, &attach(handle, handle == IN, "q"), &[]);
        let link = self.rig.attached();
        let terms = LinkTerms {
            credit: 5,
            ..LinkTerms::default()
        };
        let session = &mut self.sessions[usize::from(channel)];
        if handle == IN {
            session.sender = PeerSender {
                link: Some(link),
                target: 5,
                ..PeerSender::default()
            };
        } else {
            session.receiver = PeerReceiver {
                link: Some(link),
                ..PeerReceiver::default()
            };
        }
        self.rig.connection.accept(link, &terms);
        self.peer_reads();
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::PeerSends {
                session,
                parts,
                settled,
            } => self.peer_sends(session, parts, settled),
            Step::Settle { index, outcome } => self.settle(index, outcome),
            Step::SetCredit { session, credit } => {
                let sender = &mut self.sessions[usize::from(session)].sender;
                if let Some(link) = sender.link {
                    sender.target = credit;
                    self.rig.connection.set_credit(link, credit);
                }
            }
            Step::PeerGrants {
                session,
                credit,
                window,
                drain,
                echo,
            } => self.peer_grants(session, credit, window, drain, echo),
            Step::Send {
                session,
                bytes,
                settled,
            } => self.send(session, bytes, settled),
            Step::PeerDisposes {
                session,
                first,
                length,
                settled,
                outcome,
            } => self.peer_disposes(session, first, length, settled, outcome),
            Step::SettleSent { index } => self.settle_sent(index),
            Step::Drained { session } => {
                let receiver = &mut self.sessions[usize::from(session)].receiver;
                let Some(link) = receiver.link else { return };
                self.rig.connection.drained(link);
                if receiver.drain && !receiver.is_gone {
                    receiver.drain = false;
                    receiver.sent_count = receiver.sent_count.max(receiver.limit);
                    receiver.owes_flow = true;
                }
            }
            Step::PeerReads => self.peer_reads(),
            Step::PeerDetaches { session, handle } => self.peer_detaches(session, handle),
            Step::Detach { session, handle } => self.detach(session, handle),
            Step::PeerEnds { session } => {
                self.peer_reads();
                self.feed(session, &wire::End { error: None }, &[]);
                let events = self.rig.events();
                let gone = |handle: u32| {
                    let session = &self.sessions[usize::from(session)];
                    if handle == IN {
                        session.sender.link
                    } else {
                        session.receiver.link
                    }
                };
                let told: Vec<_> = events
                    .iter()
                    .map(|event| match event {
                        Event::Detached { link, error: None } => Some(*link),
                        other => panic!("{other:?}"),
                    })
                    .collect();
                assert_eq!(told, [gone(IN), gone(OUT)]);
                self.received.retain(|(s, _, _)| *s != session);
                self.sent.retain(|(s, _, _)| *s != session);
                assert!(matches!(
                    self.rig.performatives()[..],
                    [Performative::End(_)]
                ));
                self.begin(session);
            }
        }
    }

    fn peer_sends(&mut self, channel: u16, parts: u8, settled: bool) {
        let session = &mut self.sessions[usize::from(channel)];
        if session.next_outgoing == session.may_send_to {
            return;
        }
        let sender = &mut session.sender;
        let is_first = sender.partial.is_none();
        if is_first {
            if sender.limit <= sender.delivery_count {
                return;
            }
            sender.partial = Some((session.next_delivery, Vec::new(), parts, settled));
            sender.delivery_count += 1;
            sender.unsettled_here += 1;
            session.next_delivery += 1;
        }
        session.next_outgoing += 1;
        let (id, mut so_far, parts, settled) = sender.partial.take().unwrap();
        let (link, is_gone) = (sender.link.unwrap(), sender.is_gone);
        let payload = format!("{channel} {id} {parts} {}|", so_far.len()).into_bytes();
        so_far.extend(&payload);
        let more = parts > 1;
        // By turns as little and as much as peers say on continuations.
        let says = is_first || id % 2 == 0;
        let frame = wire::Transfer {
            handle: Handle(IN),
            delivery_id: says.then_some(id),
            delivery_tag: says.then(|| DeliveryTag::from(id.to_be_bytes().to_vec())),
            message_format: says.then_some(0),
            settled: says.then_some(settled),
            more,
            rcv_settle_mode: None,
            state: None,
            resume: false,
            aborted: false,
            batchable: false,
        };
        if more {
            sender.partial = Some((id, so_far.clone(), parts - 1, settled));
        }
        self.feed(channel, &frame, &payload);
        let mut events = self.rig.events();
        if more || is_gone {
            assert!(events.is_empty(), "{events:?}");
            return;
        }
        let Some(Event::Delivery(incoming)) = events.pop() else {
            panic!("a delivery is missing");
        };
        assert!(events.is_empty());
        assert_eq!(incoming.link, link);
        assert_eq!(incoming.settled, settled);
        assert_eq!(incoming.tag, id.to_be_bytes()[..]);
        assert_eq!(incoming.payload, so_far);
        self.received.push((channel, incoming.received, id));
    }

    fn settle(&mut self, index: usize, choice: u8) {
        if self.received.is_empty() {
            return;
        }
        let (channel, received, id) = self.received.remove(index % self.received.len());
        self.rig.connection.settle(received, outcome(choice));
        let session = &mut self.sessions[usize::from(channel)];
        if session.sender.link == Some(received.link()) && !session.sender.is_gone {
            session.sender.unsettled_here -= 1;
            if !received.is_settled() {
                session.owed.insert(id, outcome(choice));
            }
        }
    }

    fn peer_grants(&mut self, channel: u16, credit: u32, window: u32, drain: bool, echo: bool) {
        let session = &mut self.sessions[usize::from(channel)];
        let receiver = &mut session.receiver;
        let flow = wire::Flow {
            next_incoming_id: Some(session.next_incoming),
            incoming_window: window,
            next_outgoing_id: session.next_outgoing,
            outgoing_window: 100,
            handle: Some(Handle(OUT)),
            delivery_count: Some(receiver.delivery_count),
            link_credit: Some(credit),
            available: None,
            drain,
            echo,
            properties: None,
        };
        session.window = session.next_incoming + window;
        session.window_max = session.window_max.max(session.window);
        session.flush();
        let receiver = &mut session.receiver;
        let before = (
            receiver.limit.saturating_sub(receiver.sent_count),
            receiver.drain,
        );
        receiver.limit = receiver.delivery_count + credit;
        receiver.limit_max = receiver.limit_max.max(receiver.limit);
        receiver.drain = drain;
        let after = (receiver.limit.saturating_sub(receiver.sent_count), drain);
        let is_gone = receiver.is_gone;
        receiver.owes_flow |= echo && !is_gone;
        let link = receiver.link;
        self.feed(channel, &flow, &[]);
        let mut is_told = false;
        for event in self.rig.events() {
            let Event::Credit {
                link: l,
                credit,
                drain,
            } = event
            else {
                panic!("{event:?}");
            };
            assert_eq!((Some(l), credit, drain), (link, after.0, after.1));
            is_told = true;
        }
        assert!(!is_gone || !is_told);
        assert!(
            is_gone || is_told || (before == after && !drain),
            "{before:?} {after:?}"
        );
    }

    fn send(&mut self, channel: u16, bytes: usize, settled: bool) {
        let session = &mut self.sessions[usize::from(channel)];
        let Some(link) = session.receiver.link else {
            return;
        };
        let may_send = session.may_send();
        assert_eq!(self.rig.connection.can_send(link), may_send);
        let id = session.expected_delivery + number(session.receiver.expected.len());
        let payload: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8 ^ id as u8).collect();
        let delivery = Outgoing {
            tag: &id.to_be_bytes(),
            message_format: 5,
            settled,
            payload: Bytes::from(payload.clone()),
        };
        match self.rig.connection.send(link, delivery) {
            Ok(sent) => {
                assert!(may_send);
                assert_eq!(sent.0, id, "ids of a session have no gaps");
                session.receiver.sent_count += 1;
                session.receiver.expected.push_back((id, payload, settled));
                session.engine_waiting += number(bytes.div_ceil(PART).max(1));
                session.flush();
                if !settled {
                    session.records.insert(id, false);
                    self.sent.push((channel, link, sent));
                }
            }
            Err(_) => assert!(!may_send),
        }
    }

    fn peer_disposes(
        &mut self,
        channel: u16,
        first: usize,
        length: usize,
        settled: bool,
        choice: u8,
    ) {
        let session = &mut self.sessions[usize::from(channel)];
        if session.arrived.is_empty() {
            return;
        }
        let first = first % session.arrived.len();
        let last = (first + length).min(session.arrived.len() - 1);
        let (first, last) = (session.arrived[first].0, session.arrived[last].0);
        let (state, outcome) = wire_outcome(choice);
        let frame = wire::Disposition {
            role: Role::Receiver,
            first,
            last: (last > first || choice == 0).then_some(last),
            settled,
            state: Some(state),
            batchable: false,
        };
        let mut wanted = Vec::new();
        for id in first..=last {
            let Some(answered) = session.records.get_mut(&id) else {
                continue;
            };
            if settled || !*answered {
                wanted.push(id);
            }
            *answered = true;
            if settled {
                session.records.remove(&id);
            }
        }
        self.feed(channel, &frame, &[]);
        let told: Vec<_> = self
            .rig
            .events()
            .into_iter()
            .map(|event| match event {
                Event::Settled {
                    sent,
                    outcome: told,
                    settled: is_settled,
                    ..
                } => {
                    assert_eq!((told, is_settled), (Some(outcome.clone()), settled));
                    sent.0
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, wanted);
    }

    fn settle_sent(&mut self, index: usize) {
        if self.sent.is_empty() {
            return;
        }
        let (channel, link, sent) = self.sent.remove(index % self.sent.len());
        let session = &mut self.sessions[usize::from(channel)];
        self.rig.connection.settle_sent(link, sent);
        if session.records.remove(&sent.0).is_some() {
            session.settled_owed.insert(sent.0, ());
        }
    }

    fn peer_reads(&mut self) {
        // What it says in answer is answered, too.
        while self.peer_reads_once() {}
        self.check();
    }

    fn peer_reads_once(&mut self) -> bool {
        let written = self.rig.written();
        let is_news = !written.is_empty();
        for written in written {
            let Written::Frame(channel, performative, payload) = written else {
                panic!("{written:?}");
            };
            match performative {
                Performative::Transfer(transfer) => self.peer_gets(channel, &transfer, &payload),
                Performative::Flow(flow) => self.peer_is_granted(channel, &flow),
                Performative::Disposition(disposition) => self.peer_hears(channel, &disposition),
                Performative::Detach(detach) => {
                    assert!(detach.error.is_none(), "{detach:?}");
                    self.peer_is_detached(channel, detach.handle.0);
                }
                Performative::Attach(_) | Performative::Begin(_) => {}
                other => panic!("{other:?}"),
            }
        }
        is_news
    }

    /// What must hold once the peer has read everything.
    fn check(&self) {
        for session in &self.sessions {
            let (sender, receiver) = (&session.sender, &session.receiver);
            assert!(session.owed.is_empty(), "{:?}", session.owed);
            assert!(session.settled_owed.is_empty());
            assert!(!receiver.owes_flow || receiver.is_gone);
            assert!(receiver.is_gone || session.next_incoming == session.engine_sent);
            if sender.is_gone || sender.link.is_none() {
                continue;
            }
            // What is due by a tenth has been given; what was given is never taken back.
            let credit = sender.limit - sender.delivery_count;
            let full = sender.target.saturating_sub(sender.unsettled_here);
            let due = full.saturating_sub(credit);
            assert!(due == 0 || due < (sender.target / 10).max(1));
            assert!(session.may_send_to - session.next_outgoing > WINDOW / 3);
        }
    }

    fn peer_gets(&mut self, channel: u16, transfer: &Transfer, payload: &[u8]) {
        let session = &mut self.sessions[usize::from(channel)];
        session.next_incoming += 1;
        assert!(
            session.next_incoming <= session.window_max,
            "beyond the window"
        );
        let receiver = &mut session.receiver;
        assert_eq!(transfer.handle, OUT);
        let (id, wanted, settled) = receiver.expected.front().expect("nothing was sent");
        if receiver.arriving.is_empty() && transfer.delivery_id.is_some() {
            assert_eq!(transfer.delivery_id, Some(session.expected_delivery));
            assert_eq!(*id, session.expected_delivery);
            assert_eq!(
                transfer.delivery_tag.as_deref(),
                Some(&id.to_be_bytes()[..])
            );
            assert_eq!(transfer.message_format, Some(5));
            assert_eq!(transfer.settled, Some(*settled));
            receiver.delivery_count += 1;
            assert!(
                receiver.delivery_count <= receiver.limit_max,
                "beyond the credit"
            );
        }
        receiver.arriving.extend(payload);
        if transfer.more {
            assert_eq!(payload.len(), PART);
            return;
        }
        assert_eq!(receiver.arriving, *wanted);
        session.arrived.push((*id, !settled));
        session.expected_delivery += 1;
        receiver.arriving.clear();
        receiver.expected.pop_front();
    }

    fn peer_is_granted(&mut self, channel: u16, flow: &Flow) {
        let session = &mut self.sessions[usize::from(channel)];
        session.may_send_to = flow.next_incoming_id.unwrap() + flow.incoming_window;
        assert_eq!(flow.incoming_window, WINDOW);
        assert!(session.may_send_to >= session.next_outgoing);
        match flow.handle {
            Some(IN) => {
                let limit = flow.delivery_count.unwrap() + flow.link_credit.unwrap();
                assert!(limit >= session.sender.limit, "credit is taken back");
                session.sender.limit = limit;
            }
            Some(OUT) => {
                let receiver = &mut session.receiver;
                receiver.owes_flow = false;
                receiver.delivery_count = flow.delivery_count.unwrap();
            }
            other => assert_eq!(other, None),
        }
    }

    fn peer_hears(&mut self, channel: u16, disposition: &Disposition) {
        let session = &mut self.sessions[usize::from(channel)];
        assert!(disposition.settled);
        let last = disposition.last.unwrap_or(disposition.first);
        let Some(DeliveryState::Outcome(outcome)) = &disposition.state else {
            panic!("{disposition:?}");
        };
        for id in disposition.first..=last {
            if disposition.role == Role::Receiver {
                assert_eq!(session.owed.remove(&id).as_ref(), Some(outcome));
            } else {
                assert_eq!(*outcome, Outcome::Accepted);
                assert!(session.settled_owed.remove(&id).is_some());
            }
        }
    }

    /// The peer reads that the driver detached a link: it answers, and attaches anew.
    fn peer_is_detached(&mut self, channel: u16, handle: u32) {
        let session = &mut self.sessions[usize::from(channel)];
        if handle == IN {
            assert!(std::mem::take(&mut session.sender).is_gone);
        } else {
            assert!(std::mem::take(&mut session.receiver).is_gone);
        }
        self.feed(channel, &detach_frame(handle), &[]);
        assert!(self.rig.events().is_empty());
        self.attach_later(channel, handle);
    }

    /// An attach while what was said before is still being read.
    fn attach_later(&mut self, channel: u16, handle: u32) {
        self.feed(channel, &attach(handle, handle == IN, "q"), &[]);
        let link = self.rig.attached();
        let terms = LinkTerms {
            credit: 5,
            ..LinkTerms::default()
        };
        let session = &mut self.sessions[usize::from(channel)];
        if handle == IN {
            session.sender.link = Some(link);
            session.sender.target = 5;
        } else {
            session.receiver.link = Some(link);
        }
        self.rig.connection.accept(link, &terms);
    }

    /// What the engine forgets with a link.
    fn forget(&mut self, channel: u16, handle: u32) {
        let session = &mut self.sessions[usize::from(channel)];
        if handle == IN {
            // The dispositions that were owed leave before the detach.
            self.received.retain(|(c, _, _)| *c != channel);
        } else {
            session.records.clear();
            session.engine_waiting = 0;
            self.sent.retain(|(c, _, _)| *c != channel);
        }
    }

    fn peer_detaches(&mut self, channel: u16, handle: u32) {
        self.peer_reads();
        let session = &self.sessions[usize::from(channel)];
        let link = if handle == IN {
            session.sender.link
        } else {
            session.receiver.link
        };
        // Within a delivery its frames stay away: the peer forgets it as well.
        let expected = number(session.receiver.expected.len());
        self.forget(channel, handle);
        self.feed(channel, &detach_frame(handle), &[]);
        let events = self.rig.events();
        assert!(
            matches!(events[..], [Event::Detached { link: l, error: None }] if Some(l) == link),
            "{events:?}"
        );
        assert!(matches!(
            self.rig.performatives()[..],
            [Performative::Detach(_)]
        ));
        if handle == OUT {
            self.sessions[usize::from(channel)].expected_delivery += expected;
        }
        self.attach(channel, handle);
    }

    fn detach(&mut self, channel: u16, handle: u32) {
        let session = &mut self.sessions[usize::from(channel)];
        let link = if handle == IN {
            session.sender.is_gone = true;
            session.sender.link
        } else {
            // What is on its way is read first; the rest of a delivery never comes.
            self.peer_reads();
            let session = &mut self.sessions[usize::from(channel)];
            session.receiver.is_gone = true;
            session.expected_delivery += number(session.receiver.expected.len());
            session.receiver.expected.clear();
            session.receiver.link
        };
        self.forget(channel, handle);
        let link = link.unwrap();
        self.rig.connection.detach(link, None);
        self.rig.connection.detach(link, None);
        assert!(self.rig.events().is_empty());
        assert!(!self.rig.connection.can_send(link));
        if handle == OUT {
            self.peer_reads();
        }
    }

    /// Everything that is open comes to its end.
    fn finish(&mut self) {
        self.peer_reads();
        for session in 0..SESSIONS {
            for _ in 0..4 {
                self.peer_grants(session, 3, 100, false, false);
                self.peer_reads();
            }
            assert!(
                self.sessions[usize::from(session)]
                    .receiver
                    .expected
                    .is_empty()
            );
        }
        while !self.received.is_empty() {
            self.settle(0, 0);
        }
        self.peer_reads();
        for session in 0..SESSIONS {
            let sender = &self.sessions[usize::from(session)].sender;
            let (target, limit) = (sender.target, sender.limit - sender.delivery_count);
            let arriving = u32::from(sender.partial.is_some());
            assert!(
                limit + arriving >= target - target / 10,
                "{limit} of {target}"
            );
        }
        assert!(self.rig.connection.is_open());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn links_keep_to_the_model(
        pieces in vec(1..200_usize, 1..8),
        steps in vec(step(), 0..150),
    ) {
        let mut world = World::new(pieces);
        for step in &steps {
            world.step(step);
            prop_assert!(world.rig.connection.is_open());
        }
        world.finish();
    }
}

//! What the model keeps of the peer and of what the engine was told, and the steps that it takes.

use std::collections::{BTreeMap, VecDeque};

use fe2o3_amqp_types::messaging::{Accepted, DeliveryState as WireState, Rejected, Released};
use proptest::prelude::*;

use crate::connection::{LinkId, Outcome};

pub(super) const SESSIONS: u16 = 2;
/// The link on which the peer sends, in each session.
pub(super) const IN: u32 = 4;
/// The link on which it receives.
pub(super) const OUT: u32 = 9;
pub(super) const FRAME_BYTES: u32 = 512;
/// Payload of a frame that the engine sends to such a peer.
pub(super) const PART: usize = 408;
pub(super) const WINDOW: u32 = 6;

#[derive(Clone, Debug)]
pub(super) enum Step {
    /// The peer sends a delivery, or the next frame of one, if it may.
    PeerSends {
        session: u16,
        parts: u8,
        settled: bool,
    },
    /// The driver settles one of the deliveries that arrived.
    Settle {
        index: usize,
        outcome: u8,
    },
    SetCredit {
        session: u16,
        credit: u32,
    },
    PeerGrants {
        session: u16,
        credit: u32,
        window: u32,
        drain: bool,
        echo: bool,
    },
    Send {
        session: u16,
        bytes: usize,
        settled: bool,
    },
    PeerDisposes {
        session: u16,
        first: usize,
        length: usize,
        settled: bool,
        outcome: u8,
    },
    SettleSent {
        index: usize,
    },
    Drained {
        session: u16,
    },
    /// The peer reads what was said.
    PeerReads,
    PeerDetaches {
        session: u16,
        handle: u32,
    },
    Detach {
        session: u16,
        handle: u32,
    },
    PeerEnds {
        session: u16,
    },
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let session = || 0..SESSIONS;
    let handle = || prop_oneof![Just(IN), Just(OUT)];
    prop_oneof![
        20 => (session(), 1..4_u8, any::<bool>())
            .prop_map(|(session, parts, settled)| Step::PeerSends { session, parts, settled }),
        12 => (any::<usize>(), 0..4_u8).prop_map(|(index, outcome)| Step::Settle { index, outcome }),
        2 => (session(), 0..12_u32).prop_map(|(session, credit)| Step::SetCredit { session, credit }),
        10 => (session(), 0..9_u32, 0..9_u32, proptest::bool::weighted(0.2), proptest::bool::weighted(0.2))
            .prop_map(|(session, credit, window, drain, echo)| Step::PeerGrants {
                session, credit, window, drain, echo
            }),
        20 => (session(), 0..1500_usize, any::<bool>())
            .prop_map(|(session, bytes, settled)| Step::Send { session, bytes, settled }),
        10 => (session(), any::<usize>(), 0..5_usize, any::<bool>(), 0..4_u8)
            .prop_map(|(session, first, length, settled, outcome)| Step::PeerDisposes {
                session, first, length, settled, outcome
            }),
        6 => any::<usize>().prop_map(|index| Step::SettleSent { index }),
        3 => session().prop_map(|session| Step::Drained { session }),
        20 => Just(Step::PeerReads),
        1 => (session(), handle()).prop_map(|(session, handle)| Step::PeerDetaches { session, handle }),
        1 => (session(), handle()).prop_map(|(session, handle)| Step::Detach { session, handle }),
        1 => session().prop_map(|session| Step::PeerEnds { session }),
    ]
}

pub(super) fn outcome(choice: u8) -> Outcome {
    match choice {
        0 => Outcome::Accepted,
        1 => Outcome::Released,
        2 => Outcome::Rejected(None),
        _ => Outcome::Modified {
            delivery_failed: true,
            undeliverable_here: false,
        },
    }
}

pub(super) fn wire_outcome(choice: u8) -> (WireState, Outcome) {
    match choice {
        0 => (WireState::Accepted(Accepted {}), Outcome::Accepted),
        1 => (WireState::Released(Released {}), Outcome::Released),
        _ => (
            WireState::Rejected(Rejected { error: None }),
            Outcome::Rejected(None),
        ),
    }
}

/// Where the peer's receiving link stands.
#[derive(Default)]
pub(super) struct PeerReceiver {
    pub(super) link: Option<LinkId>,
    /// The driver detached it, and the peer has not read that.
    pub(super) is_gone: bool,
    // What the peer knows.
    pub(super) delivery_count: u32,
    /// The highest count up to which it ever gave credit.
    pub(super) limit_max: u32,
    pub(super) arriving: Vec<u8>,
    // What the engine knows.
    pub(super) limit: u32,
    pub(super) sent_count: u32,
    pub(super) drain: bool,
    /// Deliveries on their way: id, payload, settled.
    pub(super) expected: VecDeque<(u32, Vec<u8>, bool)>,
    pub(super) owes_flow: bool,
}

/// Where the peer's sending link stands.
#[derive(Default)]
pub(super) struct PeerSender {
    pub(super) link: Option<LinkId>,
    pub(super) is_gone: bool,
    pub(super) delivery_count: u32,
    pub(super) limit: u32,
    pub(super) target: u32,
    /// The rest of a delivery: its id, what the engine has of it, frames to come, settled.
    pub(super) partial: Option<(u32, Vec<u8>, u8, bool)>,
    pub(super) unsettled_here: u32,
}

#[derive(Default)]
pub(super) struct PeerSession {
    pub(super) sender: PeerSender,
    pub(super) receiver: PeerReceiver,
    pub(super) next_outgoing: u32,
    /// The transfer id behind the last that the peer may send.
    pub(super) may_send_to: u32,
    pub(super) next_delivery: u32,
    /// Deliveries of the peer that the driver settled: the disposition that must come.
    pub(super) owed: BTreeMap<u32, Outcome>,
    pub(super) next_incoming: u32,
    /// The highest transfer id that the peer ever allowed, and what it allows.
    pub(super) window_max: u32,
    pub(super) window: u32,
    /// Frames that the engine has sent, and those that wait for the window.
    pub(super) engine_sent: u32,
    pub(super) engine_waiting: u32,
    pub(super) expected_delivery: u32,
    /// Deliveries that the peer has: id, whether unsettled.
    pub(super) arrived: Vec<(u32, bool)>,
    /// Records of the engine: the link's kind is OUT; whether an outcome was said.
    pub(super) records: BTreeMap<u32, bool>,
    /// Settlements that the driver gave and that the peer must hear.
    pub(super) settled_owed: BTreeMap<u32, ()>,
}

impl PeerSession {
    /// Frames move while the window has room.
    pub(super) fn flush(&mut self) {
        let room = self.window.saturating_sub(self.engine_sent);
        let moved = self.engine_waiting.min(room);
        self.engine_sent += moved;
        self.engine_waiting -= moved;
    }

    pub(super) fn may_send(&self) -> bool {
        let receiver = &self.receiver;
        receiver.link.is_some()
            && !receiver.is_gone
            && receiver.limit > receiver.sent_count
            && self.engine_waiting == 0
            && self.window > self.engine_sent
    }
}

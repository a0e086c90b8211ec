//! A client for tests: frames written with fe2o3's types, read back with this crate's decoder.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use fe2o3_amqp_types::definitions::{Handle, ReceiverSettleMode, Role, SenderSettleMode};
use fe2o3_amqp_types::messaging::{Source, Target, TargetArchetype};
use fe2o3_amqp_types::performatives as wire;
use serde::Serialize;

use super::{Config, Connection, Event, LinkId};
use crate::frame::{FrameHeader, FrameLimits, FrameType};
use crate::header::ProtocolHeader;
use crate::performative::{self, Disposition, Flow, Performative, Transfer};

/// Some moment to count from.
#[allow(
    clippy::disallowed_methods,
    reason = "any moment will do; time is advanced by hand"
)]
fn instant() -> Instant {
    Instant::now()
}

/// What the engine wrote.
#[derive(Debug)]
pub(super) enum Written {
    Header([u8; 8]),
    Sasl(Bytes),
    Heartbeat,
    Frame(u16, Performative, Bytes),
}

/// A connection under test and the time of its world.
pub(super) struct Rig {
    pub(super) connection: Connection,
    pub(super) now: Instant,
    input: BytesMut,
    /// Headers that the engine is expected to write before frames.
    headers: usize,
    output: BytesMut,
}

impl Rig {
    pub(super) fn new(config: Config) -> Self {
        let now = instant();
        Self {
            connection: Connection::new(config, now),
            now,
            input: BytesMut::new(),
            headers: 0,
            output: BytesMut::new(),
        }
    }

    /// An open connection with one session on channel 0.
    pub(super) fn begun() -> Self {
        let mut rig = Self::new(Config::new("test"));
        rig.open(|_| {});
        rig.send_frame(0, &begin());
        rig.written();
        rig.events();
        rig
    }

    pub(super) fn open(&mut self, change: impl FnOnce(&mut wire::Open)) {
        let mut open = open();
        change(&mut open);
        self.bytes(&ProtocolHeader::AMQP.encode());
        self.send_frame(0, &open);
    }

    pub(super) fn advance(&mut self, by: Duration) {
        self.now += by;
        self.connection.expired(self.now);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        if bytes.starts_with(b"AMQP") {
            self.headers += 1;
        }
        self.input.extend_from_slice(bytes);
        self.connection.receive(&mut self.input, self.now);
    }

    pub(super) fn send_frame(&mut self, channel: u16, performative: &impl Serialize) {
        let body = serde_amqp::to_vec(performative).unwrap();
        self.bytes(&framed(channel, &body));
    }

    pub(super) fn send_flow(&mut self, channel: u16, flow: &Flow) {
        let mut body = BytesMut::new();
        performative::encode_flow(flow, &mut body);
        self.bytes(&framed(channel, &body));
    }

    pub(super) fn send_disposition(&mut self, channel: u16, disposition: &Disposition) {
        let mut body = BytesMut::new();
        performative::encode_disposition(disposition, &mut body);
        self.bytes(&framed(channel, &body));
    }

    pub(super) fn send_transfer(&mut self, channel: u16, transfer: &Transfer, payload: &[u8]) {
        let mut body = BytesMut::new();
        performative::encode_transfer(transfer, &mut body);
        body.extend_from_slice(payload);
        self.bytes(&framed(channel, &body));
    }

    pub(super) fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.connection.poll()).collect()
    }

    /// The link of the only event, an attach.
    pub(super) fn attached(&mut self) -> LinkId {
        let mut events = VecDeque::from(self.events());
        match (events.pop_front(), events.pop_front()) {
            (Some(Event::Attached { link, .. }), None) => link,
            other => panic!("{other:?}"),
        }
    }

    /// Everything that the engine has written since the last call.
    pub(super) fn written(&mut self) -> Vec<Written> {
        while let Some(output) = self.connection.output() {
            self.output.extend_from_slice(&output);
        }
        let mut written = Vec::new();
        while !self.output.is_empty() {
            if self.output.starts_with(b"AMQP") {
                let header = self.output.split_to(8);
                written.push(Written::Header(header[..].try_into().unwrap()));
                continue;
            }
            let limits = FrameLimits {
                frame_bytes_max: u32::MAX,
                channel_max: u16::MAX,
            };
            let header = FrameHeader::decode(&self.output, limits).unwrap().unwrap();
            let frame = self.output.split_to(header.size() as usize).freeze();
            let body = frame.slice(header.body_offset() as usize..);
            written.push(match header.frame_type() {
                FrameType::Sasl => Written::Sasl(body),
                FrameType::Amqp { .. } if body.is_empty() => Written::Heartbeat,
                FrameType::Amqp { channel } => {
                    let (performative, payload) = performative::decode(&body).unwrap();
                    Written::Frame(channel, performative, payload)
                }
            });
        }
        written
    }

    /// The performatives among what was written.
    pub(super) fn performatives(&mut self) -> Vec<Performative> {
        let frames = self.written().into_iter();
        frames
            .filter_map(|written| match written {
                Written::Frame(_, performative, _) => Some(performative),
                _ => None,
            })
            .collect()
    }
}

pub(super) fn framed(channel: u16, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len() + 8).unwrap();
    let mut frame = size.to_be_bytes().to_vec();
    frame.extend_from_slice(&[2, 0]);
    frame.extend_from_slice(&channel.to_be_bytes());
    frame.extend_from_slice(body);
    frame
}

pub(super) fn open() -> wire::Open {
    wire::Open {
        container_id: "client".to_owned(),
        hostname: Some("gw".to_owned()),
        max_frame_size: wire::MaxFrameSize(65_536),
        channel_max: wire::ChannelMax(8191),
        idle_time_out: None,
        outgoing_locales: None,
        incoming_locales: None,
        offered_capabilities: None,
        desired_capabilities: None,
        properties: None,
    }
}

pub(super) fn begin() -> wire::Begin {
    wire::Begin {
        remote_channel: None,
        next_outgoing_id: 0,
        incoming_window: 2048,
        outgoing_window: u32::MAX,
        handle_max: Handle(u32::MAX),
        offered_capabilities: None,
        desired_capabilities: None,
        properties: None,
    }
}

/// A link on which the client sends (true) or receives.
pub(super) fn attach(handle: u32, client_sends: bool, address: &str) -> wire::Attach {
    let source = Source {
        address: Some(if client_sends { "own" } else { address }.to_owned()),
        ..Source::default()
    };
    let target = Target {
        address: Some(if client_sends { address } else { "own" }.to_owned()),
        ..Target::default()
    };
    wire::Attach {
        name: format!("link{handle}"),
        handle: Handle(handle),
        role: if client_sends {
            Role::Sender
        } else {
            Role::Receiver
        },
        snd_settle_mode: SenderSettleMode::Mixed,
        rcv_settle_mode: ReceiverSettleMode::First,
        source: Some(Box::new(source)),
        target: Some(Box::new(TargetArchetype::Target(target))),
        unsettled: None,
        incomplete_unsettled: false,
        initial_delivery_count: None,
        max_message_size: None,
        offered_capabilities: None,
        desired_capabilities: None,
        properties: None,
    }
}

/// A delivery in one frame.
pub(super) fn transfer(handle: u32, delivery_id: u32) -> Transfer {
    Transfer {
        handle,
        delivery_id: Some(delivery_id),
        delivery_tag: Some(Bytes::copy_from_slice(&delivery_id.to_be_bytes())),
        message_format: Some(0),
        ..Transfer::default()
    }
}

/// The client grants credit on a link on which it receives.
pub(super) fn credit(handle: u32, delivery_count: u32, credit: u32) -> Flow {
    Flow {
        next_incoming_id: Some(1),
        incoming_window: 2048,
        next_outgoing_id: 0,
        outgoing_window: 2048,
        handle: Some(handle),
        delivery_count: Some(delivery_count),
        link_credit: Some(credit),
        ..Flow::default()
    }
}

//! From the first byte to the open: protocol headers, SASL, open (part 2, 2.2 and 2.4; part 5,
//! 5.3; spec/amqp.md 1.2, 1.4 and 2.1).

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use fe2o3_amqp_types::performatives::{ChannelMax, MaxFrameSize, Open};

use super::event::{CloseCause, Event, Opened, SaslPlain};
use super::{Connection, SASL_FRAME_BYTES_MAX, State, append, condition};
use crate::cbs::Secret;
use crate::frame::{FrameHeader, FrameLimits, FrameType};
use crate::header::{HEADER_BYTES, ProtocolHeader, ProtocolId};
use crate::limits::{
    CHANNEL_MAX, IDLE_TIME_OUT_MIN_MS, IDLE_TIME_OUT_UNNAMED_MS, MIN_MAX_FRAME_BYTES,
    NAME_BYTES_MAX,
};
use crate::performative;
use crate::sasl::{self, Mechanism, SaslCode, SaslFrame, SaslInit};

impl Connection {
    /// Takes a protocol header. Whether there may be more to take.
    pub(super) fn take_header(&mut self, input: &mut BytesMut) -> bool {
        let header = match ProtocolHeader::decode(input) {
            Ok(None) => return false,
            Ok(Some(header)) => header,
            Err(error) => {
                self.out.extend_from_slice(&error.answer().encode());
                self.end(CloseCause::Header(error.to_string()));
                return true;
            }
        };
        input.advance(HEADER_BYTES);
        match (header.id, self.state) {
            (ProtocolId::Amqp, _) => {
                self.out.extend_from_slice(&header.encode());
                self.state = State::Open;
            }
            (ProtocolId::Sasl, State::Header) => {
                self.out.extend_from_slice(&header.encode());
                let mechanisms = &self.config.mechanisms;
                append(&mut self.out, FrameType::Sasl, |out| {
                    sasl::encode_mechanisms(mechanisms, out);
                });
                self.state = State::SaslInit;
            }
            // TLS within TLS, or SASL again: what is wanted instead, and the end.
            (ProtocolId::Tls, _) => {
                self.out.extend_from_slice(&ProtocolHeader::SASL.encode());
                self.end(CloseCause::Header("it asks for TLS within TLS".to_owned()));
            }
            (ProtocolId::Sasl, _) => {
                self.out.extend_from_slice(&ProtocolHeader::AMQP.encode());
                self.end(CloseCause::Header("it asks for SASL twice".to_owned()));
            }
        }
        true
    }

    /// Takes the client's choice of a mechanism.
    pub(super) fn take_sasl(&mut self, input: &mut BytesMut) -> bool {
        let limits = FrameLimits {
            frame_bytes_max: SASL_FRAME_BYTES_MAX,
            channel_max: CHANNEL_MAX,
        };
        let header = match FrameHeader::decode(input, limits) {
            Ok(None) => return false,
            Ok(Some(header)) => header,
            Err(_) => return self.sasl_fails(SaslCode::Sys),
        };
        let size = header.size() as usize;
        if input.len() < size {
            return false;
        }
        let frame = input.split_to(size).freeze();
        if header.frame_type() != FrameType::Sasl {
            return self.sasl_fails(SaslCode::Sys);
        }
        let body = frame.slice(header.body_offset() as usize..);
        let Ok(SaslFrame::Init(init)) = sasl::decode(&body) else {
            return self.sasl_fails(SaslCode::Sys);
        };
        self.choose(&init)
    }

    fn choose(&mut self, init: &SaslInit) -> bool {
        let chosen = Mechanism::from_name(&init.mechanism)
            .filter(|mechanism| self.config.mechanisms.contains(mechanism));
        let Some(mechanism) = chosen else {
            return self.sasl_fails(SaslCode::Sys);
        };
        match mechanism {
            Mechanism::Anonymous | Mechanism::Mssbcbs => {
                self.state = State::SaslDeciding(mechanism);
                self.sasl_outcome(SaslCode::Ok);
            }
            Mechanism::External => {
                self.state = State::SaslDeciding(mechanism);
                self.events.push_back(Event::SaslExternal);
            }
            Mechanism::Plain => {
                let response = init.initial_response.as_ref().map_or(&[][..], |r| r);
                let Some(plain) = sasl::split_plain(response) else {
                    return self.sasl_fails(SaslCode::Auth);
                };
                self.state = State::SaslDeciding(mechanism);
                self.events.push_back(Event::SaslPlain(SaslPlain {
                    authzid: plain.authzid.to_owned(),
                    authcid: plain.authcid.to_owned(),
                    password: Secret::new(plain.password.to_owned()),
                }));
            }
        }
        true
    }

    /// Answers [`Event::SaslPlain`] and [`Event::SaslExternal`]. Call [`Connection::receive`]
    /// again afterwards: bytes that came early wait for it. Anything but Ok ends the connection.
    pub fn sasl_outcome(&mut self, code: SaslCode) {
        let State::SaslDeciding(mechanism) = self.state else {
            return;
        };
        if code != SaslCode::Ok {
            self.sasl_fails(code);
            return;
        }
        append(&mut self.out, FrameType::Sasl, |out| {
            sasl::encode_outcome(code, out);
        });
        self.sasl = Some(mechanism);
        self.state = State::AmqpHeader;
    }

    fn sasl_fails(&mut self, code: SaslCode) -> bool {
        append(&mut self.out, FrameType::Sasl, |out| {
            sasl::encode_outcome(code, out);
        });
        self.end(CloseCause::Sasl);
        true
    }

    /// Takes the peer's open and answers with ours.
    pub(super) fn take_open(&mut self, open: Open) {
        self.open_frame();
        self.state = State::Opened;
        let peer_max = open.max_frame_size.0;
        if peer_max < MIN_MAX_FRAME_BYTES {
            let text = format!("max-frame-size {peer_max} is below {MIN_MAX_FRAME_BYTES}");
            return self.fault(condition::INVALID_FIELD, text);
        }
        self.peer_frame_bytes_max = peer_max.min(self.config.frame_bytes_max);
        let hostname_bytes = open.hostname.as_ref().map_or(0, String::len);
        if open.container_id.len() > NAME_BYTES_MAX || hostname_bytes > NAME_BYTES_MAX {
            let text = format!("container id and host name have at most {NAME_BYTES_MAX} bytes");
            return self.fault(condition::INVALID_FIELD, text);
        }
        let idle = open.idle_time_out.filter(|ms| *ms > 0);
        if let Some(ms) = idle
            && ms < IDLE_TIME_OUT_MIN_MS
        {
            let text = format!("an idle time-out of {ms} ms is below {IDLE_TIME_OUT_MIN_MS}");
            return self.fault(condition::NOT_ALLOWED, text);
        }
        // Looked at twice in half of the time-out: the C SDK drops the connection at the full one.
        let looked_at = idle.unwrap_or(IDLE_TIME_OUT_UNNAMED_MS) / 4;
        let period = Duration::from_millis(looked_at.into());
        self.heartbeat = Some(period);
        self.heartbeat_at = Some(self.now + period);
        self.events.push_back(Event::Opened(Opened {
            sasl: self.sasl,
            container_id: open.container_id,
            hostname: open.hostname,
            idle_time_out: idle.map(|ms| Duration::from_millis(ms.into())),
        }));
    }

    pub(super) fn open_frame(&mut self) {
        let advertised = self.config.idle_advertised.as_millis();
        let open = Open {
            container_id: self.config.container_id.clone(),
            hostname: self.config.hostname.clone(),
            max_frame_size: MaxFrameSize(self.config.frame_bytes_max),
            channel_max: ChannelMax(self.config.channel_max),
            idle_time_out: Some(u32::try_from(advertised).unwrap_or(u32::MAX)),
            outgoing_locales: None,
            incoming_locales: None,
            offered_capabilities: None,
            desired_capabilities: None,
            properties: None,
        };
        self.performative(0, |out| performative::encode_open(&open, out));
    }
}

/// The body of a frame that was taken out of the input.
pub(super) fn body(frame: &Bytes, header: FrameHeader) -> Bytes {
    frame.slice(header.body_offset() as usize..)
}

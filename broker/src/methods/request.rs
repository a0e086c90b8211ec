//! A call, its id and what comes of it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::MethodResult;
use edgehub_proto::identity::Identity;
use serde::Serialize;

use super::limits::{
    CONNECT_TIMEOUT_MAX, NAME_LENGTH_MAX, PAYLOAD_BYTES_MAX, RESPONSE_TIMEOUT_MAX,
    RESPONSE_TIMEOUT_MIN, UPSTREAM_RESPONSE_TIMEOUT,
};

/// The status of a client's answer that has none, or none that is a number (spec/core.md 6).
pub const BAD_STATUS: i32 = 400_000;

/// A direct method that is to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodRequest {
    /// The method's name; goes into a topic level, so it has no `/`.
    pub name: Arc<str>,
    /// JSON, or empty.
    pub payload: Bytes,
    /// How long the client may take to answer, from when the call is handed to it.
    pub response_timeout: Duration,
    /// How long to wait for the client to connect and subscribe.
    pub connect_timeout: Duration,
}

/// Why a call is none that could be made; the text goes to the caller (400).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRequest {
    /// The name is empty or blank.
    #[error("Method name is required")]
    NoName,
    /// The name is longer than [`NAME_LENGTH_MAX`].
    #[error("Method name is longer than {NAME_LENGTH_MAX} characters")]
    LongName,
    /// The name cannot be written into a topic: no SDK could read it (spec/mqtt.md 5.4).
    #[error("Method name contains '/' or a control character")]
    NameCharacter,
    /// The payload is larger than [`PAYLOAD_BYTES_MAX`].
    #[error("Request payload size {0} is larger than {PAYLOAD_BYTES_MAX} bytes")]
    LargePayload(usize),
    /// Outside [`RESPONSE_TIMEOUT_MIN`] to [`RESPONSE_TIMEOUT_MAX`].
    #[error(
        "Response timeout is not within {} and {} seconds",
        RESPONSE_TIMEOUT_MIN.as_secs(), RESPONSE_TIMEOUT_MAX.as_secs()
    )]
    ResponseTimeout,
    /// Above [`CONNECT_TIMEOUT_MAX`].
    #[error("Connect timeout is not within 0 and {} seconds", CONNECT_TIMEOUT_MAX.as_secs())]
    ConnectTimeout,
}

impl MethodRequest {
    /// A call of a module of this device.
    ///
    /// # Errors
    /// When a rule of spec/core.md 6 is broken.
    pub fn local(
        name: &str,
        payload: Bytes,
        response_timeout: Duration,
        connect_timeout: Duration,
    ) -> Result<Self, BadRequest> {
        check_name(name)?;
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(BadRequest::LargePayload(payload.len()));
        }
        if !(RESPONSE_TIMEOUT_MIN..=RESPONSE_TIMEOUT_MAX).contains(&response_timeout) {
            return Err(BadRequest::ResponseTimeout);
        }
        if connect_timeout > CONNECT_TIMEOUT_MAX {
            return Err(BadRequest::ConnectTimeout);
        }
        Ok(Self {
            name: name.into(),
            payload,
            response_timeout,
            connect_timeout,
        })
    }

    /// A call from upstream, which has judged its size and keeps its times.
    ///
    /// # Errors
    /// When its name cannot be written into a topic.
    pub fn from_upstream(name: &str, payload: Bytes) -> Result<Self, BadRequest> {
        check_name(name)?;
        Ok(Self {
            name: name.into(),
            payload,
            response_timeout: UPSTREAM_RESPONSE_TIMEOUT,
            connect_timeout: Duration::ZERO,
        })
    }
}

fn check_name(name: &str) -> Result<(), BadRequest> {
    if name.trim().is_empty() {
        return Err(BadRequest::NoName);
    }
    // A byte is never more than one unit, so that a long text is not counted.
    if name.len() > 3 * NAME_LENGTH_MAX || name.encode_utf16().count() > NAME_LENGTH_MAX {
        return Err(BadRequest::LongName);
    }
    if name.chars().any(|c| c == '/' || c.is_control()) {
        return Err(BadRequest::NameCharacter);
    }
    Ok(())
}

/// The id of a call on its way to a client: a random GUID. Its text is in lower case; a client may
/// answer in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(u128);

impl RequestId {
    /// A fresh one. Random, so that no client can guess another one's.
    #[must_use]
    pub fn random() -> Self {
        Self::from_bits(rand::random())
    }

    /// These bits, marked as a random GUID (version 4).
    pub(super) fn from_bits(bits: u128) -> Self {
        const VERSION: u128 = 0xf << 76;
        const VARIANT: u128 = 0b11 << 62;
        Self(bits & !VERSION & !VARIANT | 4 << 76 | 0b10 << 62)
    }

    /// The id of a client's answer; none when it is no GUID with dashes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        const DASHES: [usize; 4] = [8, 13, 18, 23];
        if text.len() != 36 {
            return None;
        }
        let mut bits: u128 = 0;
        for (place, byte) in text.bytes().enumerate() {
            if DASHES.contains(&place) {
                if byte != b'-' {
                    return None;
                }
                continue;
            }
            bits = bits << 4 | u128::from(char::from(byte).to_digit(16)?);
        }
        Some(Self(bits))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            bits >> 96,
            bits >> 80 & 0xffff,
            bits >> 64 & 0xffff,
            bits >> 48 & 0xffff,
            bits & 0xffff_ffff_ffff
        )
    }
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MethodOutcome {
    /// The client answered; [`BAD_STATUS`] stands for a status that is missing or no number.
    Answered {
        /// The client's status.
        status: i32,
        /// JSON, or empty.
        payload: Bytes,
    },
    /// The client was not connected and subscribed in time.
    NotFound(Identity),
    /// It has the call but did not answer in time, or its connection ended meanwhile.
    TimedOut(RequestId),
    /// [`super::limits::CALLS_PER_CLIENT_MAX`] calls of this client wait already.
    TooManyCalls(Identity),
    /// The hub has too many calls that wait, or the client does not take what it is sent.
    Busy,
    /// There is no such call.
    Bad(BadRequest),
}

impl MethodOutcome {
    /// The HTTP status, and the text that goes with an error.
    #[must_use]
    pub fn status(&self) -> (u16, Option<String>) {
        match self {
            Self::Answered { .. } => (200, None),
            Self::NotFound(client) => (404, Some(format!("Client {client} not found"))),
            Self::TimedOut(id) => (
                504,
                Some(format!(
                    "Timed out waiting for device to respond to method request {id}"
                )),
            ),
            Self::TooManyCalls(client) => (
                429,
                Some(format!("Too many methods of client {client} are waiting")),
            ),
            Self::Busy => (
                503,
                Some("The method cannot be delivered now, try again later".to_owned()),
            ),
            Self::Bad(why) => (400, Some(why.to_string())),
        }
    }

    /// What goes upstream: the client's answer, or the status and the text of the error (D10).
    #[must_use]
    pub fn into_result(self) -> MethodResult {
        match (self.status(), self) {
            (_, Self::Answered { status, payload }) => MethodResult { status, payload },
            ((status, text), _) => MethodResult {
                status: status.into(),
                payload: error_body(&text.unwrap_or_default()),
            },
        }
    }
}

/// `{"message":"…"}`.
#[must_use]
pub(crate) fn error_body(message: &str) -> Bytes {
    #[derive(Serialize)]
    struct Body<'a> {
        message: &'a str,
    }
    // A struct of one text cannot fail to be written.
    serde_json::to_vec(&Body { message })
        .unwrap_or_default()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(name: &str, bytes: usize, response_s: u64, connect_s: u64) -> Option<BadRequest> {
        let secs = Duration::from_secs;
        MethodRequest::local(
            name,
            vec![b'1'; bytes].into(),
            secs(response_s),
            secs(connect_s),
        )
        .err()
    }

    #[test]
    fn the_limits_of_a_local_call_are_those_of_the_contract() {
        assert_eq!(local("reset", 131_072, 5, 0), None);
        assert_eq!(local("reset", 0, 300, 300), None);
        for (name, bytes, response_s, connect_s, bad) in [
            ("", 0, 30, 0, BadRequest::NoName),
            (" \t", 0, 30, 0, BadRequest::NoName),
            (&"x".repeat(101), 0, 30, 0, BadRequest::LongName),
            // 51 emoji are 102 units.
            (&"😀".repeat(51), 0, 30, 0, BadRequest::LongName),
            (&"x".repeat(1 << 20), 0, 30, 0, BadRequest::LongName),
            ("a/b", 0, 30, 0, BadRequest::NameCharacter),
            ("a\0", 0, 30, 0, BadRequest::NameCharacter),
            ("x", 131_073, 30, 0, BadRequest::LargePayload(131_073)),
            ("x", 0, 4, 0, BadRequest::ResponseTimeout),
            ("x", 0, 301, 0, BadRequest::ResponseTimeout),
            ("x", 0, 30, 301, BadRequest::ConnectTimeout),
        ] {
            assert_eq!(local(name, bytes, response_s, connect_s), Some(bad));
        }
        assert_eq!(local(&"x".repeat(100), 0, 30, 0), None);
        assert_eq!(local(&"ä".repeat(100), 0, 30, 0), None);
        assert_eq!(local(&"語".repeat(100), 0, 30, 0), None);
        assert_eq!(local("my method? 100%#", 0, 30, 0), None);
    }

    #[test]
    fn an_id_is_a_guid_in_lower_case_and_is_found_in_any() {
        let id = RequestId::from_bits(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        let text = "01234567-89ab-4def-8123-456789abcdef";
        assert_eq!(id.to_string(), text);
        assert_eq!(RequestId::parse(text), Some(id));
        assert_eq!(RequestId::parse(&text.to_uppercase()), Some(id));
        for other in [
            "",
            "0123456789ab4def8123456789abcdef",
            "{01234567-89ab-4def-8123-456789abcd}",
            "01234567-89ab-4def-8123-456789abcdeg",
            "01234567-89ab-4def-8123-456789abcdef ",
            "01234567+89ab-4def-8123-456789abcdef",
            "01234567-89ab-4def-8123-45678-abcdef",
            "ä1234567-89ab-4def-8123-456789abcde",
        ] {
            assert_eq!(RequestId::parse(other), None, "{other}");
        }
        assert_ne!(RequestId::random(), RequestId::random());
    }

    #[test]
    fn what_upstream_is_told() {
        let leaf = Identity::parse("leaf1").unwrap();
        let id = RequestId::from_bits(7);
        let answered = MethodOutcome::Answered {
            status: 299,
            payload: Bytes::from_static(b"[1]"),
        };
        for (outcome, status, payload) in [
            (answered, 299, "[1]".to_owned()),
            (
                MethodOutcome::NotFound(leaf),
                404,
                r#"{"message":"Client leaf1 not found"}"#.to_owned(),
            ),
            (
                MethodOutcome::TimedOut(id),
                504,
                format!(
                    r#"{{"message":"Timed out waiting for device to respond to method request {id}"}}"#
                ),
            ),
        ] {
            let result = outcome.into_result();
            assert_eq!(result.status, status);
            assert_eq!(result.payload, payload);
        }
    }
}

//! SASL frames (OASIS AMQP 1.0 part 5 section 5.3.3; spec/amqp.md 1.4). Which frame comes when is
//! the connection's business.

use bytes::{Bytes, BytesMut};

use crate::performative::{Fields, descriptor_code, unexpected, write_described};
use crate::value::{DecodeError, Value, write_compound};

const MECHANISMS: u64 = 0x40;
const INIT: u64 = 0x41;
const CHALLENGE: u64 = 0x42;
const RESPONSE: u64 = 0x43;
const OUTCOME: u64 = 0x44;

/// A mechanism that this engine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mechanism {
    /// Nothing is said; the identity follows by CBS.
    Anonymous,
    /// The same under the name that the C SDK asks for.
    Mssbcbs,
    /// User and password (RFC 4616).
    Plain,
    /// The certificate of the TLS layer.
    External,
}

impl Mechanism {
    const ALL: [Self; 4] = [Self::Anonymous, Self::Mssbcbs, Self::Plain, Self::External];

    /// Its name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "ANONYMOUS",
            Self::Mssbcbs => "MSSBCBS",
            Self::Plain => "PLAIN",
            Self::External => "EXTERNAL",
        }
    }

    /// The mechanism of a name; `None` for those that are not known.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|mechanism| mechanism.name() == name)
    }
}

/// Code of a SASL outcome (5.3.3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SaslCode {
    /// Authenticated.
    Ok,
    /// The credentials are wrong.
    Auth,
    /// A failure of the system, of unknown duration.
    Sys,
    /// A failure of the system that stays.
    SysPerm,
    /// A failure of the system that passes.
    SysTemp,
}

impl SaslCode {
    const ALL: [Self; 5] = [
        Self::Ok,
        Self::Auth,
        Self::Sys,
        Self::SysPerm,
        Self::SysTemp,
    ];

    /// The byte on the wire.
    #[must_use]
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// The code of a byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.byte() == byte)
    }
}

/// What a SASL frame says.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SaslFrame {
    /// Names of the mechanisms that a server offers.
    Mechanisms(Vec<String>),
    /// The choice of a client.
    Init(SaslInit),
    /// Not used by the mechanisms here.
    Challenge,
    /// Not used by the mechanisms here.
    Response,
    /// How it ended.
    Outcome(SaslCode),
}

/// The choice of a client. Debug does not show its response.
#[derive(Clone, PartialEq, Eq)]
pub struct SaslInit {
    /// Name of the mechanism.
    pub mechanism: String,
    /// Initial response; a secret.
    pub initial_response: Option<Bytes>,
    /// Host that the client means.
    pub hostname: Option<String>,
}

impl std::fmt::Debug for SaslInit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SaslInit")
            .field("mechanism", &self.mechanism)
            .field(
                "initial_response",
                &self.initial_response.as_ref().map(|_| "***"),
            )
            .field("hostname", &self.hostname)
            .finish()
    }
}

impl std::fmt::Debug for SaslFrame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mechanisms(names) => f.debug_tuple("Mechanisms").field(names).finish(),
            Self::Init(init) => init.fmt(f),
            Self::Challenge => f.write_str("Challenge"),
            Self::Response => f.write_str("Response"),
            Self::Outcome(code) => f.debug_tuple("Outcome").field(code).finish(),
        }
    }
}

/// Reads the body of a SASL frame; an initial response is a slice of it.
///
/// # Errors
/// When it is none; the connection is to be closed.
pub fn decode(body: &Bytes) -> Result<SaslFrame, DecodeError> {
    let mut rest: &[u8] = body;
    let Value::Described(described) = Value::read(&mut rest)? else {
        return Err(DecodeError::Type {
            field: "SASL frame",
            expected: "a described list",
        });
    };
    let mut fields = Fields::of(&described)?;
    Ok(match descriptor_code(&described)? {
        // One symbol may stand for an array of one.
        MECHANISMS => SaslFrame::Mechanisms(match fields.next() {
            Value::Symbol(name) => vec![name.to_owned()],
            Value::Array(names) => {
                let names = names
                    .iter()
                    .filter_map(|name| name.as_str().map(str::to_owned));
                names.collect()
            }
            _ => {
                let field = "sasl-server-mechanisms";
                return Err(DecodeError::Missing { field });
            }
        }),
        INIT => {
            let mechanism = fields.text("mechanism")?;
            let mechanism = mechanism.ok_or(DecodeError::Missing { field: "mechanism" })?;
            SaslFrame::Init(SaslInit {
                mechanism: mechanism.to_owned(),
                initial_response: fields
                    .binary("initial-response")?
                    .map(|response| body.slice_ref(response)),
                hostname: fields.text("hostname")?.map(str::to_owned),
            })
        }
        CHALLENGE => SaslFrame::Challenge,
        RESPONSE => SaslFrame::Response,
        OUTCOME => {
            let code = fields.ubyte("code")?;
            let code = code.ok_or(DecodeError::Missing { field: "code" })?;
            SaslFrame::Outcome(SaslCode::from_byte(code).ok_or(DecodeError::Type {
                field: "code",
                expected: "0 to 4",
            })?)
        }
        _ => return Err(unexpected(&described)),
    })
}

/// Appends the body of a mechanisms frame: always an array of symbols, since uAMQP takes nothing
/// else.
pub fn encode_mechanisms(mechanisms: &[Mechanism], out: &mut BytesMut) {
    let mut names = BytesMut::new();
    write_compound(&mut names, 0xe0, |out| {
        out.extend_from_slice(&[0xa3]);
        for mechanism in mechanisms {
            let name = mechanism.name();
            out.extend_from_slice(&[u8::try_from(name.len()).unwrap_or(u8::MAX)]);
            out.extend_from_slice(name.as_bytes());
        }
        u32::try_from(mechanisms.len()).unwrap_or(u32::MAX)
    });
    let mut rest: &[u8] = &names;
    if let Ok(names) = Value::read(&mut rest) {
        write_described(out, MECHANISMS, |out| out.push(names));
    }
}

/// Appends the body of an init frame.
pub fn encode_init(init: &SaslInit, out: &mut BytesMut) {
    write_described(out, INIT, |out| {
        out.push(Value::Symbol(&init.mechanism));
        out.optional(
            init.initial_response
                .as_ref()
                .map(|response| Value::Binary(response)),
        );
        out.optional(init.hostname.as_deref().map(Value::Str));
    });
}

/// Appends the body of an outcome frame.
pub fn encode_outcome(code: SaslCode, out: &mut BytesMut) {
    write_described(out, OUTCOME, |out| out.push(Value::Ubyte(code.byte())));
}

/// Parts of a PLAIN response. No Debug: the password is a secret.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Plain<'a> {
    /// Identity to act as; mostly empty.
    pub authzid: &'a str,
    /// Identity that authenticates.
    pub authcid: &'a str,
    /// Its password: a SAS token.
    pub password: &'a str,
}

/// Splits `authzid NUL authcid NUL password` (RFC 4616). `None` when it has not three parts, is
/// not UTF-8, or names nobody.
#[must_use]
pub fn split_plain(response: &[u8]) -> Option<Plain<'_>> {
    let mut parts = std::str::from_utf8(response).ok()?.split('\0');
    let (authzid, authcid, password) = (parts.next()?, parts.next()?, parts.next()?);
    (parts.next().is_none() && !authcid.is_empty()).then_some(Plain {
        authzid,
        authcid,
        password,
    })
}

#[cfg(test)]
#[path = "sasl_tests.rs"]
mod tests;

//! AMQP 1.0 without sockets: what arrives is bytes, what leaves is bytes.
//!
//! This is the start of the server engine: the two layouts that come before any performative,
//! the protocol header ([`header`]) and the frame header ([`frame`]). Connection, session, link,
//! SASL and CBS follow with the AMQP issue (spec/amqp.md). There is no I/O, no clock and no
//! allocation here, and no function trusts a length before it was checked: the functions say
//! "more bytes are needed" (`Ok(None)`) or name the violation, as early as the bytes allow.
//!
//! Source: OASIS AMQP 1.0 part 2 sections 2.2 and 2.3, part 5 section 5.3.1.

#![deny(missing_docs)]

pub mod frame;
pub mod header;
pub mod limits;

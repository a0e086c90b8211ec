//! Fuzz targets: plain functions that take any bytes and assert what must always hold.
//!
//! The tests feed them frames of clients and hostile ones, whole and cut at every byte, and then
//! mutations for `EDGEHUB_FUZZ_SECONDS` (2 by default; all targets together) from a printed seed;
//! `EDGEHUB_FUZZ_SEED` replays it. A failure prints the input.

use bytes::{Bytes, BytesMut};

use crate::cbs::PutToken;
use crate::limits::{CBS_TOKEN_BYTES_MAX, DATA_SECTIONS_MAX};
use crate::message::{Body, MessageView, batch_items};
use crate::performative::{self, Performative};
use crate::sasl::{self, SaslFrame};
use crate::value::{Value, check};

/// What was read as a performative can be written, and is then read as the same.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_frame_body(data: &[u8]) {
    let body = Bytes::copy_from_slice(data);
    fuzz_values(data);
    let Ok((read, payload)) = performative::decode(&body) else {
        return;
    };
    assert!(body.ends_with(&payload));
    let mut out = BytesMut::new();
    let written = match &read {
        Performative::Open(open) => performative::encode_open(open, &mut out),
        Performative::Begin(begin) => performative::encode_begin(begin, &mut out),
        Performative::Attach(frame) => performative::encode_attach(&frame.attach, &mut out),
        Performative::Flow(flow) => {
            performative::encode_flow(flow, &mut out);
            Ok(())
        }
        Performative::Transfer(transfer) => {
            performative::encode_transfer(transfer, &mut out);
            Ok(())
        }
        Performative::Disposition(disposition) => {
            performative::encode_disposition(disposition, &mut out);
            Ok(())
        }
        // Errors are written without their info.
        Performative::Detach(_) | Performative::End(_) | Performative::Close(_) => return,
    };
    assert_eq!(written, Ok(()), "{read:?}");
    let again = performative::decode(&out.freeze());
    match (read, again) {
        (Performative::Transfer(read), Ok((Performative::Transfer(again), _))) => {
            assert_eq!(
                (&read.delivery_tag, read.handle, read.more, read.aborted),
                (&again.delivery_tag, again.handle, again.more, again.aborted)
            );
        }
        (Performative::Disposition(read), Ok((Performative::Disposition(again), _))) => {
            assert_eq!((read.first, read.last), (again.first, again.last));
        }
        (Performative::Attach(read), Ok((Performative::Attach(again), _))) => {
            assert_eq!(format!("{:?}", read.attach), format!("{:?}", again.attach));
        }
        // NaN is not equal to itself; its text is.
        (read, again) => assert_eq!(Ok(format!("{read:?}")), again.map(|r| format!("{:?}", r.0))),
    }
}

/// Values that are taken are read to the end, and again after they were written.
fn fuzz_values(data: &[u8]) {
    let mut rest = data;
    while !rest.is_empty() {
        let before = rest;
        let Ok(value) = Value::read(&mut rest) else {
            assert_eq!(before, rest, "nothing is consumed by an error");
            assert!(check(before).is_err());
            return;
        };
        walk(value, 0);
        let mut out = BytesMut::new();
        value.write(&mut out);
        let mut written: &[u8] = &out;
        let again = Value::read(&mut written);
        assert!(written.is_empty());
        assert_eq!(
            Ok(format!("{value:?}")),
            again.map(|again| format!("{again:?}"))
        );
    }
    assert!(check(data).is_ok());
}

/// Lists, maps and arrays have as many elements as they say.
fn walk(value: Value<'_>, depth: usize) {
    assert!(depth <= crate::limits::VALUE_DEPTH_MAX);
    let mut seen = 0;
    let mut each = |value| {
        seen += 1;
        walk(value, depth + 1);
    };
    let expected = match value {
        Value::List(list) => {
            list.iter().for_each(&mut each);
            list.len()
        }
        Value::Map(map) => {
            map.iter().for_each(|(key, value)| {
                each(key);
                each(value);
            });
            map.len() * 2
        }
        Value::Array(array) => {
            array.iter().for_each(&mut each);
            array.len()
        }
        Value::Described(described) => {
            each(described.descriptor());
            each(described.value());
            2
        }
        _ => 0,
    };
    assert_eq!(seen, expected, "{value:?}");
}

/// What was read as a SASL frame can be written and read again; no response is shown.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_sasl(data: &[u8]) {
    if let Some(plain) = sasl::split_plain(data) {
        assert!(!plain.authcid.is_empty());
        assert!(data.ends_with(plain.password.as_bytes()));
    }
    let body = Bytes::copy_from_slice(data);
    let Ok(read) = sasl::decode(&body) else {
        return;
    };
    let mut out = BytesMut::new();
    match &read {
        SaslFrame::Init(init) => {
            if init.initial_response.is_some() {
                assert!(format!("{read:?}").contains("initial_response: Some(\"***\")"));
            }
            sasl::encode_init(init, &mut out);
        }
        SaslFrame::Outcome(code) => sasl::encode_outcome(*code, &mut out),
        _ => return,
    }
    let symbol = match &read {
        SaslFrame::Init(init) => init.mechanism.is_ascii(),
        _ => true,
    };
    match sasl::decode(&out.freeze()) {
        Ok(again) => assert!(again == read),
        // The name of a mechanism may have come as a string that is no symbol.
        Err(error) => assert!(!symbol, "{error}"),
    }
}

/// A message is read without copies of its body, and so is each of a batch.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_message(data: &[u8]) {
    let payload = Bytes::copy_from_slice(data);
    let Ok(message) = MessageView::parse(&payload) else {
        return;
    };
    let within = payload.as_ptr_range();
    if let Body::Data(sections) = &message.body {
        assert!(!sections.is_empty() && sections.len() <= DATA_SECTIONS_MAX);
        assert_eq!(batch_items(&message.body).count(), sections.len());
        for item in sections.iter().filter(|item| !item.is_empty()) {
            assert!(within.contains(&item.as_ptr()), "a copy");
            drop(MessageView::parse(item));
        }
    }
    let maps = [
        message.delivery_annotations,
        message.message_annotations,
        message.application_properties,
        message.footer,
    ];
    for map in maps.into_iter().flatten() {
        assert_eq!(map.iter().count(), map.len());
    }
    if let Some(properties) = &message.properties {
        let mut writer = crate::message::MessageWriter::new();
        writer.properties(properties);
        let written = writer.finish();
        let again = MessageView::parse(&written);
        let again = again.ok().and_then(|message| message.properties);
        let again = again.as_ref();
        assert_eq!(
            again.and_then(|p| p.message_id.as_ref()),
            properties.message_id.as_ref()
        );
        assert_eq!(
            again.and_then(|p| p.correlation_id.as_ref()),
            properties.correlation_id.as_ref()
        );
        assert_eq!(again.and_then(|p| p.to), properties.to);
    }
}

/// A put-token request that is taken keeps its token to itself and within limits; an error says
/// nothing of it.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_cbs(data: &[u8]) {
    let payload = Bytes::copy_from_slice(data);
    match PutToken::parse(&payload) {
        Ok(request) => {
            let token = request.token.expose();
            assert!(!token.trim().is_empty() && token.len() <= CBS_TOKEN_BYTES_MAX);
            assert_eq!(format!("{:?}", request.token), "***");
        }
        Err((_, error)) => {
            let text = format!("{error} {error:?}");
            assert!(!text.contains("SharedAccess"), "{text}");
        }
    }
}

#[cfg(test)]
#[path = "fuzz_tests.rs"]
mod tests;

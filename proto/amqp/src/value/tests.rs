use bytes::BytesMut;
use proptest::prelude::*;
use serde_amqp::Value as Oracle;
use serde_amqp::described::Described as OracleDescribed;
use serde_amqp::descriptor::Descriptor;
use serde_amqp::primitives::{Array as OracleArray, OrderedMap, Symbol, Timestamp, Uuid};

use super::*;
use crate::limits::ARRAY_EMPTY_ELEMENTS_MAX;
use crate::vectors;

fn one(mut bytes: &[u8]) -> Result<Value<'_>, DecodeError> {
    let value = Value::read(&mut bytes)?;
    assert!(bytes.is_empty());
    Ok(value)
}

fn written(value: Value<'_>) -> Vec<u8> {
    let mut out = BytesMut::new();
    value.write(&mut out);
    out.to_vec()
}

/// What the oracle holds, for values that were read from its bytes.
fn oracle(value: Value<'_>) -> Oracle {
    match value {
        Value::Null => Oracle::Null,
        Value::Bool(v) => Oracle::Bool(v),
        Value::Ubyte(v) => Oracle::Ubyte(v),
        Value::Ushort(v) => Oracle::Ushort(v),
        Value::Uint(v) => Oracle::Uint(v),
        Value::Ulong(v) => Oracle::Ulong(v),
        Value::Byte(v) => Oracle::Byte(v),
        Value::Short(v) => Oracle::Short(v),
        Value::Int(v) => Oracle::Int(v),
        Value::Long(v) => Oracle::Long(v),
        Value::Float(v) => Oracle::Float(v.into()),
        Value::Double(v) => Oracle::Double(v.into()),
        Value::Char(v) => Oracle::Char(char::from_u32(v).unwrap()),
        Value::Timestamp(v) => Oracle::Timestamp(Timestamp::from_milliseconds(v)),
        Value::Uuid(v) => Oracle::Uuid(Uuid::from(v)),
        Value::Binary(v) => Oracle::Binary(v.to_vec().into()),
        Value::Str(v) => Oracle::String(v.to_owned()),
        Value::Symbol(v) => Oracle::Symbol(Symbol::from(v)),
        Value::List(list) => Oracle::List(list.iter().map(oracle).collect()),
        Value::Map(map) => {
            let pairs = map.iter().map(|(k, v)| (oracle(k), oracle(v)));
            Oracle::Map(pairs.collect::<OrderedMap<_, _>>())
        }
        Value::Array(array) => Oracle::Array(OracleArray(array.iter().map(oracle).collect())),
        Value::Described(described) => Oracle::Described(Box::new(OracleDescribed {
            descriptor: match described.descriptor() {
                Value::Ulong(code) => Descriptor::Code(code),
                Value::Symbol(name) => Descriptor::Name(Symbol::from(name)),
                other => panic!("{other:?}"),
            },
            value: oracle(described.value()),
        })),
        Value::Decimal(_) => panic!("not made here"),
    }
}

fn simple() -> impl Strategy<Value = Oracle> {
    prop_oneof![
        Just(Oracle::Null),
        any::<bool>().prop_map(Oracle::Bool),
        any::<u8>().prop_map(Oracle::Ubyte),
        any::<u16>().prop_map(Oracle::Ushort),
        prop_oneof![Just(0), 0u32..300, any::<u32>()].prop_map(Oracle::Uint),
        prop_oneof![Just(0), 0u64..300, any::<u64>()].prop_map(Oracle::Ulong),
        any::<i8>().prop_map(Oracle::Byte),
        any::<i16>().prop_map(Oracle::Short),
        prop_oneof![-200i32..200, any::<i32>()].prop_map(Oracle::Int),
        prop_oneof![-200i64..200, any::<i64>()].prop_map(Oracle::Long),
        any::<f32>().prop_map(|v| Oracle::Float(v.into())),
        any::<f64>().prop_map(|v| Oracle::Double(v.into())),
        any::<char>().prop_map(Oracle::Char),
        any::<i64>().prop_map(|v| Oracle::Timestamp(Timestamp::from_milliseconds(v))),
        any::<[u8; 16]>().prop_map(|v| Oracle::Uuid(Uuid::from(v))),
        binary().prop_map(|v| Oracle::Binary(v.into())),
        text().prop_map(Oracle::String),
        name().prop_map(|v| Oracle::Symbol(Symbol::from(v))),
    ]
}

fn binary() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        prop::collection::vec(any::<u8>(), 250..260)
    ]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["\\PC{0,20}", "[a-zä]{250,260}"]
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[ -~]{0,20}", "[a-z]{250,260}"]
}

fn tree() -> impl Strategy<Value = Oracle> {
    simple().prop_recursive(4, 48, 8, |inner| {
        let lists = prop::collection::vec(inner.clone(), 0..8).prop_map(Oracle::List);
        let pairs = prop::collection::vec((name(), inner.clone()), 0..6);
        let maps = pairs.prop_map(|pairs| {
            let pairs = pairs.into_iter();
            Oracle::Map(
                pairs
                    .map(|(k, v)| (Oracle::Symbol(Symbol::from(k)), v))
                    .collect(),
            )
        });
        let described = (
            prop_oneof![
                any::<u64>().prop_map(Descriptor::Code),
                name().prop_map(|n| Descriptor::Name(Symbol::from(n)))
            ],
            inner,
        )
            .prop_map(|(descriptor, value)| {
                Oracle::Described(Box::new(OracleDescribed { descriptor, value }))
            });
        let strings = prop::collection::vec(name(), 0..300).prop_map(|names| {
            Oracle::Array(OracleArray(
                names
                    .into_iter()
                    .map(|n| Oracle::Symbol(Symbol::from(n)))
                    .collect(),
            ))
        });
        prop_oneof![lists, maps, described, strings]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// serde_amqp writes, we read; we write, serde_amqp reads.
    #[test]
    fn agrees_with_the_oracle_both_ways(value in tree()) {
        let theirs = serde_amqp::to_vec(&value).unwrap();
        let read = one(&theirs).unwrap();
        prop_assert_eq!(&oracle(read), &value);
        let ours = written(read);
        prop_assert!(ours.len() <= theirs.len());
        let again: Oracle = serde_amqp::from_slice(&ours).unwrap();
        prop_assert_eq!(&again, &value);
        for end in 0..theirs.len().min(200) {
            prop_assert!(check(&theirs[..end]).is_err() || end == 0);
        }
    }
}

#[test]
fn smallest_forms_and_long_ones_are_the_same() {
    let same: &[(&[u8], &[u8])] = &[
        (b"\x56\x01", b"\x41"),
        (b"\x70\x00\x00\x00\x00", b"\x43"),
        (b"\x70\x00\x00\x00\xff", b"\x52\xff"),
        (b"\x80\x00\x00\x00\x00\x00\x00\x00\x00", b"\x44"),
        (b"\x71\x00\x00\x00\xc8", b"\x71\x00\x00\x00\xc8"),
        (b"\x71\xff\xff\xff\xff", b"\x54\xff"),
        (b"\x81\x00\x00\x00\x00\x00\x00\x00\x7f", b"\x55\x7f"),
        (b"\xb0\x00\x00\x00\x01x", b"\xa0\x01x"),
        (b"\xb3\x00\x00\x00\x01x", b"\xa3\x01x"),
        (b"\xd0\x00\x00\x00\x04\x00\x00\x00\x00", b"\x45"),
        (b"\xc0\x01\x00", b"\x45"),
        (
            b"\xd1\x00\x00\x00\x06\x00\x00\x00\x02\x43\x40",
            b"\xc1\x03\x02\x43\x40",
        ),
        (
            b"\xf0\x00\x00\x00\x06\x00\x00\x00\x01\x50\x07",
            b"\xe0\x03\x01\x50\x07",
        ),
    ];
    for (long, short) in same {
        assert_eq!(written(one(long).unwrap()), *short, "{long:02x?}");
        assert_eq!(
            one(short).unwrap(),
            one(&written(one(long).unwrap())).unwrap()
        );
    }
}

#[test]
fn accessors_know_types() {
    assert_eq!(one(b"\x54\xff").unwrap().as_i64(), Some(-1));
    assert_eq!(one(b"\x54\xff").unwrap().as_u64(), None);
    assert_eq!(Value::Ulong(u64::MAX).as_i64(), None);
    assert_eq!(Value::Ulong(u64::MAX).as_u64(), Some(u64::MAX));
    assert_eq!(Value::Str("5").as_u64(), None);
    let bytes = vectors::map(&[
        vectors::string("k"),
        vectors::string("text"),
        vectors::symbol("k"),
        vectors::symbol("sym"),
    ]);
    let Value::Map(map) = one(&bytes).unwrap() else {
        panic!()
    };
    assert_eq!((map.len(), map.is_empty()), (2, false));
    assert_eq!(map.get_str("k"), Some(Value::Str("text")));
    assert_eq!(map.get_symbol("k"), Some(Value::Symbol("sym")));
    assert_eq!(map.get_symbol("missing"), None);
}

#[test]
fn arrays_of_every_kind_are_walked() {
    let elements = |bytes: &'static [u8]| match one(bytes).unwrap() {
        Value::Array(array) => array.iter().collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(elements(b"\xe0\x02\x00\xa3"), []);
    assert_eq!(elements(b"\xe0\x01\x00"), []);
    assert_eq!(elements(b"\xe0\x02\x03\x40"), [Value::Null; 3]);
    assert_eq!(
        elements(b"\xe0\x04\x02\x56\x01\x00"),
        [Value::Bool(true), Value::Bool(false)]
    );
    // Descriptors of an array's elements are left out.
    assert_eq!(
        elements(b"\xe0\x07\x02\x00\x53\x01\x50\x07\x08"),
        [Value::Ubyte(7), Value::Ubyte(8)]
    );
    assert_eq!(
        elements(b"\xe0\x06\x02\xa3\x01a\x01b"),
        [Value::Symbol("a"), Value::Symbol("b")]
    );
}

#[test]
fn depth_is_limited_whatever_nests() {
    for bytes in vectors::nested(VALUE_DEPTH_MAX) {
        assert_eq!(check(&bytes), Ok(()));
    }
    for count in [VALUE_DEPTH_MAX + 1, 100_000] {
        for bytes in vectors::nested(count) {
            assert_eq!(check(&bytes), Err(DecodeError::TooDeep), "{count}");
            assert_eq!(one(&bytes), Err(DecodeError::TooDeep));
        }
    }
    // Descriptors nest, too; so do arrays.
    let mut descriptors = b"\x00".repeat(100_000);
    descriptors.extend(b"\x40".repeat(100_001));
    assert_eq!(check(&descriptors), Err(DecodeError::TooDeep));
    let mut arrays = b"\x40".to_vec();
    for _ in 0..40 {
        let size = u32::try_from(arrays.len() + 4).unwrap().to_be_bytes();
        arrays = [&b"\xf0"[..], &size, &1u32.to_be_bytes(), &arrays].concat();
    }
    assert_eq!(check(&arrays), Err(DecodeError::TooDeep));
}

#[test]
fn counts_and_sizes_that_lie_are_refused() {
    let lies: &[&[u8]] = &[
        // Elements that take no bytes, as many as there are numbers.
        b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40",
        b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x45",
        b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x41",
        // More, and fewer, than there are bytes for.
        b"\xc0\x02\x02\x40",
        b"\xc0\x03\x01\x40\x40",
        b"\xd0\x00\x00\x00\x05\xff\xff\xff\xff\x40",
        b"\xe0\x03\x02\x50\x01",
        b"\xe0\x04\x01\x50\x01\x02",
        b"\xf0\x00\x00\x00\x06\x40\x00\x00\x00\x84\x00",
        b"\xe0\x05\x02\xa1\x01a\x00\x00",
        // A key without a value.
        b"\xc1\x02\x01\x40",
    ];
    for lie in lies {
        let refused = check(lie);
        assert!(
            matches!(
                refused,
                Err(DecodeError::Count { .. } | DecodeError::Truncated)
            ),
            "{lie:02x?} {refused:?}"
        );
    }
    let truncated: &[&[u8]] = &[
        b"",
        b"\x00",
        b"\x00\x53\x10",
        b"\xa1",
        b"\xa1\x02a",
        b"\xb1\xff\xff\xff\xffa",
        b"\xc0\x00",
        b"\xd0\xff\xff\xff\xff\x00\x00\x00\x00",
        b"\xe0\x00",
        b"\x98\x00",
    ];
    for bytes in truncated {
        let mut rest = *bytes;
        assert_eq!(
            Value::read(&mut rest),
            Err(DecodeError::Truncated),
            "{bytes:02x?}"
        );
        assert_eq!(rest, *bytes);
    }
    let most = u8::try_from(ARRAY_EMPTY_ELEMENTS_MAX).unwrap();
    assert_eq!(check(&[0xe0, 2, most, 0x40]), Ok(()));
    assert!(check(&[0xe0, 2, most + 1, 0x40]).is_err());
}

#[test]
fn texts_are_what_they_say() {
    for bytes in [
        &b"\xa1\x01\xff"[..],
        b"\xa3\x02\xc3\xa4",
        b"\x56\x02",
        b"\xe0\x03\x01\x56\x02",
    ] {
        assert!(
            matches!(check(bytes), Err(DecodeError::Invalid { .. })),
            "{bytes:02x?}"
        );
    }
    for code in [0x01, 0x3f, 0x46, 0x57, 0x62, 0x75, 0x99, 0xa2, 0xc2, 0xff] {
        assert_eq!(check(&[code, 0, 0]), Err(DecodeError::Constructor { code }));
    }
}

#[test]
fn long_lists_and_maps_are_written_in_the_long_form() {
    for count in [254u32, 255, 256, 70_000] {
        let mut out = BytesMut::from(&b"before"[..]);
        write_compound(&mut out, 0xc0, |out| {
            out.extend_from_slice(&vec![0x40; count as usize]);
            count
        });
        let Value::List(list) = one(&out[6..]).unwrap() else {
            panic!()
        };
        assert_eq!(list.iter().count(), count as usize);
        assert_eq!(out[6], if count < 255 { 0xc0 } else { 0xd0 });
    }
}

use fe2o3_amqp_types::sasl as oracle;
use serde_amqp::primitives::{Array, Binary, Symbol};

use super::*;
use crate::vectors::{self, composite};

fn written(write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::new();
    write(&mut out);
    out.freeze()
}

#[test]
fn mechanisms_are_always_an_array() {
    let all = [
        Mechanism::Anonymous,
        Mechanism::Mssbcbs,
        Mechanism::Plain,
        Mechanism::External,
    ];
    for count in 1..=all.len() {
        let bytes = written(|out| encode_mechanisms(&all[..count], out));
        let read: oracle::SaslMechanisms = serde_amqp::from_slice(&bytes).unwrap();
        let names: Vec<_> = all[..count].iter().map(|m| m.name()).collect();
        let expected = Array(names.iter().copied().map(Symbol::from).collect());
        assert_eq!(read.sasl_server_mechanisms, expected);
        // The list holds one array of symbols (uAMQP takes nothing else).
        assert_eq!((bytes[6], bytes[9]), (0xe0, 0xa3), "{bytes:02x?}");
        let names: Vec<_> = names.into_iter().map(str::to_owned).collect();
        assert!(decode(&bytes).unwrap() == SaslFrame::Mechanisms(names));
    }
    let single = Bytes::from(composite(0x40, &[vectors::symbol("PLAIN")]));
    assert!(decode(&single).unwrap() == SaslFrame::Mechanisms(vec!["PLAIN".to_owned()]));
}

#[test]
fn init_agrees_with_the_oracle_both_ways() {
    for response in [None, Some(&b"\x00u\x00SECRET"[..]), Some(&[7; 600])] {
        for hostname in [None, Some("gw")] {
            let theirs = oracle::SaslInit {
                mechanism: Symbol::from("PLAIN"),
                initial_response: response.map(|r| Binary::from(r.to_vec())),
                hostname: hostname.map(str::to_owned),
            };
            let ours = SaslInit {
                mechanism: "PLAIN".to_owned(),
                initial_response: response.map(Bytes::copy_from_slice),
                hostname: hostname.map(str::to_owned),
            };
            let bytes = Bytes::from(serde_amqp::to_vec(&theirs).unwrap());
            assert!(decode(&bytes).unwrap() == SaslFrame::Init(ours.clone()));
            let bytes = written(|out| encode_init(&ours, out));
            let read: oracle::SaslInit = serde_amqp::from_slice(&bytes).unwrap();
            assert_eq!(read.mechanism, theirs.mechanism);
            assert_eq!(read.initial_response, theirs.initial_response);
            assert_eq!(read.hostname, theirs.hostname);
            assert!(!format!("{:?}", SaslFrame::Init(ours)).contains("SECRET"));
        }
    }
}

#[test]
fn outcomes_agree_with_the_oracle() {
    use oracle::SaslCode as Theirs;
    let codes = [
        (SaslCode::Ok, Theirs::Ok),
        (SaslCode::Auth, Theirs::Auth),
        (SaslCode::Sys, Theirs::Sys),
        (SaslCode::SysPerm, Theirs::SysPerm),
        (SaslCode::SysTemp, Theirs::SysTemp),
    ];
    for (ours, theirs) in codes {
        let bytes = written(|out| encode_outcome(ours, out));
        let read: oracle::SaslOutcome = serde_amqp::from_slice(&bytes).unwrap();
        assert_eq!(read.code, theirs);
        assert!(decode(&bytes).unwrap() == SaslFrame::Outcome(ours));
    }
    assert_eq!(SaslCode::from_byte(5), None);
}

#[test]
fn what_is_no_sasl_frame_is_refused() {
    let wrong = [
        vec![],
        vec![0x40],
        composite(0x41, &[]),
        composite(0x41, &[vec![0x40]]),
        composite(0x41, &[vec![0x54, 1]]),
        composite(0x41, &[vectors::symbol("PLAIN"), vectors::string("SECRET")]),
        composite(0x40, &[vec![0x40]]),
        composite(0x44, &[vec![0x50, 5]]),
        composite(0x44, &[vec![0x52, 0]]),
        composite(0x10, &[vectors::string("SECRET")]),
    ];
    for bytes in wrong {
        let error = decode(&Bytes::from(bytes.clone())).unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(!text.contains("SECRET"), "{text}");
    }
}

#[test]
fn plain_has_three_parts() {
    let parts =
        |response: &'static [u8]| split_plain(response).map(|p| (p.authzid, p.authcid, p.password));
    assert_eq!(
        parts(b"\0leaf1@sas.hub\0token"),
        Some(("", "leaf1@sas.hub", "token"))
    );
    assert_eq!(parts(b"a\0b\0"), Some(("a", "b", "")));
    for wrong in [
        &b""[..],
        b"\0",
        b"a\0b",
        b"a\0\0c",
        b"a\0b\0c\0d",
        b"\0\xff\0c",
    ] {
        assert_eq!(parts(wrong), None, "{wrong:?}");
    }
    assert_eq!(Mechanism::from_name("MSSBCBS"), Some(Mechanism::Mssbcbs));
    assert_eq!(Mechanism::from_name("plain"), None);
}

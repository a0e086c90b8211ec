//! Sessions as bytes of the store: key `mqtt/` and the identity, value an
//! [`MqttSession`].

use edgehub_proto::identity::Identity;
use edgehub_proto::records::MqttSession;
use prost::Message as _;

use super::{Session, StoredSubscription};

const PREFIX: &str = "mqtt/";
const VERSION: u32 = 1;

pub(super) fn key(identity: &Identity) -> Vec<u8> {
    format!("{PREFIX}{identity}").into_bytes()
}

/// Whose session a key names; none for keys of other records in the column.
pub(super) fn identity(key: &[u8]) -> Option<Identity> {
    let text = std::str::from_utf8(key).ok()?;
    Identity::parse(text.strip_prefix(PREFIX)?).ok()
}

pub(super) fn encode(session: &Session) -> Vec<u8> {
    let subscriptions = &session.subscriptions;
    MqttSession {
        version: VERSION,
        filters: subscriptions.iter().map(|s| s.filter.clone()).collect(),
        granted: subscriptions.iter().map(|s| u32::from(s.qos)).collect(),
    }
    .encode_to_vec()
}

/// None when the bytes are no session.
pub(super) fn decode(bytes: &[u8]) -> Option<Session> {
    let record = MqttSession::decode(bytes).ok()?;
    if record.filters.len() != record.granted.len() {
        return None;
    }
    let subscription = |(filter, granted): (String, u32)| StoredSubscription {
        filter,
        qos: u8::from(granted > 0),
    };
    Some(Session {
        subscriptions: record
            .filters
            .into_iter()
            .zip(record.granted)
            .map(subscription)
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_names_its_identity_and_no_other_record() {
        for id in ["d1", "edge1/modA", "mqtt"] {
            let id = Identity::parse(id).unwrap();
            assert_eq!(identity(&key(&id)), Some(id));
        }
        for other in [&b"slots/edge1/modA"[..], b"mqtt/", b"d1", b"\xff"] {
            assert_eq!(identity(other), None);
        }
    }

    #[test]
    fn lists_that_do_not_fit_are_no_session() {
        let record = MqttSession {
            version: 1,
            filters: vec!["a".into()],
            granted: Vec::new(),
        };
        assert_eq!(decode(&record.encode_to_vec()), None);
        assert_eq!(decode(&[0xff]), None);
    }

    proptest! {
        #[test]
        fn a_session_survives(subscriptions in proptest::collection::vec((any::<String>(), 0u8..2), 0..6)) {
            let subscriptions = subscriptions
                .into_iter()
                .map(|(filter, qos)| StoredSubscription { filter, qos })
                .collect();
            let session = Session { subscriptions };
            prop_assert_eq!(decode(&encode(&session)), Some(session));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode(&bytes);
        }
    }
}

//! Fuzz targets: plain functions that take any bytes and assert what must always hold.
//!
//! The tests replay the corpus in `fuzz/corpus/<target>/` and then mutate it for
//! `EDGEHUB_FUZZ_SECONDS` (1 by default; all targets together) from a printed seed. Each target
//! has its own sequence of inputs, so `EDGEHUB_FUZZ_SEED` replays the same ones on any machine,
//! and a failure prints the input: put it into the corpus. A cargo-fuzz wrapper only has to call
//! these functions.

use bytes::Bytes;

use crate::auth_chain::AuthChain;
use crate::bag;
use crate::identity::{Identity, IdentityError};
use crate::limits::PROPERTIES_MAX;
use crate::message::{Message, Property, SECURITY_INTERFACE, SystemProperties, SystemProperty};
use crate::sas::{self, SasToken};
use crate::stored;
use crate::timestamp::Timestamp;
use crate::topic::{self, PublishTopic};
use crate::username::{self, MqttUserName, UserNameError};

/// What was read from a bag is the same after it was written for upstream or for a client and
/// read again there, but for what is not sent on.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_bag(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut message = Message::default();
    if bag::decode_into(text, &mut message).is_err() {
        return;
    }
    assert!(message.properties.len() <= PROPERTIES_MAX);
    assert!(
        message
            .system
            .iter()
            .all(|(property, _)| property.mqtt_in())
    );
    // An absent value is written as an empty one.
    for property in &mut message.properties {
        property.value.get_or_insert_default();
    }
    let security = message.system.get(SystemProperty::InterfaceId);
    let security = security.is_some_and(|v| v.eq_ignore_ascii_case(SECURITY_INTERFACE));

    let mut sent_up = message.clone();
    sent_up.system = only(&message.system, |property| {
        property.forwarded_upstream() && (property != SystemProperty::InterfaceId || security)
    });
    assert_read_as(&bag::encode_upstream(&message), &sent_up);

    let mut delivered = message.clone();
    delivered
        .properties
        .retain(|p| p.key != "$.cdid" && p.key != "$.cmid");
    delivered.system = only(&message.system, SystemProperty::mqtt_out);
    for time in [SystemProperty::ExpiryTime, SystemProperty::CreationTime] {
        let Some(value) = delivered.system.get(time) else {
            continue;
        };
        match Timestamp::parse(value).map(|time| time.to_string()) {
            Some(normal) => delivered.system.set(time, normal),
            None => drop(delivered.system.remove(time)),
        }
    }
    let Ok(sender) = Identity::device("sender") else {
        return;
    };
    let mut for_input = delivered.clone();
    for_input.properties.push(Property {
        key: "$.cdid".to_owned(),
        value: Some("sender".to_owned()),
    });
    assert_read_as(&bag::encode_input(&message, &sender), &for_input);
    let bag = bag::encode_cloud_to_device(&message, &sender);
    assert!(!bag.is_empty());
    if delivered.properties.is_empty() && delivered.system.is_empty() {
        let to = "/devices/sender/messages/deviceBound";
        delivered.system.set(SystemProperty::To, to);
    }
    assert_read_as(&bag, &delivered);
}

fn only(system: &SystemProperties, kept: impl Fn(SystemProperty) -> bool) -> SystemProperties {
    system
        .iter()
        .filter(|(p, _)| kept(*p))
        .map(|(p, value)| (p, value.to_owned()))
        .collect()
}

fn assert_read_as(written: &str, expected: &Message) {
    let mut again = Message::default();
    assert_eq!(bag::decode_into(written, &mut again), Ok(()), "{written}");
    assert_eq!(&again, expected, "{written}");
}

/// A telemetry topic names its ids as they stand in the text.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_topic(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let PublishTopic::Telemetry {
        device_id,
        module_id,
        bag,
    } = topic::parse_publish(text)
    {
        assert!(!device_id.is_empty() && !device_id.contains('/'));
        let prefix = match module_id {
            Some(module) => format!("devices/{device_id}/modules/{module}/messages/events"),
            None => format!("devices/{device_id}/messages/events"),
        };
        assert!(
            text.starts_with(&prefix),
            "the ids are not those of the topic: {text}"
        );
        let tail = text.get(prefix.len()..).unwrap_or("");
        let whole = tail.strip_prefix('/').unwrap_or("");
        assert_eq!(whole.strip_suffix('/').unwrap_or(whole), bag, "{text}");
        // An id that is one leads back to the same topic: no other identity can be meant.
        if let Ok(identity) = identity(device_id, module_id) {
            let again = topic::telemetry(&identity, bag);
            assert_eq!(again.trim_end_matches('/'), text.trim_end_matches('/'));
        }
    }
}

fn identity(device: &str, module: Option<&str>) -> Result<Identity, IdentityError> {
    module.map_or_else(
        || Identity::device(device),
        |module| Identity::module(device, module),
    )
}

/// A user name that was read can be written as this hub writes it and read again.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_user_name(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(name) = MqttUserName::parse(text) else {
        return;
    };
    assert!(!name.api_version.trim().is_empty());
    let MqttUserName {
        identity,
        client_type,
        model_id,
        auth_chain,
        ..
    } = name;
    let (Some(client_type), Some(chain)) = (client_type, auth_chain) else {
        return;
    };
    let written = username::format("h", &identity, &client_type, &chain, model_id.as_deref());
    match MqttUserName::parse(&written) {
        Ok(again) => {
            assert_eq!(again.identity, identity);
            assert_eq!(again.client_type.as_deref(), Some(client_type.as_str()));
            assert_eq!(again.model_id, model_id);
            assert_eq!(again.auth_chain, Some(chain));
        }
        // Encoding may pass the length limit; nothing else may go wrong.
        Err(error) => assert_eq!(error, UserNameError::TooLong, "{written}"),
    }
}

/// A chain that was read survives its text; every element is an identity.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_auth_chain(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(chain) = AuthChain::parse(text) else {
        return;
    };
    assert_eq!(AuthChain::parse(&chain.to_string()).as_ref(), Ok(&chain));
    assert_eq!(chain.elements().first(), Some(chain.target()));
    assert_eq!(chain.actor().is_some(), chain.elements().len() > 1);
    for element in chain.elements() {
        assert_eq!(Identity::parse(element.as_str()).as_ref(), Ok(element));
        assert!(!element.as_str().contains([';', '+', '#', ' ']));
    }
}

/// A stored message that was read can be written and read again.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_stored(data: &[u8]) {
    let Ok(message) = stored::decode_message(Bytes::copy_from_slice(data)) else {
        return;
    };
    assert_eq!(
        stored::decode_message(stored::encode_message(&message)),
        Ok(message)
    );
}

/// A token that was read can be written and read again.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_sas(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(token) = SasToken::parse(text) else {
        return;
    };
    let seconds = token.expires_at_ms() / 1000;
    let written = sas::format(token.resource_raw(), token.signature(), seconds);
    match SasToken::parse(&written) {
        Ok(again) => {
            assert_eq!(again.resource_raw(), token.resource_raw());
            assert_eq!(again.signature(), token.signature());
        }
        // Encoding the signature may pass the length limit; nothing else may go wrong.
        Err(error) => assert_eq!(error, sas::SasError::TooLong, "{written}"),
    }
    assert!(format!("{token:?}").contains("signature: \"***\""));
    for audience in sas::audiences(token.resource_raw()) {
        assert!(!audience.host.is_empty() && !audience.device_id.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::clock::{Clock, SystemClock};

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 6] = [
        ("auth_chain", fuzz_auth_chain),
        ("bag", fuzz_bag),
        ("sas", fuzz_sas),
        ("stored", fuzz_stored),
        ("topic", fuzz_topic),
        ("user_name", fuzz_user_name),
    ];

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let mut files: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        let inputs: Vec<_> = files
            .iter()
            .map(|file| std::fs::read(file).unwrap())
            .collect();
        assert!(!inputs.is_empty(), "no corpus for {target}");
        inputs
    }

    /// xorshift: repeatable from its seed on every machine.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 >> 11).unwrap() % limit.max(1)
        }
    }

    fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
        const WORDS: &[&[u8]] = &[
            b"%24",
            b"$.",
            b"$.cdid=",
            b"$.ifid=",
            b"&",
            b"=",
            b"/",
            b"//",
            b"%",
            b"%2525",
            b"%ff",
            b"+",
            b"?",
            b"#",
            b";",
            b"\xc3\xa4",
            b"\xff",
            b"\0",
            b"modules/",
            b"messages/events/",
            b"SharedAccessSignature ",
            b"se=9e99",
            b"?api-version=",
            b"auth-chain=",
        ];
        for _ in 0..=random.below(4) {
            let at = random.below(input.len() + 1);
            match random.below(6) {
                0 if !input.is_empty() => {
                    let at = at.min(input.len() - 1);
                    input[at] ^= 1 << random.below(8);
                }
                1 if at < input.len() => {
                    input.remove(at);
                }
                2 => input.truncate(at),
                3 => {
                    let from = random.below(other.len() + 1);
                    input.splice(at..at, other[from..].iter().copied());
                }
                _ => {
                    input.splice(at..at, WORDS[random.below(WORDS.len())].iter().copied());
                }
            }
        }
        input.truncate(8192);
    }

    #[test]
    fn the_corpus_holds() {
        for (target, run) in TARGETS {
            for input in corpus(target) {
                run(&input);
            }
        }
    }

    /// Prints the input when the target panics.
    struct Shown<'a>(&'a str, &'a [u8]);

    impl Drop for Shown<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                println!("{}: the input was \"{}\"", self.0, self.1.escape_ascii());
            }
        }
    }

    #[test]
    fn fuzz_seeded() {
        let clock = SystemClock::new();
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let seconds: f64 = variable("EDGEHUB_FUZZ_SECONDS").parse().unwrap_or(1.0);
        let seed: u64 = variable("EDGEHUB_FUZZ_SEED")
            .parse()
            .unwrap_or_else(|_| clock.unix_ms());
        println!("EDGEHUB_FUZZ_SEED={seed}");
        let share = Duration::from_secs_f64(seconds.clamp(0.01, 86_400.0) / TARGETS.len() as f64);
        for (target, run) in TARGETS {
            let inputs = corpus(target);
            // xorshift stays at zero once there.
            let mut random = Random(seed | 1);
            let mut runs = 0u64;
            let end = clock.instant() + share;
            while clock.instant() < end {
                let mut input = inputs[random.below(inputs.len())].clone();
                let other = &inputs[random.below(inputs.len())];
                mutate(&mut input, other, &mut random);
                let _shown = Shown(target, &input);
                run(&input);
                runs += 1;
            }
            println!("{target}: {runs} inputs");
            assert!(runs > 0, "{target}");
        }
    }
}

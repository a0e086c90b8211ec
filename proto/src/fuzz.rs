//! Fuzz targets: plain functions that take any bytes and assert what must always hold.
//!
//! The tests replay the corpus in `fuzz/corpus/<target>/` and then mutate it for
//! `EDGEHUB_FUZZ_SECONDS` (1 by default) from a printed seed; `EDGEHUB_FUZZ_SEED` replays one.
//! A cargo-fuzz wrapper only has to call these functions.

use crate::bag;
use crate::message::{Message, SystemProperty};
use crate::sas::{self, SasToken};
use crate::topic::{self, PublishTopic};
use crate::username::MqttUserName;

/// What was read from a bag is the same after being written and read again.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_bag(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut message = Message::default();
    if bag::decode_into(text, &mut message).is_err() {
        return;
    }
    assert_eq!(message.system.get(SystemProperty::ConnectionDeviceId), None);
    // A delivery writes absent values as empty ones and leaves out what clients do not see.
    for property in &mut message.properties {
        property.value.get_or_insert_default();
    }
    message.system.remove(SystemProperty::OutputName);
    message.system.remove(SystemProperty::InterfaceId);
    let mut again = Message::default();
    let written = bag::encode_delivery(&message);
    assert_eq!(bag::decode_into(&written, &mut again), Ok(()), "{written}");
    assert_eq!(again, message, "{written}");
}

/// A telemetry topic names its ids as they stand in the text.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_topic(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let PublishTopic::Telemetry { device_id, module_id, bag } = topic::parse_publish(text) {
        assert!(!device_id.is_empty() && !device_id.contains('/'));
        let prefix = match module_id {
            Some(module) => format!("devices/{device_id}/modules/{module}/messages/events"),
            None => format!("devices/{device_id}/messages/events"),
        };
        assert!(text.starts_with(&prefix) && text.contains(bag));
    }
    // The user name is cut at the same separators: kept beside the topics.
    let _ = MqttUserName::parse(text);
}

/// A token that was read can be written and read again.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_sas(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(token) = SasToken::parse(text) else { return };
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

    const TARGETS: [(&str, fn(&[u8])); 3] =
        [("bag", fuzz_bag), ("sas", fuzz_sas), ("topic", fuzz_topic)];

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let inputs: Vec<_> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
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
        const WORDS: [&[u8]; 12] = [
            b"%24", b"$.", b"&", b"=", b"/", b"%", b"%2525", b"+", b"?", b"SharedAccessSignature ",
            b"modules/", b"\xff",
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

    #[test]
    fn seeded_mutations_hold() {
        let clock = SystemClock::new();
        let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let seconds: u64 = variable("EDGEHUB_FUZZ_SECONDS").unwrap_or(1);
        let seed: u64 = variable("EDGEHUB_FUZZ_SEED").unwrap_or_else(|| clock.unix_ms() | 1);
        println!("EDGEHUB_FUZZ_SEED={seed}");
        let mut random = Random(seed);
        let mut runs = 0u64;
        for (target, run) in TARGETS {
            let inputs = corpus(target);
            let end = clock.instant() + Duration::from_millis(seconds * 1000 / 3);
            while clock.instant() < end {
                let mut input = inputs[random.below(inputs.len())].clone();
                let other = &inputs[random.below(inputs.len())];
                mutate(&mut input, other, &mut random);
                run(&input);
                runs += 1;
            }
        }
        println!("{runs} mutated inputs");
        assert!(runs > 0);
    }
}

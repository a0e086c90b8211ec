//! Fuzz targets: plain functions that take any bytes and assert what must always hold.
//!
//! As in `edgehub_proto::fuzz`: the tests replay the corpus in `fuzz/corpus/<target>/` and then
//! mutate it for `EDGEHUB_FUZZ_SECONDS` from a printed seed. [`fuzz_bytes`] feeds the machine what
//! a peer might send, [`fuzz_packets`] plays a dialogue between a client, the machine and a hub
//! and compares every byte of the output with what an oracle expects.

use std::time::{Duration, Instant};

use edgehub_proto::clock::{Clock, ManualClock};

use super::limits::PACKET_BYTES_MAX;
use super::machine::{Event, Machine, Timing};

mod dialogue;

use dialogue::Dialogue;

const TIMING: Timing = Timing {
    connect_max: Duration::from_secs(60),
    keep_alive_max: Duration::from_secs(1767),
};

fn beginning() -> Instant {
    ManualClock::new(0).instant()
}

/// A CONNECT of an SDK.
const CONNECT: &[u8] = b"\x10\x26\0\x04MQTT\x04\xc0\0\x3c\0\x02d1\0\x13h/d1/?api-version=1\0\x01t";

/// Any bytes end in packets or in a close: nothing panics, nothing piles up, nothing comes after
/// the close, and the peer is told less than it said. The first byte of `data` says how the rest
/// is cut, and whether a CONNECT is put in front.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_bytes(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else {
        return;
    };
    let mut stream = Vec::new();
    if how & 0x80 != 0 {
        stream.extend_from_slice(CONNECT);
    }
    stream.extend_from_slice(rest);
    let part_length = 1 + usize::from(how & 0x3f) * 7;

    let now = beginning();
    let mut machine = Machine::new(TIMING, now);
    let (mut read, mut written) = (0, 0);
    let mut closed = false;
    for part in stream.chunks(part_length) {
        if !machine.wants_input() {
            break;
        }
        read += part.len();
        machine.receive(part, now);
        while let Some(event) = machine.poll() {
            assert!(!closed, "nothing comes after the close: {event:?}");
            match event {
                Event::Connect(_) => machine.accept(how & 1 != 0, now),
                Event::Publish(publish) if how & 2 != 0 => machine.handled(publish.sequence),
                Event::Publish(publish) => machine.committed(publish.sequence),
                Event::Subscribe { packet_id, filters } => {
                    machine.subscribed(packet_id, dialogue::codes(filters.len()));
                }
                Event::Unsubscribe { packet_id, .. } => machine.unsubscribed(packet_id),
                Event::Acknowledged(token) => panic_about(token),
                Event::Close(_) => closed = true,
            }
        }
        if let Some(output) = machine.output() {
            machine.written(output.len());
            written += output.len();
        }
        let buffered_max = PACKET_BYTES_MAX as usize + 5 + part.len();
        assert!(machine.buffered() <= buffered_max);
        assert!(written <= read + 4, "{written} bytes for {read}");
        assert_eq!(closed, !machine.wants_input());
    }
}

fn panic_about(token: crate::hub::DeliveryToken) {
    assert!(
        token.stream == u16::MAX,
        "an acknowledgement of a delivery that nobody sent: {token:?}"
    );
}

/// A dialogue whose every step is written in `data` goes as the oracle says, byte for byte:
/// PUBACKs in the order of the publishes and never before their commit, packet ids unique among
/// what is on its way, acknowledgements in any order, nothing after the end.
///
/// # Panics
/// When that does not hold.
pub fn fuzz_packets(data: &[u8]) {
    let mut dialogue = Dialogue::begin();
    let mut rest = data;
    // Few enough that no limit of the machine is reached.
    for _ in 0..2_000 {
        let Some((step, later)) = dialogue::read_step(rest) else {
            break;
        };
        rest = later;
        dialogue.take(step);
    }
    dialogue.end();
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use edgehub_proto::clock::SystemClock;

    use super::*;

    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 2] = [("mqtt_bytes", fuzz_bytes), ("mqtt_packets", fuzz_packets)];

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
            b"\x30",
            b"\x32",
            b"\x3a\x0c\0\x05topic\0\x01",
            b"\x40\x02\0\x01",
            b"\x82\x06\0\x01\0\x01#\x01",
            b"\xa2\x05\0\x01\0\x01#",
            b"\xc0\0",
            b"\xe0\0",
            b"\x10",
            b"\xff\xff\xff\x7f",
            b"\x80\x80\x80\x80",
            b"\0\0",
            b"\xff\xff",
            b"$iothub/twin/GET/?$rid=1",
            b"\xc3\xa4",
            b"\xff",
            b"+/#",
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

    #[test]
    fn the_connect_of_the_targets_is_one() {
        let mut machine = Machine::new(TIMING, beginning());
        machine.receive(CONNECT, beginning());
        assert!(matches!(machine.poll(), Some(Event::Connect(_))));
        assert_eq!(machine.buffered(), 0);
    }
}

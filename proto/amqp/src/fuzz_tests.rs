use std::panic::catch_unwind;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::*;
use crate::connection::{Config, Connection, Event, LinkTerms, Outgoing};
use crate::header::ProtocolHeader;
use crate::performative::Outcome;
use crate::vectors;

type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 5] = [
    ("sequence", fuzz_sequence),
    ("frame_body", fuzz_frame_body),
    ("sasl", fuzz_sasl),
    ("message", fuzz_message),
    ("cbs", fuzz_cbs),
];

/// Frames of a sequence.
const SEQUENCE_MAX: usize = 64;

static FRAMES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(vectors::all);

fn framed(channel: u8, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len() + 8).unwrap().to_be_bytes();
    [&size[..], &[2, 0, 0, channel], body].concat()
}

/// Each byte is a frame of the corpora, on one of two channels, behind an open and a begin. Whoever
/// has the connection takes every second link, settles every other delivery, and sends what it may.
/// What is written are whole frames that the peer can take, and nothing follows the close.
fn fuzz_sequence(data: &[u8]) {
    sequence(data);
}

/// How many links and deliveries came of it.
fn sequence(data: &[u8]) -> (usize, usize) {
    let now = instant();
    let mut connection = Connection::new(Config::new("hub"), now);
    let mut input = BytesMut::new();
    input.extend_from_slice(&ProtocolHeader::AMQP.encode());
    let (mut links, mut deliveries) = (Vec::new(), 0);
    let beginning = [&0, &1];
    for byte in beginning.into_iter().chain(data.iter().take(SEQUENCE_MAX)) {
        let body = &FRAMES[usize::from(*byte & 0x7f) % FRAMES.len()];
        input.extend_from_slice(&framed(*byte >> 7, body));
        let before = connection.is_closed();
        connection.receive(&mut input, now);
        while let Some(event) = connection.poll() {
            assert!(!before, "{event:?} behind the end");
            match event {
                Event::Attached { link, .. } if links.len() % 2 == 0 => {
                    links.push(link);
                    let terms = LinkTerms {
                        credit: 3,
                        ..LinkTerms::default()
                    };
                    connection.accept(link, &terms);
                }
                Event::Attached { link, .. } => {
                    links.push(link);
                    let error = performative::ErrorInfo::new("amqp:not-allowed", "no");
                    connection.refuse(link, &error);
                }
                Event::Delivery(incoming) => {
                    deliveries += 1;
                    if deliveries % 2 == 0 {
                        connection.settle(incoming.received, Outcome::Accepted);
                    }
                }
                Event::Settled { link, sent, .. } => connection.settle_sent(link, sent),
                _ => {}
            }
        }
        for link in &links {
            if connection.can_send(*link) {
                let delivery = Outgoing {
                    tag: b"tag",
                    message_format: 0,
                    settled: false,
                    payload: Bytes::from_static(&[7; 700]),
                };
                let _ = connection.send(*link, delivery);
            }
        }
        written(&mut connection, byte);
    }
    (links.len(), deliveries)
}

#[test]
fn sequences_get_as_far_as_links_and_deliveries() {
    let frames = || 0..u8::try_from(FRAMES.len()).unwrap();
    let pairs = frames().flat_map(|first| frames().map(move |second| sequence(&[first, second])));
    let (links, deliveries) = pairs.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    assert!(links > 10 && deliveries > 0, "{links}, {deliveries}");
}

/// Takes what was written, which is a header at the beginning and whole frames.
fn written(connection: &mut Connection, byte: &u8) {
    let mut output = BytesMut::new();
    while let Some(bytes) = connection.output() {
        output.extend_from_slice(&bytes);
    }
    let mut rest: &[u8] = &output;
    if rest.starts_with(b"AMQP") {
        rest = &rest[8..];
    }
    let mut closed = false;
    while let Some(size) = rest.first_chunk::<4>() {
        assert!(!closed, "{byte}: a frame behind the close");
        let size = usize::try_from(u32::from_be_bytes(*size)).unwrap();
        assert!((8..=rest.len()).contains(&size), "{byte}: {size}");
        let body = Bytes::copy_from_slice(&rest[8..size]);
        if !body.is_empty() {
            let (read, _) = performative::decode(&body).unwrap();
            closed = matches!(read, Performative::Close(_));
        }
        rest = &rest[size..];
    }
    assert!(rest.is_empty(), "{byte}: a part of a frame");
}

#[allow(clippy::disallowed_methods, reason = "any moment will do")]
fn instant() -> Instant {
    Instant::now()
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

/// Constructors, sizes and counts that matter.
const WORDS: &[&[u8]] = &[
    b"\x00",
    b"\x00\x53\x12",
    b"\x00\x53\x28",
    b"\x00\x53\x75\xa0\x01x",
    b"\x00\x53\x77",
    b"\x40",
    b"\x43",
    b"\x45",
    b"\x56\x01",
    b"\xa3\x01a",
    b"\xc0\x01\x00",
    b"\xc0\x02\x01\x40",
    b"\xc1\x01\x00",
    b"\xc1\x05\x02\xa3\x01a\x40",
    b"\xe0\x01\x00",
    b"\xe0\x02\x00\xa3",
    b"\xe0\x02\x08\x45",
    b"\xe0\x08\x01\xc1\x05\x02\x54\x01\x54\x02",
    b"\xe0\x07\x02\x00\x53\x01\x50\x07\x08",
    b"\xe0\x0a\x02\xe0\x03\x01\x50\x07\x03\x01\x50\x08",
    b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40",
    b"\xd0\x00\x00\x00\x04\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
];

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(3) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => drop(input.remove(at)),
            2 if at < input.len() => {
                input[at] = u8::try_from(random.below(256)).unwrap();
            }
            3 => input.truncate(at),
            4 => {
                let from = random.below(other.len() + 1);
                input.splice(at..at, other[from..].iter().copied());
            }
            // A value in the place of a null: sizes in front are put right.
            _ => {
                let nulls: Vec<_> = (0..input.len()).filter(|at| input[*at] == 0x40).collect();
                let word = WORDS[random.below(WORDS.len())];
                let at = match nulls.get(random.below(nulls.len())) {
                    Some(at) => *at,
                    None => {
                        input.splice(at..at, word.iter().copied());
                        continue;
                    }
                };
                input.splice(at..=at, word.iter().copied());
                grow(input, at, word.len() - 1);
            }
        }
    }
}

/// Sizes of the short lists and maps around `at` after its value has grown.
fn grow(input: &mut [u8], at: usize, by: usize) {
    for start in 0..at {
        if !matches!(input[start], 0xc0 | 0xc1) || start + 2 > at {
            continue;
        }
        let size = usize::from(input[start + 1]);
        if start + 2 + size > at && size + by < 256 {
            input[start + 1] = u8::try_from(size + by).unwrap();
        }
    }
}

fn judge((name, target): Target, input: &[u8]) {
    if catch_unwind(|| target(input)).is_err() {
        panic!("{name} fails with {}", vectors::hex(input));
    }
}

#[test]
fn corpora_and_every_beginning_of_them() {
    for target in TARGETS {
        for input in vectors::all() {
            judge(target, &input);
            for end in 0..input.len().min(512) {
                judge(target, &input[..end]);
            }
        }
    }
}

#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "how long to go on is no behaviour"
)]
fn mutations_of_the_corpora() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let seconds = number("EDGEHUB_FUZZ_SECONDS").unwrap_or(2);
    let seed = number("EDGEHUB_FUZZ_SEED").unwrap_or(0x9e37_79b9_7f4a_7c15);
    println!("EDGEHUB_FUZZ_SEED={seed}");
    let corpus = vectors::all();
    for target in TARGETS {
        let share = Duration::from_secs(seconds) / u32::try_from(TARGETS.len()).unwrap();
        let (start, mut runs) = (Instant::now(), 0u64);
        let mut random = Random(seed | 1);
        while start.elapsed() < share || runs < 1_000 {
            let mut input = corpus[random.below(corpus.len())].clone();
            let other = &corpus[random.below(corpus.len())];
            if input.len() > 2_048 {
                continue;
            }
            mutate(&mut input, other, &mut random);
            judge(target, &input);
            runs += 1;
        }
        println!("{}: {runs} inputs", target.0);
    }
}

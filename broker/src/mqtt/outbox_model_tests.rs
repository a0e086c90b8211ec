//! The outbox against a model: streams of deliveries, a client that reads and acknowledges when it
//! likes.

use std::collections::HashMap;

use proptest::prelude::*;

use super::outbox_tests::{Client, delivery};
use crate::hub::{OUTBOX_EVENTS_MAX, ToClient};

proptest! {
    /// A service offers each stream in order, the client reads and acknowledges when it likes:
    /// every delivery is sent once, in the order of its stream, with ids that are unique among
    /// what is on its way, and settled once.
    #[test]
    fn every_delivery_is_sent_once_in_the_order_of_its_stream(
        steps in proptest::collection::vec((0u8..6, any::<prop::sample::Index>()), 1..200),
    ) {
        let mut client = Client::all_inputs();
        let mut offered: HashMap<u16, u64> = HashMap::new();
        let mut sent: HashMap<u16, u64> = HashMap::new();
        let mut on_their_way: Vec<u16> = Vec::new();
        let (mut offers, mut settled) = (0, 0);
        let drain = std::iter::repeat_n((5, None), 400).chain(std::iter::repeat_n((4, None), 1));
        let steps = steps.into_iter().map(|(what, index)| (what, Some(index)));
        for (what, index) in steps.chain(drain) {
            match (what, index) {
                (0..=3, Some(index)) if offers < OUTBOX_EVENTS_MAX => {
                    let stream = u16::from(what) * 5;
                    let next = offered.entry(stream).or_default();
                    // Steps of half an id range: every third has the id of the first.
                    let batch: Vec<_> = (0..=index.index(3) as u64)
                        .map(|more| delivery(stream, (*next + more) * 2_048, "in1"))
                        .collect();
                    *next += batch.len() as u64;
                    offers += 1;
                    client.offer(ToClient::Inputs(batch));
                }
                (0..=4, _) => {
                    for publish in client.reads() {
                        prop_assert!(!on_their_way.contains(&publish.pkid));
                        on_their_way.push(publish.pkid);
                        let stream = (publish.pkid - 1) / 4_096;
                        let expected = sent.entry(stream).or_default();
                        let number: u64 = std::str::from_utf8(&publish.payload).unwrap().parse().unwrap();
                        prop_assert_eq!(number, *expected * 2_048);
                        *expected += 1;
                    }
                    client.pump();
                }
                _ => {
                    client.pump();
                    if on_their_way.is_empty() {
                        for publish in client.reads() {
                            on_their_way.push(publish.pkid);
                            *sent.entry((publish.pkid - 1) / 4_096).or_default() += 1;
                        }
                    }
                    if !on_their_way.is_empty() {
                        let at = index.map_or(0, |index| index.index(on_their_way.len()));
                        client.acknowledges(on_their_way.swap_remove(at));
                        settled += client.outbox.take_settled().len() as u64;
                    }
                }
            }
        }
        let total: u64 = offered.values().sum();
        prop_assert_eq!(sent.values().sum::<u64>(), total);
        prop_assert_eq!(settled, total);
        prop_assert_eq!(client.peer.machine.outstanding(), 0);
    }
}

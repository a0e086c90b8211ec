//! What goes out next: which queue is read, which message is sent, and what a refusal undoes.

use std::ops::Range;
use std::sync::Arc;

use edgehub_storage::{Outcome, ReadBatch};
use smallvec::SmallVec;

use super::{Client, Input, Machine};
use crate::delivery::limits::{OFFSETS_OUT_MAX, WINDOW_BYTES_MAX};
use crate::delivery::stream::Stream;
use crate::hub::{Delivery, DeliveryToken, OfferError};
use crate::telemetry::metrics::DropReason;

impl<Q> Machine<Q> {
    /// The stream that must be read before anything can be said about its input, if there is one
    /// and its messages could go out.
    pub(in crate::delivery) fn next_read(&self) -> Option<(usize, u64)> {
        if !self.has_room() {
            return None;
        }
        let inputs = self.inputs.iter().filter(|input| self.may_send(input));
        inputs
            .filter_map(|input| self.first_stream(input))
            .find_map(|(index, stream)| {
                let is_next = stream.waiting.is_empty() && !stream.stalled;
                is_next.then_some((index, stream.cursor))
            })
    }

    /// Takes what a read of a stream brought.
    pub(in crate::delivery) fn filled(&mut self, stream: usize, batch: ReadBatch) {
        if let Some(stream) = self.streams.get_mut(stream) {
            // No progress, and nobody says why: not again at once.
            stream.stalled = batch.next <= stream.cursor;
            stream.fill(batch, self.now);
        }
    }

    /// A stream cannot be read before [`Self::retry`].
    pub(in crate::delivery) fn stalled(&mut self, stream: usize) {
        if let Some(stream) = self.streams.get_mut(stream) {
            stream.stalled = true;
        }
    }

    /// Whether something waits for [`Self::retry`].
    pub(in crate::delivery) fn wants_retry(&self) -> bool {
        self.client == Client::Full
            || (self.client == Client::Open && self.streams.iter().any(|s| s.stalled))
    }

    /// Streams whose growth would let something be sent.
    pub(in crate::delivery) fn hungry_mut(&mut self) -> impl Iterator<Item = &mut Stream<Q>> {
        let has_room = self.has_room();
        let paused = self.inputs.iter().filter(|input| input.paused);
        let paused: SmallVec<[Range<usize>; 4]> =
            paused.map(|input| input.streams.clone()).collect();
        let streams = self.streams.iter_mut().enumerate();
        streams
            .filter(move |(index, stream)| {
                has_room
                    && !stream.retired
                    && stream.is_drained()
                    && paused.iter().all(|range| !range.contains(index))
            })
            .map(|(_, stream)| stream)
    }

    fn has_room(&self) -> bool {
        self.client == Client::Open
            && self.out < self.window
            && (self.out == 0 || self.out_bytes < WINDOW_BYTES_MAX)
    }

    /// An input may not take the whole window when there are others: a module that does not get on
    /// with one of them would starve the rest.
    fn share(&self) -> usize {
        let others = self.inputs.len().saturating_sub(1);
        self.window - others.min(self.window / 4)
    }

    fn may_send(&self, input: &Input) -> bool {
        !input.paused && input.out < self.share()
    }

    /// The stream whose turn it is in an input: the best priority that has something, or may have.
    fn first_stream(&self, input: &Input) -> Option<(usize, &Stream<Q>)> {
        let streams = self.streams.get(input.streams.clone())?;
        let mut streams = input.streams.clone().zip(streams);
        streams.find(|(_, stream)| !stream.is_drained())
    }

    /// The deliveries that go out now. To be followed by [`Self::offered`] or [`Self::refused`].
    pub(in crate::delivery) fn batch(&mut self, now_ms: u64) -> Vec<Delivery> {
        let mut batch = Vec::new();
        self.staged.clear();
        while self.has_room()
            && let Some((input, index)) = self.next_sendable()
        {
            let Some(delivery) = self.take_waiting(index, now_ms) else {
                continue;
            };
            if batch.is_empty() {
                let waiting: usize = self.streams.iter().map(|s| s.waiting.len()).sum();
                batch.reserve(1 + waiting.min(self.window - self.out));
            }
            batch.push(delivery);
            self.turn = input + 1;
        }
        batch
    }

    /// The next input in turn that can send, and its stream.
    fn next_sendable(&self) -> Option<(usize, usize)> {
        let count = self.inputs.len();
        (0..count).find_map(|step| {
            let place = (self.turn + step) % count;
            let input = self.inputs.get(place)?;
            if !self.may_send(input) {
                return None;
            }
            let (index, stream) = self.first_stream(input)?;
            let sendable = !stream.waiting.is_empty()
                && stream.is_in_reach()
                && (!stream.is_shared() || self.is_number_left());
            sendable.then_some((place, index))
        })
    }

    /// Whether a new number of the shared slot is near enough to the oldest one that is in use.
    fn is_number_left(&self) -> bool {
        let shared = self.streams.iter().filter(|stream| stream.is_shared());
        let lowest = shared.filter_map(Stream::lowest_number).min();
        lowest.is_none_or(|lowest| self.next_shared - lowest < OFFSETS_OUT_MAX)
    }

    /// Moves the first waiting item of a stream out; none when it is over instead.
    fn take_waiting(&mut self, index: usize, now_ms: u64) -> Option<Delivery> {
        let stream = self.streams.get_mut(index)?;
        let mut item = stream.waiting.pop_front()?;
        // The last moment to look (design.md D9).
        if item.is_expired(now_ms) {
            stream.settle(&item, Outcome::Expired);
            self.end(index, &item, Some(DropReason::TtlExpiry));
            return None;
        }
        let Some(message) = item.decode() else {
            tracing::error!(
                queue = %stream.source.id, offset = item.offset,
                "a stored message cannot be decoded and is dropped"
            );
            stream.settle(&item, Outcome::Dropped);
            self.end(index, &item, Some(DropReason::Damaged));
            return None;
        };
        item.number = stream.number(item.offset, &mut self.next_shared);
        item.sent_at = self.now;
        let delivery = Delivery {
            token: DeliveryToken {
                stream: stream.source.slot,
                number: item.number,
            },
            input: Arc::clone(&stream.source.input),
            redelivered: item.redelivered,
            sender: item.sender.clone(),
            message,
        };
        self.staged.push((index, item.number));
        self.out += 1;
        self.out_bytes += item.bytes;
        stream.push_out(item);
        if let Some(input) = self.input_of(index) {
            input.out += 1;
        }
        Some(delivery)
    }

    /// The last batch is in the client's outbox.
    pub(in crate::delivery) fn offered(&mut self) {
        self.staged.clear();
    }

    /// The last batch was not taken: it waits again.
    pub(in crate::delivery) fn refused(&mut self, error: OfferError) {
        let staged = std::mem::take(&mut self.staged);
        for (index, number) in staged.iter().rev() {
            let stream = self.streams.get_mut(*index);
            let Some(item) = stream.and_then(|stream| stream.take_out(*number)) else {
                continue;
            };
            self.out -= 1;
            self.out_bytes -= item.bytes;
            if let Some(input) = self.input_of(*index) {
                input.out -= 1;
            }
            if let Some(stream) = self.streams.get_mut(*index) {
                stream.put_back(item);
            }
        }
        self.staged = staged;
        self.staged.clear();
        self.client = match (self.client, error) {
            (Client::Away, _) => Client::Away,
            (_, OfferError::Full) => Client::Full,
            (_, OfferError::NotConnected | OfferError::NotSubscribed) => Client::Closed,
        };
    }

    /// Whether another turn would do something right now.
    pub(in crate::delivery) fn has_work(&self) -> bool {
        self.has_room() && (self.next_sendable().is_some() || self.next_read().is_some())
    }
}

//! Which message goes to a module next, and which ones are done. No clock, no store, no socket: it
//! is told the time.
//!
//! [`Machine`] is driven by [`super::pump`]: it names the queue to be read next, takes what was
//! read, makes batches of deliveries, and takes settlements. `Q` is whatever the driver needs to
//! know of a queue.
//!
//! # Invariants
//! - Per queue deliveries go out in the order of their offsets, also again.
//! - A message of an input goes out only when no queue of this input with a better priority has
//!   one.
//! - At most the window is out; no input of several takes all of it.
//! - Nothing is settled as done that the client has not settled so.
//! - Memory: the window, and one read of each queue.

mod sending;

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use edgehub_proto::identity::Identity;
use edgehub_storage::{Outcome, QueueId};

use super::limits::{DELIVERIES_MAX, GONE_MAX, WINDOW_DEFAULT, WINDOW_MAX};
use super::stream::{Item, Source, Stream};
use crate::hub::{C2D_STREAM, DeliveryToken, Settlement};
use crate::telemetry::metrics::DropReason;

/// A run of messages of one sender and output that ended alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// Through which input, with which priority.
    pub(super) input: Arc<str>,
    pub(super) priority: u32,
    pub(super) sender: Identity,
    pub(super) output: String,
    /// None when the client has them.
    pub(super) dropped: Option<DropReason>,
    pub(super) count: u64,
    /// How long ago they were read, as far as that is known.
    pub(super) since_read: Option<Duration>,
    /// How long ago they were sent last.
    pub(super) since_sent: Option<Duration>,
}

/// The deliveries of one module.
#[derive(Debug)]
pub(super) struct Machine<Q> {
    window: usize,
    /// By endpoint, then by priority; retired ones last.
    streams: Vec<Stream<Q>>,
    /// One for each endpoint that is in the configuration.
    inputs: Vec<Input>,
    /// Who is asked first.
    turn: usize,
    /// The time as it was told last; for durations only.
    now: Option<Instant>,
    out: usize,
    out_bytes: usize,
    client: Client,
    next_shared: u64,
    /// What the last batch was made of: stream and token, in order.
    staged: Vec<(usize, u64)>,
    ended: Vec<Ended>,
    ignored: u64,
    /// Settles were handed over since the last barrier.
    handed_over: bool,
    /// Reading begins anew and must not bring what those settles name.
    wants_barrier: bool,
    /// Below which offset entries of queues that are gone were sent, in case they come back.
    gone: HashMap<QueueId, u64>,
}

/// One of the module's inputs.
#[derive(Debug)]
struct Input {
    /// Its streams, the best priority first.
    streams: Range<usize>,
    out: usize,
    /// The client is not subscribed to it.
    paused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Away,
    /// Connected, but not subscribed to inputs as far as is known.
    Closed,
    /// It takes deliveries.
    Open,
    /// Its outbox is full.
    Full,
}

impl<Q> Machine<Q> {
    pub(super) fn new(window: usize) -> Self {
        Self {
            window: window.clamp(1, WINDOW_MAX),
            streams: Vec::new(),
            inputs: Vec::new(),
            turn: 0,
            now: None,
            out: 0,
            out_bytes: 0,
            client: Client::Away,
            next_shared: 0,
            staged: Vec::new(),
            ended: Vec::new(),
            ignored: 0,
            handed_over: false,
            wants_barrier: false,
            gone: HashMap::new(),
        }
    }

    /// It is this late.
    pub(super) fn at(&mut self, now: Instant) {
        self.now = Some(now);
    }

    /// Replaces the set of queues. What is out of a queue that goes may still be settled.
    pub(super) fn configure(&mut self, sources: Vec<Source<Q>>) {
        let has_uncommitted = self.has_uncommitted();
        let mut old = std::mem::take(&mut self.streams);
        for source in sources {
            let known = old.iter().position(|s| s.source.id == source.id);
            let stream = known.map_or_else(
                || {
                    // It may have been here before, with settles that are not committed.
                    self.wants_barrier |= has_uncommitted;
                    let sent_end = self.gone.remove(&source.id).unwrap_or(0);
                    Stream::new(source, sent_end, self.window.max(WINDOW_DEFAULT))
                },
                |index| old.swap_remove(index),
            );
            self.streams.push(stream);
        }
        for stream in &mut self.streams {
            stream.retired = false;
        }
        for mut stream in old {
            stream.retired = true;
            if stream.out.is_empty() && stream.settled.is_empty() {
                self.bury(stream);
            } else {
                self.streams.push(stream);
            }
        }
        self.streams
            .sort_by(|a, b| a.retired.cmp(&b.retired).then_with(|| by_id(a, b)));
        self.group();
    }

    /// Remembers of a stream that goes what it sent.
    fn bury(&mut self, mut stream: Stream<Q>) {
        if self.gone.len() >= GONE_MAX {
            self.gone.clear();
        }
        // What waits to be sent again counts as well.
        stream.rewind();
        if let Some(sent_end) = stream.sent_end() {
            self.gone.insert(stream.source.id, sent_end);
        }
    }

    /// Lets go of retired streams that have nothing more to do. They are last: no index of another
    /// one changes.
    fn bury_retired(&mut self) {
        let is_over = |s: &Stream<Q>| s.retired && s.out.is_empty() && s.settled.is_empty();
        while let Some(index) = self.streams.iter().position(is_over) {
            let stream = self.streams.remove(index);
            self.bury(stream);
        }
    }

    /// Makes the inputs anew from the streams.
    fn group(&mut self) {
        self.inputs.clear();
        let active = self.streams.iter().filter(|s| !s.retired).count();
        let mut start = 0;
        while start < active {
            let same = |stream: &&Stream<Q>| {
                let first = self.streams.get(start);
                first.is_some_and(|s| s.source.id.endpoint == stream.source.id.endpoint)
            };
            let streams = self.streams.iter().skip(start).take(active - start);
            let count = streams.take_while(same).count().max(1);
            let streams = start..start + count;
            let out = self.streams.iter().skip(start).take(count);
            let out = out.map(|stream| stream.out.len()).sum();
            self.inputs.push(Input {
                streams,
                out,
                // If it still is, the client says so again.
                paused: false,
            });
            start += count;
        }
    }

    /// A new connection: everything that is not settled goes out again, marked unless the session
    /// is clean. Nothing is sent before [`Self::subscribed`].
    pub(super) fn connected(&mut self, clean_session: bool) {
        self.rewind();
        if clean_session {
            self.streams.iter_mut().for_each(Stream::forget_sent);
            self.gone.clear();
        }
        self.client = Client::Closed;
    }

    /// The connection is over.
    pub(super) fn disconnected(&mut self) {
        self.rewind();
        self.client = Client::Away;
    }

    /// Whether there are settles that the store may not have committed.
    fn has_uncommitted(&self) -> bool {
        self.handed_over || self.streams.iter().any(|s| !s.settled.is_empty())
    }

    fn rewind(&mut self) {
        self.wants_barrier |= self.has_uncommitted();
        self.streams.iter_mut().for_each(Stream::rewind);
        self.bury_retired();
        for input in &mut self.inputs {
            input.out = 0;
            input.paused = false;
        }
        self.staged.clear();
        self.out = 0;
        self.out_bytes = 0;
    }

    /// The client's subscriptions may have changed: everything is tried again.
    pub(super) fn subscribed(&mut self) {
        if self.client != Client::Away {
            self.client = Client::Open;
        }
        for input in &mut self.inputs {
            input.paused = false;
        }
    }

    /// Time has passed: what could not be read or sent is tried again.
    pub(super) fn retry(&mut self) {
        self.streams.iter_mut().for_each(|s| s.stalled = false);
        if self.client == Client::Full {
            self.client = Client::Open;
        }
    }

    /// Takes settlements of deliveries that are out; others are counted.
    pub(super) fn settled(&mut self, settled: &[(DeliveryToken, Settlement)]) {
        for (token, settlement) in settled {
            if token.stream != C2D_STREAM {
                self.settle(*token, *settlement);
            }
        }
        if self.client == Client::Full && !settled.is_empty() {
            self.client = Client::Open;
        }
    }

    fn settle(&mut self, token: DeliveryToken, settlement: Settlement) {
        let Some((index, mut item)) = self.take_out(token) else {
            self.ignored += 1;
            return;
        };
        let outcome = match settlement {
            Settlement::Done => {
                self.end(index, &item, None);
                Outcome::Done
            }
            Settlement::Undeliverable => {
                self.end(index, &item, Some(DropReason::Undeliverable));
                Outcome::Dropped
            }
            Settlement::Rejected => {
                self.end(index, &item, Some(DropReason::Rejected));
                Outcome::Dropped
            }
            Settlement::Released if item.releases + 1 >= DELIVERIES_MAX => {
                self.end(index, &item, Some(DropReason::ReleasedTooOften));
                Outcome::Dropped
            }
            Settlement::Released => {
                item.releases += 1;
                item.redelivered = true;
                if let Some(stream) = self.streams.get_mut(index) {
                    stream.put_back(item);
                }
                return;
            }
            Settlement::NotSubscribed => {
                if let Some(input) = self.input_of(index) {
                    input.paused = true;
                }
                if let Some(stream) = self.streams.get_mut(index) {
                    stream.put_back(item);
                }
                return;
            }
        };
        if let Some(stream) = self.streams.get_mut(index) {
            stream.settle(&item, outcome);
        }
    }

    fn take_out(&mut self, token: DeliveryToken) -> Option<(usize, Item)> {
        let streams = self.streams.iter_mut().enumerate();
        let (index, item) = streams
            .filter(|(_, stream)| stream.source.slot == token.stream)
            .find_map(|(index, stream)| Some((index, stream.take_out(token.number)?)))?;
        self.out -= 1;
        self.out_bytes -= item.bytes;
        if let Some(input) = self.input_of(index) {
            input.out -= 1;
        }
        Some((index, item))
    }

    fn input_of(&mut self, stream: usize) -> Option<&mut Input> {
        // None for a retired stream.
        self.inputs
            .iter_mut()
            .find(|input| input.streams.contains(&stream))
    }

    /// Notes how messages ended; runs of one sender and output are one note.
    fn end(&mut self, stream: usize, item: &Item, dropped: Option<DropReason>) {
        let Some(Source { id, input, .. }) = self.streams.get(stream).map(|s| &s.source) else {
            return;
        };
        let ago = |at: Option<Instant>| Some(self.now?.saturating_duration_since(at?));
        let (since_read, since_sent) = (ago(item.read_at), ago(item.sent_at));
        if let Some(last) = self.ended.last_mut()
            && Arc::ptr_eq(&last.input, input)
            && last.priority == id.priority
            && last.dropped == dropped
            && last.sender == item.sender
            && last.output == item.output()
            && (last.since_read, last.since_sent) == (since_read, since_sent)
        {
            last.count += 1;
            return;
        }
        self.ended.push(Ended {
            input: Arc::clone(input),
            priority: id.priority,
            sender: item.sender.clone(),
            output: item.output().to_owned(),
            dropped,
            count: 1,
            since_read,
            since_sent,
        });
    }

    /// The streams, to tell them where their queues end and to take what is settled.
    pub(super) fn streams_mut(&mut self) -> &mut [Stream<Q>] {
        &mut self.streams
    }

    /// What has ended since it was asked last.
    pub(super) fn drain_ended(&mut self) -> impl Iterator<Item = Ended> {
        self.ended.drain(..)
    }

    /// How many settlements named nothing that is out, since it was asked last.
    pub(super) fn take_ignored(&mut self) -> u64 {
        std::mem::take(&mut self.ignored)
    }

    /// Settles were handed to the store. Retired streams that have nothing more go.
    pub(super) fn handed_over(&mut self) {
        self.handed_over = true;
        self.bury_retired();
    }

    /// Whether all settles must be committed before the next read.
    pub(super) fn wants_barrier(&self) -> bool {
        self.wants_barrier
    }

    /// All settles are committed.
    pub(super) fn barrier(&mut self) {
        self.wants_barrier = false;
        self.handed_over = false;
    }

    /// Checks what must hold at any time.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let out = || self.streams.iter().flat_map(|stream| &stream.out);
        assert_eq!(out().count(), self.out);
        assert_eq!(out().map(|item| item.bytes).sum::<usize>(), self.out_bytes);
        assert!(self.out <= self.window);
        for input in &self.inputs {
            let streams = &self.streams[input.streams.clone()];
            let out: usize = streams.iter().map(|stream| stream.out.len()).sum();
            assert_eq!(out, input.out);
            assert!(streams.iter().all(|stream| !stream.retired));
        }
        use super::limits::OFFSETS_OUT_MAX;
        for stream in &self.streams {
            for items in [&stream.out, &stream.waiting] {
                assert!(items.iter().is_sorted_by(|a, b| a.offset < b.offset));
            }
            if let (Some(first), Some(last)) = (stream.out.front(), stream.out.back()) {
                assert!(last.offset - first.offset < OFFSETS_OUT_MAX);
            }
        }
        let numbers = out().filter(|item| item.number != item.offset);
        let numbers: Vec<_> = numbers.map(|item| item.number).collect();
        if let (Some(first), Some(last)) = (numbers.iter().min(), numbers.iter().max()) {
            assert!(last - first < OFFSETS_OUT_MAX);
        }
    }

    /// The queues of which something is out.
    pub(super) fn ids_out(&self) -> impl Iterator<Item = &QueueId> {
        let streams = self.streams.iter().filter(|s| !s.out.is_empty());
        streams.map(|stream| &stream.source.id)
    }
}

fn by_id<Q>(a: &Stream<Q>, b: &Stream<Q>) -> Ordering {
    let key = |stream: &Stream<Q>| -> (String, u32) {
        let QueueId { endpoint, priority } = &stream.source.id;
        (endpoint.clone(), *priority)
    };
    key(a).cmp(&key(b))
}

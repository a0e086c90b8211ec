//! Cloud-to-device messages: a queue per device (spec/upstream.md B6).
//!
//! Every step is in the journal before anybody hears of it, so a killed emulator redelivers what
//! was not acknowledged. What became of a message is remembered for tests.

mod feedback;
mod message;
mod queue;

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

pub(crate) use feedback::{Feedback, FeedbackRecord};
pub(crate) use message::{Message, MessageError};
pub(crate) use queue::{Delivery, Disposal, LockToken, LockedDelivery, Queued, Settled};

use crate::clock::HubClock;
use crate::ids::uuid_bytes;
use crate::journal::{Change, Journal, JournalError};
use crate::limits::{C2D_OUTCOMES_MAX, C2D_QUEUE_MAX, C2D_RETRY_PAUSE};
use crate::sessions::Actor;
use queue::{Effects, Queue};

const PREFIX: &str = "c2d/";

/// Why a step is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum C2dError {
    #[error("the connection was closed or replaced before the step")]
    Fenced,
    #[error("the device has {C2D_QUEUE_MAX} messages waiting, its limit")]
    Full,
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the delivery's lock is lost")]
    LockLost,
    #[error("no delivery has the packet id {0}")]
    PacketId(u16),
}

/// A message's record in the journal.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Queued(Queued),
    Settled(Settled),
}

/// What the journal has of a device.
#[derive(Default)]
struct Records {
    queued: BTreeMap<u64, Queued>,
    settled: BTreeMap<u64, Settled>,
}

/// The messages of one device, waiting and settled.
#[derive(Default)]
struct Device {
    queue: Queue,
    /// The newest ones, by sequence.
    settled: BTreeMap<u64, Settled>,
}

/// What the control API shows of a device.
pub(crate) struct Overview {
    pub(crate) queued: Vec<(u64, Queued)>,
    pub(crate) settled: Vec<(u64, Settled)>,
}

/// All C2D messages of one emulator.
pub(crate) struct C2d {
    devices: Mutex<BTreeMap<String, Device>>,
    journal: Arc<Journal>,
    pub(crate) feedback: Feedback,
    /// Changes with every step.
    changed: watch::Sender<u64>,
}

impl C2d {
    /// Reads the queues of those who `exist`.
    pub(crate) fn open(
        journal: Arc<Journal>,
        exists: impl Fn(&str) -> bool,
    ) -> Result<Self, JournalError> {
        let mut found: BTreeMap<String, Records> = BTreeMap::new();
        for (key, record) in journal.load(PREFIX)? {
            let Some((device, sequence)) = key.split_once('/') else {
                continue;
            };
            let Some(sequence) = sequence.parse().ok().filter(|_| exists(device)) else {
                continue;
            };
            let records = found.entry(device.to_owned()).or_default();
            match record {
                Record::Queued(record) => drop(records.queued.insert(sequence, record)),
                Record::Settled(record) => drop(records.settled.insert(sequence, record)),
            }
        }
        let devices = found.into_iter().map(|(name, records)| {
            let sequences = records.queued.keys().chain(records.settled.keys());
            let last = sequences.max().copied().unwrap_or(0);
            let device = Device {
                queue: Queue::restore(records.queued, last),
                settled: records.settled,
            };
            (name, device)
        });
        Ok(Self {
            devices: Mutex::new(devices.collect()),
            feedback: Feedback::open(journal.clone())?,
            journal,
            changed: watch::Sender::new(0),
        })
    }

    /// Enqueues a message; returns its sequence number.
    ///
    /// # Errors
    /// It is too large or the queue is full.
    pub(crate) fn send(
        &self,
        device: &str,
        message: Message,
        now_ms: u64,
    ) -> Result<u64, C2dError> {
        message.check(device)?;
        self.step(device, |queue, effects| {
            queue.tick(now_ms, effects);
            queue
                .enqueue(message, now_ms, effects)
                .ok_or(C2dError::Full)
        })
    }

    /// A device's connection begins. `goes_on`: with the session of before.
    ///
    /// # Errors
    /// The connection is closed already.
    pub(crate) fn connect(
        &self,
        device: &str,
        actor: Actor<'_>,
        goes_on: bool,
        now_ms: u64,
    ) -> Result<(), C2dError> {
        self.step_of(device, actor, |queue, effects| {
            queue.connect(goes_on, now_ms, effects);
            Ok(())
        })
    }

    /// A device's connection is over.
    pub(crate) fn disconnect(&self, device: &str, connection: u64, now_ms: u64) {
        let ended = self.step(device, |queue, effects| {
            queue.disconnect(connection, now_ms, effects);
            Ok(())
        });
        if let Err(error) = ended {
            warn!(device, %error, "c2d messages are not released");
        }
    }

    /// Takes all messages that are enqueued, for delivery on this connection.
    ///
    /// # Errors
    /// The connection is closed already.
    pub(crate) fn deliver(
        &self,
        device: &str,
        actor: Actor<'_>,
        at_least_once: bool,
        now_ms: u64,
    ) -> Result<Vec<Delivery>, C2dError> {
        self.step_of(device, actor, |queue, effects| {
            Ok(queue.deliver(actor.connection, at_least_once, now_ms, effects))
        })
    }

    /// Takes up to `count` messages that are enqueued, for delivery over AMQP.
    ///
    /// # Errors
    /// The connection is closed already.
    pub(crate) fn lock(
        &self,
        device: &str,
        actor: Actor<'_>,
        count: usize,
        now_ms: u64,
    ) -> Result<Vec<LockedDelivery>, C2dError> {
        self.step_of(device, actor, |queue, effects| {
            Ok(queue.lock(actor.connection, count, now_ms, uuid_bytes, effects))
        })
    }

    /// A disposition of a delivery over AMQP. An abandoned message is enqueued again.
    ///
    /// # Errors
    /// The connection is closed already, or the lock is lost.
    pub(crate) fn dispose(
        &self,
        device: &str,
        actor: Actor<'_>,
        token: LockToken,
        disposal: Disposal,
        now_ms: u64,
    ) -> Result<(), C2dError> {
        self.step_of(device, actor, |queue, effects| {
            if queue.dispose(token, disposal, now_ms, effects) {
                Ok(())
            } else {
                Err(C2dError::LockLost)
            }
        })
    }

    /// A PUBACK of this connection.
    ///
    /// # Errors
    /// The connection is closed already, or no delivery waits for it.
    pub(crate) fn acknowledge(
        &self,
        device: &str,
        actor: Actor<'_>,
        packet_id: u16,
        now_ms: u64,
    ) -> Result<(), C2dError> {
        self.step_of(device, actor, |queue, effects| {
            if queue.acknowledge(packet_id, now_ms, effects) {
                Ok(())
            } else {
                Err(C2dError::PacketId(packet_id))
            }
        })
    }

    /// QoS 0 deliveries of this connection are written.
    ///
    /// # Errors
    /// The connection is closed already.
    pub(crate) fn complete(
        &self,
        device: &str,
        actor: Actor<'_>,
        sequences: &[u64],
        now_ms: u64,
    ) -> Result<(), C2dError> {
        self.step_of(device, actor, |queue, effects| {
            queue.complete(sequences, actor.connection, now_ms, effects);
            Ok(())
        })
    }

    /// Removes all messages of a device that are not settled; returns how many.
    pub(crate) fn purge(&self, device: &str, now_ms: u64) -> Result<usize, C2dError> {
        self.step(device, |queue, effects| Ok(queue.purge(now_ms, effects)))
    }

    /// Messages that are not settled.
    pub(crate) fn count(&self, device: &str) -> usize {
        let devices = self.devices.lock();
        let device = devices.get(device);
        device.map_or(0, |device| device.queue.messages().len())
    }

    pub(crate) fn overview(&self, device: &str) -> Overview {
        let devices = self.devices.lock();
        let Some(device) = devices.get(device) else {
            return Overview {
                queued: Vec::new(),
                settled: Vec::new(),
            };
        };
        let queued = device.queue.messages().iter();
        let settled = device.settled.iter();
        Overview {
            queued: queued.map(|(at, queued)| (*at, queued.clone())).collect(),
            settled: settled.map(|(at, one)| (*at, one.clone())).collect(),
        }
    }

    /// Drops what there is of a device that is no more.
    pub(crate) fn forget(&self, device: &str) -> Result<(), JournalError> {
        let mut devices = self.devices.lock();
        let Some(gone) = devices.remove(device) else {
            return Ok(());
        };
        let sequences = gone.queue.messages().keys().chain(gone.settled.keys());
        let changes: Result<Vec<_>, _> = sequences
            .map(|sequence| Change::delete(key(device, *sequence)))
            .collect();
        self.journal.write(&changes?)
    }

    /// Changes with every step.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Lets locks and lives run out when their time has come, and tells `wake` whose messages are
    /// enqueued again. Never returns.
    ///
    /// # Cancel safety
    /// Holds no state: dropping it loses nothing.
    pub(crate) async fn keep_time(&self, clock: &HubClock, wake: impl Fn(&str)) {
        let mut changed = self.watch();
        loop {
            changed.mark_unchanged();
            let next_ms = {
                let devices = self.devices.lock();
                let times = devices.values().map(|device| device.queue.next_tick_ms());
                times.flatten().min()
            };
            let due = async {
                match next_ms {
                    Some(next_ms) => clock.sleep_until(next_ms).await,
                    None => std::future::pending().await,
                }
            };
            let is_due = tokio::select! {
                () = due => true,
                _ = changed.changed() => false,
            };
            if is_due && self.tick(clock.now_ms(), &wake).is_err() {
                // They are still due, and the journal is not better at once.
                tokio::time::sleep(C2D_RETRY_PAUSE).await;
            }
        }
    }

    fn tick(&self, now_ms: u64, wake: impl Fn(&str)) -> Result<(), C2dError> {
        let due = |device: &Device| device.queue.next_tick_ms().is_some_and(|at| at <= now_ms);
        let names: Vec<String> = {
            let devices = self.devices.lock();
            let due = devices.iter().filter(|(_, device)| due(device));
            due.map(|(name, _)| name.clone()).collect()
        };
        for name in names {
            let ticked = self.step(&name, |queue, effects| Ok(queue.tick(now_ms, effects)));
            if ticked.inspect_err(|error| warn!(%error, "c2d messages do not expire"))? {
                wake(&name);
            }
        }
        Ok(())
    }

    /// A step of a connection that must not be fenced. Asked under the lock, so that nothing of
    /// an old connection comes after its successor's first step.
    fn step_of<T>(
        &self,
        device: &str,
        actor: Actor<'_>,
        step: impl FnOnce(&mut Queue, &mut Effects) -> Result<T, C2dError>,
    ) -> Result<T, C2dError> {
        self.step(device, |queue, effects| {
            if actor.fence.is_closed() {
                return Err(C2dError::Fenced);
            }
            step(queue, effects)
        })
    }

    /// Carries out a step on a copy, writes its effects, and only then lets it count.
    fn step<T>(
        &self,
        name: &str,
        step: impl FnOnce(&mut Queue, &mut Effects) -> Result<T, C2dError>,
    ) -> Result<T, C2dError> {
        let mut devices = self.devices.lock();
        let mut queue = devices
            .get(name)
            .map(|device| device.queue.clone())
            .unwrap_or_default();
        let mut effects = Effects::default();
        let result = step(&mut queue, &mut effects);
        let Effects {
            touched,
            settled,
            told,
        } = effects;
        if touched.is_empty() && settled.is_empty() && !devices.contains_key(name) {
            return result;
        }
        let device = devices.entry(name.to_owned()).or_default();
        let mut changes = Vec::with_capacity(touched.len() + settled.len());
        for sequence in touched {
            if let Some(queued) = queue.messages().get(&sequence) {
                let record = Record::Queued(queued.clone());
                changes.push(Change::put(key(name, sequence), &record)?);
            }
        }
        for (sequence, settled) in &settled {
            let record = Record::Settled(settled.clone());
            changes.push(Change::put(key(name, *sequence), &record)?);
        }
        let too_many = (device.settled.len() + settled.len()).saturating_sub(C2D_OUTCOMES_MAX);
        let forgotten: Vec<u64> = device.settled.keys().take(too_many).copied().collect();
        for sequence in &forgotten {
            changes.push(Change::delete(key(name, *sequence))?);
        }
        let told = told.into_iter();
        let told = told.map(|settled| FeedbackRecord::new(name, settled));
        self.feedback.write(changes, told.collect())?;
        for sequence in forgotten {
            device.settled.remove(&sequence);
        }
        device.settled.extend(settled);
        device.queue = queue;
        self.changed.send_modify(|count| *count += 1);
        result
    }
}

fn key(device: &str, sequence: u64) -> String {
    format!("{PREFIX}{device}/{sequence}")
}

#[cfg(test)]
mod tests {
    use super::message::tests::message;
    use super::*;
    use crate::connections::{Connections, Transport};

    fn open(journal: Journal) -> C2d {
        C2d::open(Arc::new(journal), |_| true).unwrap()
    }

    /// Whatever a replaced connection still does comes to nothing.
    #[test]
    fn a_fenced_connection_settles_nothing() {
        let c2d = open(Journal::open(None).unwrap());
        let connections = Connections::default();
        let peer = "127.0.0.1:1".parse().unwrap();
        let connection = connections.open(Transport::Mqtt, peer, 0);
        let actor = connection.actor();
        c2d.send("d", message("m1"), 0).unwrap();
        assert_eq!(c2d.deliver("d", actor, true, 0).unwrap().len(), 1);
        connections.close_matching(|_| true);
        for refused in [
            c2d.connect("d", actor, true, 0),
            c2d.acknowledge("d", actor, 1, 0),
            c2d.complete("d", actor, &[1], 0),
            c2d.deliver("d", actor, true, 0).map(|_| ()),
        ] {
            assert!(matches!(refused, Err(C2dError::Fenced)));
        }
        assert_eq!(c2d.count("d"), 1);
    }

    /// The newest outcomes are remembered, the journal's too, and sequences go on.
    #[test]
    fn outcomes_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let c2d = open(Journal::open(Some(&path)).unwrap());
        let total = C2D_OUTCOMES_MAX as u64 + 30;
        for _ in 0..total {
            c2d.send("d", message("m"), 0).unwrap();
            c2d.purge("d", 0).unwrap();
        }
        for c2d in [c2d, open(Journal::open(Some(&path)).unwrap())] {
            let settled = c2d.overview("d").settled;
            assert_eq!(settled.len(), C2D_OUTCOMES_MAX);
            assert_eq!(settled[0].0, 31);
            assert_eq!(settled[C2D_OUTCOMES_MAX - 1].0, total);
        }
        let c2d = open(Journal::open(Some(&path)).unwrap());
        assert_eq!(c2d.send("d", message("m"), 0).unwrap(), total + 1);
        c2d.forget("d").unwrap();
        let c2d = open(Journal::open(Some(&path)).unwrap());
        assert!(c2d.overview("d").settled.is_empty());
    }
}

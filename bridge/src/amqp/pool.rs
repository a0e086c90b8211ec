//! Which identity goes on which connection.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    connection::{Admission, Connection, Input, now},
    multiplex::{Multiplex, Shared},
    ways::Ways,
};
use crate::{
    lanes::CloseCause,
    limits,
    transport::{OpenRequest, SessionEvent},
};

/// One connection as the pool sees it.
#[derive(Clone, Debug)]
struct Slot {
    inputs: mpsc::Sender<Input>,
    identities: Arc<AtomicUsize>,
    capacity: Arc<AtomicUsize>,
}

impl Slot {
    fn identities(&self) -> usize {
        self.identities.load(Ordering::Relaxed)
    }

    fn has_room(&self) -> bool {
        self.identities() < self.capacity.load(Ordering::Relaxed)
    }
}

/// An identity's place on a connection, given back when it is dropped.
#[derive(Debug)]
struct Seat(Slot);

impl Seat {
    /// Takes a place; the caller has seen that there is one, and holds the pool's lock.
    fn take(slot: &Slot) -> Self {
        slot.identities.fetch_add(1, Ordering::Relaxed);
        Self(slot.clone())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.identities.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connections of one bridge.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    ways: Arc<Ways>,
    /// Connections that are opened before any takes a second identity.
    size: usize,
    tasks: TaskTracker,
    cancel: CancellationToken,
    slots: Mutex<Vec<Slot>>,
}

impl Pool {
    pub(super) fn new(
        shared: Shared,
        ways: Ways,
        size: usize,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            shared: Arc::new(shared),
            ways: Arc::new(ways),
            size: size.max(1),
            tasks,
            cancel,
            slots: Mutex::new(Vec::new()),
        }
    }

    /// Seats an identity and keeps it company until it is over.
    pub(super) fn open(&self, request: OpenRequest) {
        let seat = self.seat();
        self.tasks.spawn(accompany(request, seat));
    }

    /// A place on the connection that [`choose`] names, or on one that is opened for it.
    fn seat(&self) -> Seat {
        let mut slots = self.slots.lock();
        slots.retain(|slot| !slot.inputs.is_closed());
        let loads: Vec<Option<usize>> = slots
            .iter()
            .map(|slot| slot.has_room().then(|| slot.identities()))
            .collect();
        if let Some(slot) = choose(&loads, self.size).and_then(|index| slots.get(index)) {
            return Seat::take(slot);
        }
        let slot = self.connect();
        let seat = Seat::take(&slot);
        slots.push(slot);
        seat
    }

    fn connect(&self) -> Slot {
        let (inputs, receiver) = mpsc::channel(limits::AMQP_INPUTS_MAX);
        let slot = Slot {
            inputs,
            identities: Arc::new(AtomicUsize::new(0)),
            capacity: Arc::new(AtomicUsize::new(limits::AMQP_IDENTITIES_MAX)),
        };
        let container_id = format!(
            "{}_{:032x}",
            self.shared.own_hub.device_id(),
            rand::random::<u128>()
        );
        let seed = rand::random();
        let shared = Arc::clone(&self.shared);
        let connection = Connection {
            multiplex: Multiplex::new(shared, container_id, seed, now()),
            ways: Arc::clone(&self.ways),
            inputs: receiver,
            capacity: Arc::clone(&slot.capacity),
            cancel: self.cancel.clone(),
        };
        self.tasks.spawn(connection.run());
        slot
    }
}

/// The connection for one more identity: `loads` are the identities of each, none where there is no
/// room. None: another connection is opened.
fn choose(loads: &[Option<usize>], size: usize) -> Option<usize> {
    let spread = loads.iter().take(size).enumerate();
    let with_room = spread.filter_map(|(index, load)| Some(((*load)?, index)));
    let least = with_room.min();
    match least {
        // Each of the first ones gets an identity before any gets a second.
        Some((load, _)) if load > 0 && loads.len() < size => None,
        Some((_, index)) => Some(index),
        None if loads.len() < size => None,
        // Behind them, each is filled before the next is opened.
        None => loads.iter().position(Option::is_some),
    }
}

/// Takes what an identity's lane says to its connection until it is over.
async fn accompany(request: OpenRequest, seat: Seat) {
    let OpenRequest {
        session,
        identity,
        mut needs,
        mut commands,
        events,
    } = request;
    let (sender, mut over) = oneshot::channel();
    let inputs = &seat.0.inputs;
    let mut listens = true;
    let admission = Admission {
        session,
        identity,
        needs: *needs.borrow_and_update(),
        events: events.clone(),
        over: sender,
    };
    let cause = if inputs.send(Input::Admit(admission)).await.is_err() {
        // The connection has ended since the seat was taken: another one is opened.
        CloseCause::Requested
    } else {
        loop {
            let input = tokio::select! {
                cause = &mut over => break cause.unwrap_or_else(|_| died()),
                command = commands.recv(), if listens => {
                    listens = command.is_some();
                    Input::Command(session, command)
                }
                Ok(()) = needs.changed(), if listens => {
                    Input::Need(session, *needs.borrow_and_update())
                }
            };
            if inputs.send(input).await.is_err() {
                // It has ended, and said why before.
                break over.await.unwrap_or_else(|_| died());
            }
        }
    };
    let _ = events.send(SessionEvent::Closed { session, cause }).await;
}

fn died() -> CloseCause {
    CloseCause::Local("connection task died".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_filled_one_after_the_other() {
        assert_eq!(choose(&[], 1), None);
        assert_eq!(choose(&[Some(0)], 1), Some(0));
        assert_eq!(choose(&[Some(899)], 1), Some(0));
        assert_eq!(choose(&[None], 1), None);
        assert_eq!(choose(&[None, Some(3)], 1), Some(1));
        assert_eq!(choose(&[Some(5), Some(3)], 1), Some(0), "room was made");
    }

    #[test]
    fn a_larger_pool_is_opened_first_and_then_spread_over() {
        assert_eq!(choose(&[], 3), None);
        assert_eq!(choose(&[Some(1)], 3), None);
        assert_eq!(choose(&[Some(1), Some(0)], 3), Some(1));
        assert_eq!(choose(&[Some(1), Some(1), Some(1)], 3), Some(0));
        assert_eq!(choose(&[Some(2), Some(1), Some(2)], 3), Some(1));
        assert_eq!(choose(&[None, Some(7), Some(8)], 3), Some(1));
        assert_eq!(choose(&[None, None, None], 3), None);
        assert_eq!(choose(&[None, None, None, Some(2), Some(1)], 3), Some(3));
        assert_eq!(choose(&[None], 3), None);
    }
}

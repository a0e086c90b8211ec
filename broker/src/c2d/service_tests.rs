//! The service with real handles and its timer task, on a paused clock.

use std::sync::Arc;

use edgehub_proto::hub::{CloudToDevice, CloudToDeviceOutcome};
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::clients_tests::message;
use super::limits::{FULL_RETRY, GRACE};
use super::{CloudToDeviceService, Config};
use crate::hub::{Delivery, Features, OfferError, Outlet, Settlement, ToClient};
use crate::test_support::{PausedClock, id};

/// One client, and what it got.
#[derive(Debug)]
struct Client {
    answer: Mutex<Result<(), OfferError>>,
    got: Mutex<Vec<Delivery>>,
}

impl Outlet for Client {
    fn offer(&self, to: &Identity, event: ToClient) -> Result<(), OfferError> {
        assert_eq!(to.as_str(), "leaf1");
        let ToClient::CloudToDevice(batch) = event else {
            panic!("{event:?}");
        };
        (*self.answer.lock())?;
        self.got.lock().extend(batch);
        Ok(())
    }

    fn features(&self, _of: &Identity) -> Option<Features> {
        None
    }
}

struct World {
    client: Arc<Client>,
    service: Arc<CloudToDeviceService>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl World {
    fn new() -> Self {
        let client = Arc::new(Client {
            answer: Mutex::new(Ok(())),
            got: Mutex::default(),
        });
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let service = CloudToDeviceService::new(
            Config::default(),
            Arc::clone(&client) as _,
            PausedClock::new(),
            &tasks,
            stop.clone(),
        );
        Self {
            client,
            service,
            stop,
            tasks,
        }
    }

    fn arrive(&self, text: &str) -> oneshot::Receiver<CloudToDeviceOutcome> {
        let (settle, outcome) = oneshot::channel();
        let message = CloudToDevice {
            message: message(text),
            redelivered: false,
            settle,
        };
        self.service.arrived(&id("leaf1"), message);
        outcome
    }
}

#[tokio::test(start_paused = true)]
async fn an_acknowledgement_reaches_upstream() {
    let world = World::new();
    let outcome = world.arrive("a");
    let delivery = world.client.got.lock().remove(0);
    assert_eq!(delivery.sender, id("leaf1"));
    assert!(delivery.input.is_empty());
    let settled = [(delivery.token, Settlement::Done)];
    // Another client's acknowledgement is its own.
    world.service.settled(&id("leaf10"), &settled);
    world.service.settled(&id("leaf1"), &settled);
    assert_eq!(outcome.await, Ok(CloudToDeviceOutcome::Completed));
    world.stop.cancel();
    world.tasks.close();
    world.tasks.wait().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stays_away_gives_its_messages_back_after_the_grace_period() {
    let world = World::new();
    let outcome = world.arrive("a");
    let begun = Instant::now();
    *world.client.answer.lock() = Err(OfferError::NotConnected);
    world.service.disconnected(&id("leaf1"), false);
    assert!(outcome.await.is_err());
    assert!(begun.elapsed() >= GRACE && begun.elapsed() < 2 * GRACE);
}

#[tokio::test(start_paused = true)]
async fn a_full_outbox_is_tried_again_by_itself() {
    let world = World::new();
    *world.client.answer.lock() = Err(OfferError::Full);
    let _outcome = world.arrive("a");
    *world.client.answer.lock() = Ok(());
    assert!(world.client.got.lock().is_empty());
    tokio::time::sleep(2 * FULL_RETRY).await;
    assert_eq!(world.client.got.lock().len(), 1);
}

//! A client that was accepted: lets the machine work, hands each turn's publishes to the store as
//! one batch, its requests to the hub, and the hub's events to the client.
//!
//! Nothing here happens once per message but the copy into the store's record: a turn costs at
//! most one batch, one socket write and one report of settled deliveries (design.md section 4).
//!
//! A turn: packets are worked off, events become packets, answers that are due join them, all of
//! it is written, and then the task waits for whatever comes first.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_auth::authenticator::Principal;
use edgehub_proto::clock::Clock;
use edgehub_proto::topic::{self, PublishTopic};
use edgehub_storage::{AppendBatch, StoreClosed, TryAppendError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::connection::ConnectionContext;
use super::end::ConnectionEnd;
use super::limits::FAREWELL_MAX;
use super::machine::{CloseReason, Event, Incoming, Machine, Will};
use super::outbox::{Outbox, Replaced};
use super::subscriber::Subscriber;
use super::transport::Transport;
use super::will;
use crate::hub::{Ingest, Outcome, Registration, Telemetry, ToClient};

/// What the handshake found out about a client.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) principal: Principal,
    pub(super) registration: Registration,
    pub(super) outbox: mpsc::Receiver<ToClient>,
    pub(super) subscriber: Subscriber,
    pub(super) will: Option<Will>,
}

type PendingAppend = Pin<Box<dyn Future<Output = Result<(), StoreClosed>> + Send>>;

/// A connection that was accepted. Owned by its task.
pub(super) struct Client<'a, S> {
    transport: Transport<S>,
    machine: Machine,
    ingest: Ingest,
    /// A batch that waits for room in the store; the next one is gathered meanwhile.
    appending: Option<PendingAppend>,
    subscriber: Subscriber,
    outbox: Outbox,
    will: Option<Will>,
    principal: Principal,
    registration: Registration,
    context: &'a ConnectionContext,
}

impl<'a, S> Client<'a, S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    pub(super) fn new(
        transport: Transport<S>,
        machine: Machine,
        accepted: Accepted,
        context: &'a ConnectionContext,
    ) -> Self {
        let Accepted {
            principal,
            registration,
            outbox,
            subscriber,
            will,
        } = accepted;
        let identity = principal.identity().clone();
        Self {
            transport,
            machine,
            ingest: Ingest::new(Arc::clone(&context.hub), identity.clone()),
            appending: None,
            subscriber,
            outbox: Outbox::new(identity, outbox),
            will,
            principal,
            registration,
            context,
        }
    }

    /// Serves the client until its connection ends.
    pub(super) async fn run(mut self) -> ConnectionEnd {
        let end = match self.turns().await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        self.outbox.close();
        // What was answered before the end still leaves.
        let clock = Arc::clone(self.context.hub.clock());
        self.outbox.output_taken();
        let farewell = self
            .transport
            .finish(&mut self.machine, &self.context.acks, &*clock);
        if let Ok(Ok(())) = timeout(FAREWELL_MAX, farewell).await {
            self.outbox.output_written();
        }
        self.report();
        // What was read is stored, acknowledged or not (spec/mqtt.md 8.1), then the will.
        if !matches!(end, ConnectionEnd::NotStored) {
            self.store_the_rest().await;
        }
        if end.publishes_will() {
            self.publish_will().await;
        }
        end
    }

    async fn turns(&mut self) -> Result<Infallible, ConnectionEnd> {
        let clock = Arc::clone(self.context.hub.clock());
        let progress = Arc::clone(self.ingest.progress());
        let closed = self.registration.closed().clone();
        let token_end = self.principal.expires_at_ms();
        loop {
            self.events()?;
            if self.subscriber.release(&mut self.machine) {
                self.announce();
            }
            let subscriptions = self.subscriber.subscriptions();
            self.outbox.pump(&mut self.machine, subscriptions);
            self.store()?;
            let was_full = !self.machine.has_room();
            self.write(&*clock).await?;
            self.report();

            // Room that the write made may be what packets or events wait for.
            let goes_on = was_full && self.machine.has_room();
            let reads = self.machine.wants_input();
            let takes_events = self.machine.has_room() && self.outbox.wants_events();
            let deadline = self.deadline();
            let token_left = token_end.map(|end| token_left(end, clock.unix_ms()));
            tokio::select! {
                moved = self.transport.progress(&mut self.machine, &*clock, reads) => moved?,
                () = std::future::ready(()), if goes_on => {}
                event = self.outbox.next(), if takes_events => {
                    event.map_err(|Replaced| ConnectionEnd::Revoked)?;
                }
                () = self.subscriber.due() => {}
                () = progress.changed() => {
                    if progress.failed() {
                        return Err(ConnectionEnd::NotStored);
                    }
                    self.machine.committed(progress.committed());
                }
                appended = append_done(&mut self.appending) => {
                    self.appending = None;
                    appended.map_err(|StoreClosed| ConnectionEnd::Stopping)?;
                }
                () = sleep_until(deadline) => self.check_times(&*clock)?,
                () = token_expiry(token_left) => {
                    if token_end.is_some_and(|end| token_left_is_zero(end, &*clock)) {
                        return Err(ConnectionEnd::TokenExpired);
                    }
                }
                () = closed.cancelled() => return Err(ConnectionEnd::Revoked),
                () = self.context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
            }
            if !self.transport.is_writing() {
                self.outbox.output_written();
            }
        }
    }

    /// Lets the machine work off what it has.
    fn events(&mut self) -> Result<(), ConnectionEnd> {
        let now_ms = self.context.hub.clock().unix_ms();
        while let Some(event) = self.machine.poll() {
            match event {
                Event::Publish(publish) => self.publish(publish, now_ms)?,
                Event::Acknowledged(token) => self.outbox.acknowledged(token),
                Event::Subscribe { packet_id, filters } => {
                    let live = self.registration.is_live();
                    self.subscriber.subscribe(packet_id, &filters, live);
                }
                Event::Unsubscribe { packet_id, filters } => {
                    let live = self.registration.is_live();
                    self.subscriber.unsubscribe(packet_id, &filters, live);
                }
                Event::Close(reason) => return Err(reason.into()),
                Event::Connect(_) => return Err(CloseReason::SecondConnect.into()),
            }
        }
        Ok(())
    }

    /// Sends a publish where its topic says (spec/mqtt.md 3.1, 9.1). Requests are answered by the
    /// hub in its own time; their PUBACK does not wait for it.
    fn publish(&mut self, publish: Incoming, now_ms: u64) -> Result<(), ConnectionEnd> {
        let Incoming {
            sequence,
            duplicate,
            retain,
            topic,
            payload,
            ..
        } = publish;
        let hub = &self.context.hub;
        let registration = &self.registration;
        // Copied: a twin or an answer is kept longer than the read block should be.
        let copied = || Bytes::copy_from_slice(&payload);
        match topic::parse_publish(&topic) {
            PublishTopic::TwinGet { query } => {
                let id = topic::request_id(query).ok().flatten();
                let id = id.ok_or(ConnectionEnd::TwinTopic)?;
                hub.twin_get(registration, id.into());
            }
            PublishTopic::TwinPatch { query } => {
                let id = topic::request_id(query).map_err(|_| ConnectionEnd::TwinTopic)?;
                hub.twin_report(registration, id.map(Arc::from), copied());
            }
            PublishTopic::MethodResponse { status, query } => match topic::request_id(query) {
                Ok(Some(id)) => {
                    hub.method_response(registration, id, status.parse().ok(), copied());
                }
                _ => tracing::debug!(
                    "Ignored a method response of {} without a request id",
                    registration.identity()
                ),
            },
            PublishTopic::Unknown if topic.starts_with(topic::TWIN_PREFIX) => {
                return Err(ConnectionEnd::TwinTopic);
            }
            topic @ (PublishTopic::Telemetry { .. } | PublishTopic::Unknown) => {
                let telemetry = Telemetry {
                    sequence,
                    duplicate,
                    retain,
                    topic,
                    body: payload,
                };
                match self.ingest.take(telemetry, now_ms) {
                    Outcome::Gathered => return Ok(()),
                    Outcome::Dropped(_) => {}
                    Outcome::Foreign => {
                        let identity = registration.identity();
                        tracing::warn!(
                            "{identity} published to a topic of another identity: closing"
                        );
                        return Err(ConnectionEnd::ForeignTopic);
                    }
                }
            }
        }
        self.machine.handled(sequence);
        Ok(())
    }

    /// Tells the hub what is subscribed now.
    fn announce(&mut self) {
        self.outbox.settle_refused();
        self.report();
        let features = self.subscriber.features();
        self.context.hub.subscribed(&self.registration, features);
    }

    /// Tells the hub what became of deliveries.
    fn report(&mut self) {
        let settled = self.outbox.take_settled();
        if !settled.is_empty() {
            self.context.hub.settled(&self.registration, &settled);
        }
    }

    /// Writes what there is to say, as far as the client takes it at once.
    async fn write(&mut self, clock: &dyn Clock) -> Result<(), ConnectionEnd> {
        let now = clock.instant();
        if self
            .transport
            .load(&mut self.machine, &self.context.acks, now)
        {
            self.outbox.output_taken();
            self.transport.write_now(&mut self.machine, clock).await?;
        }
        if !self.transport.is_writing() {
            self.outbox.output_written();
        }
        Ok(())
    }

    /// When [`Client::check_times`] must look.
    fn deadline(&self) -> Instant {
        let silence = self.machine.deadline();
        let deadline = self
            .transport
            .deadline()
            .map_or(silence, |stall| stall.min(silence));
        Instant::from_std(deadline)
    }

    fn check_times(&mut self, clock: &dyn Clock) -> Result<(), ConnectionEnd> {
        let now = clock.instant();
        if self.transport.is_stalled(now) {
            return Err(ConnectionEnd::NotReading);
        }
        match self.machine.expired(now) {
            Some(reason) => Err(reason.into()),
            None => Ok(()),
        }
    }

    /// Hands the batch to the store, unless an earlier one still waits for room.
    fn store(&mut self) -> Result<(), ConnectionEnd> {
        if self.appending.is_some() {
            return Ok(());
        }
        let Some(batch) = self.ingest.take_batch() else {
            return Ok(());
        };
        match self.context.hub.store().try_append(batch) {
            Ok(()) => Ok(()),
            Err(TryAppendError::Full(batch)) => {
                self.appending = Some(self.append(batch));
                Ok(())
            }
            Err(TryAppendError::Closed) => Err(ConnectionEnd::Stopping),
        }
    }

    fn append(&self, batch: AppendBatch) -> PendingAppend {
        let store = self.context.hub.store().clone();
        Box::pin(async move { store.append(batch).await })
    }

    async fn store_the_rest(&mut self) {
        let rest = async {
            if let Some(appending) = self.appending.take() {
                appending.await?;
            }
            match self.ingest.take_batch() {
                Some(batch) => self.append(batch).await,
                None => Ok(()),
            }
        };
        // Unacknowledged messages: storing them is a courtesy that must not hold a task.
        let _ = timeout(FAREWELL_MAX, rest).await;
    }

    /// Publishes the will as telemetry, behind all that was read. It is judged and counted as any
    /// message of the client, with a batch of its own: that of the others may have failed.
    async fn publish_will(&mut self) {
        let Some(will) = self.will.take() else {
            return;
        };
        let identity = self.principal.identity();
        let hub = &self.context.hub;
        let outcome = match topic::parse_publish(&will.topic) {
            PublishTopic::Telemetry {
                device_id,
                module_id,
                bag,
            } if will::is_allowed(identity, &will.topic) => {
                let bag = will::marked(bag);
                let telemetry = Telemetry {
                    sequence: 1,
                    duplicate: false,
                    retain: will.retain,
                    topic: PublishTopic::Telemetry {
                        device_id,
                        module_id,
                        bag: &bag,
                    },
                    body: will.payload.clone(),
                };
                let mut ingest = Ingest::new(Arc::clone(hub), identity.clone());
                let outcome = ingest.take(telemetry, hub.clock().unix_ms());
                if let Some(batch) = ingest.take_batch() {
                    let _ = timeout(FAREWELL_MAX, self.append(batch)).await;
                }
                outcome
            }
            _ => Outcome::Foreign,
        };
        match outcome {
            Outcome::Gathered => tracing::debug!("Published the will of {identity}"),
            Outcome::Dropped(reason) => {
                tracing::info!("The will of {identity} was dropped: {}", reason.label());
            }
            Outcome::Foreign => {
                tracing::warn!("The will of {identity} was not published: it may not any more");
            }
        }
    }
}

async fn append_done(appending: &mut Option<PendingAppend>) -> Result<(), StoreClosed> {
    match appending.as_mut() {
        Some(appending) => appending.await,
        None => std::future::pending().await,
    }
}

/// How long a token is good; its end already has the five minutes of tolerance.
fn token_left(end_ms: u64, now_ms: u64) -> Duration {
    Duration::from_millis(end_ms.saturating_sub(now_ms))
}

fn token_left_is_zero(end_ms: u64, clock: &dyn Clock) -> bool {
    token_left(end_ms, clock.unix_ms()).is_zero()
}

/// Wakes when the token may have expired; looks again every minute, since the clock can move.
async fn token_expiry(left: Option<Duration>) {
    match left {
        Some(left) => tokio::time::sleep(left.min(Duration::from_secs(60))).await,
        None => std::future::pending().await,
    }
}

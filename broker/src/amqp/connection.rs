//! One AMQP connection on a byte stream, from its first byte to its end.
//!
//! A turn: frames are worked off, events of clients become frames, telemetry goes to the store as
//! one batch, dispositions that are due join, all of it is written, and then the task waits for
//! whatever comes first (design.md section 4).
//!
//! Lifetime: the task ends when the peer closes or leaves, breaks the protocol, falls silent,
//! presents no credential, does not read, or the hub stops.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use edgehub_amqp::connection::CloseCause;
use edgehub_storage::{AppendBatch, StoreClosed, TryAppendError};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::condition;
use super::head::{Done, Guard, Head, Job, Watch};
use super::limits::{FAREWELL_MAX, JOBS_MAX};
use super::transport::Transport;
use crate::admission::Stranger;
use crate::hub::{Hub, ToClient};
use crate::telemetry::metrics::AckCounters;

/// What connections of one listener share.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    /// The hub behind the head.
    pub hub: Arc<Hub>,
    /// Where dispositions of telemetry are counted.
    pub acks: AckCounters,
    /// Fires when the hub stops.
    pub stop: CancellationToken,
}

/// Why a connection's task ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionEnd {
    /// The protocol ended it.
    #[error(transparent)]
    Protocol(#[from] CloseCause),
    /// The transport failed, or the peer left without a close.
    #[error("the transport failed: {0}")]
    Transport(#[from] io::Error),
    /// The peer does not read what is written.
    #[error("the peer does not read")]
    NotReading,
    /// The hub stops.
    #[error("the hub stops")]
    Stopping,
}

type Pending<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Serves one connection until it ends. `certificate` is what the peer showed to TLS. The stranger's
/// place is given back when the peer has presented a credential.
///
/// # Cancel safety
/// Dropping it closes the connection; nothing that is not accepted counts as stored for the peer.
pub(crate) async fn serve<S>(
    mut stream: S,
    context: ConnectionContext,
    certificate: Option<Vec<u8>>,
    stranger: Option<Stranger>,
) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let now = context.hub.clock().instant();
    let mut task = Task {
        transport: Transport::new(&mut stream, now),
        head: Head::new(Arc::clone(&context.hub), certificate),
        jobs: FuturesUnordered::new(),
        watches: FuturesUnordered::new(),
        guards: FuturesUnordered::new(),
        appending: None,
        stranger,
        context,
    };
    let end = match task.turns().await {
        Ok(never) => match never {},
        Err(end) => end,
    };
    task.farewell(&end).await;
    drop(task);
    // The peer may be gone: what matters was decided before.
    let _ = timeout(FAREWELL_MAX, stream.shutdown()).await;
    tracing::debug!("An AMQP connection ended: {end}");
    end
}

struct Task<S> {
    transport: Transport<S>,
    head: Head,
    jobs: FuturesUnordered<Pending<Done>>,
    watches: FuturesUnordered<Pending<(Watch, Option<ToClient>)>>,
    guards: FuturesUnordered<Pending<Guard>>,
    /// A batch that waits for room in the store; the next one is gathered meanwhile.
    appending: Option<Pending<Result<(), StoreClosed>>>,
    stranger: Option<Stranger>,
    context: ConnectionContext,
}

impl<S> Task<S>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    async fn turns(&mut self) -> Result<Infallible, ConnectionEnd> {
        let clock = Arc::clone(self.context.hub.clock());
        let mut progress = Arc::clone(self.head.telemetry.gather.progress());
        loop {
            // Also without fresh bytes: some may have waited for a verdict.
            let now = clock.instant();
            self.head.engine.receive(&mut self.transport.input, now);
            self.head.turn();
            self.start();
            self.store()?;
            if !self.transport.is_writing()
                && let Some(output) = self.head.engine.output()
            {
                self.transport.load(output, now);
                self.transport.write_now(&*clock).await?;
            }
            if let Some(cause) = self.head.closed() {
                return Err(cause.clone().into());
            }
            if self.stranger.is_some() && self.head.is_known() {
                self.stranger = None;
            }

            // Room that the write made may be what events wait for.
            let has_output = !self.transport.is_writing() && self.head.engine.output_bytes() > 0;
            let reads = self.head.wants_input();
            let times = self.deadline(now);
            // Not at once again: a clock of milliseconds may round.
            let expiry = self.head.expires_in().max(Duration::from_millis(1));
            tokio::select! {
                moved = self.transport.progress(&*clock, reads) => moved?,
                () = std::future::ready(()), if has_output => {}
                Some(done) = self.jobs.next() => self.head.done(done),
                Some((watch, event)) = self.watches.next() => self.head.woken(watch, event),
                Some(guard) = self.guards.next() => {
                    self.head.dismissed(&guard.identity, guard.generation);
                }
                () = progress.changed() => {
                    let count = self.head.committed(progress.committed());
                    self.context.acks.acks.increment(count);
                    self.context.acks.writes.increment(1);
                    if progress.failed() {
                        // Whoever sent what waits there sends it again.
                        self.appending = None;
                        progress = self.head.not_stored();
                    }
                }
                appended = append_done(&mut self.appending) => {
                    self.appending = None;
                    appended.map_err(|StoreClosed| ConnectionEnd::Stopping)?;
                }
                () = sleep_until(times) => {
                    let now = clock.instant();
                    if self.transport.deadline().is_some_and(|deadline| deadline <= now) {
                        return Err(ConnectionEnd::NotReading);
                    }
                    self.head.engine.expired(now);
                }
                () = sleep(expiry) => self.head.expire(),
                () = self.context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
            }
        }
    }

    /// Starts what takes time, and waits for whom it must be waited.
    fn start(&mut self) {
        while self.jobs.len() < JOBS_MAX
            && let Some(job) = self.head.next_job()
        {
            self.jobs.push(run(job, Arc::clone(&self.context.hub)));
        }
        for mut watch in self.head.take_watches() {
            self.watches.push(Box::pin(async move {
                let event = watch.outbox.recv().await;
                (watch, event)
            }));
        }
        for guard in self.head.take_guards() {
            self.guards.push(Box::pin(async move {
                guard.closed.cancelled().await;
                guard
            }));
        }
    }

    /// Hands the batch to the store, unless an earlier one still waits for room.
    fn store(&mut self) -> Result<(), ConnectionEnd> {
        if self.appending.is_some() {
            return Ok(());
        }
        let Some(batch) = self.head.telemetry.gather.take_batch() else {
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

    fn append(&self, batch: AppendBatch) -> Pending<Result<(), StoreClosed>> {
        let store = self.context.hub.store().clone();
        Box::pin(async move { store.append(batch).await })
    }

    /// When the engine or the transport must be looked at.
    fn deadline(&self, now: std::time::Instant) -> Instant {
        let hour = now + Duration::from_secs(3_600);
        let engine = self.head.engine.deadline().unwrap_or(hour);
        let transport = self.transport.deadline();
        Instant::from_std(transport.map_or(engine, |stall| stall.min(engine)))
    }

    /// What is due still leaves, and what was read is stored.
    async fn farewell(&mut self, end: &ConnectionEnd) {
        if let ConnectionEnd::Stopping = end {
            // The reference's words (spec/amqp.md 1.1).
            let text = "Server busy, please retry operation";
            let error = condition::error(condition::DETACH_FORCED, text);
            self.head.close(error);
        }
        let clock = Arc::clone(self.context.hub.clock());
        let writes = async {
            self.transport.finish(&*clock).await?;
            while let Some(output) = self.head.engine.output() {
                self.transport.load(output, clock.instant());
                self.transport.finish(&*clock).await?;
            }
            io::Result::Ok(())
        };
        let _ = timeout(FAREWELL_MAX, writes).await;
        self.head.finish();
        let rest = async {
            if let Some(appending) = self.appending.take() {
                appending.await?;
            }
            match self.head.telemetry.gather.take_batch() {
                Some(batch) => self.append(batch).await,
                None => Ok(()),
            }
        };
        // Messages that nobody was told of: storing them is a courtesy that must not hold a task.
        let _ = timeout(FAREWELL_MAX, rest).await;
    }
}

fn run(job: Job, hub: Arc<Hub>) -> Pending<Done> {
    Box::pin(async move {
        match job {
            Job::Connect(claim, proof, options) => {
                let connected = hub.connect(claim.clone(), options).await;
                Done::Connect(claim, proof, connected)
            }
            Job::Judge(request, text, claim) => {
                let verdict = hub.authenticator().authenticate(&claim).await;
                Done::Judge(request, text, verdict)
            }
            Job::Plain(claim) => {
                let verdict = hub.authenticator().authenticate(&claim).await;
                Done::Plain(claim, verdict)
            }
        }
    })
}

async fn append_done(
    appending: &mut Option<Pending<Result<(), StoreClosed>>>,
) -> Result<(), StoreClosed> {
    match appending.as_mut() {
        Some(appending) => appending.await,
        None => std::future::pending().await,
    }
}

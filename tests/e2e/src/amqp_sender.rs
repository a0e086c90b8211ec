//! A client that sends telemetry over AMQP until it is told to stop, over kills and outages of the
//! hub, and remembers what was acknowledged: the AMQP counterpart of the lab's `MqttSender`. Its
//! frames are those of [`crate::amqp`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use edgehub_lab::{Acknowledged, Lab};
use parking_lot::Mutex;
use serde_amqp::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use crate::amqp::{
    AMQP, Amqp, Frame, Link, Message, Transfer, begin, code, credit, frame, open, put_token, string,
};
use crate::tls;
use crate::token::Token;

/// Between attempts: short, because tests restart hubs in under a second.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// From TCP to the credit of the telemetry link.
const CONNECT_MAX: Duration = Duration::from_secs(20);
/// Handles of the links.
const CBS_REQUESTS: u32 = 100;
const CBS_ANSWERS: u32 = 101;
const TELEMETRY: u32 = 0;

/// How a sender sends.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Messages in flight at one time.
    pub window: usize,
    /// Pause between two messages; zero sends as fast as window and credit allow.
    pub interval: Duration,
    /// Ends by itself after this many; `None` goes on until it is stopped.
    pub count: Option<u64>,
    /// Size of each body; at least what its number needs.
    pub body_bytes: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            window: 50,
            interval: Duration::ZERO,
            count: None,
            body_bytes: 256,
        }
    }
}

/// What a running sender shows.
#[derive(Debug, Default)]
struct Shown {
    acknowledged: AtomicU64,
    in_flight: AtomicU64,
    connects: AtomicU64,
    last_error: Mutex<Option<String>>,
}

/// A running sender. Dropping it ends it at once.
#[derive(Debug)]
pub struct AmqpSender {
    id: String,
    shown: Arc<Shown>,
    no_more: watch::Sender<bool>,
    task: JoinHandle<Vec<Acknowledged>>,
}

impl AmqpSender {
    /// Starts to connect to a host of the lab and to send as this identity. That nobody answers is
    /// no error; it tries again.
    #[must_use]
    pub fn start(lab: &Lab, id: &str, host: &str, pace: Pace) -> Self {
        let place = lab.host(host).expect("a host of the lab");
        let shown = Arc::new(Shown::default());
        let (no_more, stop) = watch::channel(false);
        let work = Work {
            id: id.to_owned(),
            host: place.hostname.clone(),
            port: place.ports.amqps,
            tls: tls::connector(lab, tls::BOTH, None),
            token: Token::of(lab, id).text(),
            pace,
            stop,
            shown: Arc::clone(&shown),
            next_sequence: 1,
            next_due: Instant::now(),
            in_flight: VecDeque::new(),
            written: 0,
            next_delivery: 0,
            credit_until: 0,
            window_until: 0,
            acknowledged: Vec::new(),
        };
        Self {
            id: id.to_owned(),
            shown,
            no_more,
            task: tokio::spawn(work.run()),
        }
    }

    /// `device` or `device/module`.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Messages acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shown.acknowledged.load(Ordering::Relaxed)
    }

    /// Messages sent and not acknowledged yet, also while there is no connection.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.shown.in_flight.load(Ordering::Relaxed)
    }

    /// How often its telemetry link got credit on a new connection.
    #[must_use]
    pub fn connects(&self) -> u64 {
        self.shown.connects.load(Ordering::Relaxed)
    }

    /// Why the last connection ended or was not made.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.shown.last_error.lock().clone()
    }

    /// Begins no further message, waits until everything in flight is acknowledged, and returns its
    /// log.
    ///
    /// # Panics
    /// When that takes longer than `patience`.
    pub async fn finish(mut self, patience: Duration) -> (String, Vec<Acknowledged>) {
        // Whoever has ended by itself does not listen any more.
        let _ = self.no_more.send(true);
        let log = timeout(patience, &mut self.task).await.unwrap_or_else(|_| {
            let (flying, error) = (self.in_flight(), self.last_error());
            panic!(
                "{}: {flying} in flight after {patience:?}, {error:?}",
                self.id
            )
        });
        (self.id.clone(), log.expect("the sender does not panic"))
    }
}

impl Drop for AmqpSender {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One message on its way.
struct InFlight {
    sequence: u64,
    /// Number of its delivery on this connection, once written.
    delivery: u32,
    body: Vec<u8>,
}

struct Work {
    id: String,
    host: String,
    port: u16,
    tls: TlsConnector,
    token: String,
    pace: Pace,
    stop: watch::Receiver<bool>,
    shown: Arc<Shown>,
    next_sequence: u64,
    next_due: Instant,
    /// Oldest first; the first `written` of them are on this connection.
    in_flight: VecDeque<InFlight>,
    written: usize,
    next_delivery: u32,
    /// Deliveries of the link that the hub has given credit for, from its beginning.
    credit_until: u32,
    /// Transfers of the session that the hub has a window for, from its beginning.
    window_until: u32,
    acknowledged: Vec<Acknowledged>,
}

impl Work {
    async fn run(mut self) -> Vec<Acknowledged> {
        while !self.is_done() {
            if let Err(error) = self.connection().await {
                *self.shown.last_error.lock() = Some(error);
                sleep(RETRY_PAUSE).await;
            }
        }
        self.acknowledged
    }

    fn is_done(&self) -> bool {
        let all = self.pace.count;
        let no_more = *self.stop.borrow() || all.is_some_and(|all| self.next_sequence > all);
        no_more && self.in_flight.is_empty()
    }

    /// One connection, until everything is done or it is lost.
    async fn connection(&mut self) -> Result<(), String> {
        let opened = timeout(CONNECT_MAX, self.connect()).await;
        let mut client = opened.map_err(|_| "no credit in time".to_owned())??;
        self.shown.connects.fetch_add(1, Ordering::Relaxed);
        while !self.is_done() {
            let bytes = self.fill(Instant::now());
            self.show();
            if !bytes.is_empty() {
                let sent = client.try_send(&bytes).await;
                sent.map_err(|error| error.to_string())?;
            }
            let due = self.may_begin(self.next_due).then_some(self.next_due);
            tokio::select! {
                frame = client.try_next() => self.take(&frame.ok_or("the hub closed")?)?,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                changed = self.stop.changed() => changed.map_err(|_| "dropped".to_owned())?,
            }
            self.show();
        }
        Ok(())
    }

    /// TLS, token and the telemetry link with its first credit.
    async fn connect(&mut self) -> Result<Amqp, String> {
        let text = |error: std::io::Error| error.to_string();
        let client = Amqp::try_connect(&self.host, self.port, &self.tls).await;
        let mut client = client.map_err(text)?;
        let request = Transfer {
            handle: CBS_REQUESTS,
            settled: true,
            ..Transfer::default()
        };
        let request = request.with(&put_token(string("1"), &self.token).encode());
        let hello = [
            AMQP.to_vec(),
            frame(0, &open(None)),
            frame(0, &begin()),
            frame(0, &Link::sender(CBS_REQUESTS, "$cbs").attach()),
            frame(0, &Link::receiver(CBS_ANSWERS, "$cbs").attach()),
            frame(0, &credit(CBS_ANSWERS, 0, 10, false)),
        ];
        client.try_send(&hello.concat()).await.map_err(text)?;
        if client.try_header().await != Some(AMQP) {
            return Err("no AMQP header".to_owned());
        }
        until(&mut client, |frame| flow_of(frame, CBS_REQUESTS)).await?;
        client.try_send(&frame(0, &request)).await.map_err(text)?;
        let answer = until(&mut client, |frame| frame.code == code::TRANSFER).await?;
        let status = answer.entry(0x74, "status-code");
        if status != Some(Value::Int(200)) {
            return Err(format!("the token was answered {status:?}"));
        }
        let path = match self.id.split_once('/') {
            Some((device, module)) => format!("/devices/{device}/modules/{module}"),
            None => format!("/devices/{}", self.id),
        };
        let link = Link::sender(TELEMETRY, &(path + "/messages/events")).attach();
        client.try_send(&frame(0, &link)).await.map_err(text)?;
        // The put-token was delivery 0 of the session.
        (self.written, self.next_delivery) = (0, 1);
        (self.credit_until, self.window_until) = (0, 0);
        let flow = until(&mut client, |frame| flow_of(frame, TELEMETRY)).await?;
        self.take(&flow)?;
        Ok(client)
    }

    fn may_begin(&self, now: Instant) -> bool {
        !*self.stop.borrow()
            && self.in_flight.len() < self.pace.window
            && self
                .pace
                .count
                .is_none_or(|count| self.next_sequence <= count)
            && now >= self.next_due
    }

    fn may_write(&self) -> bool {
        // Delivery 0 is not the link's.
        self.next_delivery <= self.credit_until && self.next_delivery < self.window_until
    }

    /// Frames of what may be sent at once: what a lost connection did not acknowledge, then new
    /// messages.
    fn fill(&mut self, now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        while self.may_write() {
            if self.written == self.in_flight.len() {
                if !self.may_begin(now) {
                    break;
                }
                self.begin(now);
            }
            let Some(message) = self.in_flight.get_mut(self.written) else {
                break;
            };
            message.delivery = self.next_delivery;
            let transfer = Transfer {
                handle: TELEMETRY,
                id: self.next_delivery,
                ..Transfer::default()
            };
            let message = Message::of(&message.body).encode();
            out.extend(frame(0, &transfer.with(&message)));
            self.next_delivery += 1;
            self.written += 1;
        }
        out
    }

    fn begin(&mut self, now: Instant) {
        let (id, sequence) = (&self.id, self.next_sequence);
        let start = format!(r#"{{"sender":"{id}","sequence":{sequence},"padding":""#);
        let padding = self.pace.body_bytes.saturating_sub(start.len() + 2);
        let body = start + &"x".repeat(padding) + "\"}";
        self.in_flight.push_back(InFlight {
            sequence,
            delivery: 0,
            body: body.into_bytes(),
        });
        self.next_sequence += 1;
        self.next_due = now + self.pace.interval;
    }

    fn take(&mut self, frame: &Frame) -> Result<(), String> {
        let number = |index: usize| {
            let number = frame
                .number(index)
                .and_then(|number| u32::try_from(number).ok());
            number.ok_or_else(|| format!("field {index} is missing: {frame:?}"))
        };
        match frame.code {
            code::FLOW => {
                // What the hub has seen of the session, and its window.
                let seen = frame.number(0).unwrap_or(0);
                let seen = u32::try_from(seen).map_err(|error| error.to_string())?;
                self.window_until = seen.saturating_add(number(1)?);
                if flow_of(frame, TELEMETRY) {
                    self.credit_until = number(5)?.saturating_add(number(6)?);
                }
            }
            code::DISPOSITION => {
                if frame.outcome() != Some(code::ACCEPTED) {
                    return Err(format!("not accepted: {frame:?}"));
                }
                let first = number(1)?;
                let last = number(2).unwrap_or(first);
                self.accept(first, last);
            }
            code::ATTACH | code::BEGIN | code::OPEN => {}
            _ => return Err(format!("the hub ends it: {frame:?}")),
        }
        Ok(())
    }

    fn accept(&mut self, first: u32, last: u32) {
        let mut index = 0;
        while index < self.written {
            let delivery = self.in_flight.get(index).map_or(0, |one| one.delivery);
            if (first..=last).contains(&delivery) {
                let message = self.in_flight.remove(index).expect("it is there");
                self.written -= 1;
                self.acknowledged
                    .push(Acknowledged::new(message.sequence, &message.body));
            } else if delivery > last {
                break;
            } else {
                index += 1;
            }
        }
    }

    fn show(&self) {
        let shown = &self.shown;
        let acknowledged = self.acknowledged.len() as u64;
        shown.acknowledged.store(acknowledged, Ordering::Relaxed);
        let in_flight = self.in_flight.len() as u64;
        shown.in_flight.store(in_flight, Ordering::Relaxed);
    }
}

/// Whether this is a flow of the link with this handle of ours, whose handle the hub mirrors.
fn flow_of(frame: &Frame, handle: u32) -> bool {
    frame.code == code::FLOW && frame.number(4) == Some(handle.into())
}

async fn until(client: &mut Amqp, wanted: impl Fn(&Frame) -> bool) -> Result<Frame, String> {
    loop {
        let frame = client.try_next().await.ok_or("the hub closed")?;
        if wanted(&frame) {
            return Ok(frame);
        }
        if matches!(frame.code, code::DETACH | code::END | code::CLOSE) {
            return Err(format!("refused: {frame:?}"));
        }
    }
}

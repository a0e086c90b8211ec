//! A server of plain queues on the engine, for clients of others to judge it by.
//!
//! A message to a target address is kept in the queue of that name, a link from a source address
//! takes from it. A delivery that is released or modified goes back to the front, one that is
//! rejected or undeliverable to the queue `<name>.dead`, and what is unsettled when a link goes
//! returns in its order. Addresses with a meaning of their own: `$reject`, `$release` and `$modify`
//! answer with that outcome; `$detach` and `$close` with the end of the link or of the connection;
//! `$forbidden` is refused. SASL PLAIN takes the password `open-sesame`. A connection that is silent
//! for some seconds is closed.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use edgehub_amqp::connection::{
    Attach, Config, Connection, Event, Incoming, LinkId, LinkTerms, Outgoing, SendError, Sent,
};
use edgehub_amqp::message::{BATCH_MESSAGE_FORMAT, MessageView, batch_items};
use edgehub_amqp::performative::{ErrorInfo, Outcome};
use edgehub_amqp::sasl::{Mechanism, SaslCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Bytes of all queues; a message beyond it is rejected.
const QUEUES_BYTES_MAX: usize = 256 << 20;
/// Bytes of one message.
const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// Credit of clients that send.
const CREDIT: u32 = 100;
/// Bytes that are read at once.
const READ_BYTES: usize = 65_536;
/// What clients are told of how long they may be silent, and how long they may be.
const IDLE_ADVERTISED: Duration = Duration::from_secs(4);
const IDLE_ENFORCED: Duration = Duration::from_secs(8);

struct Message {
    format: u32,
    payload: Bytes,
}

struct Queues {
    queues: BTreeMap<String, VecDeque<Message>>,
    bytes: usize,
    changes: watch::Sender<u64>,
}

impl Queues {
    fn push(&mut self, name: &str, message: Message, front: bool) {
        self.bytes += message.payload.len();
        let queue = self.queues.entry(name.to_owned()).or_default();
        if front {
            queue.push_front(message);
        } else {
            queue.push_back(message);
        }
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn pop(&mut self, name: &str) -> Option<Message> {
        let message = self.queues.get_mut(name)?.pop_front()?;
        self.bytes -= message.payload.len();
        Some(message)
    }
}

/// Serves connections until an accept fails. Needs a `LocalSet`.
pub(crate) async fn serve(listener: TcpListener) -> io::Error {
    let queues = Rc::new(RefCell::new(Queues {
        queues: BTreeMap::new(),
        bytes: 0,
        changes: watch::Sender::new(0),
    }));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn_local(connection(stream, Rc::clone(&queues)));
                }
                Err(error) => return error,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut stream: TcpStream, queues: Rc<RefCell<Queues>>) -> io::Result<()> {
    let mut changes = queues.borrow().changes.subscribe();
    let (mut reader, mut writer) = stream.split();
    let now = || Instant::now().into_std();
    let mut config = Config::new("queues");
    config.idle_advertised = IDLE_ADVERTISED;
    config.idle_enforced = IDLE_ENFORCED;
    // There is no TLS here that could show a certificate.
    config
        .mechanisms
        .retain(|mechanism| *mechanism != Mechanism::External);
    let mut client = Client {
        engine: Connection::new(config, now()),
        queues,
        links: BTreeMap::new(),
        tags: 0,
        closed: false,
    };
    let mut input = BytesMut::new();
    let mut output = Bytes::new();
    loop {
        client.engine.receive(&mut input, now());
        client.turn();
        // A verdict on SASL was given in the turn: what came early is looked at.
        client.engine.receive(&mut input, now());
        client.turn();
        if output.is_empty() {
            output = client.engine.output().unwrap_or_default();
        }
        if client.closed && output.is_empty() {
            return writer.shutdown().await;
        }
        let wants_input = client.engine.wants_input();
        let deadline = client.engine.deadline();
        input.reserve(READ_BYTES);
        tokio::select! {
            read = reader.read_buf(&mut input), if wants_input => {
                if read? == 0 {
                    client.leave();
                    return Ok(());
                }
            }
            written = writer.write_buf(&mut output), if !output.is_empty() => {
                written?;
            }
            changed = changes.changed() => changed.map_err(io::Error::other)?,
            () = sleep_until(deadline.map_or_else(Instant::now, Instant::from_std)), if deadline.is_some() => {
                client.engine.expired(now());
            }
        }
    }
}

enum Role {
    /// The client sends.
    From(String),
    /// The client receives.
    To {
        name: String,
        unsettled: HashMap<Sent, Message>,
        order: VecDeque<Sent>,
        settled: bool,
        drain: bool,
    },
}

struct Client {
    engine: Connection,
    queues: Rc<RefCell<Queues>>,
    links: BTreeMap<LinkId, Role>,
    tags: u128,
    closed: bool,
}

impl Client {
    fn turn(&mut self) {
        while let Some(event) = self.engine.poll() {
            self.event(event);
        }
        self.pump();
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::SaslPlain(plain) => {
                let code = match plain.password.expose().as_str() {
                    "open-sesame" => SaslCode::Ok,
                    _ => SaslCode::Auth,
                };
                self.engine.sasl_outcome(code);
            }
            Event::Attached { link, attach } => self.attached(link, &attach),
            Event::Delivery(incoming) => self.delivered(incoming),
            Event::Credit { link, drain: d, .. } => {
                if let Some(Role::To { drain, .. }) = self.links.get_mut(&link) {
                    *drain = d;
                }
            }
            Event::Settled {
                link,
                sent,
                outcome,
                settled,
            } => {
                if let Some(Role::To {
                    name, unsettled, ..
                }) = self.links.get_mut(&link)
                    && let Some(message) = unsettled.remove(&sent)
                {
                    let mut queues = self.queues.borrow_mut();
                    let dead = format!("{name}.dead");
                    match outcome.unwrap_or(Outcome::Accepted) {
                        Outcome::Accepted => {}
                        Outcome::Rejected(_)
                        | Outcome::Modified {
                            undeliverable_here: true,
                            ..
                        } => queues.push(&dead, message, false),
                        Outcome::Released | Outcome::Modified { .. } => {
                            queues.push(name, message, true);
                        }
                    }
                }
                if !settled {
                    self.engine.settle_sent(link, sent);
                }
            }
            Event::Detached { link, .. } => {
                if let Some(role) = self.links.remove(&link) {
                    self.put_back(role);
                }
            }
            Event::Closed(_) => self.closed = true,
            _ => {}
        }
    }

    fn attached(&mut self, link: LinkId, attach: &Attach) {
        let refusal = match attach.address() {
            None | Some("") => Some(ErrorInfo::new("amqp:invalid-field", "no address")),
            Some("$forbidden") => Some(ErrorInfo::new("amqp:unauthorized-access", "not for you")),
            Some(_) => None,
        };
        if let Some(error) = refusal {
            self.engine.refuse(link, &error);
            return;
        }
        let name = attach.address().unwrap_or_default().to_owned();
        let role = if attach.peer_sends() {
            Role::From(name)
        } else {
            Role::To {
                name,
                unsettled: HashMap::new(),
                order: VecDeque::new(),
                settled: attach.snd_settle_mode()
                    == edgehub_amqp::connection::SenderSettleMode::Settled,
                drain: false,
            }
        };
        self.links.insert(link, role);
        let terms = LinkTerms {
            max_message_size: Some(MESSAGE_BYTES_MAX),
            credit: CREDIT,
            ..LinkTerms::default()
        };
        self.engine.accept(link, &terms);
    }

    fn delivered(&mut self, incoming: Incoming) {
        let Some(Role::From(name)) = self.links.get(&incoming.link) else {
            return;
        };
        let asked = || ErrorInfo::new("amqp:resource-deleted", "as asked");
        let outcome = match name.as_str() {
            "$detach" => {
                self.links.remove(&incoming.link);
                return self.engine.detach(incoming.link, Some(&asked()));
            }
            "$close" => return self.engine.close(Some(asked())),
            "$reject" => Outcome::Rejected(Some(ErrorInfo::new("amqp:not-allowed", "as asked"))),
            "$release" => Outcome::Released,
            "$modify" => Outcome::Modified {
                delivery_failed: true,
                undeliverable_here: false,
            },
            _ => self.keep(name, incoming.message_format, incoming.payload),
        };
        self.engine.settle(incoming.received, outcome);
    }

    fn keep(&self, name: &str, format: u32, payload: Bytes) -> Outcome {
        let mut queues = self.queues.borrow_mut();
        if queues.bytes + payload.len() > QUEUES_BYTES_MAX {
            let full = ErrorInfo::new("amqp:resource-limit-exceeded", "the queues are full");
            return Outcome::Rejected(Some(full));
        }
        if format != BATCH_MESSAGE_FORMAT {
            queues.push(name, Message { format, payload }, false);
            return Outcome::Accepted;
        }
        match MessageView::parse(&payload) {
            Ok(view) => {
                for item in batch_items(&view.body) {
                    // Not a slice of the whole batch.
                    let payload = Bytes::copy_from_slice(item);
                    queues.push(name, Message { format: 0, payload }, false);
                }
                Outcome::Accepted
            }
            Err(error) => {
                let error = ErrorInfo::new("amqp:decode-error", error.to_string());
                Outcome::Rejected(Some(error))
            }
        }
    }

    /// Sends what there is to send.
    fn pump(&mut self) {
        for (link, role) in &mut self.links {
            let Role::To {
                name,
                unsettled,
                order,
                settled,
                drain,
            } = role
            else {
                continue;
            };
            while self.engine.can_send(*link) {
                let Some(message) = self.queues.borrow_mut().pop(name) else {
                    // Only now there is nothing left.
                    if std::mem::take(drain) {
                        self.engine.drained(*link);
                    }
                    break;
                };
                self.tags += 1;
                let delivery = Outgoing {
                    tag: &self.tags.to_be_bytes(),
                    message_format: message.format,
                    settled: *settled,
                    payload: message.payload.clone(),
                };
                match self.engine.send(*link, delivery) {
                    Ok(sent) if !*settled => {
                        order.push_back(sent);
                        unsettled.insert(sent, message);
                        // Those in front that were settled are done with.
                        while order
                            .front()
                            .is_some_and(|sent| !unsettled.contains_key(sent))
                        {
                            order.pop_front();
                        }
                    }
                    Ok(_) => {}
                    Err(SendError::TooLarge { .. }) => {
                        let dead = format!("{name}.dead");
                        self.queues.borrow_mut().push(&dead, message, false);
                    }
                    Err(_) => {
                        self.queues.borrow_mut().push(name, message, true);
                        break;
                    }
                }
            }
            if *drain {
                // No credit is left, or none was given: the answer is owed all the same.
                self.engine.drained(*link);
                *drain = false;
            }
        }
    }

    fn put_back(&self, role: Role) {
        let Role::To {
            name,
            mut unsettled,
            order,
            ..
        } = role
        else {
            return;
        };
        for sent in order.iter().rev() {
            if let Some(message) = unsettled.remove(sent) {
                self.queues.borrow_mut().push(&name, message, true);
            }
        }
    }

    /// The transport is gone.
    fn leave(&mut self) {
        for (_, role) in std::mem::take(&mut self.links) {
            self.put_back(role);
        }
    }
}

//! A parent hub for tests: `edgehub_amqp`'s server engine with just enough of a hub behind it.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Instant,
};

use bytes::Bytes;
use edgehub_amqp::{
    cbs::{PutToken, cbs_response},
    connection::{
        Attach, CloseCause as ServerClose, Config, Connection, Event, LinkId, LinkTerms, Outgoing,
        Received, Sent,
    },
    message::{
        BATCH_MESSAGE_FORMAT, Body, MessageId, MessageView, MessageWriter, Properties, batch_items,
    },
    performative::{ErrorInfo, Outcome},
    value::Value,
};

/// What the parent does with telemetry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    /// Detaches the link.
    Detach(&'static str),
    /// Ends the session: not something that the server engine does, so the link goes with an error.
    Modify,
    Reject(&'static str),
    Release,
    Silent,
}

/// What the parent does with an identity.
#[derive(Clone, Debug)]
pub(crate) struct Manner {
    /// Status of a put-token; none: no answer.
    pub(crate) token: Option<i32>,
    /// Condition with which links to an address that ends so are refused.
    pub(crate) refuse: Option<(&'static str, &'static str)>,
    /// Verdicts for the next deliveries, then for all.
    pub(crate) next: VecDeque<Verdict>,
    pub(crate) always: Verdict,
    /// Bodies that make a delivery be rejected with this condition.
    pub(crate) poison: Vec<(String, &'static str)>,
    /// Status of twin requests; none: no answer.
    pub(crate) twin: Option<i32>,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            token: Some(200),
            refuse: None,
            next: VecDeque::new(),
            always: Verdict::Accept,
            poison: Vec::new(),
            twin: Some(200),
        }
    }
}

/// A link as the parent sees it.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) id: LinkId,
    pub(crate) attach: Attach,
    pub(crate) identity: String,
    pub(crate) tail: String,
    pub(crate) peer_sends: bool,
}

/// The parent.
pub(crate) struct Parent {
    pub(crate) connection: Connection,
    pub(crate) manners: HashMap<String, Manner>,
    /// Names under which tokens were put, in order, with the token.
    pub(crate) tokens: Vec<(String, String)>,
    pub(crate) links: Vec<Link>,
    /// Every attach: identity and tail.
    pub(crate) attaches: Vec<(String, String)>,
    /// Bodies of accepted telemetry, by identity.
    pub(crate) ledger: BTreeMap<String, Vec<String>>,
    /// Sizes of all telemetry deliveries, in messages, by identity.
    pub(crate) deliveries: BTreeMap<String, Vec<usize>>,
    /// Telemetry without a word, by identity.
    pub(crate) open: Vec<(String, Received)>,
    /// Twin operations, by identity.
    pub(crate) twins: Vec<(String, String)>,
    /// Answers to methods: correlation, status, payload.
    pub(crate) answers: Vec<(MessageId, i64, String)>,
    pub(crate) settled: Vec<(Sent, Option<Outcome>, bool)>,
    pub(crate) detached: Vec<String>,
    pub(crate) closed: Option<ServerClose>,
    max_message_size: Option<u64>,
}

impl Parent {
    pub(crate) fn new(config: Config, now: Instant) -> Self {
        Self {
            connection: Connection::new(config, now),
            manners: HashMap::new(),
            tokens: Vec::new(),
            links: Vec::new(),
            attaches: Vec::new(),
            ledger: BTreeMap::new(),
            deliveries: BTreeMap::new(),
            open: Vec::new(),
            twins: Vec::new(),
            answers: Vec::new(),
            settled: Vec::new(),
            detached: Vec::new(),
            closed: None,
            max_message_size: None,
        }
    }

    pub(crate) fn manner(&mut self, identity: &str) -> &mut Manner {
        self.manners.entry(identity.to_owned()).or_default()
    }

    /// What links accepted from now on say.
    pub(crate) fn max_message_size(&mut self, bytes: u64) {
        self.max_message_size = Some(bytes);
    }

    pub(crate) fn ledger(&self, identity: &str) -> Vec<String> {
        self.ledger.get(identity).cloned().unwrap_or_default()
    }

    /// The live link of an identity.
    pub(crate) fn link(&self, identity: &str, tail: &str, peer_sends: bool) -> Option<&Link> {
        self.links.iter().rev().find(|link| {
            link.identity == identity && link.tail == tail && link.peer_sends == peer_sends
        })
    }

    /// Names of the links that live, sorted.
    pub(crate) fn tails(&self, identity: &str) -> Vec<String> {
        let links = self.links.iter().filter(|link| link.identity == identity);
        let mut tails: Vec<String> = links.map(|link| link.tail.clone()).collect();
        tails.sort();
        tails.dedup();
        tails
    }

    pub(crate) fn handle(&mut self) {
        while let Some(event) = self.connection.poll() {
            match event {
                Event::Attached { link, attach } => self.attach(link, attach),
                Event::Delivery(delivery) => {
                    let link = self.links.iter().find(|link| link.id == delivery.link);
                    let Some(link) = link.cloned() else { continue };
                    let (received, format) = (delivery.received, delivery.message_format);
                    self.delivery(&link, received, format, &delivery.payload);
                }
                Event::Detached { link, .. } => self.gone(link),
                Event::Settled {
                    link,
                    sent,
                    outcome,
                    settled,
                } => {
                    if !settled {
                        self.connection.settle_sent(link, sent);
                    }
                    let is_cbs = |one: &Link| one.id == link && one.tail == "$cbs";
                    if !self.links.iter().any(is_cbs) {
                        self.settled.push((sent, outcome, settled));
                    }
                }
                Event::Closed(cause) => self.closed = Some(cause),
                _ => {}
            }
        }
    }

    fn gone(&mut self, id: LinkId) {
        if let Some(index) = self.links.iter().position(|link| link.id == id) {
            let link = self.links.remove(index);
            self.detached
                .push(format!("{} {}", link.identity, link.tail));
        }
    }

    fn attach(&mut self, id: LinkId, attach: Attach) {
        let address = attach.address().unwrap_or_default().to_owned();
        let (identity, tail) = split(&address);
        let peer_sends = attach.peer_sends();
        self.attaches.push((identity.clone(), tail.clone()));
        let refusal = self
            .manners
            .get(&identity)
            .and_then(|manner| manner.refuse)
            .filter(|(end, _)| tail.ends_with(end) && !tail.is_empty());
        let chain = attach.property("com.microsoft:auth-chain");
        let actor = chain.and_then(|chain| chain.rsplit(';').next());
        let has_token = tail == "$cbs"
            || actor.is_some_and(|actor| {
                let name = format!("/devices/{actor}/modules/%24edgeHub");
                self.tokens.iter().any(|(put, _)| put.ends_with(&name))
            });
        if let Some((_, condition)) = refusal {
            let error = ErrorInfo::new(condition, "refused by the test");
            self.connection.refuse(id, &error);
            return;
        }
        if !has_token {
            let condition = "amqp:unauthorized-access";
            self.connection
                .refuse(id, &ErrorInfo::new(condition, "no token"));
            return;
        }
        let terms = LinkTerms {
            max_message_size: self.max_message_size,
            credit: 100,
            ..LinkTerms::default()
        };
        self.connection.accept(id, &terms);
        self.links.push(Link {
            id,
            attach,
            identity,
            tail,
            peer_sends,
        });
    }

    fn delivery(&mut self, link: &Link, received: Received, format: u32, payload: &Bytes) {
        match link.tail.as_str() {
            "$cbs" => self.token(received, payload),
            "messages/events" => self.telemetry(link, received, format, payload),
            "twin" => self.twin(link, received, payload),
            _ => {
                let view = MessageView::parse(payload).unwrap();
                let status = view
                    .application_properties
                    .unwrap()
                    .get_str("IoThub-status");
                let correlation = view.properties.unwrap().correlation_id.unwrap();
                let status = status.unwrap().as_i64().unwrap();
                self.answers.push((correlation, status, text(&view.body)));
                self.connection.settle(received, Outcome::Accepted);
            }
        }
    }

    fn token(&mut self, received: Received, payload: &Bytes) {
        let put = PutToken::parse(payload).unwrap();
        self.connection.settle(received, Outcome::Accepted);
        let (_, rest) = put.name.split_once("/devices/").unwrap();
        let identity = decoded(&rest.replace("/modules/", "/"));
        self.tokens
            .push((put.name.clone(), put.token.expose().clone()));
        let status = self
            .manners
            .get(&identity)
            .map_or(Some(200), |one| one.token);
        if let Some(status) = status {
            let answer = cbs_response(put.message_id.as_ref(), status, "by the test");
            let out = self
                .links
                .iter()
                .find(|one| one.tail == "$cbs" && !one.peer_sends);
            let out = out.unwrap().id;
            self.send(out, &answer, false);
        }
    }

    pub(crate) fn send(&mut self, link: LinkId, payload: &Bytes, settled: bool) -> Sent {
        let outgoing = Outgoing {
            tag: &[7; 16],
            message_format: 0,
            settled,
            payload: payload.clone(),
        };
        self.connection.send(link, outgoing).unwrap()
    }

    fn telemetry(&mut self, link: &Link, received: Received, format: u32, payload: &Bytes) {
        let bodies: Vec<String> = if format == BATCH_MESSAGE_FORMAT {
            let view = MessageView::parse(payload).unwrap();
            batch_items(&view.body).map(body_of).collect()
        } else {
            vec![body_of(payload)]
        };
        let identity = link.identity.clone();
        let sizes = self.deliveries.entry(identity.clone()).or_default();
        sizes.push(bodies.len());
        let manner = self.manners.entry(identity.clone()).or_default();
        let poison = manner.poison.iter().find(|(body, _)| bodies.contains(body));
        let verdict = match poison {
            Some((_, condition)) => Verdict::Reject(condition),
            None => manner
                .next
                .pop_front()
                .unwrap_or_else(|| manner.always.clone()),
        };
        let outcome = match verdict {
            Verdict::Accept => {
                self.ledger.entry(identity).or_default().extend(bodies);
                Outcome::Accepted
            }
            Verdict::Detach(condition) => {
                let error = ErrorInfo::new(condition, "detached by the test");
                self.connection.detach(link.id, Some(&error));
                self.gone(link.id);
                return;
            }
            Verdict::Modify => Outcome::Modified {
                delivery_failed: true,
                undeliverable_here: false,
            },
            Verdict::Reject(condition) => {
                Outcome::Rejected(Some(ErrorInfo::new(condition, "by the test")))
            }
            Verdict::Release => Outcome::Released,
            Verdict::Silent => {
                self.open.push((identity, received));
                return;
            }
        };
        self.connection.settle(received, outcome);
    }

    fn twin(&mut self, link: &Link, received: Received, payload: &Bytes) {
        self.connection.settle(received, Outcome::Accepted);
        let view = MessageView::parse(payload).unwrap();
        let annotations = view.message_annotations.unwrap();
        let operation = annotations.get_symbol("operation").unwrap();
        let operation = operation.as_str().unwrap().to_owned();
        let identity = link.identity.clone();
        self.twins.push((identity.clone(), operation.clone()));
        let status = self
            .manners
            .get(&identity)
            .map_or(Some(200), |one| one.twin);
        let Some(mut status) = status else { return };
        if status == 200 && operation == "PATCH" {
            status = 204;
        }
        let mut writer = MessageWriter::new();
        let version = Value::Long(text(&view.body).len() as i64);
        writer.annotations([("status", Value::Int(status)), ("version", version)]);
        writer.properties(&Properties {
            correlation_id: view.properties.unwrap().correlation_id,
            ..Properties::default()
        });
        writer.data(if operation == "GET" {
            b"{\"desired\":{}}"
        } else {
            b""
        });
        // Gone already after a DELETE.
        if let Some(out) = self.link(&identity, "twin", false) {
            let outgoing = Outgoing {
                tag: &[1],
                message_format: 0,
                settled: true,
                payload: writer.finish(),
            };
            let _ = self.connection.send(out.id, outgoing);
        }
    }
}

/// Identity and what follows of an address.
fn split(address: &str) -> (String, String) {
    let Some((_, rest)) = address.split_once("/devices/") else {
        return (String::new(), address.to_owned());
    };
    let mut parts = rest.split('/');
    let device = decoded(parts.next().unwrap());
    let rest: Vec<&str> = parts.collect();
    match rest.as_slice() {
        ["modules", module, tail @ ..] => {
            let module = decoded(module);
            (format!("{device}/{module}"), tail.join("/"))
        }
        tail => (device, tail.join("/")),
    }
}

fn decoded(text: &str) -> String {
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    decoded.unwrap().into_owned()
}

fn text(body: &Body<'_>) -> String {
    match body {
        Body::Data(sections) => String::from_utf8(sections.concat()).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn body_of(payload: &Bytes) -> String {
    text(&MessageView::parse(payload).unwrap().body)
}

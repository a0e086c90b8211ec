//! Sessions: what each identity has subscribed to, and the way to its live connection.
//!
//! The session of a client that connects with clean session 0 outlives its connections and the
//! process: unmodified SDKs subscribe once and rely on it. One with clean session 1 ends with its
//! connection and ends what was there before. A session belongs to the identity, whoever acts for
//! it. Unacknowledged C2D deliveries are part of it too; they are kept with their messages, in
//! `c2d`.
//!
//! AMQP has no sessions of this kind: what a client's links stand for ends with them. It is kept
//! here under the MQTT filter of the same meaning, so that whoever looks for a subscribed client
//! need not know its protocol. The MQTT session of such a client waits meanwhile.

mod feature;
mod outbox;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mqttbytes::QoS;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub(crate) use feature::Feature;
pub(crate) use outbox::{Outbox, Push};

use crate::connections::Fence;
use crate::identity::Identity;
use crate::journal::{Change, Journal, JournalError};

const PREFIX: &str = "session/";

/// Why a session is not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("the connection was closed or replaced before its session was changed")]
    Fenced,
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The connection that acts: its number, and whether it still may.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Actor<'a> {
    pub(crate) connection: u64,
    pub(crate) fence: &'a Fence,
}

/// The form in the journal.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Filter -> granted QoS.
    subscriptions: BTreeMap<String, u8>,
}

#[derive(Debug, Clone)]
struct Session {
    /// Clean session 0.
    persistent: bool,
    /// Filter -> granted QoS, 0 or 1. Only filters that [`Feature::of`] knows: a handful.
    subscriptions: BTreeMap<String, u8>,
    live: Option<Live>,
}

#[derive(Debug, Clone)]
struct Live {
    connection: u64,
    outbox: Arc<Outbox>,
    /// What an AMQP client is subscribed to, in place of the session's.
    own: Option<BTreeMap<String, u8>>,
}

/// One line of the list.
#[derive(Debug)]
pub(crate) struct SessionInfo {
    pub(crate) identity: Identity,
    pub(crate) persistent: bool,
    pub(crate) connection: Option<u64>,
    pub(crate) subscriptions: BTreeMap<String, u8>,
}

/// All sessions of one emulator.
pub(crate) struct Sessions {
    sessions: Mutex<HashMap<Identity, Session>>,
    journal: Arc<Journal>,
    /// Changes whenever a client comes, goes, or changes its subscriptions.
    changed: watch::Sender<u64>,
}

impl Sessions {
    /// Reads the sessions of those who `exist`.
    pub(crate) fn open(
        journal: Arc<Journal>,
        exists: impl Fn(&Identity) -> bool,
    ) -> Result<Self, JournalError> {
        let sessions = journal.load(PREFIX)?.into_iter();
        let sessions = sessions.filter_map(|(key, record): (_, Record)| {
            let session = Session {
                persistent: true,
                subscriptions: record.subscriptions,
                live: None,
            };
            let identity = Identity::parse(&key).ok()?;
            exists(&identity).then_some((identity, session))
        });
        Ok(Self {
            sessions: Mutex::new(sessions.collect()),
            journal,
            changed: watch::Sender::new(0),
        })
    }

    /// Makes a connection the live one of its identity. Returns whether a session was there that
    /// it goes on with.
    ///
    /// # Errors
    /// The connection is closed already, or the session could not be written.
    pub(crate) fn connect(
        &self,
        identity: &Identity,
        actor: Actor<'_>,
        clean: bool,
        outbox: Arc<Outbox>,
    ) -> Result<bool, SessionError> {
        let mut sessions = self.sessions.lock();
        // Under the lock: a newer connection, which fenced this one, is seen here or comes later.
        if actor.fence.is_closed() {
            return Err(SessionError::Fenced);
        }
        let old = sessions.get(identity).filter(|old| old.persistent);
        let subscriptions = match old {
            Some(old) if !clean => Some(old.subscriptions.clone()),
            Some(_) => {
                let delete = Change::delete(key(identity))?;
                self.journal.write(&[delete])?;
                None
            }
            None => None,
        };
        let present = subscriptions.is_some();
        let session = Session {
            persistent: !clean,
            subscriptions: subscriptions.unwrap_or_default(),
            live: Some(Live {
                connection: actor.connection,
                outbox,
                own: None,
            }),
        };
        if !present {
            self.store(identity, &session)?;
        }
        sessions.insert(identity.clone(), session);
        drop(sessions);
        self.tell();
        Ok(present)
    }

    /// Makes a connection without a session the live one of its identity. It has no subscriptions.
    ///
    /// # Errors
    /// The connection is closed already.
    pub(crate) fn attach(
        &self,
        identity: &Identity,
        actor: Actor<'_>,
        outbox: Arc<Outbox>,
    ) -> Result<(), SessionError> {
        let mut sessions = self.sessions.lock();
        if actor.fence.is_closed() {
            return Err(SessionError::Fenced);
        }
        let session = sessions.entry(identity.clone()).or_insert_with(|| Session {
            persistent: false,
            subscriptions: BTreeMap::new(),
            live: None,
        });
        session.live = Some(Live {
            connection: actor.connection,
            outbox,
            own: Some(BTreeMap::new()),
        });
        drop(sessions);
        self.tell();
        Ok(())
    }

    /// The connection is over; so is its session, unless it is a persistent one.
    pub(crate) fn disconnect(&self, identity: &Identity, connection: u64) {
        let mut sessions = self.sessions.lock();
        let Some(session) = sessions.get_mut(identity) else {
            return;
        };
        if !session.is_live(connection) {
            return;
        }
        session.live = None;
        if !session.persistent {
            sessions.remove(identity);
        }
        drop(sessions);
        self.tell();
    }

    /// Adds subscriptions, or replaces their QoS (MQTT-3.8.4-3).
    ///
    /// # Errors
    /// The connection is not the live one, or the session could not be written.
    pub(crate) fn subscribe(
        &self,
        identity: &Identity,
        actor: Actor<'_>,
        filters: &[(&str, QoS)],
    ) -> Result<(), SessionError> {
        self.change(identity, actor, |subscriptions| {
            for (filter, qos) in filters {
                subscriptions.insert((*filter).to_owned(), *qos as u8);
            }
        })
    }

    /// Removes subscriptions, those that there are.
    ///
    /// # Errors
    /// As [`Self::subscribe`].
    pub(crate) fn unsubscribe(
        &self,
        identity: &Identity,
        actor: Actor<'_>,
        filters: &[String],
    ) -> Result<(), SessionError> {
        self.change(identity, actor, |subscriptions| {
            for filter in filters {
                subscriptions.remove(filter);
            }
        })
    }

    fn change(
        &self,
        identity: &Identity,
        actor: Actor<'_>,
        change: impl FnOnce(&mut BTreeMap<String, u8>),
    ) -> Result<(), SessionError> {
        let mut sessions = self.sessions.lock();
        let session = sessions
            .get_mut(identity)
            .filter(|session| session.is_live(actor.connection) && !actor.fence.is_closed());
        let session = session.ok_or(SessionError::Fenced)?;
        if let Some(own) = session.live.as_mut().and_then(|live| live.own.as_mut()) {
            change(own);
        } else {
            let mut next = session.clone();
            change(&mut next.subscriptions);
            if next.subscriptions != session.subscriptions {
                self.store(identity, &next)?;
                *session = next;
            }
        }
        drop(sessions);
        self.tell();
        Ok(())
    }

    /// The QoS at which the identity's live connection has subscribed to a feature.
    pub(crate) fn granted(&self, identity: &Identity, feature: Feature) -> Option<QoS> {
        let sessions = self.sessions.lock();
        let session = sessions.get(identity).filter(|all| all.live.is_some())?;
        session.granted(identity, feature)
    }

    /// Sends something to the identity if it is connected and subscribed to the feature; says
    /// whether it is on its way.
    pub(crate) fn push(&self, identity: &Identity, feature: Feature, push: &Push) -> bool {
        let sessions = self.sessions.lock();
        let session = sessions
            .get(identity)
            .filter(|session| session.granted(identity, feature).is_some());
        let live = session.and_then(|session| session.live.as_ref());
        live.is_some_and(|live| live.outbox.push(push))
    }

    /// Makes the identity's live connection look for C2D messages.
    pub(crate) fn wake(&self, identity: &Identity) {
        let sessions = self.sessions.lock();
        let live = sessions
            .get(identity)
            .and_then(|session| session.live.as_ref());
        if let Some(live) = live {
            live.outbox.wake();
        }
    }

    /// Changes whenever a client comes, goes, or changes its subscriptions.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn list(&self) -> Vec<SessionInfo> {
        let sessions = self.sessions.lock();
        let mut list: Vec<_> = sessions
            .iter()
            .map(|(identity, session)| SessionInfo {
                identity: identity.clone(),
                persistent: session.persistent,
                connection: session.live.as_ref().map(|live| live.connection),
                subscriptions: session.effective().clone(),
            })
            .collect();
        list.sort_by(|one, other| one.identity.cmp(&other.identity));
        list
    }

    /// Drops the session of an identity that is no more.
    pub(crate) fn forget(&self, identity: &Identity) -> Result<(), JournalError> {
        let mut sessions = self.sessions.lock();
        let removed = sessions.remove(identity);
        if removed.is_some_and(|session| session.persistent) {
            self.journal.write(&[Change::delete(key(identity))?])?;
        }
        drop(sessions);
        self.tell();
        Ok(())
    }

    fn store(&self, identity: &Identity, session: &Session) -> Result<(), JournalError> {
        if !session.persistent {
            return Ok(());
        }
        let record = Record {
            subscriptions: session.subscriptions.clone(),
        };
        self.journal.write(&[Change::put(key(identity), &record)?])
    }

    fn tell(&self) {
        self.changed.send_modify(|count| *count += 1);
    }
}

impl Session {
    fn is_live(&self, connection: u64) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| live.connection == connection)
    }

    /// What counts now.
    fn effective(&self) -> &BTreeMap<String, u8> {
        let own = self.live.as_ref().and_then(|live| live.own.as_ref());
        own.unwrap_or(&self.subscriptions)
    }

    fn granted(&self, identity: &Identity, feature: Feature) -> Option<QoS> {
        let qos = self
            .effective()
            .iter()
            .filter(|(filter, _)| Feature::of(filter, identity) == Some(feature))
            .map(|(_, qos)| *qos)
            .max()?;
        Some(if qos == 0 {
            QoS::AtMostOnce
        } else {
            QoS::AtLeastOnce
        })
    }
}

fn key(identity: &Identity) -> String {
    format!("{PREFIX}{identity}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::{Connection, Connections, Transport};

    const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";

    fn sessions() -> Sessions {
        let journal = Arc::new(Journal::open(None).unwrap());
        Sessions::open(journal, |_| true).unwrap()
    }

    fn connection(connections: &Connections) -> Connection {
        connections.open(Transport::Mqtt, "127.0.0.1:1".parse().unwrap(), 0)
    }

    fn push() -> Push {
        Push::Desired {
            version: 2,
            body: "x".to_owned(),
        }
    }

    fn leaf() -> Identity {
        Identity::parse("leaf1").unwrap()
    }

    fn connect(sessions: &Sessions, connection: &Connection, clean: bool) -> Arc<Outbox> {
        let outbox = Arc::<Outbox>::default();
        sessions
            .connect(&leaf(), connection.actor(), clean, outbox.clone())
            .unwrap();
        outbox
    }

    /// Whatever a replaced connection still does comes to nothing.
    #[test]
    fn a_replaced_connection_changes_nothing() {
        let (sessions, connections) = (sessions(), Connections::default());
        let (old, new) = (connection(&connections), connection(&connections));
        let filters = [(DESIRED, QoS::AtMostOnce)];
        let old_outbox = connect(&sessions, &old, false);
        let subscribe = |of: &Connection| sessions.subscribe(&leaf(), of.actor(), &filters);
        subscribe(&old).unwrap();
        let outbox = connect(&sessions, &new, false);
        assert!(matches!(subscribe(&old), Err(SessionError::Fenced)));
        let unsubscribed = sessions.unsubscribe(&leaf(), old.actor(), &[DESIRED.to_owned()]);
        assert!(matches!(unsubscribed, Err(SessionError::Fenced)));
        sessions.disconnect(&leaf(), old.id());
        assert!(sessions.push(&leaf(), Feature::Desired, &push()));
        assert_eq!(outbox.take(), [push()]);
        assert_eq!(old_outbox.take(), []);
        sessions.disconnect(&leaf(), new.id());
        assert!(!sessions.push(&leaf(), Feature::Desired, &push()));
        assert_eq!(sessions.granted(&leaf(), Feature::Desired), None);
    }

    #[test]
    fn a_fenced_connection_opens_nothing() {
        let (sessions, connections) = (sessions(), Connections::default());
        let connection = connection(&connections);
        connections.close_matching(|_| true);
        let refused = sessions.connect(&leaf(), connection.actor(), false, Arc::default());
        assert!(matches!(refused, Err(SessionError::Fenced)));
        assert!(sessions.list().is_empty());
    }

    #[test]
    fn a_fenced_live_connection_changes_nothing() {
        let (sessions, connections) = (sessions(), Connections::default());
        let connection = connection(&connections);
        connect(&sessions, &connection, true);
        connections.close_matching(|_| true);
        let filters = [(DESIRED, QoS::AtMostOnce)];
        let refused = sessions.subscribe(&leaf(), connection.actor(), &filters);
        assert!(matches!(refused, Err(SessionError::Fenced)));
    }
    /// The MQTT session waits while its client is there over AMQP.
    #[test]
    fn a_client_without_a_session_leaves_the_session_alone() {
        let (sessions, connections) = (sessions(), Connections::default());
        let (mqtt, amqp) = (connection(&connections), connection(&connections));
        let filters = [(DESIRED, QoS::AtMostOnce)];
        connect(&sessions, &mqtt, false);
        sessions.subscribe(&leaf(), mqtt.actor(), &filters).unwrap();
        sessions
            .attach(&leaf(), amqp.actor(), Arc::default())
            .unwrap();
        let is_granted = || sessions.granted(&leaf(), Feature::Desired).is_some();
        assert!(!is_granted());
        sessions.subscribe(&leaf(), amqp.actor(), &filters).unwrap();
        assert!(is_granted());
        sessions
            .unsubscribe(&leaf(), amqp.actor(), &[DESIRED.to_owned()])
            .unwrap();
        assert!(!is_granted());
        sessions.disconnect(&leaf(), amqp.id());
        let again = connection(&connections);
        let outbox = Arc::<Outbox>::default();
        let present = sessions.connect(&leaf(), again.actor(), false, outbox);
        assert!(present.unwrap() && is_granted());
    }
}

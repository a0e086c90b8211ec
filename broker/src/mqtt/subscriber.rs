//! SUBSCRIBE and UNSUBSCRIBE of one connection: what is granted, and when it is answered.
//!
//! A change counts at once. With a session that lasts (clean session 0) it is answered when the
//! session is stored, or after [`SESSION_WRITE_MAX`] if that takes longer: the write goes through
//! the same thread as all messages, and a stuck disk must not make clients give up that only
//! want to receive. What is answered before it is stored is stored as soon as the disk works,
//! whether the client is still connected or not, and a reconnecting client finds it meanwhile;
//! it is lost if the hub is killed within that time.

use std::collections::VecDeque;
use std::num::NonZeroU16;

use edgehub_proto::identity::Identity;
use ntex_bytes::ByteString;
use ntex_mqtt::QoS;
use ntex_mqtt::v3::codec::SubscribeReturnCode;
use tokio::time::{Instant, timeout_at};

use super::features;
use super::filters::{Added, Subscriptions};
use super::limits::{SESSION_ANSWERS_MAX, SESSION_WRITE_MAX};
use super::machine::Machine;
use crate::hub::Features;
use crate::session::{Saving, Session, SessionStore};

/// Characters of a filter that are logged: a client chooses it.
const LOGGED_CHARS_MAX: usize = 200;

/// The subscriptions of one connection and the answers that are due.
#[derive(Debug)]
pub(super) struct Subscriber {
    identity: Identity,
    /// Where the session lasts; none for a clean one.
    sessions: Option<SessionStore>,
    subscriptions: Subscriptions,
    answers: VecDeque<Answer>,
    /// A refusal was logged: the first of a connection says enough.
    refused: bool,
}

#[derive(Debug)]
struct Answer {
    packet_id: NonZeroU16,
    /// Codes of a SUBACK; none is an UNSUBACK.
    codes: Option<Vec<SubscribeReturnCode>>,
    /// Whether the subscriptions changed.
    changed: bool,
    wait: Option<Wait>,
}

#[derive(Debug)]
struct Wait {
    saving: Saving,
    until: Instant,
}

impl Subscriber {
    /// Without `sessions` nothing lasts. Of a stored session only filters come back that may
    /// still be granted.
    pub(super) fn new(
        identity: Identity,
        sessions: Option<SessionStore>,
        restored: Option<&Session>,
    ) -> Self {
        let subscriptions = restored.map_or_else(Subscriptions::default, |session| {
            Subscriptions::restore(session, |filter| features::is_of_use(&identity, filter))
        });
        Self {
            identity,
            sessions,
            subscriptions,
            answers: VecDeque::new(),
            refused: false,
        }
    }

    /// What is subscribed.
    pub(super) fn subscriptions(&self) -> &Subscriptions {
        &self.subscriptions
    }

    /// What that switches on.
    pub(super) fn features(&self) -> Features {
        features::features(&self.identity, self.subscriptions.filters())
    }

    /// Takes a SUBSCRIBE. `live`: the connection still is the one of its identity; the session of
    /// one that was taken over belongs to its successor.
    pub(super) fn subscribe(
        &mut self,
        packet_id: NonZeroU16,
        filters: &[(ByteString, QoS)],
        live: bool,
    ) {
        let mut changed = false;
        let mut codes = Vec::with_capacity(filters.len());
        for (filter, wished) in filters {
            let granted = match wished {
                QoS::AtMostOnce => QoS::AtMostOnce,
                _ => QoS::AtLeastOnce,
            };
            let added = if features::is_of_use(&self.identity, filter) {
                self.subscriptions.add(filter, granted)
            } else {
                Added::Full
            };
            changed |= added == Added::Changed;
            codes.push(match added {
                Added::Changed | Added::Same => SubscribeReturnCode::Success(granted),
                Added::Full => {
                    self.log_refusal(filter);
                    SubscribeReturnCode::Failure
                }
            });
        }
        self.answer(packet_id, Some(codes), changed, live);
    }

    /// Takes an UNSUBSCRIBE; `live` as for [`Subscriber::subscribe`].
    pub(super) fn unsubscribe(
        &mut self,
        packet_id: NonZeroU16,
        filters: &[ByteString],
        live: bool,
    ) {
        let mut changed = false;
        for filter in filters {
            changed |= self.subscriptions.remove(filter);
        }
        self.answer(packet_id, None, changed, live);
    }

    /// Waits until the oldest answer may leave; for ever when there is none.
    ///
    /// # Cancel safety
    /// Safe: nothing is lost but the waiting.
    pub(super) async fn due(&mut self) {
        let Some(answer) = self.answers.front_mut() else {
            return std::future::pending().await;
        };
        if let Some(Wait { saving, until }) = &mut answer.wait {
            // Either way it leaves now.
            let _ = timeout_at(*until, saving.done()).await;
        }
        answer.wait = None;
    }

    /// Writes the answers that may leave, in the order of their packets. Whether the hub has to
    /// hear of other subscriptions.
    pub(super) fn release(&mut self, machine: &mut Machine) -> bool {
        let mut changed = false;
        while let Some(answer) = self.answers.pop_front_if(|answer| answer.wait.is_none()) {
            changed |= answer.changed;
            match answer.codes {
                Some(codes) => machine.subscribed(answer.packet_id, codes),
                None => machine.unsubscribed(answer.packet_id),
            }
        }
        changed
    }

    fn log_refusal(&mut self, filter: &str) {
        if !std::mem::replace(&mut self.refused, true) {
            let filter: String = filter.chars().take(LOGGED_CHARS_MAX).collect();
            let identity = &self.identity;
            tracing::info!(
                "Refused {identity} a subscription to {filter:?}: no message for it can match, \
                 or it has too many"
            );
        }
    }

    fn answer(
        &mut self,
        packet_id: NonZeroU16,
        codes: Option<Vec<SubscribeReturnCode>>,
        changed: bool,
        live: bool,
    ) {
        let wait = match &self.sessions {
            Some(sessions) if changed && live => Some(Wait {
                saving: sessions.save(&self.identity, self.subscriptions.stored()),
                until: Instant::now() + SESSION_WRITE_MAX,
            }),
            _ => None,
        };
        if self.answers.len() >= SESSION_ANSWERS_MAX
            && let Some(oldest) = self.answers.front_mut()
        {
            oldest.wait = None;
        }
        self.answers.push_back(Answer {
            packet_id,
            codes,
            changed,
            wait,
        });
    }
}

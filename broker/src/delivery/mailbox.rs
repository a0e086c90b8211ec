//! What others tell a module's pump, and the door through which it sends.
//!
//! The pump sends while it holds the mailbox's lock, and only if no connection came or went since
//! it looked last. Otherwise it could put a message into a new connection that it believes to be
//! the old one, and send it there once more when it hears of it.

use std::sync::Arc;

use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Configured;
use super::limits::SETTLED_WAITING_MAX;
use crate::hub::{Delivery, DeliveryToken, OfferError, Outlet, Settlement, ToClient};

/// The mailbox of one pump; many write, one reads.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    pub(super) wake: Notify,
}

/// What was told since the pump looked last.
#[derive(Debug, Default)]
pub(super) struct Mail {
    /// How often connections came and went.
    pub(super) epoch: u64,
    pub(super) connection: Option<Connection>,
    /// Subscriptions may have changed.
    pub(super) subscribed: bool,
    pub(super) settled: Vec<(DeliveryToken, Settlement)>,
    pub(super) overflowed: u64,
    /// The queues, when they changed.
    pub(super) queues: Option<Arc<[Configured]>>,
}

/// What became of the connection. Only the last word counts, and whether a session began anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    pub(super) online: bool,
    pub(super) clean_session: bool,
}

impl Mailbox {
    fn tell(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.mail.lock());
        self.wake.notify_one();
    }

    pub(super) fn connected(&self, clean_session: bool) {
        self.tell(|mail| mail.moved(true, clean_session));
    }

    pub(super) fn disconnected(&self) {
        self.tell(|mail| mail.moved(false, false));
    }

    pub(super) fn subscribed(&self) {
        self.tell(|mail| mail.subscribed = true);
    }

    pub(super) fn configured(&self, queues: Arc<[Configured]>) {
        self.tell(|mail| mail.queues = Some(queues));
    }

    pub(super) fn settled(&self, settled: &[(DeliveryToken, Settlement)]) {
        self.tell(|mail| {
            let room = SETTLED_WAITING_MAX.saturating_sub(mail.settled.len());
            let taken = settled.get(..room).unwrap_or(settled);
            mail.settled.extend_from_slice(taken);
            mail.overflowed += (settled.len() - taken.len()) as u64;
        });
    }

    /// Takes what is there; `settled` is the empty list that replaces the full one.
    pub(super) fn take(&self, settled: &mut Vec<(DeliveryToken, Settlement)>) -> Mail {
        settled.clear();
        let mut mail = self.mail.lock();
        Mail {
            epoch: mail.epoch,
            connection: mail.connection.take(),
            subscribed: std::mem::take(&mut mail.subscribed),
            settled: std::mem::replace(&mut mail.settled, std::mem::take(settled)),
            overflowed: std::mem::take(&mut mail.overflowed),
            queues: mail.queues.take(),
        }
    }

    /// Offers deliveries to the connection that the pump knows of.
    pub(super) fn offer(
        &self,
        epoch: u64,
        outlet: &dyn Outlet,
        to: &Identity,
        batch: Vec<Delivery>,
    ) -> Result<(), OfferError> {
        let mail = self.mail.lock();
        if mail.epoch != epoch {
            return Err(OfferError::NotConnected);
        }
        outlet.offer(to, ToClient::Inputs(batch))
    }
}

impl Mail {
    fn moved(&mut self, online: bool, clean_session: bool) {
        self.epoch += 1;
        let began_anew = self.connection.is_some_and(|c| c.clean_session);
        self.connection = Some(Connection {
            online,
            clean_session: clean_session || began_anew,
        });
        // What an earlier connection was subscribed to says nothing about this one.
        self.subscribed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::Features;
    use crate::test_support::id;

    #[derive(Debug)]
    struct Anybody;

    impl Outlet for Anybody {
        fn offer(&self, _to: &Identity, _event: ToClient) -> Result<(), OfferError> {
            Ok(())
        }

        fn features(&self, _of: &Identity) -> Option<Features> {
            None
        }
    }

    fn token(number: u64) -> (DeliveryToken, Settlement) {
        (DeliveryToken { stream: 0, number }, Settlement::Done)
    }

    #[test]
    fn nothing_is_sent_to_a_connection_that_the_pump_does_not_know() {
        let mailbox = Mailbox::default();
        let mut scratch = Vec::new();
        mailbox.connected(false);
        let epoch = mailbox.take(&mut scratch).epoch;
        let module = id("edge1/modA");
        let offer = || mailbox.offer(epoch, &Anybody, &module, Vec::new());
        assert_eq!(offer(), Ok(()));
        mailbox.connected(false);
        assert_eq!(offer(), Err(OfferError::NotConnected));
    }

    #[test]
    fn a_session_that_began_anew_in_between_is_not_overlooked() {
        let mailbox = Mailbox::default();
        let mut scratch = Vec::new();
        mailbox.connected(true);
        mailbox.subscribed();
        mailbox.disconnected();
        mailbox.connected(false);
        let mail = mailbox.take(&mut scratch);
        let expected = Connection {
            online: true,
            clean_session: true,
        };
        assert_eq!(mail.connection, Some(expected));
        assert!(!mail.subscribed, "that was the earlier connection");
        let mail = mailbox.take(&mut scratch);
        assert_eq!((mail.connection, mail.epoch), (None, 3));
    }

    #[test]
    fn settlements_that_nobody_can_mean_do_not_pile_up() {
        let mailbox = Mailbox::default();
        let many: Vec<_> = (0..SETTLED_WAITING_MAX as u64 - 1).map(token).collect();
        mailbox.settled(&many);
        mailbox.settled(&[token(1), token(2), token(3)]);
        let mut scratch = Vec::with_capacity(7);
        let mail = mailbox.take(&mut scratch);
        assert_eq!(mail.settled.len(), SETTLED_WAITING_MAX);
        assert_eq!(mail.settled.last(), Some(&token(1)));
        assert_eq!(mail.overflowed, 2);
        assert!(mailbox.take(&mut scratch).settled.is_empty());
    }
}

//! How clients of a connection end, and the connection with the last of them (spec/amqp.md 11).

use std::collections::BTreeSet;
use std::sync::Arc;

use edgehub_amqp::connection::LinkId;
use edgehub_amqp::performative::ErrorInfo;
use edgehub_proto::identity::Identity;
use edgehub_storage::CommitProgress;

use super::Head;
use crate::amqp::client::Client;
use crate::amqp::condition;
use crate::telemetry::metrics;

impl Head {
    /// A client's place was taken by another connection, or its right was revoked.
    pub(in crate::amqp) fn dismissed(&mut self, identity: &Identity, generation: u64) {
        let is_it = |client: &&Client| client.generation == generation;
        let Some(client) = self.clients.get(identity).filter(is_it) else {
            return;
        };
        // Its place is still its own when it was revoked: nobody else has it.
        let error = if client.registration.is_live() {
            let text = "the identity may not connect any more";
            condition::error(condition::UNAUTHORIZED, text)
        } else {
            stolen()
        };
        self.drop_client(identity, &error);
    }

    /// Ends a client against its will; the connection with it when it carries no other.
    pub(super) fn drop_client(&mut self, identity: &Identity, error: &ErrorInfo) {
        let Some(client) = self.clients.get(identity) else {
            return;
        };
        let links: Vec<LinkId> = client.links.all().collect();
        for link in links {
            self.owners.remove(&link);
            self.engine.detach(link, Some(error));
        }
        self.forget(identity);
        if self.clients.is_empty() && self.asked.is_empty() && self.parked.is_empty() {
            self.engine.close(Some(error.clone()));
        }
    }

    /// A client has no link any more.
    pub(super) fn forget(&mut self, identity: &Identity) {
        let Some(mut client) = self.clients.remove(identity) else {
            return;
        };
        let links: Vec<LinkId> = client.links.all().collect();
        for link in links {
            client.detached(link);
        }
        client.report(&self.hub);
        drop(client);
        self.hub.disconnected(identity, false);
        tracing::info!("Connection of {identity} closed");
    }

    /// A commit failed: nothing later of those who wait for one may be stored before what was lost,
    /// so their links end. The others go on, with the progress that is returned.
    pub(in crate::amqp) fn not_stored(&mut self) -> Arc<CommitProgress> {
        let links = self.telemetry.restart();
        let senders: BTreeSet<Identity> = links
            .filter_map(|link| Some(self.owners.get(&link)?.0.clone()))
            .collect();
        let text = "a message could not be stored";
        let error = condition::error(condition::INTERNAL_ERROR, text);
        for sender in senders {
            metrics::messages_unacknowledged(&sender).increment(1);
            tracing::warn!("AMQP links of {sender} are detached: {text}");
            self.drop_client(&sender, &error);
        }
        Arc::clone(self.telemetry.gather.progress())
    }

    /// The connection is over: its clients leave.
    pub(in crate::amqp) fn finish(&mut self) {
        let identities: Vec<Identity> = self.clients.keys().cloned().collect();
        for identity in identities {
            self.forget(&identity);
        }
    }

    /// The hub stops.
    pub(in crate::amqp) fn close(&mut self, error: ErrorInfo) {
        self.engine.close(Some(error));
    }
}

pub(super) fn stolen() -> ErrorInfo {
    let text = "another connection of the identity took over";
    condition::error(condition::STOLEN, text)
}

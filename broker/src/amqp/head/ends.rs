//! How clients of a connection end, and the connection with the last of them (spec/amqp.md 11).

use edgehub_amqp::connection::LinkId;
use edgehub_amqp::performative::ErrorInfo;
use edgehub_proto::identity::Identity;

use super::Head;
use crate::amqp::client::Client;
use crate::amqp::condition;

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

    /// The connection is over: its clients leave.
    pub(in crate::amqp) fn finish(&mut self) {
        let identities: Vec<Identity> = self.clients.keys().cloned().collect();
        for identity in identities {
            self.forget(&identity);
        }
    }

    /// The hub stops, or cannot store.
    pub(in crate::amqp) fn close(&mut self, error: ErrorInfo) {
        self.engine.close(Some(error));
    }
}

pub(super) fn stolen() -> ErrorInfo {
    let text = "another connection of the identity took over";
    condition::error(condition::STOLEN, text)
}

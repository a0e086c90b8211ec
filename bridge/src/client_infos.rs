//! What the broker says about identities, for the sessions that are opened for them.

use std::{collections::HashMap, sync::Arc};

use edgehub_proto::{hub::ClientInfo, identity::Identity};
use parking_lot::Mutex;

/// What is known of identities. Shared by the broker's end and the transports; an entry for each
/// identity that the broker knows something of.
#[derive(Debug, Default)]
pub struct ClientInfos(Mutex<HashMap<Identity, ClientInfo>>);

impl ClientInfos {
    /// Replaces what is known of an identity. Tells whether it has another model.
    pub fn set(&self, identity: &Identity, info: &ClientInfo) -> bool {
        let mut infos = self.0.lock();
        let before = if *info == ClientInfo::default() {
            infos.remove(identity)
        } else {
            infos.insert(identity.clone(), info.clone())
        };
        before.and_then(|before| before.model_id) != info.model_id
    }

    /// What the upstream is told that speaks for the identity: its own product info, then ours
    /// (spec/upstream.md A3.4).
    #[must_use]
    pub fn product_info(&self, identity: &Identity, own: &str) -> String {
        let infos = self.0.lock();
        let client = infos
            .get(identity)
            .and_then(|info| info.product_info.as_deref());
        format!("{} {own}", client.unwrap_or_default())
            .trim()
            .to_owned()
    }

    /// The identity's model.
    #[must_use]
    pub fn model_id(&self, identity: &Identity) -> Option<Arc<str>> {
        self.0.lock().get(identity)?.model_id.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::id;

    #[test]
    fn the_product_info_is_the_clients_and_ours() {
        let infos = ClientInfos::default();
        assert_eq!(infos.product_info(&id("leaf1"), "EdgeHub/1"), "EdgeHub/1");
        let info = ClientInfo {
            product_info: Some("py-iot".into()),
            model_id: Some("dtmi:a;1".into()),
        };
        assert!(infos.set(&id("leaf1"), &info), "another model");
        assert!(!infos.set(&id("leaf1"), &info), "the same");
        assert_eq!(
            infos.product_info(&id("leaf1"), "EdgeHub/1"),
            "py-iot EdgeHub/1"
        );
        assert_eq!(infos.model_id(&id("leaf1")).as_deref(), Some("dtmi:a;1"));
        assert_eq!(infos.model_id(&id("leaf2")), None);
        assert!(infos.set(&id("leaf1"), &ClientInfo::default()), "none");
        assert_eq!(infos.product_info(&id("leaf1"), "EdgeHub/1"), "EdgeHub/1");
    }
}

//! What our own view of the scope says about an identity that the upstream refused.

use std::sync::Arc;

use edgehub_auth::{
    authenticator::{IdentityRefresh, RefreshOutcome},
    scope_cache::ScopeCache,
};
use edgehub_proto::identity::Identity;

use crate::lanes::Verdict;

/// Decides what the scope says about a doubtful identity.
pub(crate) struct Judge {
    pub(crate) own_device: Identity,
    pub(crate) scope: Arc<ScopeCache>,
    pub(crate) refresh: Arc<dyn IdentityRefresh>,
    /// Whether the whole scope was walked since the start.
    pub(crate) has_walked: Box<dyn Fn() -> bool + Send + Sync>,
    /// `TrackDeviceState`: messages of an identity that is gone are dropped.
    pub(crate) track_device_state: bool,
}

impl Judge {
    /// Never says that an identity is gone without proof: its record says disabled, the upstream
    /// answered without it, or a complete walk did not find it.
    pub(crate) fn verdict(&self, identity: &Identity, outcome: Option<RefreshOutcome>) -> Verdict {
        let tree = self.scope.current();
        let is_gone = match tree.get(identity) {
            Some(record) => !record.is_enabled(),
            None => outcome == Some(RefreshOutcome::NotFound) || (self.has_walked)(),
        };
        // A refresh that brought nothing new is no reason to try again early.
        let is_news = matches!(outcome, None | Some(RefreshOutcome::Refreshed));
        if is_gone {
            if self.track_device_state {
                Verdict::Gone
            } else {
                Verdict::Unknown
            }
        } else if is_news && tree.auth_chain(identity).is_some() {
            Verdict::Retry
        } else {
            Verdict::Unknown
        }
    }
}

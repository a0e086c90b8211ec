//! Whether the upstream can be reached, as one value for the whole hub.
//!
//! Fed by the lanes (device protocol) and by the scope client (HTTPS). The device protocol has the
//! say: HTTPS alone makes the hub connected only while no lane has failed. That the lanes found the
//! link up holds while one of them is open; afterwards it is news only once, so that it does not
//! contradict HTTPS for ever.

use std::sync::Arc;

use edgehub_proto::{hub::Connectivity, identity::Identity};
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::info;

use crate::lanes::Link;

/// Holds the state and tells watchers.
#[derive(Clone, Debug)]
pub(crate) struct ConnectivityMonitor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    own_hub: Identity,
    lanes: Mutex<LaneView>,
    state: watch::Sender<Connectivity>,
}

#[derive(Clone, Copy, Debug)]
struct LaneView {
    link: Link,
    ready: usize,
}

impl ConnectivityMonitor {
    /// Starts disconnected. `own_hub` is the label of the offline counter.
    pub(crate) fn new(own_hub: Identity) -> Self {
        let (state, _) = watch::channel(Connectivity::Disconnected);
        let lanes = Mutex::new(LaneView {
            link: Link::Unknown,
            ready: 0,
        });
        Self {
            inner: Arc::new(Inner {
                own_hub,
                lanes,
                state,
            }),
        }
    }

    /// The state and its changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Connectivity> {
        self.inner.state.subscribe()
    }

    /// What the lanes see after a turn.
    pub(crate) fn lanes(&self, link: Link, ready: usize) {
        let before = std::mem::replace(&mut *self.inner.lanes.lock(), LaneView { link, ready });
        match link {
            Link::Up if ready > 0 || before.link != Link::Up => {
                self.enter(Connectivity::Connected);
            }
            Link::Unknown | Link::Up => {}
            Link::Down => self.enter(Connectivity::Disconnected),
        }
    }

    /// The upstream answered an HTTPS request, with whatever status.
    pub(crate) fn https_answered(&self) {
        let link = self.inner.lanes.lock().link;
        if link != Link::Down {
            self.enter(Connectivity::Connected);
        }
    }

    /// The upstream could not be reached over HTTPS.
    pub(crate) fn https_failed(&self) {
        let ready = self.inner.lanes.lock().ready;
        if ready == 0 {
            self.enter(Connectivity::Disconnected);
        }
    }

    fn enter(&self, next: Connectivity) {
        let changed = self.inner.state.send_if_modified(|state| {
            let changed = *state != next;
            *state = next;
            changed
        });
        if !changed {
            return;
        }
        match next {
            Connectivity::Connected => info!("Entering connected state"),
            Connectivity::Disconnected => {
                info!("Entering disconnected state");
                let id = self.inner.own_hub.as_str().to_owned();
                metrics::counter!("edgehub_offline_count_total", "id" => id).increment(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_have_the_say() {
        let monitor = ConnectivityMonitor::new(Identity::edge_hub("edge1").unwrap());
        let state = monitor.subscribe();
        let now = || *state.borrow();
        assert_eq!(now(), Connectivity::Disconnected);
        monitor.https_answered();
        assert_eq!(now(), Connectivity::Connected);
        monitor.lanes(Link::Down, 0);
        assert_eq!(now(), Connectivity::Disconnected);
        monitor.https_answered();
        assert_eq!(
            now(),
            Connectivity::Disconnected,
            "the device protocol does not get through"
        );
        monitor.lanes(Link::Up, 1);
        assert_eq!(now(), Connectivity::Connected);
        monitor.https_failed();
        assert_eq!(
            now(),
            Connectivity::Connected,
            "an open lane proves the opposite"
        );
        monitor.lanes(Link::Up, 0);
        monitor.https_failed();
        assert_eq!(now(), Connectivity::Disconnected);
    }

    #[test]
    fn an_idle_hub_that_loses_its_upstream_stays_disconnected() {
        let monitor = ConnectivityMonitor::new(Identity::edge_hub("edge1").unwrap());
        let state = monitor.subscribe();
        monitor.lanes(Link::Up, 1);
        // The last lane closes in order: nobody has seen the link fail.
        monitor.lanes(Link::Up, 0);
        assert_eq!(*state.borrow(), Connectivity::Connected);
        monitor.https_failed();
        // The pump's next turns bring nothing new.
        monitor.lanes(Link::Up, 0);
        assert_eq!(*state.borrow(), Connectivity::Disconnected);
        monitor.lanes(Link::Up, 1);
        assert_eq!(*state.borrow(), Connectivity::Connected);
    }

    #[test]
    fn watchers_hear_of_changes_only() {
        let monitor = ConnectivityMonitor::new(Identity::edge_hub("edge1").unwrap());
        let mut state = monitor.subscribe();
        monitor.lanes(Link::Up, 1);
        assert!(state.has_changed().unwrap());
        state.mark_unchanged();
        monitor.lanes(Link::Up, 2);
        assert!(!state.has_changed().unwrap());
    }
}

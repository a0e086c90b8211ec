//! How many connections there may be of clients that have not said who they are: in all, and from
//! one address.
//!
//! A listener announces each connection with [`Admission::arrive`] and serves it when
//! [`Arrival::admitted`] returns. So whoever opens thousands of connections and says nothing waits
//! behind itself only: everybody else has the other places (testing.md S6, S12). Nobody is turned
//! away for coming in a crowd, as all clients behind one gateway do after an outage: they wait their
//! turn, up to a bound, and while an address is crowded its clients have less time each
//! ([`Stranger::patience`]), so that the turn comes.
//!
//! Not here: TLS, protocols, and how long anything takes.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a client has for each step while its address is crowded.
const CROWDED_PATIENCE: Duration = Duration::from_secs(3);

/// Bounds of one listener.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Connections that are served at once.
    pub(crate) served_max: usize,
    /// Those of one address.
    pub(crate) served_per_address_max: usize,
    /// Connections that wait to be served. Further ones are closed.
    pub(crate) waiting_max: usize,
    /// Those of one address.
    pub(crate) waiting_per_address_max: usize,
}

/// Counts the connections of one listener. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    bounds: Bounds,
    places: Arc<Semaphore>,
    present: Mutex<Present>,
}

/// Connections that are served or wait.
#[derive(Debug, Default)]
struct Present {
    all: usize,
    by_address: HashMap<IpAddr, Address>,
}

#[derive(Debug)]
struct Address {
    present: usize,
    places: Arc<Semaphore>,
}

/// A connection that waits for its place.
#[derive(Debug)]
pub(crate) struct Arrival {
    of_address: Arc<Semaphore>,
    counted: Counted,
}

/// A connection that has its place, until this is dropped.
#[derive(Debug)]
pub(crate) struct Stranger {
    is_crowded: bool,
    _of_address: Option<OwnedSemaphorePermit>,
    _of_all: Option<OwnedSemaphorePermit>,
    _counted: Counted,
}

/// One connection in [`Present`].
#[derive(Debug)]
struct Counted {
    shared: Arc<Shared>,
    address: IpAddr,
}

impl Admission {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Self {
            shared: Arc::new(Shared {
                bounds,
                places: Arc::new(Semaphore::new(bounds.served_max)),
                present: Mutex::default(),
            }),
        }
    }

    /// A connection came from this address; none when too many wait already.
    pub(crate) fn arrive(&self, peer: IpAddr) -> Option<Arrival> {
        let bounds = self.shared.bounds;
        let address = group(peer);
        let mut present = self.shared.present.lock();
        if present.all >= bounds.served_max + bounds.waiting_max {
            return None;
        }
        let entry = present
            .by_address
            .entry(address)
            .or_insert_with(|| Address {
                present: 0,
                places: Arc::new(Semaphore::new(bounds.served_per_address_max)),
            });
        if entry.present >= bounds.served_per_address_max + bounds.waiting_per_address_max {
            return None;
        }
        entry.present += 1;
        let of_address = Arc::clone(&entry.places);
        present.all += 1;
        Some(Arrival {
            of_address,
            counted: Counted {
                shared: Arc::clone(&self.shared),
                address,
            },
        })
    }
}

impl Arrival {
    /// Waits for a place, in the order of arrival.
    ///
    /// # Cancel safety
    /// The connection has left then.
    pub(crate) async fn admitted(self) -> Stranger {
        let Self {
            of_address,
            counted,
        } = self;
        let per_address = counted.shared.bounds.served_per_address_max;
        // The semaphores are never closed. First the address's own: a crowd waits there, not at the
        // places of all.
        let own = Arc::clone(&of_address).acquire_owned().await.ok();
        let places = Arc::clone(&counted.shared.places);
        let common = places.acquire_owned().await.ok();
        Stranger {
            is_crowded: 2 * of_address.available_permits() < per_address,
            _of_address: own,
            _of_all: common,
            _counted: counted,
        }
    }
}

impl Stranger {
    /// How long it has for a step that may usually take so long.
    pub(crate) fn patience(&self, usual: Duration) -> Duration {
        if self.is_crowded {
            usual.min(CROWDED_PATIENCE)
        } else {
            usual
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut present = self.shared.present.lock();
        present.all -= 1;
        if let Some(address) = present.by_address.get_mut(&self.address) {
            address.present -= 1;
            if address.present == 0 {
                present.by_address.remove(&self.address);
            }
        }
    }
}

/// What counts as one address: of IPv6 the network, since a host has all of it.
fn group(peer: IpAddr) -> IpAddr {
    const NETWORK: u128 = !0 << 64;
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & NETWORK).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        served_max: 6,
        served_per_address_max: 4,
        waiting_max: 5,
        waiting_per_address_max: 3,
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    async fn is_served(arrival: Arrival) -> Option<Stranger> {
        timeout(Duration::from_secs(1), arrival.admitted())
            .await
            .ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_waits_behind_itself_and_others_are_served() {
        let admission = Admission::new(BOUNDS);
        let crowd = ip("10.0.0.1");
        let mut served = Vec::new();
        for number in 0..4 {
            let stranger = is_served(admission.arrive(crowd).unwrap()).await.unwrap();
            let second = Duration::from_secs(1);
            assert_eq!(stranger.patience(second), second);
            let is_hurried = stranger.patience(Duration::from_secs(60)) == CROWDED_PATIENCE;
            assert_eq!(is_hurried, number >= 2, "{number}");
            served.push(stranger);
        }
        let waiting: Vec<_> = (0..3).map(|_| admission.arrive(crowd).unwrap()).collect();
        assert!(admission.arrive(crowd).is_none(), "a bounded crowd");
        let mut waiting = waiting.into_iter();
        assert!(is_served(waiting.next().unwrap()).await.is_none());

        let other = is_served(admission.arrive(ip("10.0.0.2")).unwrap()).await;
        assert!(other.is_some_and(|other| !other.is_crowded));
        served.pop();
        assert!(
            is_served(waiting.next().unwrap()).await.is_some(),
            "in its turn"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn all_together_are_bounded_and_nothing_is_left_of_who_went() {
        let admission = Admission::new(BOUNDS);
        let mut present = Vec::new();
        for number in 0..11 {
            let address = ip(&format!("10.0.0.{number}"));
            present.push(admission.arrive(address).unwrap());
        }
        assert!(
            admission.arrive(ip("10.0.0.99")).is_none(),
            "a bounded number of all"
        );
        let mut served = Vec::new();
        for arrival in present {
            served.extend(is_served(arrival).await);
        }
        assert_eq!(served.len(), BOUNDS.served_max);
        drop(served);
        assert!(admission.shared.present.lock().by_address.is_empty());
        assert_eq!(admission.shared.present.lock().all, 0);
        assert_eq!(
            admission.shared.places.available_permits(),
            BOUNDS.served_max
        );
    }

    #[test]
    fn a_host_has_one_group() {
        assert_eq!(group(ip("::ffff:10.0.0.1")), ip("10.0.0.1"));
        assert_eq!(
            group(ip("2001:db8:1:2:3:4:5:6")),
            group(ip("2001:db8:1:2::1"))
        );
        assert_ne!(group(ip("2001:db8:1:2::1")), group(ip("2001:db8:1:3::1")));
        assert_ne!(group(ip("10.0.0.1")), group(ip("10.0.0.2")));
    }
}

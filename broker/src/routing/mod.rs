//! Which queues a message goes to.
//!
//! `parser` reads a route's text; [`Router`] holds the routes that are in force. A sender's
//! source path decides which routes can match at all, so a connection asks for a [`Plan`] once
//! per output and uses it for every message; conditions, when they come, are evaluated on the
//! plan's routes only. Behaviour: spec/core.md 2.1, 2.2, 2.11, 3.1, 3.2.

mod parser;
mod source;

pub use parser::{Route, RouteError, RouteFault, Sink};
pub use source::{SourcePath, SourcePattern};

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::identity::Identity;
use edgehub_storage::{Queue, QueueId, Store, StoreError, Target};
use smallvec::SmallVec;

/// The id of the one endpoint behind `$upstream`.
pub const UPSTREAM_ENDPOINT: &str = "iothub";
/// The priority of a route that names none: the lowest (spec/core.md 3.2).
pub const DEFAULT_PRIORITY: u32 = 2_000_000_000;

/// A route that is in force, and the queue it feeds.
#[derive(Clone, Debug)]
struct ActiveRoute {
    route: Route,
    queue: Queue,
}

/// The routes in force. Immutable: a change makes another one.
#[derive(Clone, Debug)]
pub struct Router {
    routes: Arc<[ActiveRoute]>,
    time_to_live: Option<Duration>,
}

/// A route that cannot be used, with its name.
#[derive(Debug, thiserror::Error)]
#[error("Error parsing route {name} - {error}")]
pub struct BadRoute {
    /// The route's name in the configuration.
    pub name: String,
    /// What is wrong and where.
    pub error: RouteError,
}

impl Router {
    /// Compiles the routes and opens their queues. A bad route does not keep the others from
    /// working (design.md D2); it is returned beside the router.
    ///
    /// # Errors
    /// When the store cannot open a queue.
    pub fn new(
        texts: &[(String, String)],
        own_device: &str,
        time_to_live: Option<Duration>,
        store: &Store,
    ) -> Result<(Self, Vec<BadRoute>), StoreError> {
        let mut routes = Vec::new();
        let mut bad = Vec::new();
        for (name, text) in texts {
            match Route::parse(text) {
                Ok(route) => routes.push(route),
                Err(error) => bad.push(BadRoute {
                    name: name.clone(),
                    error,
                }),
            }
        }
        Ok((
            Self::from_routes(routes, own_device, time_to_live, store)?,
            bad,
        ))
    }

    /// Opens the queues of routes that were parsed. Blocks while a new queue is committed.
    ///
    /// # Errors
    /// When the store cannot open a queue.
    pub fn from_routes(
        routes: impl IntoIterator<Item = Route>,
        own_device: &str,
        time_to_live: Option<Duration>,
        store: &Store,
    ) -> Result<Self, StoreError> {
        let active = |route: Route| {
            let endpoint = route.sink.endpoint(own_device);
            let queue = store.queue(&QueueId {
                endpoint,
                priority: DEFAULT_PRIORITY,
            })?;
            Ok(ActiveRoute { route, queue })
        };
        let routes: Result<Vec<_>, StoreError> = routes.into_iter().map(active).collect();
        Ok(Self {
            routes: routes?.into(),
            time_to_live,
        })
    }

    /// The queues of all module inputs that routes lead to, each once, in a fixed order.
    #[must_use]
    pub fn inputs(&self) -> Vec<InputQueue> {
        let mut inputs = BTreeMap::new();
        for active in self.routes.iter() {
            if let Sink::Input { module, input } = &active.route.sink {
                let id = active.queue.id();
                let key = (id.endpoint.clone(), id.priority);
                inputs.entry(key).or_insert_with(|| InputQueue {
                    module: module.clone(),
                    input: input.clone(),
                    queue: active.queue.clone(),
                });
            }
        }
        inputs.into_values().collect()
    }

    /// Where messages of `sender` with `output` go. At most one copy for each endpoint.
    #[must_use]
    pub fn plan(&self, sender: &Identity, output: Option<&str>) -> Plan {
        self.plan_of(&SourcePath::telemetry(sender, output))
    }

    /// Where messages from `path` go. At most one copy for each endpoint.
    #[must_use]
    pub fn plan_of(&self, path: &SourcePath) -> Plan {
        let mut queues: BTreeMap<String, Queue> = BTreeMap::new();
        for active in self.routes.iter().filter(|a| a.route.source.matches(path)) {
            queues.insert(active.queue.id().endpoint.clone(), active.queue.clone());
        }
        Plan {
            queues: queues.into_values().collect(),
            time_to_live: self.time_to_live,
        }
    }

    /// How many routes are in force.
    #[must_use]
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether no route is in force: every message is then dropped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }
}

/// The queue of a module's input.
#[derive(Clone, Debug)]
pub struct InputQueue {
    /// The module, on this device.
    pub module: String,
    /// The name of its input.
    pub input: String,
    /// What waits for it.
    pub queue: Queue,
}

/// The queues of one source path.
#[derive(Clone, Debug)]
pub struct Plan {
    queues: SmallVec<[Queue; 2]>,
    time_to_live: Option<Duration>,
}

impl Plan {
    /// Whether nothing takes these messages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// The targets of one message that is stored at `now_ms`; its expiry is fixed here (D9).
    #[must_use]
    pub fn targets(&self, now_ms: u64) -> SmallVec<[Target; 2]> {
        let expires_at_ms = self
            .time_to_live
            .map(|ttl| now_ms.saturating_add(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)));
        self.queues
            .iter()
            .map(|queue| Target {
                queue: queue.clone(),
                expires_at_ms,
            })
            .collect()
    }
}

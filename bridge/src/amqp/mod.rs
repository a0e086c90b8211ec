//! AMQP 1.0 upstream: many identities on one connection.
//!
//! `client` is the protocol without sockets and without knowledge of Azure. An identity is a
//! `member` of a connection with a session of its own; `multiplex` is a connection with its
//! members, still without a socket; `connection` moves the bytes. The credential is always our own
//! hub's token; the auth chain on each link says on whose behalf it is used (upstream.md A3).
//!
//! # Pool
//!
//! `IotHubConnectionPoolSize` connections are opened before any takes a second identity, so that
//! load can be spread; with the default of 1 each connection is filled to
//! [`crate::limits::AMQP_IDENTITIES_MAX`] before the next is opened. The number of connections is
//! not limited by the setting: it follows from the number of identities.

mod arrivals;
mod client;
mod conditions;
mod connection;
mod convert;
mod hearing;
mod links;
mod member;
mod multiplex;
mod outbox;
mod pool;
mod ports;
mod renewal;
#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod rig_parent;
mod tokens;
mod twin;
mod ways;

use std::{sync::Arc, time::Duration};

use edgehub_auth::{sas_signer::TokenSource, scope_cache::ScopeCache};
use edgehub_proto::{
    clock::Clock,
    hub::Downstream,
    identity::{Identity, IdentityError},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{multiplex::Shared, pool::Pool, ways::Ways};
use crate::{
    client_infos::ClientInfos,
    transport::{OpenRequest, Transport},
};

pub use ways::Way;

/// What the AMQP transport works with.
#[derive(Debug)]
pub struct AmqpConfig {
    /// The ways to the upstream, the preferred one first.
    pub ways: Vec<Way>,
    /// Connections that are opened before any takes a second identity. `IotHubConnectionPoolSize`.
    pub pool_size: usize,
    /// The device that this hub runs on.
    pub own_device: Identity,
    /// `com.microsoft:client-version` of the links.
    pub product_info: String,
    /// How long a put-token may take. `CloudOperationTimeoutSecs`.
    pub operation_timeout: Duration,
}

/// What the AMQP transport is given.
#[derive(Debug)]
pub struct AmqpDeps {
    /// Our own hub's tokens.
    pub tokens: Arc<TokenSource>,
    /// Where auth chains come from.
    pub scope: Arc<ScopeCache>,
    /// What clients say about themselves.
    pub infos: Arc<ClientInfos>,
    /// Wall clock.
    pub clock: Arc<dyn Clock>,
    /// Where what arrives goes.
    pub downstream: Arc<dyn Downstream>,
    /// Owner of the connections' tasks.
    pub tasks: TaskTracker,
    /// Connections without identities are closed at once after this.
    pub cancel: CancellationToken,
}

/// Opens AMQP sessions. One per bridge.
#[derive(Debug)]
pub struct AmqpTransport {
    pool: Arc<Pool>,
}

impl AmqpTransport {
    /// A transport without a connection.
    ///
    /// # Errors
    ///
    /// The own device's id leaves no room for a module.
    pub fn new(config: AmqpConfig, deps: AmqpDeps) -> Result<Self, IdentityError> {
        let host = config
            .ways
            .first()
            .map(|way| way.dialer.host().to_owned())
            .unwrap_or_default();
        let shared = Shared {
            host,
            own_hub: Identity::edge_hub(config.own_device.device_id())?,
            product_info: config.product_info,
            tokens: deps.tokens,
            scope: deps.scope,
            infos: deps.infos,
            clock: deps.clock,
            downstream: deps.downstream,
            operation_timeout: config.operation_timeout,
        };
        let pool = Pool::new(
            shared,
            Ways::new(config.ways),
            config.pool_size,
            deps.tasks,
            deps.cancel,
        );
        Ok(Self {
            pool: Arc::new(pool),
        })
    }
}

impl Transport for AmqpTransport {
    fn open(&self, request: OpenRequest) {
        self.pool.open(request);
    }
}

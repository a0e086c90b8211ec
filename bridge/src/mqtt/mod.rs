//! MQTT 3.1.1 upstream: one connection per identity.
//!
//! [`Machine`] is the protocol without sockets; [`MqttTransport`] opens sessions for lanes. What
//! goes up is `telemetry`, what comes down and what is asked is `hearing`. The identity is the
//! connection's; the credential is always our own hub's token, and the auth chain says on whose
//! behalf it is used (upstream.md A3).

mod arrivals;
#[cfg(test)]
mod cloud_to_device_tests;
mod frame;
mod hearing;
#[cfg(test)]
mod hearing_tests;
mod inbound;
mod liveness;
mod machine;
mod replies;
mod requests;
mod session;
#[cfg(test)]
mod session_support;
mod subscriptions;
mod telemetry;
mod terms;
#[cfg(test)]
mod twin_tests;
mod window;

use std::sync::Arc;

use edgehub_auth::{sas_signer::TokenSource, scope_cache::ScopeCache};
use edgehub_proto::{hub::Downstream, identity::Identity, username};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

pub use machine::{Machine, MachineEvent};
pub use terms::{Connack, ConnectParams, MachineConfig, MachineError, PublishError, Received};

use crate::{
    client_infos::ClientInfos,
    dial::{Carrier, Dialer},
    lanes::CloseCause,
    transport::{Command, OpenRequest, SessionEvent, Transport},
};

/// Opens MQTT sessions. One per bridge.
#[derive(Debug)]
pub struct MqttTransport {
    /// How connections are made.
    pub dialer: Dialer,
    /// The port at the upstream.
    pub port: u16,
    /// What MQTT is spoken on there.
    pub carrier: Carrier,
    /// Window, packet limit and time-outs of each connection.
    pub machine: MachineConfig,
    /// `DeviceClientType` of the user name.
    pub product_info: Arc<str>,
    /// What clients say about themselves.
    pub infos: Arc<ClientInfos>,
    /// Our own hub's tokens.
    pub tokens: Arc<TokenSource>,
    /// Where auth chains come from.
    pub scope: Arc<ScopeCache>,
    /// Where what arrives goes.
    pub downstream: Arc<dyn Downstream>,
    /// Owner of the sessions' tasks.
    pub tasks: TaskTracker,
}

/// What a session's task needs.
struct Attempt {
    dialer: Dialer,
    port: u16,
    carrier: Carrier,
    machine: MachineConfig,
    connect: ConnectParams,
    expires_at_ms: u64,
}

impl Transport for MqttTransport {
    fn open(&self, request: OpenRequest) {
        let attempt = self.prepare(&request.identity);
        let downstream = Arc::clone(&self.downstream);
        self.tasks.spawn(async move {
            let OpenRequest {
                session,
                identity,
                needs,
                mut commands,
                events,
            } = request;
            let cause = match attempt {
                None => CloseCause::OutOfScope,
                Some(attempt) => {
                    let events = events.clone();
                    let expires_at_ms = Some(attempt.expires_at_ms);
                    let context = session::SessionContext {
                        session,
                        identity,
                        expires_at_ms,
                        needs,
                        downstream,
                        events,
                    };
                    attempt.run(context, &mut commands).await
                }
            };
            let _ = events.send(SessionEvent::Closed { session, cause }).await;
        });
    }
}

impl MqttTransport {
    /// The contents of CONNECT; none if the identity has no usable auth chain.
    fn prepare(&self, identity: &Identity) -> Option<Attempt> {
        let chain = self.scope.current().auth_chain(identity)?;
        let token = self.tokens.signed_device_token();
        let expires_at_ms = token.expires_at_ms();
        let connect = ConnectParams {
            client_id: identity.as_str().to_owned(),
            user_name: username::format(
                self.dialer.host(),
                identity,
                &self.infos.product_info(identity, &self.product_info),
                &chain,
                self.infos.model_id(identity).as_deref(),
            ),
            password: token.into_text(),
        };
        let machine = self.machine.clone();
        Some(Attempt {
            dialer: self.dialer.clone(),
            port: self.port,
            carrier: self.carrier,
            machine,
            connect,
            expires_at_ms,
        })
    }
}

impl Attempt {
    async fn run(
        self,
        context: session::SessionContext,
        commands: &mut mpsc::Receiver<Command>,
    ) -> CloseCause {
        let dialed = tokio::select! {
            dialed = self.dialer.open(self.port, self.carrier) => dialed,
            // Nothing can be sent before the session is open: this is Close or the end of all.
            _ = commands.recv() => return CloseCause::Requested,
        };
        match dialed {
            Ok(stream) => session::run(stream, self.machine, self.connect, context, commands).await,
            Err(error) => CloseCause::Unreachable(error.to_string().into()),
        }
    }
}

//! One MQTT connection on a byte stream, from its first byte to its end.
//!
//! It does not know what carries the stream; 8883 and WebSocket use it alike. This file has the
//! handshake: CONNECT is judged, the session restored, the client accepted or refused. What
//! follows is in `client`.
//!
//! Lifetime: the task ends when the client leaves, breaks the protocol, falls silent, is taken
//! over or revoked, its token expires, its message cannot be stored, or the hub stops.

use std::sync::Arc;

use edgehub_auth::authenticator::{AuthnError, Claim, Credential};
use edgehub_proto::hub::ClientInfo;
use edgehub_proto::username::MqttUserName;
use ntex_mqtt::v3::codec::ConnectAckReason;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::client::{Accepted, Client};
pub use super::end::ConnectionEnd;
use super::limits::{FAREWELL_MAX, LOGGED_ID_BYTES_MAX, SESSION_WRITE_MAX};
use super::machine::{CloseReason, ConnectRequest, Event, Machine, Timing};
use super::subscriber::Subscriber;
use super::transport::Transport;
use super::will;
use crate::admission::Stranger;
use crate::hub::{ConnectError, ConnectOptions, Hub};
use crate::telemetry::metrics::{self, AckCounters};

/// What connections of one listener share.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    /// The hub behind the head.
    pub hub: Arc<Hub>,
    /// Bounds of a connection's times.
    pub timing: Timing,
    /// Where PUBACKs are counted.
    pub acks: AckCounters,
    /// Fires when the hub stops.
    pub stop: CancellationToken,
}

/// Serves one connection until it ends. The stranger's place is given back when CONNECT is decided.
///
/// # Cancel safety
/// Dropping it closes the connection; nothing unacknowledged counts as stored for the client, and
/// its will is not published.
pub(crate) async fn serve<S>(
    mut stream: S,
    context: ConnectionContext,
    stranger: Option<Stranger>,
) -> ConnectionEnd
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let now = context.hub.clock().instant();
    let mut timing = context.timing;
    if let Some(stranger) = &stranger {
        timing.connect_max = stranger.patience(timing.connect_max);
    }
    let mut machine = Machine::new(timing, now);
    let mut transport = Transport::new(&mut stream, now);
    let shaken = handshake(&mut transport, &mut machine, &context).await;
    drop(stranger);
    let end = match shaken {
        Ok(accepted) => {
            let identity = accepted.principal.identity().clone();
            let clean_session = accepted.registration.clean_session();
            let client = Client::new(transport, machine, accepted, &context);
            let end = client.run().await;
            context.hub.disconnected(&identity, clean_session);
            if let ConnectionEnd::NotStored = end {
                metrics::messages_unacknowledged(&identity).increment(1);
                tracing::warn!("Connection of {identity} closed: {end}");
            } else {
                tracing::info!("Connection of {identity} closed: {end}");
            }
            end
        }
        Err(end) => {
            // An answer that is due still leaves.
            let clock = Arc::clone(context.hub.clock());
            let farewell = transport.finish(&mut machine, &context.acks, &*clock);
            let _ = timeout(FAREWELL_MAX, farewell).await;
            tracing::debug!("An MQTT connection ended before it was accepted: {end}");
            end
        }
    };
    // The peer may be gone: what matters was decided before.
    let _ = timeout(FAREWELL_MAX, stream.shutdown()).await;
    end
}

/// Reads until CONNECT is complete and judges it. The answer is in the machine's output.
async fn handshake<S>(
    transport: &mut Transport<S>,
    machine: &mut Machine,
    context: &ConnectionContext,
) -> Result<Accepted, ConnectionEnd>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let clock = Arc::clone(context.hub.clock());
    let request = loop {
        match machine.poll() {
            Some(Event::Connect(request)) => break request,
            Some(Event::Close(reason)) => return Err(reason.into()),
            // The machine has none of these for a client that has not connected.
            Some(_) => return Err(CloseReason::FirstPacket.into()),
            None => {}
        }
        let deadline = Instant::from_std(machine.deadline());
        tokio::select! {
            read = transport.progress(machine, &*clock, true) => read?,
            () = sleep_until(deadline) => return Err(CloseReason::ConnectTimeout.into()),
            () = context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
        }
    };
    let client_id = request.client_id.clone();
    let admitted = tokio::select! {
        admitted = admit(*request, context) => admitted,
        () = context.stop.cancelled() => return Err(ConnectionEnd::Stopping),
    };
    match admitted {
        Ok((accepted, session_present)) => {
            // Registered and subscribed first, then answered (spec/mqtt.md 2.4, 12.5).
            let features = accepted.subscriber.features();
            context.hub.subscribed(&accepted.registration, features);
            machine.accept(session_present, clock.instant());
            Ok(accepted)
        }
        Err((code, text)) => {
            let client_id = named(&client_id);
            tracing::info!("Refused the connection of {client_id}: {text}");
            machine.refuse(code);
            Err(ConnectionEnd::Refused(text))
        }
    }
}

/// As much of a client id as the log gets: a stranger may write one of 64 KiB.
fn named(client_id: &str) -> &str {
    let end = client_id.floor_char_boundary(LOGGED_ID_BYTES_MAX);
    client_id.get(..end).unwrap_or_default()
}

type Refusal = (ConnectAckReason, String);

/// Judges a client and finds its session; whether there was one.
async fn admit(
    mut request: ConnectRequest,
    context: &ConnectionContext,
) -> Result<(Accepted, bool), Refusal> {
    let hub = &context.hub;
    // Judged before the credential: it takes nobody's place then.
    let (claim, info) = claim(&request)?;
    let options = ConnectOptions {
        info: Some(info),
        clean_session: request.clean_session,
    };
    let connected = hub
        .connect(claim, options)
        .await
        .map_err(|error| refusal(&error))?;
    let identity = connected.principal.identity().clone();
    let sessions = hub.sessions();
    let stored = sessions.load(&identity).await.map_err(|error| {
        let code = ConnectAckReason::ServiceUnavailable;
        (code, error.to_string())
    })?;
    let (lasting, restored) = if request.clean_session {
        if stored.is_some() {
            let mut removing = sessions.remove(&identity);
            // It does not count any more; how soon that lasts is the disk's affair.
            let _ = timeout(SESSION_WRITE_MAX, removing.done()).await;
        }
        (None, None)
    } else {
        (Some(sessions.clone()), stored)
    };
    let subscriber = Subscriber::new(identity, lasting, restored.as_ref());
    let accepted = Accepted {
        principal: connected.principal,
        registration: connected.registration,
        outbox: connected.outbox,
        subscriber,
        will: request.will.take(),
    };
    Ok((accepted, restored.is_some()))
}

/// What CONNECT claims, or the code and text of the refusal (design.md D6).
fn claim(request: &ConnectRequest) -> Result<(Claim, ClientInfo), Refusal> {
    let malformed = |text: String| (ConnectAckReason::BadUserNameOrPassword, text);
    let not_authorised = |text: &str| (ConnectAckReason::NotAuthorized, text.to_owned());
    let user_name = request
        .user_name
        .as_deref()
        .ok_or_else(|| malformed("no user name".into()))?;
    let user_name = MqttUserName::parse(user_name).map_err(|error| malformed(error.to_string()))?;
    if user_name.identity.as_str() != request.client_id {
        let text = "the client id is not the identity of the user name";
        return Err(not_authorised(text));
    }
    if let Some(will) = &request.will
        && !will::is_allowed(&user_name.identity, &will.topic)
    {
        return Err(not_authorised(
            "it may not publish to the topic of its will",
        ));
    }
    let credential = request
        .password
        .clone()
        .map_or(Credential::None, Credential::Sas);
    let claim = Claim {
        identity: user_name.identity,
        chain: user_name.auth_chain,
        credential,
    };
    let info = ClientInfo {
        product_info: user_name.client_type.map(Arc::from),
        model_id: user_name.model_id.map(Arc::from),
    };
    Ok((claim, info))
}

fn refusal(error: &ConnectError) -> Refusal {
    let code = match error {
        ConnectError::Refused(AuthnError::MalformedToken { .. }) => {
            ConnectAckReason::BadUserNameOrPassword
        }
        ConnectError::Refused(error) if error.is_definite() => ConnectAckReason::NotAuthorized,
        ConnectError::Refused(_) | ConnectError::Full(_) => ConnectAckReason::ServiceUnavailable,
    };
    // With the short name under which docs/errors.md explains it.
    let text = match error {
        ConnectError::Refused(refused) => format!("{refused} ({})", refused.reason()),
        ConnectError::Full(_) => error.to_string(),
    };
    (code, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::machine::Will;

    fn request(client_id: &str, user_name: Option<&str>) -> ConnectRequest {
        ConnectRequest {
            client_id: client_id.to_owned(),
            user_name: user_name.map(str::to_owned),
            password: Some("x".to_owned()),
            clean_session: false,
            will: None,
        }
    }

    fn code(request: &ConnectRequest) -> Result<Claim, ConnectAckReason> {
        let (claim, _) = claim(request).map_err(|(code, _)| code)?;
        Ok(claim)
    }

    #[test]
    fn connect_is_refused_by_the_codes_of_the_contract() {
        let good = "h/d1/?api-version=2021-04-12";
        assert!(code(&request("d1", Some(good))).is_ok());
        let differs = code(&request("D1", Some(good))).unwrap_err();
        assert_eq!(differs, ConnectAckReason::NotAuthorized);
        for user_name in [None, Some("h/d1"), Some("")] {
            let malformed = code(&request("d1", user_name)).unwrap_err();
            assert_eq!(malformed, ConnectAckReason::BadUserNameOrPassword);
        }
    }

    #[test]
    fn the_log_gets_a_bounded_part_of_a_strangers_id() {
        assert_eq!(named("edge1/mod1"), "edge1/mod1");
        let long = "ä".repeat(30_000);
        let logged = named(&long);
        assert!(long.starts_with(logged));
        assert_eq!(logged.len(), LOGGED_ID_BYTES_MAX - 1, "whole letters");
    }

    #[test]
    fn a_will_on_a_topic_of_somebody_else_is_refused() {
        let with_will = |topic: &str| {
            let mut request = request("d1", Some("h/d1/?api-version=2021-04-12"));
            request.will = Some(Will {
                topic: topic.to_owned(),
                payload: "gone".into(),
                retain: false,
            });
            code(&request).map(|claim| claim.identity.to_string())
        };
        let own = "devices/d1/messages/events/a=1";
        assert_eq!(with_will(own), Ok("d1".to_owned()));
        for topic in ["devices/d2/messages/events/", "$internal/x", "foo"] {
            let refused = Err(ConnectAckReason::NotAuthorized);
            assert_eq!(with_will(topic), refused, "{topic}");
        }
    }
}

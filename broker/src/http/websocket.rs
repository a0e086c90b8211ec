//! WebSocket upgrades on the HTTPS head: the way to the same protocol connections as on their own
//! ports (spec/mqtt.md 1.2, spec/auth-hierarchy-http.md 10.3).
//!
//! Any path will do; the sub-protocol decides. The upgrade needs no authentication: credentials
//! follow in the protocol inside. No ping is ever sent.

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{
    CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use edgehub_ws::ByteStream;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::limits::UPGRADE_MAX;
use super::{PeerCertificate, Place};
use crate::{amqp, mqtt};

/// What upgraded connections speak. Cheap to clone.
#[derive(Clone, Debug)]
pub struct WebSockets {
    /// What MQTT connections share; none when the MQTT head is switched off.
    pub mqtt: Option<mqtt::connection::ConnectionContext>,
    /// What AMQP connections share; none when the AMQP head is switched off.
    pub amqp: Option<amqp::connection::ConnectionContext>,
    /// Owns the tasks of upgraded connections.
    pub tasks: TaskTracker,
}

impl WebSockets {
    /// Puts the upgrade before `router`, whatever the path.
    pub fn before(self, router: Router) -> Router {
        router.layer(from_fn_with_state(self, upgrade_or_next))
    }

    /// What is spoken under this sub-protocol, if anything.
    fn speaker(&self, protocol: &str) -> Option<Speaker> {
        if protocol.eq_ignore_ascii_case(edgehub_ws::MQTT) {
            self.mqtt.clone().map(Speaker::Mqtt)
        } else if protocol.eq_ignore_ascii_case(edgehub_ws::AMQP) {
            self.amqp.clone().map(Speaker::Amqp)
        } else {
            None
        }
    }
}

async fn upgrade_or_next(
    State(sockets): State<WebSockets>,
    request: Request,
    next: Next,
) -> Response {
    if request.method() == Method::GET && has_token(request.headers(), &UPGRADE, "websocket") {
        upgrade(&sockets, request)
    } else {
        next.run(request).await
    }
}

fn upgrade(sockets: &WebSockets, mut request: Request) -> Response {
    let (accept, speaker) = match agree(request.headers(), |name| sockets.speaker(name)) {
        Ok(agreed) => agreed,
        Err(refusal) => {
            tracing::debug!("Refused a WebSocket: {refusal}");
            return StatusCode::BAD_REQUEST.into_response();
        }
    };
    let certificate = request.extensions().get::<PeerCertificate>();
    let certificate = certificate.and_then(|certificate| certificate.0.as_deref());
    let certificate = certificate.map(<[u8]>::to_vec);
    // It counts as a stranger until it has said who it is, as on the protocols' own ports.
    let stranger = request.extensions().get::<Place>().and_then(Place::take);
    let spoken = speaker.name();
    let upgrade = hyper::upgrade::on(&mut request);
    sockets.tasks.spawn(async move {
        match timeout(UPGRADE_MAX, upgrade).await {
            Ok(Ok(upgraded)) => {
                let stream = ByteStream::server(TokioIo::new(upgraded)).await;
                match speaker {
                    Speaker::Mqtt(context) => {
                        mqtt::connection::serve(stream, context, stranger).await;
                    }
                    Speaker::Amqp(context) => {
                        let serve = amqp::connection::serve;
                        serve(stream, context, certificate, stranger).await;
                    }
                }
            }
            Ok(Err(error)) => tracing::debug!("A WebSocket upgrade failed: {error}"),
            Err(_) => tracing::debug!("A WebSocket upgrade was never finished"),
        }
    });
    let headers = [
        (UPGRADE, HeaderValue::from_static("websocket")),
        (CONNECTION, HeaderValue::from_static("Upgrade")),
        (SEC_WEBSOCKET_ACCEPT, accept),
        (SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(spoken)),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response()
}

/// Who takes over the byte stream of a WebSocket.
enum Speaker {
    Mqtt(mqtt::connection::ConnectionContext),
    Amqp(amqp::connection::ConnectionContext),
}

impl Speaker {
    /// The sub-protocol as it is registered.
    fn name(&self) -> &'static str {
        match self {
            Self::Mqtt(_) => edgehub_ws::MQTT,
            Self::Amqp(_) => edgehub_ws::AMQP,
        }
    }
}

/// Why a request for a WebSocket is refused, with 400 and no body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("`Connection: Upgrade` is missing")]
    Connection,
    #[error("its version is not 13")]
    Version,
    #[error("its key is not 16 bytes in base64")]
    Key,
    #[error("it asks for no sub-protocol that this hub speaks")]
    Protocol,
}

/// The value of `Sec-WebSocket-Accept` when the request can be granted (RFC 6455 section 4.2.1), and
/// who speaks the first of its sub-protocols that anybody does.
fn agree<T>(
    headers: &HeaderMap,
    speaker: impl Fn(&str) -> Option<T>,
) -> Result<(HeaderValue, T), Refusal> {
    if !has_token(headers, &CONNECTION, "upgrade") {
        return Err(Refusal::Connection);
    }
    let version = headers.get(SEC_WEBSOCKET_VERSION);
    if version.is_none_or(|version| version.as_bytes().trim_ascii() != b"13") {
        return Err(Refusal::Version);
    }
    let key = headers
        .get(SEC_WEBSOCKET_KEY)
        .map(|key| key.as_bytes().trim_ascii())
        // 16 bytes are 22 characters and two of padding.
        .filter(|key| key.len() == 24 && key.ends_with(b"=="))
        .ok_or(Refusal::Key)?;
    let speaker = tokens(headers, &SEC_WEBSOCKET_PROTOCOL)
        .find_map(speaker)
        .ok_or(Refusal::Protocol)?;
    let accept = HeaderValue::try_from(edgehub_ws::accept_key(key));
    Ok((accept.map_err(|_| Refusal::Key)?, speaker))
}

/// The comma-separated values of a header, over all its lines.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn has_token(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(changes: &[(&'static str, Option<&'static str>)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, Upgrade"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
            ("sec-websocket-protocol", "other, MQTT"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        for (name, value) in changes {
            headers.remove(*name);
            if let Some(value) = value {
                headers.insert(*name, HeaderValue::from_static(value));
            }
        }
        headers
    }

    fn agreed(changes: &[(&'static str, Option<&'static str>)]) -> Result<String, Refusal> {
        let speaks = |protocol: &str| protocol.eq_ignore_ascii_case("mqtt").then_some(());
        let (accept, ()) = agree(&headers(changes), speaks)?;
        Ok(accept.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_example_of_the_rfc_is_accepted() {
        assert_eq!(agreed(&[]).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn what_is_missing_or_wrong_is_refused() {
        for (name, value, refusal) in [
            ("connection", None, Refusal::Connection),
            ("connection", Some("close"), Refusal::Connection),
            ("sec-websocket-version", None, Refusal::Version),
            ("sec-websocket-version", Some("8"), Refusal::Version),
            ("sec-websocket-key", None, Refusal::Key),
            ("sec-websocket-key", Some("short"), Refusal::Key),
            ("sec-websocket-protocol", None, Refusal::Protocol),
            (
                "sec-websocket-protocol",
                Some("mqttv5, xmqtt"),
                Refusal::Protocol,
            ),
        ] {
            assert_eq!(agreed(&[(name, value)]), Err(refusal), "{name}: {value:?}");
        }
    }
}

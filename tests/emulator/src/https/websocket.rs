//! MQTT and AMQP in a WebSocket on the port of HTTPS (spec/upstream.md B2, spec/mqtt.md 1.2).
//!
//! The framing is the workspace's own crate; what is in it is this crate's MQTT or AMQP. The hub sends no
//! pings, as IoT Hub does not.

use std::io;

use bytes::Bytes;
use edgehub_ws::ByteStream;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tracing::info;

use crate::connections::{Connection, Transport};
use crate::hub::Hub;
use crate::{amqp, mqtt};

/// The path by which Event Hubs clients ask for AMQP.
pub(super) const EVENTS_PATH: &str = "/$servicebus/websocket";

/// The sub-protocols, as they are answered.
const PROTOCOLS: [&str; 2] = [edgehub_ws::MQTT, edgehub_ws::AMQP];

/// A request that became a WebSocket, and its sub-protocol.
pub(super) type Upgrade = (OnUpgrade, &'static str);

/// Where a request that became a WebSocket leaves it for the connection's task.
#[derive(Default)]
pub(super) struct UpgradeSlot(Mutex<Option<Upgrade>>);

impl UpgradeSlot {
    pub(super) fn take(&self) -> Option<Upgrade> {
        self.0.lock().take()
    }
}

/// Answers a request for a WebSocket: 101, or 400 with the reason in the log.
pub(super) fn upgrade(
    request: &mut Request<Incoming>,
    slot: &UpgradeSlot,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    match agree(request.method(), request.headers()) {
        Ok((accept, protocol)) => {
            *slot.0.lock() = Some((hyper::upgrade::on(request), protocol));
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
            let protocol = HeaderValue::from_static(protocol);
            headers.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
        }
        Err(reason) => {
            info!(reason, "websocket refused");
            *response.status_mut() = StatusCode::BAD_REQUEST;
        }
    }
    response
}

/// Serves the upgraded connection until it ends.
pub(super) async fn serve(hub: &Hub, upgrade: Upgrade, connection: &Connection) {
    let (upgrade, protocol) = upgrade;
    let stream = async {
        let upgraded = upgrade.await.map_err(io::Error::other)?;
        Ok(ByteStream::server(TokioIo::new(upgraded)).await)
    };
    if protocol == edgehub_ws::AMQP {
        connection.upgraded(Transport::AmqpWs);
        amqp::serve_over(hub, &hub.https_port, stream, connection).await;
    } else {
        connection.upgraded(Transport::MqttWs);
        mqtt::serve_over(hub, &hub.https_port, stream, connection).await;
    }
}

/// What goes into `Sec-WebSocket-Accept` (RFC 6455 section 4.2) with the sub-protocol, or what is
/// wrong.
fn agree(
    method: &Method,
    headers: &HeaderMap,
) -> Result<(HeaderValue, &'static str), &'static str> {
    if method != Method::GET || !names(headers, &UPGRADE, "websocket") {
        return Err("no request for a WebSocket");
    }
    if !names(headers, &CONNECTION, "upgrade") {
        return Err("`Connection: Upgrade` is missing");
    }
    if !names(headers, &SEC_WEBSOCKET_VERSION, "13") {
        return Err("its version is not 13");
    }
    let asked = |name: &&&str| names(headers, &SEC_WEBSOCKET_PROTOCOL, name);
    let protocol = PROTOCOLS.iter().find(asked);
    let protocol = *protocol.ok_or("it asks for neither MQTT nor AMQP")?;
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or("it has no key")?;
    let accept = HeaderValue::try_from(edgehub_ws::accept_key(key.as_bytes()));
    Ok((accept.map_err(|_| "its key is unusable")?, protocol))
}

/// Whether one of a header's comma-separated values is this one, in any case.
fn names(headers: &HeaderMap, name: &HeaderName, wanted: &str) -> bool {
    let lines = headers.get_all(name).into_iter();
    let mut values = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','));
    values.any(|value| value.trim().eq_ignore_ascii_case(wanted))
}

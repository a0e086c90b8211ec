//! The control API: how a test watches and disturbs the emulator. Plain HTTP on its own port, for
//! the test machine alone; nothing that it does passes through the ports of the hub.
//!
//! Health:
//! - `GET /healthz`: `{"status":"ok"}`.
//! - `GET /readyz`: 200 `{"ready":true}`, or 503 `{"ready":false}` while a port is not open.
//!
//! Ledger:
//! - `GET /ledger?from=<sequence>`: `application/x-ndjson`, a message per line, oldest first, up to
//!   the last one there is at the time of the call. `from` is 0 when left out. The header
//!   `x-ledger-count` has the count of the whole ledger at that time.
//! - `GET /ledger/count`: `{"count":n}`.
//! - `GET /ledger/wait?count=n&timeout_ms=t`: `{"count":m,"reached":true}` as soon as m >= n, or
//!   `"reached":false` after t, which is 30,000 when left out and 600,000 at most.
//!
//! Connections, of all ports; `client_id` is null before CONNECT, for HTTPS and for a socket with
//! AMQP. Each identity that such a socket carries has an entry of its own, with the socket's id as
//! its `carrier`. `subscriptions` are those of the session:
//! - `GET /connections`: `[{"id":7,"transport":"mqtt"|"mqtt_ws"|"amqp"|"amqp_ws"|"https",
//!   "carrier":6|null,"client_id":"leaf1"|null,"auth_chain":"leaf1;L3;L4"|null,
//!   "client_version":"…"|null,"peer":"127.0.0.1:50000","connected_since_utc":"…",
//!   "subscriptions":[{"filter":"$iothub/twin/res/#","qos":0}]}]`.
//! - `DELETE /connections`: kills all; `{"killed":n}` once their sockets are closed.
//! - `DELETE /connections?client_id=leaf1`: kills that identity's. Of an AMQP socket that serves
//!   others as well only its links are detached, with `amqp:link:detach-forced`. An AMQP client's
//!   links are shown as the MQTT filters of the same meaning.
//! - `DELETE /connections/{id}`: kills one; 404 when there is no such connection.
//!
//! Sessions, those of clients that are connected and those that wait for their client:
//! - `GET /sessions`: `[{"client_id":"leaf1","persistent":true,"connection":7|null,
//!   "subscriptions":[…]}]`.
//! - `GET /sessions/wait?client_id=leaf1&filter=<filter>&timeout_ms=t`: `{"reached":true}` as soon
//!   as the client is connected and subscribed to the filter, without `filter` as soon as it is
//!   connected, or `"reached":false` after t as above.
//!
//! Cloud-to-device messages; a device's messages are numbered from 1 on:
//! - `POST /c2d/{device}` with `{"body":"text"|"body_base64":"…","message_id":"m1",
//!   "correlation_id":"…","user_id":"…","content_type":"…","content_encoding":"…",
//!   "ack":"none"|"positive"|"negative"|"full","ttl_ms":n,"properties":{"a":"1"}}`, of which
//!   everything may be left out: `{"sequence":1,"message_id":"m1"}`. 404 for a device that is not
//!   registered, 403 when 50 messages wait already, 413 for more than 64 KiB.
//! - `GET /c2d/{device}`: `{"queue":[{"sequence":2,"message_id":"m2","state":"enqueued"|
//!   "invisible","delivery_count":1,"packet_id":3|null,"enqueued_utc":"…","expires_utc":"…",
//!   "locked_until_utc":"…"|null}],"outcomes":[{"sequence":1,"message_id":"m1","outcome":
//!   "completed"|"expired"|"dead_lettered"|"purged","delivery_count":1,"enqueued_utc":"…",
//!   "settled_utc":"…"}]}`, oldest first; of the outcomes the newest 1,000.
//! - `GET /c2d/{device}/wait?sequence=n&timeout_ms=t`: that message's entry of `outcomes` as soon
//!   as it has one, or null after t as above.
//! - `DELETE /c2d/{device}`: `{"purged":n}`.
//!
//! Counters of what devices and callers have asked for, since the start or the last `DELETE`:
//! - `GET /counters`: `{"connects":3,"subscribes":9,"twin_gets":3,…}`, the sums of all. The names
//!   are in `counters.rs`; those of sockets, refused CONNECTs and HTTPS calls belong to nobody.
//! - `GET /counters?client_id=leaf1`: those of one identity.
//! - `DELETE /counters`: all 0.
//!
//! Ports:
//! - `GET /ports`: `{"amqp":{"port":5671,"state":"open"},"mqtt":{"port":8883,"state":"open"},
//!   "https":{"port":443,"state":"open"}}`.
//! - `PUT /ports/{amqp|mqtt|https}` with `{"state":"open"|"black_hole"|"refused"}`: the same answer,
//!   once the state is reached.
//!
//! Faults; `code` is a CONNACK code (1 to 5, 3 when left out) for `connect`, an HTTP status (400
//! to 599, 500 when left out) for `scope`, `registry` and `service` (twins, methods, queries, purge
//! and configurations), such a status in the answer to a device for `twin` and `put_token`, one that
//! is made an AMQP error condition for `attach` and `transfer`, and has to be left out for
//! `publish`:
//! - `GET /faults`: `[{"kind":"connect","count":2,"code":5}]`, what is not used up.
//! - `POST /faults` with `{"kind":"connect"|"publish"|"put_token"|"attach"|"transfer"|"twin"|
//!   "scope"|"registry"|"service","count":n,"code":c}`: the next n requests of that kind fail;
//!   with `"standing":true` instead of `count` all do until it is cleared (so is a device
//!   throttled: 429; a quota used up: 403). With `"client_id":"leaf1"|"L5/modA"` only that
//!   identity's requests: for HTTPS the one that the path names below `devices` or `twins`.
//!   Replaces the order of that kind and identity; that of an identity goes before that of
//!   everybody. `attach` and `transfer` take `"condition":"amqp:…"` to be used instead of the one
//!   of the code, and `transfer` `"containing":"text"`: only transfers whose bytes contain it.
//!   `"answer"` says what happens otherwise than usual: `"close"` (the connection,
//!   with the error) or `"silence"` for `put_token`, `attach` and `transfer`; `"detach"`,
//!   `"release"` or `"modify"` for `transfer`, which usually is rejected. The same answer.
//! - `DELETE /faults`: `[]`. With `?kind=twin`, `?client_id=leaf1` or both: only those; the rest is
//!   answered.
//!
//! Clock:
//! - `GET /clock`: `{"offset_ms":0,"utc":"…"}`.
//! - `PUT /clock` with `{"offset_ms":n}`: the same answer.
//!
//! A refused call gets 400 or 404, where nothing else is said, and `{"error":"…"}`.

mod c2d_api;
mod clients;
mod ledger_body;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::info;

use crate::clock::utc_text;
use crate::faults::{Fault, FaultError, FaultKind};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::limits::{REQUEST_BYTES_MAX, SETTLE_MAX, WAIT_MAX};
use crate::port::PortState;
use ledger_body::LedgerBody;

/// What the control API acts on.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) hub: Arc<Hub>,
    pub(crate) amqp: SocketAddr,
    pub(crate) mqtt: SocketAddr,
    pub(crate) https: SocketAddr,
}

/// The routes of the list above.
pub(crate) fn router(control: Control) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/ledger", get(ledger))
        .route("/ledger/count", get(ledger_count))
        .route("/ledger/wait", get(ledger_wait))
        .route(
            "/connections",
            get(clients::connections).delete(clients::kill_connections),
        )
        .route("/connections/{id}", delete(clients::kill_connection))
        .route("/sessions", get(clients::sessions))
        .route("/sessions/wait", get(clients::wait_for_session))
        .route(
            "/counters",
            get(clients::counters).delete(clients::clear_counters),
        )
        .route(
            "/c2d/{device}",
            get(c2d_api::overview)
                .post(c2d_api::send)
                .delete(c2d_api::purge),
        )
        .route("/c2d/{device}/wait", get(c2d_api::wait))
        .route("/ports", get(ports))
        .route("/ports/{name}", put(set_port))
        .route("/faults", get(faults).post(set_fault).delete(clear_faults))
        .route("/clock", get(clock).put(set_clock))
        .fallback(|| async { Refused(StatusCode::NOT_FOUND, "no such call".to_owned()) })
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(control)
}

/// A call that can not be carried out.
struct Refused(StatusCode, String);

impl Refused {
    fn bad(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }
}

impl From<JsonRejection> for Refused {
    fn from(rejection: JsonRejection) -> Self {
        Self::bad(rejection.body_text())
    }
}

impl From<FaultError> for Refused {
    fn from(error: FaultError) -> Self {
        Self::bad(error.to_string())
    }
}

impl From<QueryRejection> for Refused {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad(rejection.body_text())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

async fn healthz() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

async fn readyz(State(control): State<Control>) -> (StatusCode, Json<Value>) {
    let hub = &control.hub;
    let ready = [&hub.amqp_port, &hub.mqtt_port, &hub.https_port]
        .iter()
        .all(|port| port.state() == PortState::Open);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(json!({ "ready": ready })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DumpQuery {
    #[serde(default)]
    from: u64,
}

async fn ledger(
    State(control): State<Control>,
    query: Result<Query<DumpQuery>, QueryRejection>,
) -> Result<Response, Refused> {
    let Query(query) = query?;
    let dump = control.hub.ledger.dump(query.from);
    let headers = [
        (CONTENT_TYPE, "application/x-ndjson".to_owned()),
        (
            HeaderName::from_static("x-ledger-count"),
            dump.count().to_string(),
        ),
    ];
    Ok((headers, Body::new(LedgerBody::new(dump))).into_response())
}

async fn ledger_count(State(control): State<Control>) -> Json<Value> {
    Json(json!({ "count": control.hub.ledger.count() }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitQuery {
    count: u64,
    timeout_ms: Option<u64>,
}

/// A long poll: asks at once and at every change. No lock is held while it asks.
async fn wait_until(
    mut changed: watch::Receiver<u64>,
    timeout_ms: Option<u64>,
    is_reached: impl Fn() -> bool,
) -> bool {
    let reaching = async {
        loop {
            changed.mark_unchanged();
            if is_reached() {
                return;
            }
            // Fails only when the hub is gone, and then nobody asks any more.
            let _ = changed.changed().await;
        }
    };
    timeout(waiting_time(timeout_ms), reaching).await.is_ok()
}

/// How long a long poll waits.
fn waiting_time(timeout_ms: Option<u64>) -> Duration {
    Duration::from_millis(timeout_ms.unwrap_or(30_000)).min(WAIT_MAX)
}

async fn ledger_wait(
    State(control): State<Control>,
    query: Result<Query<WaitQuery>, QueryRejection>,
) -> Result<Json<Value>, Refused> {
    let Query(query) = query?;
    let time = waiting_time(query.timeout_ms);
    let mut count = control.hub.ledger.watch();
    let reached = timeout(time, count.wait_for(|count| *count >= query.count))
        .await
        .is_ok();
    Ok(Json(
        json!({ "count": control.hub.ledger.count(), "reached": reached }),
    ))
}

async fn ports(State(control): State<Control>) -> Json<Value> {
    let Control {
        hub,
        amqp,
        mqtt,
        https,
    } = &control;
    Json(json!({
        "amqp": { "port": amqp.port(), "state": hub.amqp_port.state() },
        "mqtt": { "port": mqtt.port(), "state": hub.mqtt_port.state() },
        "https": { "port": https.port(), "state": hub.https_port.state() },
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PortRequest {
    state: PortState,
}

async fn set_port(
    State(control): State<Control>,
    Path(name): Path<String>,
    request: Result<Json<PortRequest>, JsonRejection>,
) -> Result<Json<Value>, Refused> {
    let Json(PortRequest { state }) = request?;
    let gate = match name.as_str() {
        "amqp" => &control.hub.amqp_port,
        "https" => &control.hub.https_port,
        "mqtt" => &control.hub.mqtt_port,
        _ => return Err(Refused(StatusCode::NOT_FOUND, "no such port".to_owned())),
    };
    let late = || {
        Refused(
            StatusCode::GATEWAY_TIMEOUT,
            "the listener does not follow".to_owned(),
        )
    };
    timeout(SETTLE_MAX, gate.set(state))
        .await
        .map_err(|_| late())?;
    info!(port = name, ?state, "port changed");
    Ok(ports(State(control)).await)
}

async fn faults(State(control): State<Control>) -> Json<Vec<Fault>> {
    Json(control.hub.faults.list())
}

async fn set_fault(
    State(control): State<Control>,
    request: Result<Json<Fault>, JsonRejection>,
) -> Result<Json<Vec<Fault>>, Refused> {
    let Json(fault) = request?;
    control.hub.faults.set(fault.clone())?;
    info!(?fault, "faults ordered");
    Ok(faults(State(control)).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClearQuery {
    kind: Option<FaultKind>,
    client_id: Option<String>,
}

async fn clear_faults(
    State(control): State<Control>,
    query: Result<Query<ClearQuery>, QueryRejection>,
) -> Result<Json<Vec<Fault>>, Refused> {
    let Query(ClearQuery { kind, client_id }) = query?;
    let identity = client_id.as_deref().map(Identity::parse).transpose();
    let identity = identity.map_err(|error| Refused::bad(error.to_string()))?;
    control.hub.faults.clear(kind, identity.as_ref());
    Ok(faults(State(control)).await)
}

async fn clock(State(control): State<Control>) -> Json<Value> {
    let clock = &control.hub.clock;
    Json(json!({ "offset_ms": clock.offset_ms(), "utc": utc_text(clock.now_ms()) }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClockRequest {
    offset_ms: i64,
}

async fn set_clock(
    State(control): State<Control>,
    request: Result<Json<ClockRequest>, JsonRejection>,
) -> Result<Json<Value>, Refused> {
    let Json(ClockRequest { offset_ms }) = request?;
    control.hub.clock.set_offset_ms(offset_ms);
    info!(offset_ms, "clock moved");
    Ok(clock(State(control)).await)
}

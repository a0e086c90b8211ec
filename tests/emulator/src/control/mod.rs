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
//! Connections, of both ports; `client_id` is null before CONNECT and for HTTPS:
//! - `GET /connections`: `[{"id":7,"transport":"mqtt"|"https","client_id":"leaf1"|null,
//!   "auth_chain":"leaf1;L3;L4"|null,"peer":"127.0.0.1:50000","connected_since_utc":"…"}]`.
//! - `DELETE /connections`: kills all; `{"killed":n}` once their sockets are closed.
//! - `DELETE /connections?client_id=leaf1`: kills that identity's.
//! - `DELETE /connections/{id}`: kills one; 404 when there is no such connection.
//!
//! Ports:
//! - `GET /ports`: `{"mqtt":{"port":8883,"state":"open"},"https":{"port":443,"state":"open"}}`.
//! - `PUT /ports/{mqtt|https}` with `{"state":"open"|"black_hole"|"refused"}`: the same answer,
//!   once the state is reached.
//!
//! Faults; `code` is a CONNACK code (1 to 5, 3 when left out) for `connect`, an HTTP status (400
//! to 599, 500 when left out) for `scope` and `registry`, and has to be left out for `publish`:
//! - `GET /faults`: `[{"kind":"connect","count":2,"code":5}]`, what is not used up.
//! - `POST /faults` with `{"kind":"connect"|"publish"|"scope"|"registry","count":n,"code":c}`: the
//!   next n requests of that kind fail. Replaces the order of that kind. The same answer.
//! - `DELETE /faults`: `[]`.
//!
//! Clock:
//! - `GET /clock`: `{"offset_ms":0,"utc":"…"}`.
//! - `PUT /clock` with `{"offset_ms":n}`: the same answer.
//!
//! A refused call gets 400 or 404 and `{"error":"…"}`.

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
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::info;

use crate::clock::utc_text;
use crate::connections::{ConnectionInfo, Transport};
use crate::faults::Fault;
use crate::hub::Hub;
use crate::limits::{FAULT_COUNT_MAX, REQUEST_BYTES_MAX, SETTLE_MAX, WAIT_MAX};
use crate::port::PortState;
use ledger_body::LedgerBody;

/// What the control API acts on.
#[derive(Clone)]
pub(crate) struct Control {
    pub(crate) hub: Arc<Hub>,
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
        .route("/connections", get(connections).delete(kill_connections))
        .route("/connections/{id}", delete(kill_connection))
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
    let ready = [&hub.mqtt_port, &hub.https_port]
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

async fn ledger_wait(
    State(control): State<Control>,
    query: Result<Query<WaitQuery>, QueryRejection>,
) -> Result<Json<Value>, Refused> {
    let Query(query) = query?;
    let time = Duration::from_millis(query.timeout_ms.unwrap_or(30_000)).min(WAIT_MAX);
    let mut count = control.hub.ledger.watch();
    let reached = timeout(time, count.wait_for(|count| *count >= query.count))
        .await
        .is_ok();
    Ok(Json(
        json!({ "count": control.hub.ledger.count(), "reached": reached }),
    ))
}

#[derive(Serialize)]
struct ConnectionJson {
    id: u64,
    transport: &'static str,
    client_id: Option<String>,
    auth_chain: Option<String>,
    peer: String,
    connected_since_utc: String,
}

impl From<ConnectionInfo> for ConnectionJson {
    fn from(info: ConnectionInfo) -> Self {
        let claim = info.claim.as_ref();
        Self {
            id: info.id,
            transport: match info.transport {
                Transport::Https => "https",
                Transport::Mqtt => "mqtt",
            },
            client_id: claim.map(|claim| claim.identity.to_string()),
            auth_chain: claim
                .and_then(|claim| claim.chain.as_ref())
                .map(ToString::to_string),
            peer: info.peer.to_string(),
            connected_since_utc: utc_text(info.since_ms),
        }
    }
}

async fn connections(State(control): State<Control>) -> Json<Vec<ConnectionJson>> {
    Json(
        control
            .hub
            .connections
            .list()
            .into_iter()
            .map(Into::into)
            .collect(),
    )
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KillQuery {
    client_id: Option<String>,
}

async fn kill_connections(
    State(control): State<Control>,
    query: Result<Query<KillQuery>, QueryRejection>,
) -> Result<Json<Value>, Refused> {
    let Query(KillQuery { client_id }) = query?;
    let killed = kill(&control, |info| {
        let known = info.claim.as_ref().map(|claim| claim.identity.to_string());
        client_id.is_none() || known == client_id
    });
    killed.await
}

async fn kill_connection(
    State(control): State<Control>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Refused> {
    let known = control.hub.connections.list();
    let id = id
        .parse::<u64>()
        .ok()
        .filter(|id| known.iter().any(|info| info.id == *id));
    let missing = || Refused(StatusCode::NOT_FOUND, "no such connection".to_owned());
    let id = id.ok_or_else(missing)?;
    kill(&control, |info| info.id == id).await
}

async fn kill(
    control: &Control,
    matches: impl Fn(&ConnectionInfo) -> bool,
) -> Result<Json<Value>, Refused> {
    let connections = &control.hub.connections;
    let killed = connections.close_matching(matches);
    let late = || {
        Refused(
            StatusCode::GATEWAY_TIMEOUT,
            "the sockets do not close".to_owned(),
        )
    };
    timeout(SETTLE_MAX, connections.gone(&killed))
        .await
        .map_err(|_| late())?;
    info!(count = killed.len(), "connections killed");
    Ok(Json(json!({ "killed": killed.len() })))
}

async fn ports(State(control): State<Control>) -> Json<Value> {
    let Control { hub, mqtt, https } = &control;
    Json(json!({
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
    if fault.checked_code().is_none() || fault.count > FAULT_COUNT_MAX {
        return Err(Refused::bad(
            "the kind has no such code, or count is too large",
        ));
    }
    info!(kind = ?fault.kind, count = fault.count, code = fault.code, "faults ordered");
    control.hub.faults.set(fault);
    Ok(faults(State(control)).await)
}

async fn clear_faults(State(control): State<Control>) -> Json<Vec<Fault>> {
    control.hub.faults.clear();
    faults(State(control)).await
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

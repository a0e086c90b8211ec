//! Connections, sessions and counters.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::info;

use super::{Control, Refused, wait_until};
use crate::clock::utc_text;
use crate::connections::{ConnectionInfo, Transport};
use crate::identity::Identity;
use crate::limits::SETTLE_MAX;
use crate::sessions::SessionInfo;

#[derive(Serialize)]
pub(super) struct ConnectionJson {
    id: u64,
    transport: &'static str,
    carrier: Option<u64>,
    client_id: Option<String>,
    auth_chain: Option<String>,
    client_version: Option<String>,
    peer: String,
    connected_since_utc: String,
    subscriptions: Vec<SubscriptionJson>,
}

impl ConnectionJson {
    fn new(info: &ConnectionInfo, sessions: &[SessionInfo]) -> Self {
        let claim = info.claim.as_ref();
        let session = sessions
            .iter()
            .find(|session| session.connection == Some(info.id));
        Self {
            id: info.id,
            transport: match info.transport {
                Transport::Amqp => "amqp",
                Transport::AmqpWs => "amqp_ws",
                Transport::Https => "https",
                Transport::Mqtt => "mqtt",
                Transport::MqttWs => "mqtt_ws",
            },
            carrier: info.carrier,
            client_id: claim.map(|claim| claim.identity.to_string()),
            auth_chain: claim
                .and_then(|claim| claim.chain.as_ref())
                .map(ToString::to_string),
            client_version: info.client_version.clone(),
            peer: info.peer.to_string(),
            connected_since_utc: utc_text(info.since_ms),
            subscriptions: session.map(subscriptions).unwrap_or_default(),
        }
    }
}

#[derive(Serialize)]
struct SubscriptionJson {
    filter: String,
    qos: u8,
}

fn subscriptions(session: &SessionInfo) -> Vec<SubscriptionJson> {
    let subscriptions = session.subscriptions.iter();
    subscriptions
        .map(|(filter, qos)| SubscriptionJson {
            filter: filter.clone(),
            qos: *qos,
        })
        .collect()
}

pub(super) async fn connections(State(control): State<Control>) -> Json<Vec<ConnectionJson>> {
    let sessions = control.hub.sessions.list();
    let connections = control.hub.connections.list();
    let list = connections
        .iter()
        .map(|info| ConnectionJson::new(info, &sessions));
    Json(list.collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KillQuery {
    client_id: Option<String>,
}

pub(super) async fn kill_connections(
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

pub(super) async fn kill_connection(
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

#[derive(Serialize)]
pub(super) struct SessionJson {
    client_id: String,
    persistent: bool,
    connection: Option<u64>,
    subscriptions: Vec<SubscriptionJson>,
}

pub(super) async fn sessions(State(control): State<Control>) -> Json<Vec<SessionJson>> {
    let sessions = control.hub.sessions.list();
    let list = sessions.iter().map(|session| SessionJson {
        client_id: session.identity.to_string(),
        persistent: session.persistent,
        connection: session.connection,
        subscriptions: subscriptions(session),
    });
    Json(list.collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SessionQuery {
    client_id: String,
    filter: Option<String>,
    timeout_ms: Option<u64>,
}

pub(super) async fn wait_for_session(
    State(control): State<Control>,
    query: Result<Query<SessionQuery>, QueryRejection>,
) -> Result<Json<Value>, Refused> {
    let Query(query) = query?;
    let identity = identity(&query.client_id)?;
    let is_there = |session: &SessionInfo| {
        session.identity == identity
            && session.connection.is_some()
            && query
                .filter
                .as_ref()
                .is_none_or(|filter| session.subscriptions.contains_key(filter))
    };
    let sessions = &control.hub.sessions;
    let is_reached = || sessions.list().iter().any(is_there);
    let reached = wait_until(sessions.watch(), query.timeout_ms, is_reached).await;
    Ok(Json(json!({ "reached": reached })))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CountersQuery {
    client_id: Option<String>,
}

pub(super) async fn counters(
    State(control): State<Control>,
    query: Result<Query<CountersQuery>, QueryRejection>,
) -> Result<Json<Value>, Refused> {
    let Query(CountersQuery { client_id }) = query?;
    let identity = client_id.as_deref().map(identity).transpose()?;
    Ok(Json(control.hub.counters.show(identity.as_ref())))
}

pub(super) async fn clear_counters(State(control): State<Control>) -> Json<Value> {
    control.hub.counters.clear();
    info!("counters cleared");
    Json(control.hub.counters.show(None))
}

fn identity(text: &str) -> Result<Identity, Refused> {
    Identity::parse(text).map_err(|error| Refused::bad(error.to_string()))
}

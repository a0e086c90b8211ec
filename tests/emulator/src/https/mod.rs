//! The HTTPS side: registry, twins, methods, queries, and the two scope calls (spec/upstream.md A9,
//! B7); and MQTT and AMQP in a WebSocket.

mod bulk_api;
mod configuration_api;
mod error;
mod method_api;
mod query_api;
mod registry_api;
mod request;
mod scope_api;
mod statistics_api;
mod twin_api;
mod websocket;

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tracing::info;

use crate::connections::Connection;
use crate::counters::Counter;
use crate::faults::FaultKind;
use crate::hub::Hub;
use crate::identity::Identity;
use crate::limits::CONNECT_TIMEOUT;
use crate::port::Gated;
use error::ApiError;
use request::Call;
use websocket::UpgradeSlot;

/// An answer of 200 with JSON, or of 204 without.
enum Answer {
    Empty,
    /// The body, and the etag of the one identity in it.
    Json(Vec<u8>, Option<String>),
    /// Of a query.
    Page(query_api::Page),
    /// A body that says what of a bulk call could not be done, as an answer of 400.
    Partial(Vec<u8>),
}

impl Answer {
    fn json(value: &impl serde::Serialize, etag: Option<&str>) -> Result<Self, ApiError> {
        let body = serde_json::to_vec(value).map_err(|error| ApiError::internal(&error))?;
        Ok(Self::Json(body, etag.map(str::to_owned)))
    }
}

/// Serves a socket until it ends.
pub(crate) async fn serve(
    hub: Arc<Hub>,
    tls: TlsAcceptor,
    socket: Gated<TcpStream>,
    connection: Connection,
) {
    let served = async {
        let Some(Ok(stream)) = hub
            .https_port
            .limit(CONNECT_TIMEOUT, tls.accept(socket))
            .await
        else {
            return;
        };
        let slot = UpgradeSlot::default();
        let service = service_fn(|request| answer(&hub, &slot, request));
        let _ = http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Some(upgrade) = slot.take() {
            websocket::serve(&hub, upgrade, &connection).await;
        }
    };
    tokio::select! {
        () = served => {}
        () = connection.closing() => {}
    }
}

async fn answer(
    hub: &Hub,
    slot: &UpgradeSlot,
    mut request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if [edgehub_ws::PATH, websocket::EVENTS_PATH].contains(&request.uri().path()) {
        return Ok(websocket::upgrade(&mut request, slot));
    }
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let request_id = request.headers().get("request-id").cloned();
    let answer = match Call::read(request).await {
        Ok(call) => route(hub, &call).await,
        Err(error) => Err(error),
    };
    let mut response = match answer {
        Ok(Answer::Empty) => with_status(StatusCode::NO_CONTENT, Bytes::new()),
        Ok(Answer::Json(body, etag)) => {
            let mut response = with_status(StatusCode::OK, body.into());
            if let Some(etag) =
                etag.and_then(|etag| HeaderValue::from_str(&format!("\"{etag}\"")).ok())
            {
                response.headers_mut().insert(hyper::header::ETAG, etag);
            }
            response
        }
        Ok(Answer::Page(page)) => page.into_response(),
        Ok(Answer::Partial(body)) => with_status(StatusCode::BAD_REQUEST, body.into()),
        Err(error) => {
            info!(%method, path, status = error.status.as_u16(), reason = error.text, "refused");
            error.into_response(hub.clock.now_ms())
        }
    };
    if let Some(id) = request_id {
        response
            .headers_mut()
            .insert(HeaderName::from_static("x-ms-request-id"), id);
    }
    Ok(response)
}

fn with_status(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let json = HeaderValue::from_static("application/json; charset=utf-8");
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// The three groups of calls: they fail and are counted apart.
fn kind_of(method: &Method, path: &[&str]) -> (FaultKind, Counter) {
    match path {
        [
            _,
            _,
            _,
            _,
            "devicesAndModulesInTargetDeviceScope" | "getDeviceAndModuleOnBehalfOf",
        ] => (FaultKind::Scope, Counter::ScopeCalls),
        ["twins", ..] | ["devices", _, "applyConfigurationContent" | "commands"] => {
            (FaultKind::Service, Counter::ServiceCalls)
        }
        // A device may have this name.
        ["devices", "query"] if method == Method::POST => {
            (FaultKind::Service, Counter::ServiceCalls)
        }
        _ => (FaultKind::Registry, Counter::RegistryCalls),
    }
}

async fn route(hub: &Hub, call: &Call) -> Result<Answer, ApiError> {
    let path = call.path();
    let (kind, counter) = kind_of(&call.method, &path);
    hub.counters.add_other(counter);
    if let Some(failure) = hub.faults.take(kind, named(&path).as_ref()) {
        return Err(ApiError::ordered(failure.code));
    }
    call.check_api_version()?;
    match (kind, &call.method, path.as_slice()) {
        (FaultKind::Scope, &Method::POST, ["devices", actor, "modules", module, name]) => {
            if *name == "getDeviceAndModuleOnBehalfOf" {
                scope_api::identity(hub, call, actor, module)
            } else {
                scope_api::page(hub, call, actor, module)
            }
        }
        (FaultKind::Service, &Method::POST, ["devices", device, "applyConfigurationContent"]) => {
            configuration_api::apply(hub, call, device)
        }
        (FaultKind::Service, &Method::DELETE, ["devices", device, "commands"]) => {
            method_api::purge(hub, call, device)
        }
        (FaultKind::Service, &Method::POST, ["devices", "query"]) => query_api::run(hub, call),
        (FaultKind::Service, &Method::POST, ["twins", rest @ .., "methods"]) => {
            method_api::invoke(hub, call, &target(rest)?).await
        }
        (FaultKind::Service, method, ["twins", rest @ ..]) => {
            twin_api::route(hub, call, method, &target(rest)?)
        }
        (FaultKind::Registry, &Method::POST, ["devices"]) => bulk_api::change(hub, call),
        (FaultKind::Registry, &Method::GET, ["statistics", what]) => {
            statistics_api::get(hub, call, what)
        }
        (FaultKind::Registry, method, ["devices", rest @ ..]) => {
            registry_api::route(hub, call, method, rest)
        }
        _ => Err(ApiError::not_supported()),
    }
}

/// The identity that a path is about.
fn named(path: &[&str]) -> Option<Identity> {
    match path {
        ["devices" | "twins", device, "modules", module, ..] => {
            Identity::new(device, Some(module)).ok()
        }
        ["devices" | "twins", device, ..] => Identity::new(device, None).ok(),
        _ => None,
    }
}

/// `{device}` or `{device}/modules/{module}` of a path.
fn target(path: &[&str]) -> Result<Identity, ApiError> {
    match path {
        [device] => Ok(Identity::new(device, None)?),
        [device, "modules", module] => Ok(Identity::new(device, Some(module))?),
        _ => Err(ApiError::not_supported()),
    }
}

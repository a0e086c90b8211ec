//! Direct methods over HTTPS: a module of this device calls a client of this hub
//! (spec/auth-hierarchy-http.md 10.2, spec/core.md 6).
//!
//! Who calls is decided here; how a call reaches its target and what comes of it is
//! [`MethodService`]'s affair. Nothing is forwarded upstream or to a child hub's own clients that
//! are not connected through this hub.
//!
//! | Status | When |
//! |---|---|
//! | 200 | the client answered: `{"status":…,"payload":…}`, whatever its status |
//! | 400 | the header `x-ms-edge-moduleId` or the body is missing or wrong |
//! | 401 | the caller is no module of this device, or not who it says it is |
//! | 404 | the client did not connect and subscribe in time; any other path |
//! | 408, 413 | the body is too slow ([`BODY_READ_MAX`]) or too large ([`METHOD_BODY_BYTES_MAX`]) |
//! | 429 | too many calls of this client wait |
//! | 503 | too many calls wait, the client does not read, or the caller cannot be judged now |
//! | 504 | the client did not answer in time, or its connection ended |
//!
//! Every answer of 4xx and 5xx that is made here has the body `{"message":"…"}`.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use edgehub_auth::authenticator::{Authenticator, AuthnError, Claim, Credential};
use edgehub_auth::scope_cache::ScopeCache;
use edgehub_proto::identity::Identity;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::limits::{BODY_READ_MAX, METHOD_BODY_BYTES_MAX};
use super::patience::Patience;
use crate::hub::UNKNOWN_ID;
use crate::methods::limits::RESPONSE_TIMEOUT_DEFAULT;
use crate::methods::{BadRequest, MethodOutcome, MethodRequest, MethodService, error_body};
use crate::telemetry::metrics;

/// Who calls: `{device}/{module}`.
pub const CALLER_HEADER: &str = "x-ms-edge-moduleid";

/// The content type of every answer.
const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");

/// What calls work on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MethodsApi {
    own_device: Arc<str>,
    scope: Arc<ScopeCache>,
    authenticator: Arc<Authenticator>,
    methods: Arc<MethodService>,
}

impl MethodsApi {
    /// Takes calls of modules of `own_device`, which `authenticator` judges by `scope`.
    #[must_use]
    pub fn new(
        own_device: &str,
        scope: Arc<ScopeCache>,
        authenticator: Arc<Authenticator>,
        methods: Arc<MethodService>,
    ) -> Self {
        Self {
            own_device: own_device.into(),
            scope,
            authenticator,
            methods,
        }
    }

    /// The routes of both forms; without a fallback, so that it can be merged into another router.
    /// The `api-version` is not looked at.
    pub fn router(self) -> Router {
        Router::new()
            .route("/twins/{device}/methods", post(call_device))
            .route(
                "/twins/{device}/modules/{module}/methods",
                post(call_module),
            )
            .with_state(self)
    }

    /// Who calls, proven. Nothing of the body has been read yet.
    async fn authenticate(&self, headers: &HeaderMap) -> Result<Identity, Failure> {
        let caller = caller(headers)?;
        if caller.device_id() != &*self.own_device {
            let text = "Only modules on the same device can invoke DirectMethods";
            return Err(Failure::new(StatusCode::UNAUTHORIZED, text));
        }
        let claim = Claim {
            credential: credential(&caller, headers)?,
            identity: caller,
            chain: None,
        };
        match self.authenticator.authenticate(&claim).await {
            Ok(_) => Ok(claim.identity),
            Err(error) => {
                let caller = &claim.identity;
                tracing::info!("Refused a method call of {caller}: {error}");
                Err(match error {
                    AuthnError::MalformedToken(error) => Failure::new(
                        StatusCode::UNAUTHORIZED,
                        format!(
                            "Cannot parse SharedAccessSignature because of the following error - \
                             {error}"
                        ),
                    ),
                    error if error.is_definite() => not_authenticated(caller),
                    _ => Failure::new(
                        StatusCode::SERVICE_UNAVAILABLE,
                        format!("Cannot decide about device with Id {caller} now"),
                    ),
                })
            }
        }
    }

    /// Calls `target`, an id that was in the path.
    async fn call(&self, target: &str, request: Request) -> Result<Response, Failure> {
        let (head, body) = request.into_parts();
        let patience = head.extensions.get::<Patience>().cloned();
        let caller = self.authenticate(&head.headers).await?;
        let request = parse(&read(body).await?)?;
        let Ok(target) = Identity::parse(target) else {
            // What is no id is not connected either.
            let text = format!("Client {target} not found");
            return Err(Failure::new(StatusCode::NOT_FOUND, text));
        };
        // A caller chooses targets freely, and each name would be a series for ever.
        let known = self.scope.current().get(&target).is_some();
        let label = if known { target.as_str() } else { UNKNOWN_ID };
        metrics::direct_methods(&caller, label).increment(1);
        // Its time-outs may be longer than the rest of the connection's life.
        let _held = patience.as_ref().map(Patience::hold);
        let begun = self.methods.clock().instant();
        let outcome = self.methods.invoke(&target, request).await;
        if known {
            let took = self.methods.clock().instant() - begun;
            metrics::direct_method_duration(caller.as_str(), &target).record(took);
        }
        answer(outcome)
    }
}

/// Route parameters, each percent-decoded once (13 #19).
type Params<T> = Result<Path<T>, PathRejection>;

async fn call_device(
    State(api): State<MethodsApi>,
    target: Params<String>,
    request: Request,
) -> Result<Response, Failure> {
    let Path(device) = target.map_err(|_| bad_path())?;
    // A device's id has no slash, whatever was decoded.
    if device.contains('/') {
        return Err(bad_path());
    }
    api.call(&device, request).await
}

async fn call_module(
    State(api): State<MethodsApi>,
    target: Params<(String, String)>,
    request: Request,
) -> Result<Response, Failure> {
    let Path((device, module)) = target.map_err(|_| bad_path())?;
    if device.contains('/') {
        return Err(bad_path());
    }
    api.call(&format!("{device}/{module}"), request).await
}

fn bad_path() -> Failure {
    Failure::new(StatusCode::BAD_REQUEST, "The path names no client")
}

/// The module that the one header names.
fn caller(headers: &HeaderMap) -> Result<Identity, Failure> {
    let mut values = headers.get_all(CALLER_HEADER).iter();
    let caller = match (values.next().map(HeaderValue::to_str), values.next()) {
        (Some(Ok(value)), None) => Identity::parse(value).ok(),
        _ => None,
    };
    caller.filter(Identity::is_module).ok_or_else(|| {
        Failure::new(
            StatusCode::BAD_REQUEST,
            "Invalid header value for x-ms-edge-moduleId",
        )
    })
}

/// The token of the one `Authorization` header.
fn credential(caller: &Identity, headers: &HeaderMap) -> Result<Credential, Failure> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (Some(Ok(token)), None) => Ok(Credential::Sas(token.to_owned())),
        _ => Err(not_authenticated(caller)),
    }
}

fn not_authenticated(caller: &Identity) -> Failure {
    let text = format!("Unable to authenticate device with Id {caller}");
    Failure::new(StatusCode::UNAUTHORIZED, text)
}

async fn read(body: Body) -> Result<Bytes, Failure> {
    let limited = Limited::new(body, METHOD_BODY_BYTES_MAX);
    match timeout(BODY_READ_MAX, limited.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Failure::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "The body is too large",
        )),
        Ok(Err(_)) => Err(Failure::new(
            StatusCode::BAD_REQUEST,
            "The body cannot be read",
        )),
        Err(_) => Err(Failure::new(
            StatusCode::REQUEST_TIMEOUT,
            "The body took too long",
        )),
    }
}

/// The body as the SDKs write it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MethodBody<'a> {
    method_name: Option<String>,
    /// As it was written. An explicit `null` is a payload, unlike none.
    #[serde(borrow, default, deserialize_with = "present")]
    payload: Option<&'a RawValue>,
    response_timeout_in_seconds: Option<i64>,
    connect_timeout_in_seconds: Option<i64>,
}

fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

fn parse(body: &Bytes) -> Result<MethodRequest, Failure> {
    let parsed: MethodBody<'_> = serde_json::from_slice(body).map_err(|_| {
        Failure::new(
            StatusCode::BAD_REQUEST,
            "The body is not JSON of the expected form",
        )
    })?;
    let secs = |secs: Option<i64>, default, bad| match secs.map(u64::try_from) {
        None => Ok(default),
        Some(Ok(secs)) => Ok(Duration::from_secs(secs)),
        Some(Err(_)) => Err(bad),
    };
    let payload = parsed.payload.map_or(Bytes::new(), |payload| {
        body.slice_ref(payload.get().as_bytes())
    });
    let request = secs(
        parsed.response_timeout_in_seconds,
        RESPONSE_TIMEOUT_DEFAULT,
        BadRequest::ResponseTimeout,
    )
    .and_then(|response_timeout| {
        let connect_timeout = secs(
            parsed.connect_timeout_in_seconds,
            Duration::ZERO,
            BadRequest::ConnectTimeout,
        )?;
        let name = parsed.method_name.as_deref().unwrap_or_default();
        MethodRequest::local(name, payload, response_timeout, connect_timeout)
    });
    request.map_err(|bad| Failure::new(StatusCode::BAD_REQUEST, bad.to_string()))
}

fn answer(outcome: MethodOutcome) -> Result<Response, Failure> {
    let (code, text) = outcome.status();
    let MethodOutcome::Answered { status, payload } = outcome else {
        let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        return Err(Failure::new(code, text.unwrap_or_default()));
    };
    let mut body = format!(r#"{{"status":{status},"payload":"#).into_bytes();
    body.extend_from_slice(&json_of(&payload));
    body.push(b'}');
    Ok((StatusCode::OK, [(CONTENT_TYPE, JSON)], body).into_response())
}

/// A client's payload as JSON: itself, `null` when there is none. What is no JSON becomes a JSON
/// text, because as it stands it could break out of the answer that it is put into.
fn json_of(payload: &Bytes) -> Bytes {
    if payload.is_empty() {
        return Bytes::from_static(b"null");
    }
    if serde_json::from_slice::<&RawValue>(payload).is_ok() {
        return payload.clone();
    }
    let text = String::from_utf8_lossy(payload);
    // A text cannot fail to be written.
    serde_json::to_vec(&text).unwrap_or_default().into()
}

/// An answer other than 200.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    text: String,
}

impl Failure {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let body = error_body(&self.text);
        (self.status, [(CONTENT_TYPE, JSON)], body).into_response()
    }
}

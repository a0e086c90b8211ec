//! The two scope calls, as server for child hubs (spec/auth-hierarchy-http.md 7).
//!
//! Who calls, and what it may be told, is decided by `edgehub-auth`; here are the routes, the
//! bodies and the statuses. Answers contain keys: nothing of a body or of an `Authorization`
//! header is ever logged.
//!
//! | Status | When |
//! |---|---|
//! | 200 | `devices, modules, continuationLink` |
//! | 400 | the body is not JSON of the right form, its chain cannot be read, a target that is no id |
//! | 401 | not a `$edgeHub`, no or a wrong token, or nothing for this caller to know |
//! | 404, 405 | any other path, any other method |
//! | 408, 413 | the body is too slow ([`BODY_READ_MAX`]) or too large ([`BODY_BYTES_MAX`]) |
//! | 503 | it cannot be decided now: the child keeps what it knows and asks again |
//!
//! Every answer of 4xx and 5xx that is made here has the body `{"ErrorMessage":"…"}`; 404 and 405
//! have none.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use edgehub_auth::authenticator::{
    Authenticator, AuthnError, Credential, ServiceClaim, ServicePrincipal,
};
use edgehub_auth::scope_cache::ScopeCache;
use edgehub_auth::scope_server::{IdentityQuery, ScopeDenied, answer_scope};
use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::identity::{EDGE_HUB_MODULE, Identity};
use edgehub_proto::scope::{ErrorBody, IdentityRequest, ScopeRequest, ScopeResponse};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::limits::{BODY_BYTES_MAX, BODY_READ_MAX};

/// The content type of every answer with a body.
const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");

/// What the two calls work on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ScopeApi {
    scope: Arc<ScopeCache>,
    authenticator: Arc<Authenticator>,
}

/// Route parameters: the acting device and its module, each percent-decoded once (13 #19).
type Actor = Result<Path<(String, String)>, PathRejection>;

impl ScopeApi {
    /// Answers from `scope`; callers are judged by `authenticator`.
    #[must_use]
    pub fn new(scope: Arc<ScopeCache>, authenticator: Arc<Authenticator>) -> Self {
        Self {
            scope,
            authenticator,
        }
    }

    /// The routes of both calls. The `api-version` is not looked at.
    pub fn router(self) -> Router {
        const SCOPE: &str =
            "/devices/{device}/modules/{module}/devicesAndModulesInTargetDeviceScope";
        const IDENTITY: &str = "/devices/{device}/modules/{module}/getDeviceAndModuleOnBehalfOf";
        Router::new()
            .route(SCOPE, post(devices_in_scope))
            .route(IDENTITY, post(one_identity))
            .fallback(async || StatusCode::NOT_FOUND)
            .with_state(self)
    }

    /// Who calls, proven.
    async fn authenticate(
        &self,
        caller: Identity,
        credential: Credential,
        auth_chain: &str,
    ) -> Result<ServicePrincipal, Failure> {
        let chain = AuthChain::parse(auth_chain).map_err(ScopeDenied::from)?;
        let claim = ServiceClaim {
            caller,
            chain,
            credential,
        };
        let proven = self.authenticator.authenticate_service(&claim).await;
        proven.map_err(|error| {
            let reason = format!("{error} ({})", error.reason());
            let failure = match error {
                AuthnError::MalformedToken(error) => Failure::new(
                    StatusCode::UNAUTHORIZED,
                    format!(
                        "Cannot parse SharedAccessSignature because of the following error - \
                         {error}"
                    ),
                ),
                error if error.is_definite() => not_authenticated(&claim.caller),
                _ => Failure::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("Cannot decide about device with Id {} now", claim.caller),
                ),
            };
            Failure { reason, ..failure }
        })
    }
}

/// `devicesAndModulesInTargetDeviceScope`: served from our own tree, never asks upstream about
/// the target.
async fn devices_in_scope(State(api): State<ScopeApi>, actor: Actor, request: Request) -> Response {
    let name = name(&actor);
    answered(&name, answer_devices(&api, actor, request).await)
}

async fn answer_devices(
    api: &ScopeApi,
    actor: Actor,
    request: Request,
) -> Result<Response, Failure> {
    let caller = caller(actor)?;
    let credential = credential(&caller, request.headers())?;
    let request: ScopeRequest = body(request.into_body()).await?;
    let principal = api
        .authenticate(caller, credential, &request.auth_chain)
        .await?;
    let answer = answer_scope(&api.scope.current(), &principal, &request)?;
    tracing::debug!(
        "Told {} of {} devices and {} modules in scope",
        principal.caller(),
        answer.devices.len(),
        answer.modules.len()
    );
    Ok(success(&answer))
}

/// `getDeviceAndModuleOnBehalfOf`: asks upstream first, so that a child learns of an identity
/// through all layers at once.
async fn one_identity(State(api): State<ScopeApi>, actor: Actor, request: Request) -> Response {
    let name = name(&actor);
    answered(&name, answer_identity(&api, actor, request).await)
}

async fn answer_identity(
    api: &ScopeApi,
    actor: Actor,
    request: Request,
) -> Result<Response, Failure> {
    let caller = caller(actor)?;
    let credential = credential(&caller, request.headers())?;
    let request: IdentityRequest = body(request.into_body()).await?;
    let principal = api
        .authenticate(caller, credential, &request.auth_chain)
        .await?;
    let query = IdentityQuery::new(&api.scope.current(), &principal, &request)?;
    let refreshed = api.authenticator.refresh(query.refresh_query()).await;
    let answer = query.answer(&api.scope.current(), refreshed)?;
    tracing::debug!(
        "Told {} about {}",
        principal.caller(),
        query.refresh_query().identity
    );
    Ok(success(&answer))
}

/// What the caller calls itself, for the log.
fn name(actor: &Actor) -> String {
    match actor {
        Ok(Path((device, module))) => format!("{device}/{module}"),
        Err(_) => "somebody".to_owned(),
    }
}

/// The answer. The log has every refusal once, with the reason.
fn answered(name: &str, answer: Result<Response, Failure>) -> Response {
    answer.unwrap_or_else(|failure| {
        let Failure { status, reason, .. } = &failure;
        let status = status.as_u16();
        tracing::info!("Refused a scope call of {name} with {status}: {reason}");
        failure.into_response()
    })
}

/// The `$edgeHub` that the path names.
fn caller(actor: Actor) -> Result<Identity, Failure> {
    let unauthorized = |text: &str| Failure::new(StatusCode::UNAUTHORIZED, text.to_owned());
    let Ok(Path((device, module))) = actor else {
        return Err(unauthorized("the path names no device and module"));
    };
    if module != EDGE_HUB_MODULE {
        return Err(unauthorized(
            "only $edgeHub may ask for identities in scope",
        ));
    }
    Identity::edge_hub(&device).map_err(|_| unauthorized("the path names no device"))
}

/// The token of the one `Authorization` header. Without one nothing more is read.
fn credential(caller: &Identity, headers: &HeaderMap) -> Result<Credential, Failure> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (Some(Ok(token)), None) => Ok(Credential::Sas(token.to_owned())),
        (None, _) => Err(Failure {
            reason: "no Authorization header".to_owned(),
            ..not_authenticated(caller)
        }),
        _ => Err(Failure {
            reason: "several Authorization headers, or one that is no text".to_owned(),
            ..not_authenticated(caller)
        }),
    }
}

fn not_authenticated(caller: &Identity) -> Failure {
    let text = format!("Unable to authenticate device with Id {caller}");
    Failure::new(StatusCode::UNAUTHORIZED, text)
}

async fn body<T: DeserializeOwned>(body: Body) -> Result<T, Failure> {
    let bad = |status, text: &str| Failure::new(status, text.to_owned());
    let collected = timeout(BODY_READ_MAX, Limited::new(body, BODY_BYTES_MAX).collect()).await;
    let bytes = match collected {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(bad(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large"));
        }
        Ok(Err(_)) => return Err(bad(StatusCode::BAD_REQUEST, "the body cannot be read")),
        Err(_) => return Err(bad(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    };
    // What exactly does not fit stays out of the text: a body may have secrets in it.
    serde_json::from_slice(&bytes).map_err(|_| {
        bad(
            StatusCode::BAD_REQUEST,
            "the body is not JSON of the expected form",
        )
    })
}

fn success(answer: &ScopeResponse) -> Response {
    json(StatusCode::OK, answer)
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(text) => (status, [(CONTENT_TYPE, JSON)], text).into_response(),
        // These types have neither maps with odd keys nor anything else that can fail.
        Err(error) => {
            tracing::error!("an answer cannot be written as JSON: {error}");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// An answer other than 200.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    /// For the caller.
    text: String,
    /// For the log, where more may be said.
    reason: String,
}

impl Failure {
    fn new(status: StatusCode, text: String) -> Self {
        let reason = text.clone();
        Self {
            status,
            text,
            reason,
        }
    }
}

impl From<ScopeDenied> for Failure {
    fn from(denied: ScopeDenied) -> Self {
        let status =
            StatusCode::from_u16(denied.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::new(status, denied.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        json(
            self.status,
            &ErrorBody {
                error_message: self.text,
            },
        )
    }
}

//! The two calls of the nested scope API (auth-hierarchy-http.md 6.1).

use std::{fmt::Write as _, sync::Arc, time::Duration};

use bytes::Bytes;
use edgehub_auth::sas_signer::TokenSource;
use edgehub_proto::{
    auth_chain::AuthChain,
    identity::{EDGE_HUB_MODULE, Identity},
    scope::{API_VERSION, ErrorBody, IdentityRequest, ScopeRequest, ScopeResponse},
};
use hyper::StatusCode;
use serde::Serialize;

use super::http::{HttpClient, HttpError};
use crate::connectivity::ConnectivityMonitor;

/// Why the upstream gave no usable answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScopeError {
    /// The upstream answered with something that is no scope page.
    #[error("the answer is not a scope page: {0}")]
    Malformed(String),
    /// The upstream answered with an error.
    #[error("status {status}: {message}")]
    Status {
        /// HTTP status.
        status: u16,
        /// Text of the answer, shortened.
        message: String,
    },
    /// There was no answer.
    #[error(transparent)]
    Unreachable(#[from] HttpError),
}

impl ScopeError {
    /// Whether the same request may succeed soon (auth-hierarchy-http.md 6.3).
    pub(crate) fn is_retryable(&self) -> bool {
        match self {
            Self::Malformed(_) => false,
            Self::Status { status, .. } => !matches!(status, 400 | 401 | 403 | 404 | 405 | 406),
            Self::Unreachable(error) => !matches!(error, HttpError::Request(_)),
        }
    }

    /// The upstream says that it does not know the identity.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: 404, .. })
    }

    /// The upstream says no, which may mean the identity or us.
    pub(crate) fn is_denied(&self) -> bool {
        matches!(
            self,
            Self::Status {
                status: 400 | 401 | 403 | 404,
                ..
            }
        )
    }
}

/// The scope API. A trait so that the walk and the refresh are tested without a network.
pub(crate) trait ScopeApi: Send + Sync + 'static {
    /// One page of the scope of the edge device at the head of `chain`.
    fn page(
        &self,
        chain: &AuthChain,
        continuation: Option<String>,
    ) -> impl Future<Output = Result<ScopeResponse, ScopeError>> + Send;

    /// One identity, asked for in the name of the edge device at the head of `chain`.
    fn identity(
        &self,
        target: &Identity,
        chain: &AuthChain,
    ) -> impl Future<Output = Result<ScopeResponse, ScopeError>> + Send;
}

/// The scope API over HTTPS, as our own `$edgeHub`.
#[derive(Debug)]
pub(crate) struct HttpScopeApi {
    http: HttpClient,
    tokens: Arc<TokenSource>,
    monitor: ConnectivityMonitor,
    /// `/devices/{own device}/modules/$edgeHub/`
    base: String,
    page_size: i64,
    request_timeout: Duration,
}

impl HttpScopeApi {
    pub(crate) fn new(
        http: HttpClient,
        tokens: Arc<TokenSource>,
        monitor: ConnectivityMonitor,
        own_device: &Identity,
        page_size: i64,
        request_timeout: Duration,
    ) -> Self {
        let device = path_segment(own_device.device_id());
        let base = format!("/devices/{device}/modules/{EDGE_HUB_MODULE}/");
        Self {
            http,
            tokens,
            monitor,
            base,
            page_size,
            request_timeout,
        }
    }

    async fn call(
        &self,
        name: &str,
        request: &impl Serialize,
    ) -> Result<ScopeResponse, ScopeError> {
        let path = format!("{}{name}?api-version={API_VERSION}", self.base);
        let body =
            serde_json::to_vec(request).map_err(|error| HttpError::Request(error.to_string()))?;
        let token = self.tokens.http_token();
        let answered = self
            .http
            .post(&path, &token, Bytes::from(body), self.request_timeout)
            .await;
        match &answered {
            Ok(_) => self.monitor.https_answered(),
            Err(_) => self.monitor.https_failed(),
        }
        let answer = answered?;
        if answer.status == StatusCode::OK {
            return parse(&answer.body);
        }
        let status = answer.status.as_u16();
        Err(ScopeError::Status {
            status,
            message: error_text(&answer.body),
        })
    }
}

impl ScopeApi for HttpScopeApi {
    async fn page(
        &self,
        chain: &AuthChain,
        continuation: Option<String>,
    ) -> Result<ScopeResponse, ScopeError> {
        let request = ScopeRequest {
            page_size: Some(self.page_size),
            continuation_link: continuation,
            auth_chain: chain.to_string(),
        };
        self.call("devicesAndModulesInTargetDeviceScope", &request)
            .await
    }

    async fn identity(
        &self,
        target: &Identity,
        chain: &AuthChain,
    ) -> Result<ScopeResponse, ScopeError> {
        let request = IdentityRequest {
            target_device_id: target.device_id().to_owned(),
            target_module_id: target.module_id().map(str::to_owned),
            auth_chain: chain.to_string(),
        };
        self.call("getDeviceAndModuleOnBehalfOf", &request).await
    }
}

/// Ids go into the path as they are, as the reference writes them, save for the two characters that
/// would end the path or be read as an escape.
fn path_segment(id: &str) -> String {
    let mut segment = String::with_capacity(id.len());
    for character in id.chars() {
        if matches!(character, '%' | '?') {
            // Writing to a string cannot fail.
            let _ = write!(segment, "%{:02X}", u32::from(character));
        } else {
            segment.push(character);
        }
    }
    segment
}

/// The parser's own words may quote what it found, and an answer is full of keys: only the place
/// is told.
fn parse(body: &[u8]) -> Result<ScopeResponse, ScopeError> {
    serde_json::from_slice(body).map_err(|error| {
        let (kind, line, column) = (error.classify(), error.line(), error.column());
        ScopeError::Malformed(format!("{kind:?} error at line {line} column {column}"))
    })
}

/// What an error body says, at most a line of it.
fn error_text(body: &[u8]) -> String {
    let text = serde_json::from_slice::<ErrorBody>(body).map_or_else(
        |_| String::from_utf8_lossy(body).into_owned(),
        |body| body.error_message,
    );
    text.chars()
        .filter(|character| !character.is_control())
        .take(200)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_the_path() {
        assert_eq!(path_segment("edge1"), "edge1");
        assert_eq!(path_segment("a$b@c=d"), "a$b@c=d");
        assert_eq!(path_segment("50%?"), "50%25%3F");
    }

    #[test]
    fn error_texts_are_short_and_on_one_line() {
        assert_eq!(
            error_text(br#"{"ErrorMessage":"no such device"}"#),
            "no such device"
        );
        assert_eq!(error_text(b"<html>\r\n"), "<html>");
        assert_eq!(error_text(&[b'x'; 1000]).len(), 200);
    }

    #[test]
    fn a_page_that_is_no_page_is_told_without_its_contents() {
        let body =
            br#"{"devices":[{"deviceId":"d","authentication":{"symmetricKey":"c2VjcmV0"}}]}"#;
        let error = parse(body).unwrap_err();
        assert!(matches!(error, ScopeError::Malformed(_)));
        let text = format!("{error} {error:?}");
        assert!(!text.contains("c2VjcmV0"), "{text}");
        assert!(text.contains("line 1 column"), "{text}");
    }

    #[test]
    fn which_statuses_are_worth_a_retry() {
        let status = |status| ScopeError::Status {
            status,
            message: String::new(),
        };
        for code in [400, 401, 403, 404, 405, 406] {
            assert!(!status(code).is_retryable(), "{code}");
        }
        for code in [408, 429, 500, 502, 503, 504] {
            assert!(status(code).is_retryable(), "{code}");
        }
    }
}

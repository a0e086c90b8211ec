//! IoT Hub's error answers (spec/upstream.md B7, B9).

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde_json::json;

use super::with_status;
use crate::authorize::Refusal;
use crate::clock::utc_text;
use crate::identity::NameError;
use crate::ids::uuid;
use crate::methods::MethodError;
use crate::query::QueryError;
use crate::registry::RegistryError;
use crate::twin::TwinError;

/// A refusal with the status and the error name that IoT Hub uses.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    name: &'static str,
    pub(super) text: String,
    /// The number of an error whose message is JSON: those of direct methods.
    code: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, name: &'static str, text: impl Into<String>) -> Self {
        Self {
            status,
            name,
            text: text.into(),
            code: None,
        }
    }

    pub(super) fn bad_request(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "ArgumentInvalid", text)
    }

    pub(super) fn api_version() -> Self {
        let text = "the query has no api-version of a known form";
        Self::new(StatusCode::BAD_REQUEST, "InvalidProtocolVersion", text)
    }

    pub(super) fn unauthorized(text: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "IotHubUnauthorizedAccess", text)
    }

    pub(super) fn too_large() -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "RequestEntityTooLarge",
            "the body is too large",
        )
    }

    pub(super) fn not_supported() -> Self {
        let text = "the emulator has no such call";
        Self::new(StatusCode::NOT_IMPLEMENTED, "NotImplemented", text)
    }

    pub(super) fn internal(error: &impl ToString) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "ServerError",
            error.to_string(),
        )
    }

    /// A failure that a test ordered.
    pub(super) fn ordered(code: u16) -> Self {
        let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let name = match code {
            400 => "ArgumentInvalid",
            401 => "IotHubUnauthorizedAccess",
            403 => "IotHubQuotaExceeded",
            404 => "DeviceNotFound",
            412 => "PreconditionFailed",
            413 => "MessageTooLarge",
            429 => "ThrottlingException",
            503 => "ServiceUnavailable",
            504 => "GatewayTimeout",
            _ => "ServerError",
        };
        Self::new(status, name, "made to fail through the control API")
    }

    pub(super) fn into_response(self, now_ms: u64) -> Response<Full<Bytes>> {
        let message = match self.code {
            None => format!("ErrorCode:{};{}", self.name, self.text),
            Some(code) => json!({
                "errorCode": code,
                "trackingId": uuid(),
                "message": self.text,
                "timestampUtc": utc_text(now_ms),
            })
            .to_string(),
        };
        let body = json!({
            "Message": message,
            "ExceptionMessage": format!("Tracking ID:emulator-TimeStamp:{}", utc_text(now_ms)),
        });
        let mut response = with_status(self.status, body.to_string().into());
        let headers = response.headers_mut();
        let name = HeaderName::from_static("iothub-errorcode");
        headers.insert(name, HeaderValue::from_static(self.name));
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::unauthorized(refusal.to_string())
    }
}

impl From<NameError> for ApiError {
    fn from(error: NameError) -> Self {
        Self::bad_request(error.to_string())
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> Self {
        let (code, name) = error.code();
        // The number begins with the status.
        let status = u16::try_from(code / 1_000).ok();
        let status = status.and_then(|status| StatusCode::from_u16(status).ok());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self::new(status, name, error.to_string())
    }
}

impl From<QueryError> for ApiError {
    fn from(error: QueryError) -> Self {
        Self::bad_request(error.to_string())
    }
}

impl From<TwinError> for ApiError {
    fn from(error: TwinError) -> Self {
        let (status, name) = match error.status() {
            400 => (StatusCode::BAD_REQUEST, "ArgumentInvalid"),
            412 => (StatusCode::PRECONDITION_FAILED, "PreconditionFailed"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "ServerError"),
        };
        Self::new(status, name, error.to_string())
    }
}

impl From<MethodError> for ApiError {
    fn from(error: MethodError) -> Self {
        let (status, name, code) = match &error {
            MethodError::BadAnswer => (StatusCode::BAD_GATEWAY, "BadDeviceResponse", 502_001),
            MethodError::NoAnswer => (StatusCode::GATEWAY_TIMEOUT, "GatewayTimeout", 504_101),
            MethodError::NotOnline => (StatusCode::NOT_FOUND, "DeviceNotOnline", 404_103),
            MethodError::TooMany => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                (status, "ThrottlingException", 429_001)
            }
        };
        Self {
            code: Some(code),
            ..Self::new(status, name, error.to_string())
        }
    }
}

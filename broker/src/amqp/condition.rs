//! What peers are told, by cause (spec/amqp.md 4.1, 11; spec/upstream.md B9).

use edgehub_amqp::performative::ErrorInfo;
use edgehub_auth::authenticator::AuthnError;

use super::limits::ECHO_BYTES_MAX;
use crate::hub::ConnectError;

pub(super) const DETACH_FORCED: &str = "amqp:link:detach-forced";
pub(super) const INTERNAL_ERROR: &str = "amqp:internal-error";
pub(super) const INVALID_FIELD: &str = "amqp:invalid-field";
pub(super) const MESSAGE_SIZE: &str = "amqp:link:message-size-exceeded";
pub(super) const NOT_ALLOWED: &str = "amqp:not-allowed";
pub(super) const NOT_IMPLEMENTED: &str = "amqp:not-implemented";
pub(super) const RESOURCE_LIMIT: &str = "amqp:resource-limit-exceeded";
pub(super) const STOLEN: &str = "amqp:link:stolen";
/// What SDKs take for "try again": Node as service unavailable, C# as a time-out.
pub(super) const TIMEOUT: &str = "com.microsoft:timeout";
pub(super) const UNAUTHORIZED: &str = "amqp:unauthorized-access";

/// An error of a link or connection.
pub(super) fn error(condition: &'static str, text: impl Into<String>) -> ErrorInfo {
    ErrorInfo::new(condition, text)
}

/// An error of a delivery: the reference writes the text as a JSON string (spec/amqp.md 4.1).
pub(super) fn rejection(condition: &'static str, text: &str) -> ErrorInfo {
    let quoted = serde_json::Value::from(text).to_string();
    ErrorInfo::new(condition, quoted)
}

/// Why a credential does not count.
pub(super) fn refused(refusal: &AuthnError) -> ErrorInfo {
    let condition = if refusal.is_definite() {
        UNAUTHORIZED
    } else {
        TIMEOUT
    };
    // With the short name under which docs/errors.md explains it.
    error(condition, format!("{refusal} ({})", refusal.reason()))
}

/// Why an identity may not connect.
pub(super) fn not_connected(refusal: &ConnectError) -> ErrorInfo {
    match refusal {
        ConnectError::Refused(refusal) => refused(refusal),
        ConnectError::Full(full) => error(RESOURCE_LIMIT, full.to_string()),
    }
}

/// The beginning of a text of the peer's, for an error or the log.
pub(super) fn excerpt(text: &str) -> &str {
    let mut end = text.len().min(ECHO_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

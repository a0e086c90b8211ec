//! AMQP error conditions of IoT Hub (spec/upstream.md B9).

use edgehub_amqp::performative::ErrorInfo;

use crate::authorize::Refusal;
use crate::faults::Failure;

pub(super) const ARGUMENT: &str = "com.microsoft:argument-error";
pub(super) const DETACH_FORCED: &str = "amqp:link:detach-forced";
pub(super) const INTERNAL: &str = "amqp:internal-error";
pub(super) const MESSAGE_SIZE: &str = "amqp:link:message-size-exceeded";
pub(super) const NOT_ALLOWED: &str = "amqp:not-allowed";
pub(super) const NOT_FOUND: &str = "amqp:not-found";
pub(super) const RESOURCE_LIMIT: &str = "amqp:resource-limit-exceeded";
pub(super) const STOLEN: &str = "amqp:link:stolen";
pub(super) const UNAUTHORIZED: &str = "amqp:unauthorized-access";

/// What an identity or service that is not admitted gets.
pub(super) fn refused(refusal: &Refusal) -> ErrorInfo {
    let condition = match refusal {
        Refusal::Unknown(_) => NOT_FOUND,
        _ => UNAUTHORIZED,
    };
    ErrorInfo::new(condition, refusal.to_string())
}

/// The `status-code` of a put-token that is not taken.
pub(super) fn token_status(refusal: &Refusal) -> i32 {
    match refusal {
        Refusal::Token(_) => 400,
        Refusal::Unknown(_) => 404,
        _ => 401,
    }
}

/// What a test ordered.
pub(super) fn ordered(failure: &Failure) -> ErrorInfo {
    let text = "made to fail through the control API";
    ErrorInfo::new(failure.condition().to_owned(), text)
}

//! The error table of AMQP: what follows from the condition of a rejected delivery, a refused or
//! detached link, an ended session, and from the status of a put-token (spec/upstream.md A6, A14,
//! B9; spec/amqp.md 4.1).
//!
//! | class | conditions | a delivery | a link or session |
//! |---|---|---|---|
//! | refused | `amqp:unauthorized-access`, `amqp:not-found` | session ends, scope is asked | the same |
//! | throttled | `…device-container-throttled`, `amqp:resource-limit-exceeded`, `…quota-exceeded`, `…server-busy` | waits, then again | session ends, lane backs off |
//! | too large | `amqp:link:message-size-exceeded` | split; alone: dropped | the same for the delivery under way |
//! | poison | `…argument-error`, `…argument-out-of-range`, `amqp:not-allowed`, `amqp:invalid-field`, `amqp:decode-error` | split; alone: dropped | while opening as refused, else ends |
//! | away | `…iot-hub-not-found-error`, `…iot-hub-suspended` | the connection ends | the same |
//! | transient | all others | waits, then again | session ends, lane backs off |

use edgehub_amqp::performative::ErrorInfo;

use super::client::Reason;
use crate::lanes::{CloseCause, DropReason};

/// What an error of the upstream is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The hub itself: it fails over, or is suspended.
    Away,
    /// The message: it will never be taken.
    Poison,
    /// The identity or its credential.
    Refused,
    /// Asks for patience.
    Throttled,
    /// The message: it is too large.
    TooLarge,
    /// Anything else: worth another try.
    Transient,
}

/// The table. No error at all is transient.
pub(super) fn class(error: Option<&ErrorInfo>) -> Class {
    let Some(error) = error else {
        return Class::Transient;
    };
    let condition: &str = &error.condition;
    match condition {
        "amqp:unauthorized-access" | "amqp:not-found" => Class::Refused,
        "amqp:link:message-size-exceeded" => Class::TooLarge,
        "amqp:resource-limit-exceeded" => Class::Throttled,
        "amqp:not-allowed" | "amqp:invalid-field" | "amqp:decode-error" => Class::Poison,
        _ => match condition.strip_prefix("com.microsoft:") {
            Some("device-container-throttled" | "quota-exceeded" | "server-busy") => {
                Class::Throttled
            }
            Some("argument-error" | "argument-out-of-range") => Class::Poison,
            Some("iot-hub-not-found-error" | "iot-hub-suspended") => Class::Away,
            _ => Class::Transient,
        },
    }
}

impl Class {
    /// Value of a metric's label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Poison => "poison",
            Self::Refused => "refused",
            Self::Throttled => "throttled",
            Self::TooLarge => "too_large",
            Self::Transient => "transient",
        }
    }

    /// The rule under which a message that is sent alone is given up.
    pub(super) fn drop_reason(self) -> Option<DropReason> {
        match self {
            Self::Poison => Some(DropReason::Rejected),
            Self::TooLarge => Some(DropReason::TooLarge),
            Self::Away | Self::Refused | Self::Throttled | Self::Transient => None,
        }
    }
}

/// Why an identity's session is over whose link was refused before it was open. The reference's hub
/// says `amqp:not-allowed` where a token is missing or wrong (spec/amqp.md 2.4).
pub(super) fn refusal(what: &str, error: Option<&ErrorInfo>) -> CloseCause {
    let text = format!("{what}{}", Reason(error)).into();
    match class(error) {
        Class::Refused | Class::Poison => CloseCause::Refused(text),
        Class::Away | Class::Throttled | Class::TooLarge | Class::Transient => {
            CloseCause::Busy(text)
        }
    }
}

/// Why an identity's session is over that was open.
pub(super) fn loss(what: &str, error: Option<&ErrorInfo>) -> CloseCause {
    let text = format!("{what}{}", Reason(error)).into();
    match class(error) {
        Class::Refused => CloseCause::Refused(text),
        Class::Throttled | Class::Away => CloseCause::Busy(text),
        Class::Poison | Class::TooLarge | Class::Transient => CloseCause::Detached(text),
    }
}

/// What the status of a put-token means; none when the token was taken.
pub(super) fn token_refusal(status: i32, description: &str) -> Option<CloseCause> {
    let text: String = description.chars().take(200).collect();
    let text = format!("put-token: status {status} {text}").into();
    match status {
        200..=299 => None,
        400 | 401 | 404 => Some(CloseCause::Refused(text)),
        _ => Some(CloseCause::Busy(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(condition: &'static str) -> ErrorInfo {
        ErrorInfo::new(condition, "text\nof the peer")
    }

    #[test]
    fn every_row() {
        for (condition, expected) in [
            ("amqp:unauthorized-access", Class::Refused),
            ("amqp:not-found", Class::Refused),
            ("com.microsoft:device-container-throttled", Class::Throttled),
            ("amqp:resource-limit-exceeded", Class::Throttled),
            ("com.microsoft:quota-exceeded", Class::Throttled),
            ("com.microsoft:server-busy", Class::Throttled),
            ("amqp:link:message-size-exceeded", Class::TooLarge),
            ("com.microsoft:argument-error", Class::Poison),
            ("com.microsoft:argument-out-of-range", Class::Poison),
            ("amqp:not-allowed", Class::Poison),
            ("amqp:invalid-field", Class::Poison),
            ("amqp:decode-error", Class::Poison),
            ("com.microsoft:iot-hub-not-found-error", Class::Away),
            ("com.microsoft:iot-hub-suspended", Class::Away),
            ("amqp:internal-error", Class::Transient),
            ("amqp:link:stolen", Class::Transient),
            ("amqp:link:detach-forced", Class::Transient),
            ("amqp:connection:forced", Class::Transient),
            ("com.microsoft:timeout", Class::Transient),
            ("com.microsoft:message-lock-lost", Class::Transient),
            ("unheard:of", Class::Transient),
            ("", Class::Transient),
        ] {
            assert_eq!(class(Some(&error(condition))), expected, "{condition}");
        }
        assert_eq!(class(None), Class::Transient);
    }

    #[test]
    fn only_what_is_about_the_message_drops_it() {
        use Class::{Away, Poison, Refused, Throttled, TooLarge, Transient};
        assert_eq!(Poison.drop_reason(), Some(DropReason::Rejected));
        assert_eq!(TooLarge.drop_reason(), Some(DropReason::TooLarge));
        for class in [Away, Refused, Throttled, Transient] {
            assert_eq!(class.drop_reason(), None);
        }
    }

    #[test]
    fn a_parent_of_the_reference_refuses_links_as_not_allowed() {
        let cause = refusal("telemetry link", Some(&error("amqp:not-allowed")));
        assert!(matches!(cause, CloseCause::Refused(_)), "{cause}");
        assert!(!cause.to_string().contains('\n'));
        let cause = loss("telemetry link", Some(&error("amqp:not-allowed")));
        assert!(matches!(cause, CloseCause::Detached(_)), "{cause}");
        let cause = loss("telemetry link", Some(&error("amqp:unauthorized-access")));
        assert!(matches!(cause, CloseCause::Refused(_)), "{cause}");
        let cause = refusal("session", None);
        assert!(matches!(cause, CloseCause::Busy(_)), "{cause}");
    }

    #[test]
    fn statuses_of_tokens() {
        assert_eq!(token_refusal(200, "OK"), None);
        assert_eq!(token_refusal(202, ""), None);
        for status in [400, 401, 404] {
            let cause = token_refusal(status, "no");
            assert!(matches!(cause, Some(CloseCause::Refused(_))), "{status}");
        }
        for status in [0, 403, 429, 500, 503] {
            let cause = token_refusal(status, "later");
            assert!(matches!(cause, Some(CloseCause::Busy(_))), "{status}");
        }
    }
}

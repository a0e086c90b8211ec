//! Twin requests and method answers of a client.
//!
//! The answer to a twin request goes into the turn's replies: it leaves in the order of the
//! requests, and after the change is in the journal.

use mqttbytes::QoS;
use mqttbytes::v4::Publish;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::CloseReason;
use super::codec::CodecError;
use super::handler::Handler;
use super::iothub_topic::IotHubTopic;
use super::session::Turn;
use crate::counters::Counter;
use crate::faults::FaultKind;
use crate::ids::uuid;
use crate::sessions::Feature;
use crate::twin::{Object, TwinError};

/// Handles a request.
///
/// # Errors
/// The connection has to end. A request that is merely wrong is answered with its error.
pub(super) fn handle(
    handler: &Handler<'_>,
    topic: &IotHubTopic<'_>,
    body: &[u8],
    turn: &mut Turn,
) -> Result<(), CloseReason> {
    let identity = handler.session.identity();
    match topic {
        IotHubTopic::MethodAnswer { status, rid } => {
            handler.count(Counter::MethodResponses);
            handler.hub.methods.answer(identity, rid, *status, body);
            Ok(())
        }
        IotHubTopic::TwinGet { rid } => {
            handler.count(Counter::TwinGets);
            let answer = match ordered_failure(handler) {
                Some(failure) => failure,
                None => Answer {
                    status: 200,
                    version: None,
                    body: Some(handler.hub.twins.get(identity).for_device()),
                },
            };
            reply(handler, rid, &answer, turn)
        }
        IotHubTopic::TwinPatch { rid, version } => {
            handler.count(Counter::TwinPatches);
            if rid.is_none() && handler.session.is_strict() {
                return Err(CloseReason::Unexpected("a reported patch without $rid"));
            }
            let answer = match ordered_failure(handler) {
                Some(failure) => failure,
                None => report(handler, *version, body)?,
            };
            rid.map_or(Ok(()), |rid| reply(handler, rid, &answer, turn))
        }
    }
}

/// What a twin request is answered with.
struct Answer {
    status: u16,
    version: Option<u64>,
    body: Option<Value>,
}

fn report(handler: &Handler<'_>, wanted: Option<u64>, body: &[u8]) -> Result<Answer, CloseReason> {
    let Ok(patch) = serde_json::from_slice::<Object>(body) else {
        return Ok(failure(handler, 400, "the patch is no JSON object"));
    };
    let (hub, identity) = (handler.hub, handler.session.identity());
    match hub.twins.report(
        identity,
        handler.actor.fence,
        &patch,
        wanted,
        handler.now_ms,
    ) {
        Ok(version) => Ok(Answer {
            status: 204,
            version: Some(version),
            body: None,
        }),
        Err(TwinError::Fenced) => Err(CloseReason::Closed),
        Err(error) => {
            info!(client = %identity, %error, "reported patch refused");
            Ok(failure(handler, error.status(), &error.to_string()))
        }
    }
}

/// A failure that a test ordered.
fn ordered_failure(handler: &Handler<'_>) -> Option<Answer> {
    let who = handler.session.identity();
    let ordered = handler.hub.faults.take(FaultKind::Twin, Some(who))?;
    Some(failure(
        handler,
        ordered.code,
        "made to fail through the control API",
    ))
}

/// The error body that Node reads its `errorCode` from (spec/mqtt.md 5.1).
fn failure(handler: &Handler<'_>, status: u16, message: &str) -> Answer {
    let detail = match status {
        400 => 4,
        _ => 1,
    };
    Answer {
        status,
        version: None,
        body: Some(json!({
            "errorCode": u32::from(status) * 1_000 + detail,
            "trackingId": uuid(),
            "message": message,
            "timestampUtc": handler.now_utc,
        })),
    }
}

/// At QoS 0, as all `$iothub` traffic, and only to who is subscribed.
fn reply(
    handler: &Handler<'_>,
    rid: &str,
    answer: &Answer,
    turn: &mut Turn,
) -> Result<(), CloseReason> {
    let identity = handler.session.identity();
    let sessions = &handler.hub.sessions;
    if sessions.granted(identity, Feature::TwinResponses).is_none() {
        warn!(client = %identity, "no answer: $iothub/twin/res/# is not subscribed");
        return Ok(());
    }
    let mut topic = format!("$iothub/twin/res/{}/?$rid={rid}", answer.status);
    if let Some(version) = answer.version {
        topic.push_str(&format!("&$version={version}"));
    }
    let body = answer.body.as_ref().map(Value::to_string);
    let publish = Publish::new(topic, QoS::AtMostOnce, body.unwrap_or_default());
    publish
        .write(&mut turn.replies)
        .map_err(CodecError::Packet)?;
    Ok(())
}

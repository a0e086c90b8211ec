//! Direct methods: calls of the service side that wait for a device's answer (spec/upstream.md
//! B7).
//!
//! A call is sent once, to the connection that is subscribed at that moment; if that connection
//! ends, the answer may still come over the next one, until the time is over. Its times are those
//! of the machine, not of the hub's clock.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::counters::Counter;
use crate::hub::Hub;
use crate::identity::Identity;
use crate::ids::uuid;
use crate::limits::{METHOD_NAME_CHARS_MAX, METHOD_PAYLOAD_BYTES_MAX, METHODS_MAX};
use crate::sessions::{Feature, Push};

/// What a caller wants.
#[derive(Debug, Clone)]
pub(crate) struct MethodCall {
    pub(crate) name: String,
    /// JSON; `null` when the caller gave none.
    pub(crate) payload: Value,
    pub(crate) connect_time: Duration,
    pub(crate) response_time: Duration,
}

/// What the device answered.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MethodAnswer {
    pub(crate) status: i32,
    pub(crate) payload: Value,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MethodError {
    #[error("Timed out waiting for device to connect.")]
    NotOnline,
    #[error("Timed out waiting for the response from device.")]
    NoAnswer,
    #[error("The response of the device is not JSON of at most {METHOD_PAYLOAD_BYTES_MAX} bytes.")]
    BadAnswer,
    #[error("Too many calls wait for an answer.")]
    TooMany,
}

/// Whether a method can have this name: it is one level of a topic.
pub(crate) fn is_method_name(name: &str) -> bool {
    let fits = |c: char| !c.is_control() && c != '/';
    (1..=METHOD_NAME_CHARS_MAX).contains(&name.chars().count()) && name.chars().all(fits)
}

struct Pending {
    identity: Identity,
    answer: oneshot::Sender<Result<MethodAnswer, MethodError>>,
}

/// The calls that wait for an answer, by request id.
#[derive(Default)]
pub(crate) struct Methods {
    pending: Mutex<HashMap<String, Pending>>,
}

/// Takes a call out of the table when its caller does not wait any more.
struct Waiting<'a> {
    methods: &'a Methods,
    rid: String,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.methods.pending.lock().remove(&self.rid);
    }
}

impl Methods {
    /// A device's answer. One that nobody waits for is ignored; so is one from somebody else.
    pub(crate) fn answer(&self, identity: &Identity, rid: &str, status: i32, body: &[u8]) {
        let mut pending = self.pending.lock();
        if pending
            .get(rid)
            .is_none_or(|pending| pending.identity != *identity)
        {
            return;
        }
        if let Some(pending) = pending.remove(rid) {
            // The caller may just have gone.
            let _ = pending.answer.send(read_answer(status, body));
        }
    }

    fn enter(
        &self,
        identity: &Identity,
        answer: oneshot::Sender<Result<MethodAnswer, MethodError>>,
    ) -> Result<Waiting<'_>, MethodError> {
        let mut pending = self.pending.lock();
        if pending.len() >= METHODS_MAX {
            return Err(MethodError::TooMany);
        }
        let rid = uuid();
        let identity = identity.clone();
        pending.insert(rid.clone(), Pending { identity, answer });
        Ok(Waiting { methods: self, rid })
    }
}

/// Sends a call as soon as the target is connected and subscribed, and waits for its answer.
///
/// # Errors
/// One of the two times is over, or the answer is none.
///
/// # Cancel safety
/// A dropped call is forgotten; the device may have got it.
pub(crate) async fn invoke(
    hub: &Hub,
    identity: &Identity,
    call: &MethodCall,
) -> Result<MethodAnswer, MethodError> {
    let (answer, answered) = oneshot::channel();
    let waiting = hub.methods.enter(identity, answer)?;
    let push = Push::Method {
        rid: waiting.rid.clone(),
        name: call.name.clone(),
        payload: call.payload.to_string(),
    };
    let deadline = Instant::now() + call.connect_time;
    let mut changed = hub.sessions.watch();
    loop {
        changed.mark_unchanged();
        if hub.sessions.push(identity, Feature::Methods, &push) {
            break;
        }
        let change = timeout_at(deadline, changed.changed()).await;
        if !matches!(change, Ok(Ok(()))) {
            return Err(MethodError::NotOnline);
        }
    }
    hub.counters.add(identity, Counter::MethodRequests);
    match timeout(call.response_time, answered).await {
        Ok(Ok(answer)) => answer,
        _ => Err(MethodError::NoAnswer),
    }
}

fn read_answer(status: i32, body: &[u8]) -> Result<MethodAnswer, MethodError> {
    if body.len() > METHOD_PAYLOAD_BYTES_MAX {
        return Err(MethodError::BadAnswer);
    }
    let payload = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(body).map_err(|_| MethodError::BadAnswer)?
    };
    Ok(MethodAnswer { status, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_level_of_a_topic() {
        assert!(is_method_name("reboot") && is_method_name("a b?c"));
        for bad in ["", "a/b", "a\nb", &"x".repeat(101)] {
            assert!(!is_method_name(bad), "{bad}");
        }
    }

    #[test]
    fn answers_count_for_their_target_and_once() {
        let methods = Methods::default();
        let leaf = Identity::parse("leaf1").unwrap();
        let (sender, mut answered) = oneshot::channel();
        let waiting = methods.enter(&leaf, sender).unwrap();
        let other = Identity::parse("leaf2").unwrap();
        methods.answer(&other, &waiting.rid, 200, b"1");
        methods.answer(&leaf, "unknown", 200, b"2");
        assert!(answered.try_recv().is_err());
        methods.answer(&leaf, &waiting.rid, -3, b"");
        methods.answer(&leaf, &waiting.rid, 200, b"4");
        let answer = answered.try_recv().unwrap().unwrap();
        assert_eq!((answer.status, answer.payload), (-3, Value::Null));
        drop(waiting);
        assert!(methods.pending.lock().is_empty());
        assert_eq!(read_answer(200, b"no json"), Err(MethodError::BadAnswer));
        let long = format!("\"{}\"", "x".repeat(METHOD_PAYLOAD_BYTES_MAX));
        assert_eq!(
            read_answer(200, long.as_bytes()),
            Err(MethodError::BadAnswer)
        );
    }

    #[test]
    fn a_dropped_call_leaves_no_trace_and_calls_are_bounded() {
        let methods = Methods::default();
        let leaf = Identity::parse("leaf1").unwrap();
        let mut calls: Vec<_> = (0..METHODS_MAX)
            .map(|_| methods.enter(&leaf, oneshot::channel().0).unwrap())
            .collect();
        let refused = methods.enter(&leaf, oneshot::channel().0).err();
        assert_eq!(refused, Some(MethodError::TooMany));
        calls.pop();
        assert!(methods.enter(&leaf, oneshot::channel().0).is_ok());
    }
}

//! Twin requests of one session: correlation by request id, and what an answer means.
//!
//! Requests wait until the server has granted the subscription to their answers. What is sent and
//! not answered is forgotten after its deadline, when its asker has gone (spec/upstream.md A7).

use std::{collections::HashMap, collections::VecDeque, time::Instant};

use bytes::Bytes;
use edgehub_proto::hub::UpstreamError;
use serde::Deserialize;

use crate::{
    lanes::RequestId,
    transport::{TwinAnswer, TwinAsk, TwinRequest},
};

/// What became of a request.
pub(super) type Outcome = (RequestId, Result<TwinAnswer, UpstreamError>);

#[derive(Clone, Copy, Debug)]
struct Sent {
    is_get: bool,
    deadline: Instant,
}

/// A request in the form in which it is published.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) request: RequestId,
    pub(super) topic: String,
    pub(super) payload: Bytes,
}

/// The requests of one session.
#[derive(Debug, Default)]
pub(super) struct Requests {
    waiting: VecDeque<TwinRequest>,
    sent: HashMap<RequestId, Sent>,
}

impl Requests {
    pub(super) fn push(&mut self, requests: Vec<TwinRequest>) {
        self.waiting.extend(requests);
    }

    /// The next request to publish, for which an answer is awaited from then on.
    pub(super) fn send(&mut self, now: Instant) -> Option<Outgoing> {
        self.sent.retain(|_, sent| now < sent.deadline);
        loop {
            let TwinRequest {
                request,
                ask,
                deadline,
            } = self.waiting.pop_front()?;
            if deadline <= now {
                continue;
            }
            let is_get = ask == TwinAsk::Get;
            self.sent.insert(request, Sent { is_get, deadline });
            let id = request.0;
            let (topic, payload) = match ask {
                TwinAsk::Get => (format!("$iothub/twin/GET/?$rid={id}"), Bytes::new()),
                TwinAsk::Report(patch) => {
                    let topic = format!("$iothub/twin/PATCH/properties/reported/?$rid={id}");
                    (topic, patch)
                }
            };
            return Some(Outgoing {
                request,
                topic,
                payload,
            });
        }
    }

    /// The request could not be sent.
    pub(super) fn forget(&mut self, request: RequestId) {
        self.sent.remove(&request);
    }

    /// Requests that wait for their subscription: it will not come.
    pub(super) fn take_waiting(&mut self) -> impl Iterator<Item = RequestId> {
        std::mem::take(&mut self.waiting)
            .into_iter()
            .map(|request| request.request)
    }

    /// Whether an answer is awaited at `now`.
    pub(super) fn awaits_answers(&self, now: Instant) -> bool {
        self.sent.values().any(|sent| now < sent.deadline)
    }

    /// An answer came. None if it is to nothing that is awaited.
    pub(super) fn answer(
        &mut self,
        request_id: &str,
        status: Option<u16>,
        version: Option<u64>,
        body: Bytes,
    ) -> Option<Outcome> {
        let request = RequestId(request_id.parse().ok()?);
        // Only our own spelling of the number is our id.
        if request.0.to_string() != request_id {
            return None;
        }
        let sent = self.sent.remove(&request)?;
        Some((request, outcome(sent.is_get, status, version, body)))
    }
}

/// The body of an error.
#[derive(Deserialize)]
struct ErrorBody {
    #[serde(rename = "errorCode")]
    error_code: u32,
}

/// What an answer means. The code in an error's body says more than the status, and counts also
/// beside a status of success, as SDKs take it (spec/mqtt.md 5.1).
fn outcome(
    is_get: bool,
    status: Option<u16>,
    version: Option<u64>,
    body: Bytes,
) -> Result<TwinAnswer, UpstreamError> {
    let unavailable = |text: String| Err(UpstreamError::Unavailable(text));
    match error_status(&body).or(status) {
        None => unavailable("the answer has no status".to_owned()),
        Some(200..=299) if is_get && body.is_empty() => {
            unavailable("the answer has no twin".to_owned())
        }
        Some(200..=299) if is_get => Ok(TwinAnswer {
            body,
            version: None,
        }),
        Some(200..=299) => Ok(TwinAnswer {
            body: Bytes::new(),
            version,
        }),
        Some(status @ (429 | 503)) => Err(UpstreamError::Busy { status }),
        Some(status @ 400..=499) => Err(UpstreamError::Refused { status }),
        Some(status) => unavailable(format!("status {status}")),
    }
}

/// The status that an error's body states: the first three digits of its six-digit code.
fn error_status(body: &[u8]) -> Option<u16> {
    const KEY: &[u8] = b"errorCode";
    // Twins are large and errors are rare: only what may be one is parsed.
    if !body.windows(KEY.len()).any(|window| window == KEY) {
        return None;
    }
    let error: ErrorBody = serde_json::from_slice(body).ok()?;
    let status = match error.error_code {
        code @ 100_000..=999_999 => code / 1000,
        code => code,
    };
    u16::try_from(status)
        .ok()
        .filter(|status| (400..=599).contains(status))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn now() -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn request(id: u64, ask: TwinAsk, deadline: Instant) -> TwinRequest {
        TwinRequest {
            request: RequestId(id),
            ask,
            deadline,
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn requests_are_published_in_order_and_answers_find_theirs() {
        let now = now();
        let mut requests = Requests::default();
        let patch = Bytes::from_static(br#"{"a":1}"#);
        requests.push(vec![
            request(7, TwinAsk::Get, now + SECOND),
            request(8, TwinAsk::Get, now),
            request(9, TwinAsk::Report(patch.clone()), now + SECOND),
        ]);
        let first = requests.send(now).unwrap();
        assert_eq!(first.topic, "$iothub/twin/GET/?$rid=7");
        assert!(first.payload.is_empty());
        let second = requests.send(now).unwrap();
        assert_eq!(
            (second.topic.as_str(), second.payload),
            ("$iothub/twin/PATCH/properties/reported/?$rid=9", patch)
        );
        assert_eq!(
            requests.send(now),
            None,
            "the one in the middle is too late"
        );
        let twin = Bytes::from_static(b"{}");
        let version = Some(3);
        let patched = requests
            .answer("9", Some(204), version, Bytes::new())
            .unwrap();
        let answer = TwinAnswer {
            body: Bytes::new(),
            version,
        };
        assert_eq!(patched, (RequestId(9), Ok(answer)));
        let fetched = requests.answer("7", Some(200), None, twin.clone()).unwrap();
        let answer = TwinAnswer {
            body: twin.clone(),
            version: None,
        };
        assert_eq!(fetched, (RequestId(7), Ok(answer)));
        assert_eq!(requests.answer("7", Some(200), None, twin), None, "once");
    }

    #[test]
    fn wrong_and_late_ids_are_nobodys() {
        let begin = now();
        let mut requests = Requests::default();
        requests.push(vec![request(7, TwinAsk::Get, begin + SECOND)]);
        requests.send(begin).unwrap();
        for id in ["", "8", "07", "+7", "7 ", "x", "99999999999999999999999"] {
            let answer = requests.answer(id, Some(200), None, Bytes::from_static(b"{}"));
            assert_eq!(answer, None, "{id}");
        }
        assert!(requests.awaits_answers(begin));
        assert!(!requests.awaits_answers(begin + SECOND));
        assert_eq!(requests.send(begin + SECOND), None);
        assert!(requests.sent.is_empty(), "forgotten with its deadline");
    }

    #[test]
    fn every_kind_of_answer() {
        let busy = |status| Err(UpstreamError::Busy { status });
        let refused = |status| Err(UpstreamError::Refused { status });
        let unavailable = |text: &str| Err(UpstreamError::Unavailable(text.to_owned()));
        for (status, body, expected) in [
            (Some(429), "", busy(429)),
            (Some(503), "", busy(503)),
            (Some(400), "", refused(400)),
            (Some(412), "{}", refused(412)),
            (Some(500), "", unavailable("status 500")),
            (Some(504), "", unavailable("status 504")),
            (Some(302), "", unavailable("status 302")),
            (None, "{}", unavailable("the answer has no status")),
            (Some(200), "", unavailable("the answer has no twin")),
            (Some(200), r#"{"errorCode":404001}"#, refused(404)),
            (
                Some(200),
                r#"{"errorCode":429001,"message":"x"}"#,
                busy(429),
            ),
            (Some(400), r#"{"errorCode":503003}"#, busy(503)),
            (None, r#"{"errorCode":500}"#, unavailable("status 500")),
            (Some(400), r#"{"errorCode":"404001"}"#, refused(400)),
        ] {
            let body = Bytes::from_static(body.as_bytes());
            let answer = outcome(true, status, None, body.clone());
            assert_eq!(answer, expected, "{status:?} {body:?}");
        }
        let innocent = r#"{"desired":{"errorCode":404001,"$version":1},"reported":{}}"#;
        let body = Bytes::from_static(innocent.as_bytes());
        let answer = TwinAnswer {
            body: body.clone(),
            version: None,
        };
        assert_eq!(outcome(true, Some(200), None, body), Ok(answer));
        let answer = TwinAnswer {
            body: Bytes::new(),
            version: None,
        };
        assert_eq!(outcome(false, Some(204), None, Bytes::new()), Ok(answer));
    }
}

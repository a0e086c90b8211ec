//! Put-token: how identities of a connection present their tokens (spec/amqp.md 3, design.md D7).

use std::collections::VecDeque;

use bytes::Bytes;
use edgehub_amqp::cbs::{PutToken, cbs_response};
use edgehub_amqp::connection::{Connection, LinkId, Outgoing, Received};
use edgehub_amqp::message::MessageId;
use edgehub_auth::authenticator::{AuthnError, Claim, Credential, Principal};
use edgehub_proto::identity::Identity;
use edgehub_proto::sas::{self, SasToken};

use super::limits::CBS_ANSWERS_MAX;
use super::tokens::Standing;

/// Types of tokens that are taken, whatever their case.
const TOKEN_TYPES: [&str; 2] = [
    "servicebus.windows.net:sastoken",
    "azure-devices.net:sastoken",
];

/// A request whose token is judged.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) received: Received,
    /// Whom the token is made out to.
    pub(super) owner: Identity,
    /// What the token itself says.
    expires_at_ms: u64,
    message_id: Option<MessageId>,
    reply_to: Option<String>,
}

/// The links of the node of tokens, and answers that wait for credit.
#[derive(Debug, Default)]
pub(super) struct Cbs {
    /// Links that answers go out on, with the address that the peer has for them.
    answers: Vec<(LinkId, Option<String>)>,
    waiting: VecDeque<(Option<String>, Bytes)>,
    next_tag: u32,
}

/// An answer to a put-token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: i32,
    pub(super) text: String,
}

impl Answer {
    pub(super) fn ok() -> Self {
        Self::new(200, "OK")
    }

    pub(super) fn new(status: i32, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }
}

/// What a put-token asks for.
pub(super) enum Asked {
    /// To judge a token.
    Judge(Request, String, Claim),
    /// Nothing that can be done.
    Answered(Received, Option<MessageId>, Option<String>, Answer),
}

/// Reads a request. The identity comes from the token alone, not from the name (spec/amqp.md 3).
/// `is_known` says whether an identity is in the scope.
pub(super) fn read(
    received: Received,
    payload: &Bytes,
    is_known: impl Fn(&Identity) -> bool,
) -> Asked {
    let put = match PutToken::parse(payload) {
        Ok(put) => put,
        Err((message_id, error)) => {
            let answer = Answer::new(400, error.to_string());
            return Asked::Answered(received, message_id, None, answer);
        }
    };
    let text = put.token.expose().clone();
    let known = |kind: &&str| put.token_type.eq_ignore_ascii_case(kind);
    let judged = if TOKEN_TYPES.iter().any(known) {
        owner(&text, is_known)
    } else {
        Err("the type of the token is not known".to_owned())
    };
    match judged {
        Err(why) => {
            let answer = Answer::new(400, why);
            Asked::Answered(received, put.message_id, put.reply_to, answer)
        }
        Ok((owner, expires_at_ms)) => {
            let claim = Claim {
                identity: owner.clone(),
                chain: None,
                credential: Credential::Sas(text.clone()),
            };
            let request = Request {
                received,
                owner,
                expires_at_ms,
                message_id: put.message_id,
                reply_to: put.reply_to,
            };
            Asked::Judge(request, text, claim)
        }
    }
}

/// Whom a token is made out to, and until when. How often its audience was encoded is the client's
/// secret, and a percent sign is a letter of ids: of the readings the first counts that is known,
/// else the last.
fn owner(text: &str, is_known: impl Fn(&Identity) -> bool) -> Result<(Identity, u64), String> {
    let token = SasToken::parse(text).map_err(|error| error.to_string())?;
    let readings: Vec<Identity> = sas::audiences(token.resource_raw())
        .filter_map(|audience| match &audience.module_id {
            Some(module) => Identity::module(&audience.device_id, module).ok(),
            None => Identity::device(&audience.device_id).ok(),
        })
        .collect();
    let known = readings.iter().find(|identity| is_known(identity));
    let identity = known.or_else(|| readings.last()).cloned();
    let identity = identity.ok_or("the audience of the token is no device or module")?;
    Ok((identity, token.expires_at_ms()))
}

impl Request {
    /// What the verdict means: how far the token counts, or the answer that says why not. A token
    /// that cannot be judged now is taken; the attach decides (design.md D7).
    pub(super) fn concluded(
        &self,
        verdict: Result<&Principal, &AuthnError>,
    ) -> Result<Standing, Answer> {
        match verdict {
            Ok(principal) => Ok(Standing {
                expires_at_ms: principal.expires_at_ms().unwrap_or(u64::MAX),
                verified: true,
            }),
            Err(AuthnError::MalformedToken { .. }) => {
                Err(Answer::new(400, "the token cannot be read"))
            }
            Err(error) if error.is_definite() => {
                Err(Answer::new(401, format!("{error} ({})", error.reason())))
            }
            Err(_) => Ok(Standing {
                expires_at_ms: self.expires_at_ms,
                verified: false,
            }),
        }
    }
}

impl Cbs {
    /// A link on which the peer takes answers.
    pub(super) fn attached(&mut self, link: LinkId, address: Option<&str>) {
        self.answers.push((link, address.map(str::to_owned)));
    }

    /// A link is gone.
    pub(super) fn detached(&mut self, link: LinkId) {
        self.answers.retain(|(known, _)| *known != link);
    }

    /// Answers a request.
    pub(super) fn answer(&mut self, request: Request, answer: &Answer) {
        self.say(request.message_id.as_ref(), request.reply_to, answer);
    }

    /// Puts an answer into the queue.
    pub(super) fn say(
        &mut self,
        message_id: Option<&MessageId>,
        reply_to: Option<String>,
        answer: &Answer,
    ) {
        if self.waiting.len() < CBS_ANSWERS_MAX {
            let payload = cbs_response(message_id, answer.status, &answer.text);
            self.waiting.push_back((reply_to, payload));
        }
    }

    /// Sends what there is credit for.
    pub(super) fn pump(&mut self, engine: &mut Connection) {
        while let Some((reply_to, payload)) = self.waiting.front() {
            // By the address that the request names; clients with one link name it as they like.
            let named = self
                .answers
                .iter()
                .rev()
                .find(|(_, address)| reply_to.is_some() && address == reply_to);
            let Some((link, _)) = named.or_else(|| self.answers.last()) else {
                // Nobody can be answered; whoever attaches later has not asked.
                self.waiting.clear();
                return;
            };
            let tag = self.next_tag.to_le_bytes();
            let delivery = Outgoing {
                tag: &tag,
                message_format: 0,
                settled: true,
                payload: payload.clone(),
            };
            if engine.send(*link, delivery).is_err() {
                return;
            }
            self.next_tag = self.next_tag.wrapping_add(1);
            self.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_found_however_often_the_audience_is_encoded() {
        let token =
            |resource: &str| format!("SharedAccessSignature sr={resource}&sig=x&se=1900000000");
        let known = |wanted: &'static str| move |identity: &Identity| identity.as_str() == wanted;
        for (resource, wanted) in [
            (
                "h%2Fdevices%2Fedge2%2Fmodules%2F%2524edgeHub",
                "edge2/$edgeHub",
            ),
            (
                "h%2Fdevices%2Fedge2%2Fmodules%2F%252524edgeHub",
                "edge2/$edgeHub",
            ),
            ("h%2Fdevices%2Fleaf1", "leaf1"),
            ("h/devices/leaf1", "leaf1"),
            ("h%2Fdevices%2Fa%252541", "a%41"),
        ] {
            let (owner, expires_at_ms) = owner(&token(resource), known(wanted)).unwrap();
            assert_eq!(
                (owner.as_str(), expires_at_ms),
                (wanted, 1_900_000_000_000),
                "{resource}"
            );
        }
        // Unknown ones are read as far as they go.
        let (unknown, _) = owner(&token("h%2Fdevices%2Fe%2Fmodules%2F%2524edgeHub"), |_| {
            false
        })
        .unwrap();
        assert_eq!(unknown.as_str(), "e/$edgeHub");
        assert!(owner(&token("h"), |_| false).is_err());
        assert!(owner("nonsense", |_| false).is_err());
    }
}

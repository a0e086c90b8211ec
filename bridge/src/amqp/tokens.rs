//! The `$cbs` node of one connection: put-tokens, pipelined, and whose answer is whose.
//!
//! The token is always our own hub's; each identity has it put under its own name, because IoT Hub
//! admits a link only for a name that has a token, and a parent looks for the one of the chain's
//! last element (spec/upstream.md A3.4, spec/amqp.md 3).

use std::{
    collections::{HashMap, VecDeque},
    fmt::Write as _,
    time::{Duration, Instant},
};

use bytes::Bytes;
use edgehub_amqp::{
    message::{MessageId, MessageView, MessageWriter, Properties},
    value::Value,
};
use edgehub_proto::{identity::Identity, sas};

use super::client::{Client, LinkKey};
use crate::{lanes::SessionId, limits};

/// Whose token it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Holder {
    /// Our own hub, which acts for all others.
    Actor,
    /// An identity's session.
    Member(SessionId),
}

/// The answer to a put-token.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TokenAnswer {
    pub(super) holder: Holder,
    pub(super) status: i32,
    pub(super) description: String,
    /// When the token that was put expires, Unix milliseconds.
    pub(super) expires_at_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Put {
    holder: Holder,
    expires_at_ms: u64,
    deadline: Instant,
}

/// A token and when it expires, Unix milliseconds.
pub(super) struct Token {
    pub(super) text: String,
    pub(super) expires_at_ms: u64,
}

/// Put-tokens of one connection.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    sender: Option<LinkKey>,
    waiting: VecDeque<(Holder, String)>,
    /// By message id.
    under_way: HashMap<u64, Put>,
    next_id: u64,
}

impl Tokens {
    /// The link for requests is there.
    pub(super) fn attached(&mut self, sender: LinkKey) {
        self.sender = Some(sender);
    }

    /// A token is to be put under a name.
    pub(super) fn put(&mut self, holder: Holder, name: String) {
        self.waiting.push_back((holder, name));
    }

    /// Nobody waits for an answer any more.
    pub(super) fn forget(&mut self, holder: Holder) {
        self.waiting.retain(|(one, _)| *one != holder);
        self.under_way.retain(|_, put| put.holder != holder);
    }

    /// Sends what can be sent.
    pub(super) fn send(
        &mut self,
        client: &mut Client,
        token: impl Fn() -> Token,
        now: Instant,
        timeout: Duration,
    ) {
        let Some(sender) = self.sender else { return };
        while self.under_way.len() < limits::AMQP_TOKENS_UNDER_WAY_MAX && client.can_send(sender) {
            let Some((holder, name)) = self.waiting.pop_front() else {
                return;
            };
            let Token {
                text,
                expires_at_ms,
            } = token();
            let id = self.next_id;
            self.next_id += 1;
            let request = request(id, &name, &text, expires_at_ms);
            if client.send(sender, 0, request).is_ok() {
                let deadline = now + timeout;
                self.under_way.insert(
                    id,
                    Put {
                        holder,
                        expires_at_ms,
                        deadline,
                    },
                );
            }
        }
    }

    /// Takes an answer; none if it is to nothing that is awaited.
    pub(super) fn answered(&mut self, payload: &Bytes) -> Option<TokenAnswer> {
        let view = MessageView::parse(payload).ok()?;
        let correlation = view.properties?.correlation_id?.to_string();
        let id: u64 = correlation.parse().ok()?;
        let put = self.under_way.remove(&id)?;
        let application = view.application_properties.unwrap_or_default();
        let status = application
            .get_str("status-code")
            .and_then(|status| status.as_i64())
            .and_then(|status| i32::try_from(status).ok());
        let description = application
            .get_str("status-description")
            .and_then(|text| text.as_str())
            .unwrap_or_default();
        Some(TokenAnswer {
            holder: put.holder,
            status: status.unwrap_or(0),
            description: description.to_owned(),
            expires_at_ms: put.expires_at_ms,
        })
    }

    /// When the first answer is overdue.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.under_way.values().map(|put| put.deadline).min()
    }

    /// Those whose answer is overdue; they are not awaited any more.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<Holder> {
        let mut overdue = Vec::new();
        self.under_way.retain(|_, put| {
            let is_overdue = now >= put.deadline;
            if is_overdue {
                overdue.push(put.holder);
            }
            !is_overdue
        });
        overdue
    }
}

/// The name under which an identity's token is put.
pub(super) fn name(host: &str, identity: &Identity) -> String {
    let mut name = format!(
        "{host}/devices/{}",
        sas::encode_resource(identity.device_id())
    );
    if let Some(module) = identity.module_id() {
        let _ = write!(name, "/modules/{}", sas::encode_resource(module));
    }
    name
}

fn request(id: u64, name: &str, token: &str, expires_at_ms: u64) -> Bytes {
    let mut writer = MessageWriter::new();
    writer.properties(&Properties {
        message_id: Some(MessageId::Str(id.to_string().into())),
        to: Some("$cbs"),
        reply_to: Some("cbs"),
        ..Properties::default()
    });
    let expiration = i64::try_from(expires_at_ms).unwrap_or(i64::MAX);
    writer.application_properties([
        ("operation", Value::Str("put-token")),
        ("type", Value::Str("azure-devices.net:sastoken")),
        ("name", Value::Str(name)),
        ("expiration", Value::Timestamp(expiration)),
    ]);
    writer.value(Value::Str(token));
    writer.finish()
}

#[cfg(test)]
mod tests {
    use edgehub_amqp::cbs::{PutToken, cbs_response};

    use super::*;
    use crate::test_support::id;

    #[test]
    fn names_are_those_of_the_reference() {
        assert_eq!(
            name("parent", &id("leaf:1")),
            "parent/devices/leaf%3A1",
            "spec/upstream.md A3.4"
        );
        assert_eq!(
            name("h.azure-devices.net", &id("edge/$edgeHub")),
            "h.azure-devices.net/devices/edge/modules/%24edgeHub"
        );
    }

    #[test]
    fn a_request_is_what_a_cbs_node_reads() {
        let bytes = request(7, "h/devices/d", "SharedAccessSignature sr=x", 1000);
        let read = PutToken::parse(&bytes).unwrap();
        assert_eq!(read.message_id, Some(MessageId::Str("7".into())));
        assert_eq!(read.token_type, "azure-devices.net:sastoken");
        assert_eq!(read.name, "h/devices/d");
        assert_eq!(read.token.expose(), "SharedAccessSignature sr=x");
        assert_eq!(read.expiration, Some(1000));
    }

    #[test]
    fn answers_find_their_holder_once() {
        let now = tokio::time::Instant::now().into_std();
        let mut tokens = Tokens::default();
        let put = Put {
            holder: Holder::Actor,
            expires_at_ms: 5,
            deadline: now + Duration::from_secs(1),
        };
        tokens.under_way.insert(3, put);
        let answer = cbs_response(Some(&MessageId::Str("3".into())), 401, "no");
        let stranger = cbs_response(Some(&MessageId::Str("4".into())), 200, "OK");
        assert_eq!(tokens.answered(&stranger), None);
        assert_eq!(tokens.answered(&Bytes::from_static(b"junk")), None);
        let expected = TokenAnswer {
            holder: Holder::Actor,
            status: 401,
            description: "no".to_owned(),
            expires_at_ms: 5,
        };
        assert_eq!(tokens.answered(&answer), Some(expected));
        assert_eq!(tokens.answered(&answer), None);
        tokens.under_way.insert(3, put);
        assert_eq!(tokens.next_timeout(), Some(now + Duration::from_secs(1)));
        assert_eq!(tokens.overdue(now), []);
        assert_eq!(
            tokens.overdue(now + Duration::from_secs(1)),
            [Holder::Actor]
        );
    }
}

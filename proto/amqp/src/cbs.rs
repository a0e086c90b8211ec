//! Claims-based security: a put-token request and its response, both ordinary messages of the node
//! `$cbs` (AMQP CBS draft; spec/amqp.md 3). What a token or its type means is not known here.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;

use crate::limits::{CBS_TEXT_BYTES_MAX, CBS_TOKEN_BYTES_MAX, MESSAGE_ID_BYTES_MAX};
use crate::message::{Body, MessageId, MessageView, MessageWriter, Properties};
use crate::value::{DecodeError, Map, Value};

/// Status of a request that cannot be read.
pub const STATUS_BAD_REQUEST: i32 = 400;

const PUT_TOKEN: &str = "put-token";

/// A value that Debug does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<T>(T);

impl<T> Secret<T> {
    /// Hides a value.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The value; not for logs.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A put-token request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutToken {
    /// Its id, which the response carries as its correlation-id.
    pub message_id: Option<MessageId>,
    /// Where the client would have the response.
    pub reply_to: Option<String>,
    /// Type of the token.
    pub token_type: String,
    /// What the token is for.
    pub name: String,
    /// The token.
    pub token: Secret<String>,
    /// When it expires, as the client says, milliseconds since 1970.
    pub expiration: Option<i64>,
}

/// Why a request is answered with [`STATUS_BAD_REQUEST`] and this text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CbsRequestError {
    /// Not a message.
    #[error("the request is no AMQP message: {0}")]
    Malformed(#[from] DecodeError),
    /// An application property is absent, empty or no string.
    #[error("the application property '{0}' is missing or no string")]
    Missing(&'static str),
    /// An operation other than put-token.
    #[error("the operation must be put-token")]
    Operation,
    /// The body is no token.
    #[error("the body must be the token as a string")]
    Token,
    /// More bytes than are taken.
    #[error("the {what} is longer than {limit} bytes")]
    TooLong {
        /// What is.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

impl PutToken {
    /// Reads a request. The token may be an amqp-value string or binary, or data.
    ///
    /// # Errors
    /// What is wrong, with the id to answer where there is one.
    pub fn parse(payload: &Bytes) -> Result<Self, (Option<MessageId>, CbsRequestError)> {
        let message = MessageView::parse(payload).map_err(|error| (None, error.into()))?;
        let properties = message.properties.clone().unwrap_or_default();
        let id = properties.message_id.as_ref();
        if id.is_some_and(|id| id.length() > MESSAGE_ID_BYTES_MAX) {
            let (what, limit) = ("message-id", MESSAGE_ID_BYTES_MAX);
            return Err((None, CbsRequestError::TooLong { what, limit }));
        }
        let read = Self::read(&message, &properties);
        read.map_err(|error| (properties.message_id, error))
    }

    fn read(
        message: &MessageView<'_>,
        properties: &Properties<'_>,
    ) -> Result<Self, CbsRequestError> {
        let application = message.application_properties.unwrap_or_default();
        if !text(&application, "operation")?.eq_ignore_ascii_case(PUT_TOKEN) {
            return Err(CbsRequestError::Operation);
        }
        let token_type = bounded(text(&application, "type")?, "type", CBS_TEXT_BYTES_MAX)?;
        let name = bounded(text(&application, "name")?, "name", CBS_TEXT_BYTES_MAX)?;
        let reply_to = properties.reply_to;
        let reply_to = reply_to.map(|text| bounded(text, "reply-to", CBS_TEXT_BYTES_MAX));
        let reply_to = reply_to.transpose()?;
        let token = token(&message.body)?;
        Ok(Self {
            message_id: properties.message_id.clone(),
            reply_to: reply_to.map(str::to_owned),
            token_type: token_type.to_owned(),
            name: name.to_owned(),
            token: Secret::new(bounded(&token, "token", CBS_TOKEN_BYTES_MAX)?.to_owned()),
            expiration: application
                .get_str("expiration")
                .and_then(|time| time.as_timestamp()),
        })
    }
}

fn text<'a>(properties: &Map<'a>, key: &'static str) -> Result<&'a str, CbsRequestError> {
    let value = properties.get_str(key).and_then(|value| value.as_str());
    let value = value.filter(|value| !value.trim().is_empty());
    value.ok_or(CbsRequestError::Missing(key))
}

fn bounded<'t>(
    text: &'t str,
    what: &'static str,
    limit: usize,
) -> Result<&'t str, CbsRequestError> {
    if text.len() > limit {
        return Err(CbsRequestError::TooLong { what, limit });
    }
    Ok(text)
}

fn utf8(bytes: &[u8]) -> Result<&str, CbsRequestError> {
    std::str::from_utf8(bytes).map_err(|_| CbsRequestError::Token)
}

fn token<'a>(body: &'a Body<'_>) -> Result<Cow<'a, str>, CbsRequestError> {
    let token = match body {
        Body::Value(Value::Str(token)) => Cow::Borrowed(*token),
        Body::Value(Value::Binary(token)) => Cow::Borrowed(utf8(token)?),
        Body::Data(sections) => match &sections[..] {
            [one] => Cow::Borrowed(utf8(one)?),
            many => Cow::Owned(utf8(&many.concat())?.to_owned()),
        },
        _ => return Err(CbsRequestError::Token),
    };
    if token.trim().is_empty() {
        return Err(CbsRequestError::Token);
    }
    Ok(token)
}

/// The response to a request: `correlation` is the request's id with its type, `status-code` an
/// AMQP int, the body an amqp-value null.
#[must_use]
pub fn cbs_response(correlation: Option<&MessageId>, status: i32, description: &str) -> Bytes {
    let mut message = MessageWriter::new();
    message.properties(&Properties {
        correlation_id: correlation.cloned(),
        ..Properties::default()
    });
    message.application_properties([
        ("status-code", Value::Int(status)),
        ("status-description", Value::Str(description)),
    ]);
    message.value(Value::Null);
    message.finish()
}

#[cfg(test)]
#[path = "cbs_tests.rs"]
mod tests;

//! Twin requests and methods as messages of their links (spec/amqp.md 4.5, 4.6).

use bytes::Bytes;
use edgehub_amqp::limits::MESSAGE_ID_BYTES_MAX;
use edgehub_amqp::message::{Body, MessageId, MessageView, MessageWriter, Properties};
use edgehub_amqp::value::Value;

use super::message::guid_bytes;

const METHOD_NAME: &str = "IoThub-methodname";
const METHOD_STATUS: &str = "IoThub-status";

/// What a twin request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// The twin.
    Get,
    /// A change of reported properties.
    Patch,
    /// Desired properties from now on.
    Put,
    /// No desired properties any more.
    Delete,
}

/// A twin request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TwinRequest {
    pub(super) operation: Operation,
    /// What the answer names, with its type; nothing is answered without one.
    pub(super) correlation: Option<MessageId>,
    pub(super) body: Bytes,
}

/// Reads a twin request; none when it is none, which the reference ignores too, or when its id is
/// longer than [`MESSAGE_ID_BYTES_MAX`].
pub(super) fn twin_request(payload: &Bytes) -> Option<TwinRequest> {
    let view = MessageView::parse(payload).ok()?;
    let operation = view.message_annotations?.get_symbol("operation")?;
    let operation = match operation.as_str()? {
        op if op.eq_ignore_ascii_case("GET") => Operation::Get,
        op if op.eq_ignore_ascii_case("PATCH") => Operation::Patch,
        op if op.eq_ignore_ascii_case("PUT") => Operation::Put,
        op if op.eq_ignore_ascii_case("DELETE") => Operation::Delete,
        _ => return None,
    };
    let correlation = view
        .properties
        .as_ref()
        .and_then(|p| p.correlation_id.clone());
    // It is kept until the answer has left.
    if correlation
        .as_ref()
        .is_some_and(|id| id.length() > MESSAGE_ID_BYTES_MAX)
    {
        return None;
    }
    Some(TwinRequest {
        operation,
        correlation: correlation.filter(|id| !is_blank(id)),
        body: data(&view.body),
    })
}

fn is_blank(id: &MessageId) -> bool {
    matches!(id, MessageId::Str(text) if text.trim().is_empty())
}

/// The bytes of a body; kept longer than the block that was read, so copied.
fn data(body: &Body<'_>) -> Bytes {
    match body {
        Body::Data(sections) => Bytes::from(sections.concat()),
        Body::Value(Value::Str(text)) => Bytes::copy_from_slice(text.as_bytes()),
        Body::Value(Value::Binary(bytes)) => Bytes::copy_from_slice(bytes),
        _ => Bytes::new(),
    }
}

/// The answer to a twin request.
pub(super) fn twin_response(
    correlation: &MessageId,
    status: u16,
    version: Option<u64>,
    body: &[u8],
) -> Bytes {
    let mut writer = MessageWriter::new();
    let mut annotations = vec![("status", Value::Int(status.into()))];
    let version = version.and_then(|version| i64::try_from(version).ok());
    annotations.extend(version.map(|version| ("version", Value::Long(version))));
    writer.annotations(annotations);
    writer.properties(&Properties {
        correlation_id: Some(correlation.clone()),
        ..Properties::default()
    });
    if body.is_empty() && status >= 300 {
        // Node parses the body of every error (spec/amqp.md 4.5).
        let text = format!(r#"{{"message":"the request failed with status {status}"}}"#);
        writer.data(text.as_bytes());
    } else {
        writer.data(body);
    }
    writer.finish()
}

/// A change of desired properties: no correlation id and no status.
pub(super) fn desired(version: u64, patch: &[u8]) -> Bytes {
    let mut writer = MessageWriter::new();
    let version = i64::try_from(version).ok();
    writer.annotations(version.map(|version| ("version", Value::Long(version))));
    writer.properties(&Properties::default());
    writer.data(patch);
    writer.finish()
}

/// A call of a direct method. The C SDK takes a correlation id of type uuid alone.
pub(super) fn method_request(request_id: &str, name: &str, payload: &[u8]) -> Bytes {
    let mut writer = MessageWriter::new();
    let correlation = match guid_bytes(request_id) {
        Some(bytes) => MessageId::Uuid(bytes),
        None => MessageId::Str(request_id.into()),
    };
    writer.properties(&Properties {
        correlation_id: Some(correlation),
        ..Properties::default()
    });
    writer.application_properties([(METHOD_NAME, Value::Str(name))]);
    writer.data(payload);
    writer.finish()
}

/// The answer to a direct method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MethodResponse {
    /// Of the call, as lower-case text.
    pub(super) request_id: String,
    /// None when it is missing or no number.
    pub(super) status: Option<i32>,
    pub(super) payload: Bytes,
}

/// Reads an answer; none when it names no call.
pub(super) fn method_response(payload: &Bytes) -> Option<MethodResponse> {
    let view = MessageView::parse(payload).ok()?;
    let correlation = view.properties.as_ref()?.correlation_id.as_ref()?;
    let status = view
        .application_properties
        .and_then(|application| application.get_str(METHOD_STATUS))
        .and_then(|status| match status {
            Value::Str(text) => text.parse().ok(),
            other => other.as_i64().and_then(|number| i32::try_from(number).ok()),
        });
    Some(MethodResponse {
        request_id: correlation.to_string().to_ascii_lowercase(),
        status,
        payload: data(&view.body),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(
        annotations: &[(&str, Value<'_>)],
        correlation: Option<MessageId>,
        body: Option<&[u8]>,
    ) -> Bytes {
        let mut writer = MessageWriter::new();
        writer.annotations(annotations.iter().copied());
        writer.properties(&Properties {
            correlation_id: correlation,
            ..Properties::default()
        });
        if let Some(body) = body {
            writer.data(body);
        }
        writer.finish()
    }

    #[test]
    fn twin_requests_of_the_sdks_are_read() {
        let id = || Some(MessageId::Str("Get1".into()));
        // C# sends no body, and a version that is null; Node and C a blank.
        let get = twin_request(&request(&[("operation", Value::Str("GET"))], id(), None)).unwrap();
        assert_eq!((get.operation, get.correlation), (Operation::Get, id()));
        let patch = [
            ("operation", Value::Str("PATCH")),
            ("resource", Value::Str("/properties/reported")),
            ("version", Value::Null),
        ];
        let patch = twin_request(&request(&patch, None, Some(b"{\"a\":1}"))).unwrap();
        assert_eq!(
            (patch.operation, patch.correlation),
            (Operation::Patch, None)
        );
        assert_eq!(patch.body, "{\"a\":1}");
        let blank = Some(MessageId::Str(" ".into()));
        let put = twin_request(&request(
            &[("operation", Value::Symbol("put"))],
            blank,
            Some(b" "),
        ))
        .unwrap();
        assert_eq!((put.operation, put.correlation), (Operation::Put, None));
        assert_eq!(
            twin_request(&request(&[("operation", Value::Str("X"))], id(), None)),
            None
        );
        assert_eq!(twin_request(&request(&[], id(), None)), None);
        for (length, taken) in [
            (MESSAGE_ID_BYTES_MAX, true),
            (MESSAGE_ID_BYTES_MAX + 1, false),
        ] {
            let id = Some(MessageId::Str("x".repeat(length).into()));
            let get = request(&[("operation", Value::Str("GET"))], id, None);
            assert_eq!(twin_request(&get).is_some(), taken, "{length}");
        }
    }

    #[test]
    fn twin_responses_have_the_types_that_c_asserts() {
        let id = MessageId::Str("Get1".into());
        let bytes = twin_response(&id, 200, Some(5), b"{}");
        let view = MessageView::parse(&bytes).unwrap();
        let annotations = view.message_annotations.unwrap();
        assert_eq!(annotations.get_symbol("status"), Some(Value::Int(200)));
        assert_eq!(annotations.get_symbol("version"), Some(Value::Long(5)));
        assert_eq!(view.properties.unwrap().correlation_id, Some(id.clone()));
        let bytes = twin_response(&id, 500, None, b"");
        let view = MessageView::parse(&bytes).unwrap();
        let Body::Data(body) = &view.body else {
            panic!()
        };
        assert!(serde_json::from_slice::<serde_json::Value>(&body[0]).is_ok());
        let bytes = desired(3, b"{\"$version\":3}");
        let view = MessageView::parse(&bytes).unwrap();
        assert!(view.properties.is_none_or(|p| p.correlation_id.is_none()));
        assert!(
            view.message_annotations
                .unwrap()
                .get_symbol("status")
                .is_none()
        );
    }

    #[test]
    fn methods_go_out_with_a_uuid_and_come_back_with_either() {
        let id = "0b9c5c9e-0000-4000-8000-00000000abcd";
        let bytes = method_request(id, "reboot", b"{}");
        let view = MessageView::parse(&bytes).unwrap();
        let correlation = view.properties.unwrap().correlation_id.unwrap();
        assert!(matches!(correlation, MessageId::Uuid(_)));
        let application = view.application_properties.unwrap();
        assert_eq!(application.get_str(METHOD_NAME), Some(Value::Str("reboot")));
        for correlation in [
            correlation,
            MessageId::Str(id.to_uppercase().as_str().into()),
        ] {
            let mut writer = MessageWriter::new();
            writer.properties(&Properties {
                correlation_id: Some(correlation),
                ..Properties::default()
            });
            writer.application_properties([(METHOD_STATUS, Value::Int(200))]);
            writer.data(b"{\"ok\":true}");
            let response = method_response(&writer.finish()).unwrap();
            assert_eq!(
                (response.request_id.as_str(), response.status),
                (id, Some(200))
            );
            assert_eq!(response.payload, "{\"ok\":true}");
        }
    }
}

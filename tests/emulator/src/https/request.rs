//! One request, read whole: path segments, query, credential, body.

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, IF_MATCH};
use hyper::{HeaderMap, Method, Request};
use percent_encoding::percent_decode_str;

use super::error::ApiError;
use crate::api_version::is_api_version;
use crate::identity::is_id;
use crate::limits::REQUEST_BYTES_MAX;

/// A request whose path has only plain segments.
pub(super) struct Call {
    pub(super) method: Method,
    segments: Vec<String>,
    query: Vec<(String, String)>,
    credential: String,
    if_match: Option<String>,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Call {
    pub(super) async fn read(request: Request<Incoming>) -> Result<Self, ApiError> {
        let (head, body) = request.into_parts();
        let text = |name| {
            head.headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let segments = segments(head.uri.path())?;
        let query = head.uri.query().unwrap_or_default().split('&').map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_decode_str(value).decode_utf8_lossy();
            (name.to_owned(), value.into_owned())
        });
        let (query, credential) = (query.collect(), text(AUTHORIZATION).unwrap_or_default());
        let if_match = text(IF_MATCH);
        let body = Limited::new(body, REQUEST_BYTES_MAX)
            .collect()
            .await
            .map_err(|error| {
                if error.is::<LengthLimitError>() {
                    ApiError::too_large()
                } else {
                    ApiError::bad_request("the body could not be read")
                }
            })?;
        let body = body.to_bytes().to_vec();
        Ok(Self {
            method: head.method,
            segments,
            query,
            credential,
            if_match,
            headers: head.headers,
            body,
        })
    }

    pub(super) fn path(&self) -> Vec<&str> {
        self.segments.iter().map(String::as_str).collect()
    }

    pub(super) fn credential(&self) -> &str {
        &self.credential
    }

    pub(super) fn query(&self, name: &str) -> Option<&str> {
        self.query
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub(super) fn check_api_version(&self) -> Result<(), ApiError> {
        let version = self
            .query("api-version")
            .filter(|version| is_api_version(version));
        version.map(|_| ()).ok_or_else(ApiError::api_version)
    }

    /// None without `If-Match`; `Some(None)` for any etag: SDKs send `*` with and without quotes.
    pub(super) fn if_match(&self) -> Option<Option<&str>> {
        let etag = self.if_match.as_deref()?.trim_matches('"');
        Some(Some(etag).filter(|etag| *etag != "*"))
    }

    /// The value of a header; None when it is missing, empty or no text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let text = self.headers.get(name)?.to_str().ok()?.trim();
        Some(text).filter(|text| !text.is_empty())
    }

    pub(super) fn json<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, ApiError> {
        serde_json::from_slice(&self.body).map_err(|error| ApiError::bad_request(error.to_string()))
    }
}

/// Splits a path and decodes each segment once. Segments are ids and fixed words, which have one
/// alphabet; so dot segments, empty segments and encoded slashes, which could make a path mean
/// something else to the next reader, are refused here.
fn segments(path: &str) -> Result<Vec<String>, ApiError> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    let decoded = path.split('/').map(|segment| {
        let text = percent_decode_str(segment).decode_utf8().ok();
        text.filter(|text| is_id(text))
            .map(std::borrow::Cow::into_owned)
    });
    let segments: Option<Vec<String>> = decoded.collect();
    segments.ok_or_else(|| ApiError::bad_request("a segment of the path is no id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_and_decoded_once() {
        let path = segments("/devices/L5/modules/%24edgeHub/").unwrap();
        assert_eq!(path, ["devices", "L5", "modules", "$edgeHub"]);
        assert_eq!(segments("/devices/a%2541").unwrap(), ["devices", "a%41"]);
        for path in [
            "/devices/L5/modules/$edgeHub/../../../L4",
            "/devices/x/%2e%2e/L5",
            "/devices//L5",
            "/devices/L5%2Fmodules",
            "/devices/./L5",
            "//devices/L5",
            "/devices/L5//",
            "/devices/%ff",
            "/",
        ] {
            assert!(segments(path).is_err(), "{path}");
        }
    }
}

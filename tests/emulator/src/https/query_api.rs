//! `POST /devices/query`: the twins that a query finds, page by page.
//!
//! The order is that of the ids, and a continuation names the last identity of its page. So what
//! is created or deleted between two pages moves nothing else.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use ring::digest::{SHA256, digest};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::request::Call;
use super::twin_api::rest_twin;
use super::{Answer, with_status};
use crate::authorize::{self, Permission};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::limits::{PAGE_ITEMS_MAX, QUERY_ITEMS_DEFAULT};
use crate::query::{Query, Source};
use crate::registry::Devices;

const MAX_ITEM_COUNT: &str = "x-ms-max-item-count";
const CONTINUATION: &str = "x-ms-continuation";
const ITEM_TYPE: &str = "x-ms-item-type";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QueryRequest {
    query: String,
}

/// A part of the result.
pub(super) struct Page {
    body: Vec<u8>,
    item_type: &'static str,
    /// None on the last page: Node takes even an empty header for another page.
    continuation: Option<String>,
}

impl Page {
    pub(super) fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = with_status(StatusCode::OK, self.body.into());
        let headers = response.headers_mut();
        let item_type = HeaderValue::from_static(self.item_type);
        headers.insert(HeaderName::from_static(ITEM_TYPE), item_type);
        let continuation = self.continuation.and_then(|text| text.try_into().ok());
        if let Some(continuation) = continuation {
            headers.insert(HeaderName::from_static(CONTINUATION), continuation);
        }
        response
    }
}

pub(super) fn run(hub: &Hub, call: &Call) -> Result<Answer, ApiError> {
    authorize::service_call(
        hub,
        Permission::ServiceConnect,
        &call.path(),
        call.credential(),
    )?;
    let request: QueryRequest = call.json()?;
    let query = Query::parse(&request.query)?;
    let size = page_size(call)?;
    let after = call.header(CONTINUATION);
    let after = after.map(|link| read_link(link, &request.query));
    let after = after.transpose()?;

    let devices = hub.devices();
    let mut found = Vec::new();
    let (mut count, mut last, mut continuation) = (0_u64, None, None);
    for identity in identities(&devices, query.source()) {
        if after.as_ref().is_some_and(|after| identity <= *after) {
            continue;
        }
        let document = rest_twin(hub, &devices, &identity, &hub.twins.get(&identity))?;
        if !query.finds(&document) {
            continue;
        }
        if query.count_name().is_some() {
            count += 1;
            continue;
        }
        if found.len() == size {
            continuation = last.map(|last| write_link(&last, &request.query));
            break;
        }
        found.push(query.project(document));
        last = Some(identity);
    }
    if let Some(name) = query.count_name() {
        found.push(json!({ name: count }));
    }
    let item_type = if query.selects_all() { "Twin" } else { "Raw" };
    Ok(Answer::Page(Page {
        body: Value::Array(found).to_string().into_bytes(),
        item_type,
        continuation,
    }))
}

fn page_size(call: &Call) -> Result<usize, ApiError> {
    let Some(text) = call.header(MAX_ITEM_COUNT) else {
        return Ok(QUERY_ITEMS_DEFAULT);
    };
    let size = text.parse().ok();
    let size = size.filter(|size| (1..=PAGE_ITEMS_MAX).contains(size));
    size.ok_or_else(|| ApiError::bad_request("x-ms-max-item-count is not a number from 1 to 1000"))
}

/// Everything that the query runs over, in the order of [`Identity`].
fn identities(devices: &Devices, source: Source) -> impl Iterator<Item = Identity> {
    devices.iter().flat_map(move |device| {
        let of = |module: Option<&String>| Identity {
            device: device.id.clone(),
            module: module.cloned(),
        };
        match source {
            Source::Devices => vec![of(None)],
            Source::Modules => device.modules.keys().map(|id| of(Some(id))).collect(),
        }
    })
}

/// Says which query it belongs to and behind whom it goes on.
fn write_link(last: &Identity, query: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{};{last}", mark(query)))
}

fn read_link(link: &str, query: &str) -> Result<Identity, ApiError> {
    let bad = || ApiError::bad_request("x-ms-continuation is not one of this query");
    let text = URL_SAFE_NO_PAD.decode(link).map_err(|_| bad())?;
    let text = String::from_utf8(text).map_err(|_| bad())?;
    let last = text
        .split_once(';')
        .filter(|(of, _)| *of == mark(query))
        .map(|(_, last)| last);
    Identity::parse(last.ok_or_else(bad)?).map_err(|_| bad())
}

/// Tells queries apart.
fn mark(query: &str) -> String {
    let digest = digest(&SHA256, query.as_bytes());
    URL_SAFE_NO_PAD.encode(digest.as_ref().get(..9).unwrap_or_default())
}

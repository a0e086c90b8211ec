//! `POST /devices`: many devices created, changed or deleted at once.

use serde_json::{Value, json};

use super::Answer;
use super::error::ApiError;
use super::request::Call;
use crate::authorize::{self, Permission};
use crate::hub::Hub;
use crate::limits::BULK_ITEMS_MAX;
use crate::registry::bulk::{BulkItem, BulkOutcome};

/// Does what can be done of it. When something can not, the answer has the status 400 and says
/// what (inferred: the public documentation of the call has this body for 200 and 400).
pub(super) fn change(hub: &Hub, call: &Call) -> Result<Answer, ApiError> {
    let path = call.path();
    authorize::registry_call(
        hub,
        Permission::RegistryWrite,
        &path,
        None,
        call.credential(),
    )?;
    let items: Vec<BulkItem> = call.json()?;
    if !(1..=BULK_ITEMS_MAX).contains(&items.len()) {
        return Err(ApiError::bad_request("an array has from 1 to 100 devices"));
    }
    let outcomes = hub.change_devices(|devices, now_ms| {
        let items = items.into_iter();
        let outcomes = items.map(|item| item.carry_out(devices, now_ms));
        Ok(outcomes.collect::<Vec<_>>())
    })?;
    let errors: Vec<Value> = outcomes.iter().filter_map(error_json).collect();
    let body = json!({
        "isSuccessful": errors.is_empty(),
        "errors": errors,
        "warnings": [],
    });
    if errors.is_empty() {
        return Answer::json(&body, None);
    }
    Ok(Answer::Partial(body.to_string().into_bytes()))
}

fn error_json(outcome: &BulkOutcome) -> Option<Value> {
    let error = outcome.result.as_ref().err()?;
    let (code, name) = error.code();
    Some(json!({
        "deviceId": outcome.device,
        "moduleId": outcome.module,
        "errorCode": code,
        "errorStatus": format!("{name}: {error}"),
    }))
}

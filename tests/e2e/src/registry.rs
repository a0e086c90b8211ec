//! The service side: an administrator who changes the registry of the IoT Hub.

use edgehub_lab::{HUB, Lab};
use serde_json::Value;

use crate::https::Request;
use crate::token::Token;

/// Sets `status` (`enabled` or `disabled`) of a registered device; nothing else about it changes.
pub async fn set_status(lab: &Lab, device: &str, status: &str) {
    let path = format!("/devices/{device}?api-version=2021-04-12");
    let authorization = Token::of_owner(lab);
    let get = Request::json("GET", &path, &Value::Null).with("Authorization", &authorization);
    let answer = get.send(lab, HUB).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let mut record = answer.json();
    let members = record.as_object_mut().expect("a device");
    members.insert("status".to_owned(), Value::from(status));
    let put = Request::json("PUT", &path, &record)
        .with("Authorization", &authorization)
        .with("If-Match", "\"*\"");
    let answer = put.send(lab, HUB).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.json().get("status"), Some(&Value::from(status)));
}

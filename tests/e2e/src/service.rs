//! The service side: what an operator does to devices through the IoT Hub's REST and the
//! emulator's control API.

use std::time::Duration;

use edgehub_lab::{HUB, Lab};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::PATIENCE;
use crate::https::{Answer, Request};
use crate::token::Token;

/// How often a twin is looked at while somebody waits for a change of it.
const POLL: Duration = Duration::from_millis(50);

/// Filter under which a client's methods arrive, at every layer.
pub const METHODS: &str = "$iothub/methods/POST/#";
/// Filter under which desired patches arrive, at every layer.
pub const DESIRED: &str = "$iothub/twin/PATCH/properties/desired/#";

/// Somebody with the policy `iothubowner`.
#[derive(Debug)]
pub struct Service<'a> {
    lab: &'a Lab,
}

impl<'a> Service<'a> {
    /// Of this lab.
    #[must_use]
    pub const fn of(lab: &'a Lab) -> Self {
        Self { lab }
    }

    async fn request(&self, method: &'static str, path: &str, body: &Value) -> Answer {
        let path = format!("{path}?api-version=2021-04-12");
        Request::json(method, path, body)
            .with("Authorization", Token::of_owner(self.lab))
            .send(self.lab, HUB)
            .await
    }

    async fn must(&self, method: &'static str, path: &str, body: &Value) -> Value {
        let answer = self.request(method, path, body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text);
        answer.json()
    }

    /// The twin of `device` or `device/module`.
    pub async fn twin(&self, id: &str) -> Value {
        self.must("GET", &twin_path(id), &Value::Null).await
    }

    /// The twin as soon as it fits.
    pub async fn twin_that(&self, id: &str, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let twin = self.twin(id).await;
            if fits(&twin) {
                return twin;
            }
            assert!(Instant::now() < deadline, "{id}: no {what}: {twin}");
            sleep(POLL).await;
        }
    }

    /// Changes desired properties; their new version.
    pub async fn desire(&self, id: &str, desired: &Value) -> Value {
        let body = json!({"properties": {"desired": desired}});
        let twin = self.must("PATCH", &twin_path(id), &body).await;
        twin.pointer("/properties/desired/$version")
            .cloned()
            .unwrap_or_else(|| panic!("{id}: a twin without a version: {twin}"))
    }

    /// Calls a direct method, which may wait `connect_secs` until its target is there: what the
    /// target answered, or the status of the IoT Hub and its error code.
    ///
    /// # Errors
    /// Status and error code.
    pub async fn call(
        &self,
        id: &str,
        name: &str,
        payload: &Value,
        connect_secs: u64,
        response_secs: u64,
    ) -> Result<Value, (u16, Value)> {
        let body = json!({
            "methodName": name,
            "payload": payload,
            "connectTimeoutInSeconds": connect_secs,
            "responseTimeoutInSeconds": response_secs,
        });
        let path = format!("{}/methods", twin_path(id));
        let answer = self.request("POST", &path, &body).await;
        if answer.status == 200 {
            return Ok(answer.json());
        }
        // The error of a method is JSON in a text in JSON.
        let error = answer.json();
        let message = error.get("Message").and_then(Value::as_str);
        let inner: Option<Value> = message.and_then(|text| serde_json::from_str(text).ok());
        let code = inner.and_then(|inner| inner.get("errorCode").cloned());
        Err((answer.status, code.unwrap_or(error)))
    }

    /// Queues a message for a device; its number.
    pub async fn send(&self, device: &str, message: &Value) -> u64 {
        let path = format!("/c2d/{device}");
        let answer = self.control("POST", &path, Some(message)).await;
        let number = answer.get("sequence").and_then(Value::as_u64);
        number.unwrap_or_else(|| panic!("{device}: {answer}"))
    }

    /// What became of a message to a device; waits until something has.
    pub async fn outcome(&self, device: &str, number: u64) -> Value {
        let millis = PATIENCE.as_millis();
        let path = format!("/c2d/{device}/wait?sequence={number}&timeout_ms={millis}");
        let outcome = self.control("GET", &path, None).await;
        let outcome = outcome.get("outcome").cloned();
        outcome.unwrap_or_else(|| panic!("{device}: message {number} is never settled"))
    }

    /// Waits until the IoT Hub has a subscription of this client: its own, or what its hub holds
    /// on its behalf.
    pub async fn subscribed(&self, id: &str, filter: &str) {
        let (id_text, filter_text) = (percent(id), percent(filter));
        let millis = PATIENCE.as_millis();
        let path =
            format!("/sessions/wait?client_id={id_text}&filter={filter_text}&timeout_ms={millis}");
        let answer = self.control("GET", &path, None).await;
        if answer != json!({"reached": true}) {
            let sessions = self.control("GET", "/sessions", None).await;
            panic!("{id}: no subscription to {filter} at the IoT Hub: {sessions}");
        }
    }

    /// What the IoT Hub was asked since the last [`Self::forget_counters`].
    pub async fn counter(&self, name: &str) -> u64 {
        let counters = self.control("GET", "/counters", None).await;
        let count = counters.get(name).and_then(Value::as_u64);
        count.unwrap_or_else(|| panic!("no counter {name}: {counters}"))
    }

    /// All counters are 0.
    pub async fn forget_counters(&self) {
        self.control("DELETE", "/counters", None).await;
    }

    async fn control(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let answer = self.lab.control(method, path, body).await;
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error:#}"))
    }
}

fn percent(text: &str) -> String {
    edgehub_lab::sas::encode(text)
}

fn twin_path(id: &str) -> String {
    match id.split_once('/') {
        Some((device, module)) => format!("/twins/{device}/modules/{module}"),
        None => format!("/twins/{id}"),
    }
}

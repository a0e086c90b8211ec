//! The `clients` section of what `$edgeHub` reports (spec/core.md 8.4, spec/upstream.md A8).
//!
//! Pure: connects and disconnects come in, one patch for all that changed goes out, so that a storm
//! of reconnects is a few patches and not thousands.

use std::collections::{BTreeMap, BTreeSet};

use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::sync::Notify;

/// Clients that are reported at once. A twin holds 32 KiB; the hub serves more clients than fit.
pub const CLIENTS_REPORTED_MAX: usize = 200;

/// What was reported and what is to be.
#[derive(Debug, Default)]
pub struct ClientReport {
    reported: BTreeSet<String>,
    changes: BTreeMap<String, Value>,
    /// The first patch wipes what an earlier run of the hub left.
    begun: bool,
}

impl ClientReport {
    /// A client connected at `now_ms`, Unix milliseconds.
    pub fn connected(&mut self, client: &Identity, now_ms: u64) {
        let key = key(client);
        if !self.admit(&key) {
            return;
        }
        let status = json!({ "status": "Connected", "lastConnectedTimeUtc": utc(now_ms) });
        self.changes.insert(key, status);
    }

    /// A client's connection ended at `now_ms`. A module stays, as disconnected; a leaf goes.
    pub fn disconnected(&mut self, client: &Identity, now_ms: u64) {
        let key = key(client);
        if !self.reported.contains(&key) {
            return;
        }
        if client.module_id().is_none() {
            self.reported.remove(&key);
            self.changes.insert(key, Value::Null);
            return;
        }
        let mut status = json!({
            "status": "Disconnected", "lastDisconnectedTimeUtc": utc(now_ms) });
        // A connect that was not reported yet must not be lost in this one patch.
        let since = self
            .changes
            .get(&key)
            .and_then(|change| change.get("lastConnectedTimeUtc"))
            .cloned();
        if let (Some(since), Some(status)) = (since, status.as_object_mut()) {
            status.insert("lastConnectedTimeUtc".to_owned(), since);
        }
        self.changes.insert(key, status);
    }

    /// What is to be reported now as `clients`: null once at the beginning, then the changes.
    pub fn take(&mut self) -> Option<Value> {
        if !std::mem::replace(&mut self.begun, true) {
            return Some(Value::Null);
        }
        if self.changes.is_empty() {
            return None;
        }
        let changes: Map<String, Value> = std::mem::take(&mut self.changes).into_iter().collect();
        Some(Value::Object(changes))
    }

    /// What [`ClientReport::take`] gave could not be reported: it is to be given again, under what
    /// changed since.
    pub fn put_back(&mut self, taken: Value) {
        match taken {
            Value::Object(taken) => {
                for (key, status) in taken {
                    self.changes.entry(key).or_insert(status);
                }
            }
            _ => self.begun = false,
        }
    }

    /// Whether [`ClientReport::take`] has something.
    #[must_use]
    pub fn is_due(&self) -> bool {
        !self.begun || !self.changes.is_empty()
    }

    fn admit(&mut self, key: &str) -> bool {
        if self.reported.len() >= CLIENTS_REPORTED_MAX && !self.reported.contains(key) {
            return false;
        }
        self.reported.insert(key.to_owned());
        true
    }
}

/// The report of connected clients, shared: the hub tells, and the hub's own twin reports.
#[derive(Debug, Default)]
pub struct Presence {
    report: Mutex<ClientReport>,
    changed: Notify,
}

impl Presence {
    /// A client connected at `now_ms`, Unix milliseconds.
    pub fn connected(&self, client: &Identity, now_ms: u64) {
        self.report.lock().connected(client, now_ms);
        self.changed.notify_one();
    }

    /// A client's connection ended, and no newer one took its place.
    pub fn disconnected(&self, client: &Identity, now_ms: u64) {
        self.report.lock().disconnected(client, now_ms);
        self.changed.notify_one();
    }

    /// Waits until something changed since it was last waited for.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// See [`ClientReport::is_due`].
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.report.lock().is_due()
    }

    /// See [`ClientReport::take`].
    pub fn take(&self) -> Option<Value> {
        self.report.lock().take()
    }

    /// See [`ClientReport::put_back`].
    pub fn put_back(&self, taken: Value) {
        self.report.lock().put_back(taken);
    }
}

/// An id as a property name: without the characters that twins do not allow there.
fn key(client: &Identity) -> String {
    let mut key = String::with_capacity(client.as_str().len());
    for character in client.as_str().chars() {
        match character {
            '.' => key.push_str("%2E"),
            '$' => key.push_str("%24"),
            ' ' => key.push_str("%20"),
            '#' => key.push_str("%23"),
            other => key.push(other),
        }
    }
    key
}

/// Unix milliseconds in .NET's round-trip form, seven digits of a second.
#[must_use]
pub fn utc(unix_ms: u64) -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:7]Z");
    let nanos = i128::from(unix_ms) * 1_000_000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .ok()
        .and_then(|at| at.format(&format).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 1_714_557_600_000;
    const AT_TEXT: &str = "2024-05-01T10:00:00.0000000Z";

    fn id(text: &str) -> Identity {
        Identity::parse(text).unwrap()
    }

    #[test]
    fn a_run_begins_by_wiping_and_then_reports_changes_once() {
        let mut report = ClientReport::default();
        report.connected(&id("leaf1"), AT);
        report.connected(&id("edge1/mod.A"), AT);
        report.connected(&id("edge2/$edgeHub"), AT);
        assert_eq!(report.take(), Some(Value::Null));
        let connected = json!({ "status": "Connected", "lastConnectedTimeUtc": AT_TEXT });
        assert_eq!(
            report.take(),
            Some(json!({
                "leaf1": connected, "edge1/mod%2EA": connected, "edge2/%24edgeHub": connected }))
        );
        assert!(!report.is_due());
        assert_eq!(report.take(), None);
    }

    #[test]
    fn a_module_stays_as_disconnected_and_a_leaf_goes() {
        let mut report = ClientReport::default();
        report.take();
        for client in ["leaf1", "e/m"] {
            report.connected(&id(client), AT);
        }
        report.take();
        for client in ["leaf1", "e/m", "never"] {
            report.disconnected(&id(client), AT);
        }
        assert_eq!(
            report.take(),
            Some(json!({
                "leaf1": null,
                "e/m": { "status": "Disconnected", "lastDisconnectedTimeUtc": AT_TEXT } }))
        );
        report.connected(&id("e/m"), AT);
        report.disconnected(&id("e/m"), AT + 1000);
        let both = report.take().unwrap();
        assert_eq!(
            both.pointer("/e~1m/lastConnectedTimeUtc"),
            Some(&json!(AT_TEXT))
        );
        assert_eq!(both.pointer("/e~1m/status"), Some(&json!("Disconnected")));
    }

    #[test]
    fn what_could_not_be_reported_is_reported_later_under_what_is_newer() {
        let mut report = ClientReport::default();
        let wipe = report.take().unwrap();
        report.put_back(wipe);
        assert_eq!(report.take(), Some(Value::Null));
        report.connected(&id("leaf1"), AT);
        report.connected(&id("leaf2"), AT);
        let both = report.take().unwrap();
        report.disconnected(&id("leaf1"), AT);
        report.put_back(both.clone());
        assert_eq!(
            report.take(),
            Some(json!({ "leaf1": null, "leaf2": both["leaf2"] }))
        );
    }

    #[test]
    fn no_more_clients_are_reported_than_a_twin_holds() {
        let mut report = ClientReport::default();
        report.take();
        for number in 0..CLIENTS_REPORTED_MAX + 50 {
            report.connected(&id(&format!("leaf{number}")), AT);
        }
        let patch = report.take().unwrap();
        assert_eq!(patch.as_object().unwrap().len(), CLIENTS_REPORTED_MAX);
        assert!(patch.to_string().len() < 32_768);
        report.disconnected(&id("leaf0"), AT);
        report.connected(&id("leaf999"), AT);
        assert_eq!(report.take().unwrap().as_object().unwrap().len(), 2);
    }
}

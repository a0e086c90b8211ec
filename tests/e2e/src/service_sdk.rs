//! Microsoft's service SDK and Event Hubs SDK as the service side (`sdk/node/service.js`): what an
//! operator's program does, unmodified. [`crate::service`] does the same without an SDK.

use std::time::Duration;

use edgehub_lab::{HUB, Lab};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::PATIENCE;
use crate::agent::Agent;

/// What the service SDK speaks for messages; its registry, twins and methods are always HTTPS, and
/// the Event Hubs SDK always speaks AMQP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// AMQP on 5671.
    Amqp,
    /// AMQP over WebSocket on 443.
    AmqpWs,
}

/// A message to a device.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// Its text.
    pub body: String,
    /// Named in the feedback.
    pub message_id: String,
    /// `none`, `positive`, `negative` or `full`; the SDK sends none when there is none.
    pub ack: Option<&'static str>,
    /// How long it lives from now on.
    pub time_to_live: Option<Duration>,
    /// Application properties.
    pub properties: Vec<(String, String)>,
}

/// A record of a feedback message (spec/upstream.md B8).
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Feedback {
    /// The message that it is about.
    pub original_message_id: String,
    /// `Success`, `Expired`, `DeliveryCountExceeded`, `Rejected` or `Purged`.
    pub status_code: String,
    /// The same in words.
    pub description: String,
    /// Whom it was sent to.
    pub device_id: String,
    /// That device's generation.
    pub device_generation_id: String,
    /// When the outcome was reached.
    pub enqueued_time_utc: String,
}

/// Where a reader of a partition starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// With the oldest.
    Earliest,
    /// With what comes from now on.
    Latest,
    /// With this sequence number, or behind it.
    Sequence {
        /// The number.
        number: u64,
        /// Whether the event of that number is read.
        inclusive: bool,
    },
    /// With what was enqueued after these milliseconds since 1970.
    EnqueuedAfter(u64),
}

/// An event that a reader got.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// What is JSON has been read by the SDK; a text is a text.
    pub body: Value,
    /// Of its partition.
    pub sequence: u64,
    /// Its place in the partition.
    pub offset: Value,
    /// Milliseconds since 1970.
    pub enqueued_ms: u64,
    /// The device.
    pub partition_key: Option<String>,
    /// Application properties.
    #[serde(default)]
    pub properties: Value,
    /// The stamps of the IoT Hub, among them.
    #[serde(default)]
    pub system: Value,
    /// The sender's message id.
    pub message_id: Option<Value>,
}

/// The two SDKs in a process of their own. Dropping it ends the process.
#[derive(Debug)]
pub struct ServiceSdk {
    agent: Agent,
}

impl ServiceSdk {
    /// Starts it with the policy `iothubowner`; nothing is connected yet.
    #[must_use]
    pub fn start(lab: &Lab, transport: Transport) -> Self {
        let folder = crate::root().join("tests/e2e/sdk/node");
        let modules = folder.join("node_modules/azure-iothub");
        assert!(
            modules.exists(),
            "no Node service SDK: run scripts/lib/sdks.sh"
        );
        let protocol = match transport {
            Transport::Amqp => "amqp",
            Transport::AmqpWs => "amqpws",
        };
        let host = &lab.host(HUB).expect("a lab has a hub").hostname;
        let key = owner_key(lab);
        let policy = format!("SharedAccessKeyName=iothubowner;SharedAccessKey={key}");
        let entity = entity_of(host);
        let mut command = Command::new("node");
        command
            .arg(folder.join("service.js"))
            .args(["--protocol", protocol])
            .env("NODE_EXTRA_CA_CERTS", lab.ca_file())
            // Not on the command line: everybody on the machine could read the key there.
            .env(
                "SERVICE_CONNECTION_STRING",
                format!("HostName={host};{policy}"),
            )
            .env(
                "EVENT_HUB_CONNECTION_STRING",
                format!("Endpoint=sb://{host}/;{policy};EntityPath={entity}"),
            );
        Self {
            agent: Agent::spawn(format!("service {protocol}"), command),
        }
    }

    /// The process, for what has no method here.
    #[must_use]
    pub const fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Creates a device, described as the SDK's documentation has it.
    ///
    /// # Errors
    /// What the SDK threw, as for all others below.
    pub async fn create_device(&self, device: &Value) -> Result<Value, String> {
        let arguments = json!({ "device": device });
        self.agent.call("create_device", arguments).await
    }

    /// A registered device.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn device(&self, id: &str) -> Result<Value, String> {
        self.agent.call("get_device", json!({ "device": id })).await
    }

    /// All devices.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn devices(&self) -> Result<Vec<Value>, String> {
        let devices = self.agent.call("list_devices", Value::Null).await?;
        Ok(devices.as_array().cloned().unwrap_or_default())
    }

    /// Changes a device, whatever its etag is.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn update_device(&self, device: &Value) -> Result<Value, String> {
        let arguments = json!({ "device": device });
        self.agent.call("update_device", arguments).await
    }

    /// Deletes a device.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn delete_device(&self, id: &str) -> Result<(), String> {
        let deleted = self.agent.call("delete_device", json!({ "device": id }));
        deleted.await.map(drop)
    }

    /// Creates many devices at once.
    ///
    /// # Errors
    /// What the SDK threw; it has what could not be done in it.
    pub async fn add_devices(&self, devices: &[Value]) -> Result<Value, String> {
        let arguments = json!({ "devices": devices });
        self.agent.call("add_devices", arguments).await
    }

    /// Changes many devices at once; `force` does not compare etags.
    ///
    /// # Errors
    /// As for [`Self::add_devices`].
    pub async fn update_devices(&self, devices: &[Value], force: bool) -> Result<Value, String> {
        let arguments = json!({ "devices": devices, "force": force });
        self.agent.call("update_devices", arguments).await
    }

    /// Deletes many devices at once; `force` does not compare etags.
    ///
    /// # Errors
    /// As for [`Self::add_devices`].
    pub async fn remove_devices(&self, devices: &[Value], force: bool) -> Result<Value, String> {
        let arguments = json!({ "devices": devices, "force": force });
        self.agent.call("remove_devices", arguments).await
    }

    /// How many devices there are: `totalDeviceCount`, `enabledDeviceCount`, …
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn statistics(&self) -> Result<Value, String> {
        self.agent.call("statistics", Value::Null).await
    }

    /// Deploys to an edge device.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn apply_configuration(&self, device: &str, content: &Value) -> Result<(), String> {
        let arguments = json!({ "device": device, "content": content });
        let applied = self.agent.call("apply_configuration", arguments);
        applied.await.map(drop)
    }

    /// Creates a module; it has `deviceId` and `moduleId`.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn add_module(&self, module: &Value) -> Result<Value, String> {
        let arguments = json!({ "module": module });
        self.agent.call("add_module", arguments).await
    }

    /// A registered `device/module`.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn module(&self, id: &str) -> Result<Value, String> {
        self.agent.call("get_module", named(id)).await
    }

    /// The modules of a device.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn modules(&self, device: &str) -> Result<Vec<Value>, String> {
        let arguments = json!({ "device": device });
        let modules = self.agent.call("list_modules", arguments).await?;
        Ok(modules.as_array().cloned().unwrap_or_default())
    }

    /// Changes a module; without `force` its etag has to match.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn update_module(&self, module: &Value, force: bool) -> Result<Value, String> {
        let arguments = json!({ "module": module, "force": force });
        self.agent.call("update_module", arguments).await
    }

    /// Deletes a module as it was got: its etag has to match.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn remove_module(&self, module: &Value) -> Result<(), String> {
        let arguments = json!({ "module": module });
        let removed = self.agent.call("remove_module", arguments);
        removed.await.map(drop)
    }

    /// The twin of `device` or `device/module`.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn twin(&self, id: &str) -> Result<Value, String> {
        self.agent.call("get_twin", named(id)).await
    }

    /// Merges into tags and desired properties; the etag is that of the twin or `*`.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn update_twin(&self, id: &str, patch: &Value, etag: &str) -> Result<Value, String> {
        let mut arguments = named(id);
        if let Some(members) = arguments.as_object_mut() {
            members.insert("patch".to_owned(), patch.clone());
            members.insert("etag".to_owned(), json!(etag));
        }
        self.agent.call("update_twin", arguments).await
    }

    /// All pages of a query's result.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn query(&self, sql: &str, page_size: usize) -> Result<Vec<Vec<Value>>, String> {
        let arguments = json!({ "sql": sql, "page_size": page_size });
        let pages = self.agent.call("query", arguments).await?;
        serde_json::from_value(pages).map_err(|error| error.to_string())
    }

    /// Calls a direct method of `device` or `device/module`: what it answered.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn invoke(
        &self,
        id: &str,
        name: &str,
        payload: &Value,
        connect_secs: u64,
        response_secs: u64,
    ) -> Result<Value, String> {
        let mut arguments = named(id);
        let request = json!({
            "methodName": name,
            "payload": payload,
            "connectTimeoutInSeconds": connect_secs,
            "responseTimeoutInSeconds": response_secs,
        });
        if let Some(members) = arguments.as_object_mut() {
            members.insert("request".to_owned(), request);
        }
        self.agent.call("invoke", arguments).await
    }

    /// Connects for messages; the SDK does so by itself when one is sent.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn open(&self) -> Result<(), String> {
        self.agent.call("open", Value::Null).await.map(drop)
    }

    /// Closes what [`Self::open`] opened.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn close(&self) -> Result<(), String> {
        self.agent.call("close", Value::Null).await.map(drop)
    }

    /// Sends a message to a device; returns when the IoT Hub has accepted it.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn send(&self, device: &str, message: &Outgoing) -> Result<(), String> {
        let properties: serde_json::Map<_, _> = message
            .properties
            .iter()
            .map(|(name, value)| (name.clone(), json!(value)))
            .collect();
        let arguments = json!({
            "device": device,
            "body": message.body,
            "message_id": message.message_id,
            "ack": message.ack,
            "ttl_ms": message.time_to_live.map(|time| time.as_millis()),
            "properties": properties,
        });
        self.agent.call("send", arguments).await.map(drop)
    }

    /// Receives feedback from now on, and settles it.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn watch_feedback(&self) -> Result<(), String> {
        let watching = self.agent.call("watch_feedback", Value::Null);
        watching.await.map(drop)
    }

    /// The feedback on this message, once it is there.
    pub async fn feedback(&self, message_id: &str) -> Feedback {
        let is_it =
            |event: &Value| event.pointer("/record/originalMessageId") == Some(&json!(message_id));
        let event = self.agent.event("feedback", is_it).await;
        let content = event.get("content_type").and_then(Value::as_str);
        assert_eq!(
            content,
            Some("application/vnd.microsoft.iothub.feedback.json"),
            "{event}"
        );
        let record = event.get("record").cloned().unwrap_or_default();
        serde_json::from_value(record).unwrap_or_else(|error| panic!("{error}: {event}"))
    }

    /// The ids of the partitions.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn partition_ids(&self) -> Result<Vec<String>, String> {
        let ids = self.agent.call("partition_ids", Value::Null).await?;
        serde_json::from_value(ids).map_err(|error| error.to_string())
    }

    /// What the IoT Hub says of a partition.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn partition(&self, id: &str) -> Result<Value, String> {
        let arguments = json!({ "partition": id });
        self.agent.call("partition", arguments).await
    }

    /// Starts a reader of a partition. What it reads is told by [`Self::next_event`].
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn read(&self, reader: &str, partition: &str, from: StartAt) -> Result<(), String> {
        let from = match from {
            StartAt::Earliest => json!({ "earliest": true }),
            StartAt::Latest => json!({ "latest": true }),
            StartAt::Sequence { number, inclusive } => {
                json!({ "sequence": number, "inclusive": inclusive })
            }
            StartAt::EnqueuedAfter(unix_ms) => json!({ "enqueued_ms": unix_ms }),
        };
        let arguments = json!({ "reader": reader, "partition": partition, "from": from });
        self.agent.call("read", arguments).await.map(drop)
    }

    /// Ends a reader.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn stop_reading(&self, reader: &str) -> Result<(), String> {
        let arguments = json!({ "reader": reader });
        self.agent.call("stop_reading", arguments).await.map(drop)
    }

    /// The next event that a reader got; waits for it.
    pub async fn next_event(&self, reader: &str) -> Event {
        let event = self.next_event_within(PATIENCE, reader).await;
        event.unwrap_or_else(|others| panic!("{reader}: no event came; what came: {others:?}"))
    }

    /// As [`Self::next_event`], for a time.
    ///
    /// # Errors
    /// Everything else that has arrived.
    pub async fn next_event_within(
        &self,
        patience: Duration,
        reader: &str,
    ) -> Result<Event, Vec<Value>> {
        let is_its = |event: &Value| event.get("reader") == Some(&json!(reader));
        let event = self
            .agent
            .event_within(patience, "telemetry", is_its)
            .await?;
        Ok(
            serde_json::from_value(event.clone())
                .unwrap_or_else(|error| panic!("{error}: {event}")),
        )
    }
}

/// The Event-Hubs-compatible name of an IoT Hub: its first label and `-events`.
#[must_use]
pub fn entity_of(hostname: &str) -> String {
    let label = hostname.split('.').next().unwrap_or(hostname);
    format!("{label}-events")
}

/// The key of the policy `iothubowner`.
fn owner_key(lab: &Lab) -> &str {
    let policies = &lab.seed().policies;
    let owner = policies.iter().find(|policy| policy.name == "iothubowner");
    owner
        .and_then(|policy| policy.key.as_deref())
        .expect("a policy with a key")
}

/// `device` or `device/module` as the arguments of a command.
fn named(id: &str) -> Value {
    match id.split_once('/') {
        Some((device, module)) => json!({ "device": device, "module": module }),
        None => json!({ "device": id }),
    }
}

//! Microsoft's SDKs as processes that do what a test tells them (`sdk/python/agent.py`,
//! `sdk/node/agent.js`).

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use edgehub_lab::Lab;
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::timeout;

use crate::PATIENCE;

/// Events that a client may be ahead of the test; then it waits.
const EVENTS_MAX: usize = 65_536;

/// Which SDK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sdk {
    /// `azure-iot-device` of npm.
    Node,
    /// `azure-iot-device` of PyPI.
    Python,
}

/// What it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// MQTT on 8883.
    Mqtt,
    /// MQTT over WebSocket on 443.
    MqttWs,
    /// AMQP on 5671. Only the Node SDK has it.
    Amqp,
    /// AMQP over WebSocket on 443. Only the Node SDK has it.
    AmqpWs,
}

/// One client, in its own process. Dropping it ends the process.
#[derive(Debug)]
pub struct Agent {
    name: String,
    stdin: Mutex<ChildStdin>,
    calls: Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>>,
    next: AtomicU64,
    events: Mutex<Events>,
    /// Ends with it.
    _child: Child,
}

#[derive(Debug)]
struct Events {
    arriving: mpsc::Receiver<Value>,
    /// Arrived, and nobody has asked for them yet.
    waiting: Vec<Value>,
}

impl Agent {
    /// Starts a client for this identity at this gateway (none: at the IoT Hub itself).
    pub fn start(
        lab: &Lab,
        sdk: Sdk,
        protocol: Protocol,
        id: &str,
        gateway: Option<&str>,
        token_ttl_secs: Option<u64>,
    ) -> Self {
        Self::start_with(lab, sdk, protocol, id, gateway, token_ttl_secs, &[])
    }

    /// As [`Agent::start`], with further options of the agent and their values.
    pub fn start_with(
        lab: &Lab,
        sdk: Sdk,
        protocol: Protocol,
        id: &str,
        gateway: Option<&str>,
        token_ttl_secs: Option<u64>,
        options: &[(&str, &str)],
    ) -> Self {
        let connection = lab
            .connection_string(id, gateway)
            .expect("a registered identity");
        let folder = crate::root().join("tests/e2e/sdk");
        let mut command = match sdk {
            Sdk::Python => {
                let python = folder.join("python/.venv/bin/python");
                assert!(python.exists(), "no Python SDK: run scripts/lib/sdks.sh");
                let mut command = Command::new(python);
                command.arg(folder.join("python/agent.py"));
                command
            }
            Sdk::Node => {
                let modules = folder.join("node/node_modules");
                assert!(modules.exists(), "no Node SDK: run scripts/lib/sdks.sh");
                let mut command = Command::new("node");
                command.arg(folder.join("node/agent.js"));
                command
            }
        };
        let protocol = match protocol {
            Protocol::Mqtt => "mqtt",
            Protocol::MqttWs => "mqttws",
            Protocol::Amqp => "amqp",
            Protocol::AmqpWs => "amqpws",
        };
        command
            .arg("--ca")
            .arg(lab.ca_file())
            .args(["--protocol", protocol]);
        if let Some(seconds) = token_ttl_secs {
            command.args(["--token-ttl", &seconds.to_string()]);
        }
        for (option, value) in options {
            command.args([option, value]);
        }
        let name = format!("{sdk:?} {protocol} {id}");
        // Not on the command line: everybody on the machine could read the key there.
        command.env("CONNECTION_STRING", connection.to_string());
        Self::spawn(name, command)
    }

    /// Starts a process that speaks the protocol of the agents.
    pub(crate) fn spawn(name: String, mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let stdin = child.stdin.take().expect("a pipe");
        let stdout = child.stdout.take().expect("a pipe");
        let calls = Arc::new(Mutex::new(HashMap::<u64, oneshot::Sender<Value>>::new()));
        let (events, arriving) = mpsc::channel(EVENTS_MAX);
        let answered = Arc::clone(&calls);
        let reader = name.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let line: Value = serde_json::from_str(&line)
                    .unwrap_or_else(|error| panic!("{reader}: {error}: {line}"));
                match line.get("id").and_then(Value::as_u64) {
                    Some(id) => {
                        if let Some(call) = answered.lock().await.remove(&id) {
                            let _ = call.send(line);
                        }
                    }
                    None => drop(events.send(line).await),
                }
            }
        });
        Self {
            name,
            stdin: Mutex::new(stdin),
            calls,
            next: AtomicU64::new(1),
            events: Mutex::new(Events {
                arriving,
                waiting: Vec::new(),
            }),
            _child: child,
        }
    }

    /// Who it is, for messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Has a command done, and gives its result, or what the SDK said instead.
    ///
    /// # Errors
    /// What the SDK threw.
    pub async fn call(&self, what: &str, arguments: Value) -> Result<Value, String> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut command: Map<String, Value> = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        command.insert("id".to_owned(), json!(id));
        command.insert("do".to_owned(), json!(what));
        let (call, answer) = oneshot::channel();
        self.calls.lock().await.insert(id, call);
        let line = format!("{}\n", Value::Object(command));
        self.stdin
            .lock()
            .await
            .write_all(line.as_bytes())
            .await
            .unwrap_or_else(|error| panic!("{}: {what}: {error}", self.name));
        let answer = timeout(2 * PATIENCE, answer)
            .await
            .unwrap_or_else(|_| panic!("{}: {what} was never answered", self.name))
            .unwrap_or_else(|_| panic!("{} ended during {what}", self.name));
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer.get("ok").cloned().unwrap_or(Value::Null)),
        }
    }

    /// As [`Agent::call`], for what must succeed.
    pub async fn must(&self, what: &str, arguments: Value) -> Value {
        self.call(what, arguments)
            .await
            .unwrap_or_else(|error| panic!("{}: {what}: {error}", self.name))
    }

    /// Waits for an event of this kind that fits, and takes it. Others stay for later questions.
    pub async fn event(&self, kind: &str, fits: impl Fn(&Value) -> bool) -> Value {
        self.event_within(PATIENCE, kind, fits)
            .await
            .unwrap_or_else(|waiting| {
                panic!("{}: no {kind} came; what came: {waiting:?}", self.name)
            })
    }

    /// As [`Agent::event`], for a time; what else came when it passes.
    ///
    /// # Errors
    /// All events that wait.
    pub async fn event_within(
        &self,
        patience: Duration,
        kind: &str,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<Value, Vec<Value>> {
        let is_it = |event: &Value| event.get("event") == Some(&json!(kind)) && fits(event);
        let mut events = self.events.lock().await;
        let search = async {
            loop {
                if let Some(index) = events.waiting.iter().position(is_it) {
                    return Some(events.waiting.remove(index));
                }
                let next = events.arriving.recv().await?;
                events.waiting.push(next);
            }
        };
        match timeout(patience, search).await {
            Ok(Some(event)) => Ok(event),
            Ok(None) | Err(_) => Err(events.waiting.clone()),
        }
    }

    /// All events of this kind that have arrived; they stay.
    pub async fn events(&self, kind: &str) -> Vec<Value> {
        let mut events = self.events.lock().await;
        while let Ok(event) = events.arriving.try_recv() {
            events.waiting.push(event);
        }
        let wanted = json!(kind);
        let of_kind = |event: &&Value| event.get("event") == Some(&wanted);
        events.waiting.iter().filter(of_kind).cloned().collect()
    }
}

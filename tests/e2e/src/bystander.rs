//! A client that has nothing to do with what others do to the hub, and must not feel it.

use std::time::Duration;

use edgehub_lab::Lab;
use tokio::time::Instant;

use crate::mqtt::{Door, Hello, MqttClient, telemetry};
use crate::only_these_arrive;

/// A leaf that works all the time.
#[derive(Debug)]
pub struct Bystander {
    id: String,
    client: MqttClient,
    bodies: Vec<String>,
}

impl Bystander {
    /// Connects a registered leaf.
    pub async fn connect(lab: &Lab, id: &str) -> Self {
        Self {
            id: id.to_owned(),
            client: Door::of(lab, "edge1").admitted(&Hello::of(lab, id)).await,
            bodies: Vec::new(),
        }
    }

    /// Publishes and pings on its old connection: both are answered.
    pub async fn works(&mut self) {
        self.work().await;
    }

    /// As [`Self::works`]; how long it took.
    pub async fn work(&mut self) -> Duration {
        let begun = Instant::now();
        let body = format!("{} {}", self.id, self.bodies.len());
        self.client.publish(&telemetry(&self.id), &body, 1).await;
        self.client.ping().await;
        self.bodies.push(body);
        begun.elapsed()
    }

    /// Everything that it sent is at the IoT Hub, in order, and nothing else as it; the hub has not
    /// panicked meanwhile.
    pub async fn ends_well(mut self, lab: &Lab) {
        self.works().await;
        only_these_arrive(lab, &self.id, &self.bodies).await;
        let log = lab.log("edge1").expect("a log");
        assert!(
            !log.contains("panicked"),
            "a panic in the hub's log:\n{log}"
        );
    }
}

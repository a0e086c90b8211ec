//! Hubs that are killed while leaves and modules at three layers send: nothing acknowledged is lost
//! (acceptance 3 of the walking skeleton, acceptance 5 of the AMQP side).

use std::time::Duration;

use edgehub_lab::mqtt_sender::{MqttSender, SenderOptions};
use edgehub_lab::{Acknowledged, ConnectionString, HUB, Lab, LabBuilder};
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};

use crate::amqp_sender::{AmqpSender, Pace};

/// Kills of each hub.
const KILLS: usize = 5;
/// The emulator answers nothing for this long.
const BLACK_HOLE: Duration = Duration::from_secs(20);
/// Messages a sender may have unacknowledged.
const SENDER_WINDOW: u16 = 50;
/// Pause between two messages of a sender.
const INTERVAL: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(120);

/// What the senders speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// MQTT over TLS.
    Mqtt,
    /// AMQP over TLS.
    Amqp,
}

/// What one run is about.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// Of the senders.
    pub senders: Speech,
    /// `UpstreamProtocol` of all hubs.
    pub upstream: &'static str,
    /// Messages that a lane of a bridge may have unacknowledged with that protocol
    /// (`bridge::limits`).
    pub lane_window: u64,
}

/// A sender of either protocol.
#[derive(Debug)]
enum Sender {
    Mqtt(MqttSender),
    Amqp(AmqpSender),
}

impl Sender {
    fn id(&self) -> &str {
        match self {
            Self::Mqtt(sender) => sender.id(),
            Self::Amqp(sender) => sender.id(),
        }
    }

    fn acknowledged(&self) -> u64 {
        match self {
            Self::Mqtt(sender) => sender.acknowledged(),
            Self::Amqp(sender) => sender.acknowledged(),
        }
    }

    fn in_flight(&self) -> u64 {
        match self {
            Self::Mqtt(sender) => sender.in_flight(),
            Self::Amqp(sender) => sender.in_flight(),
        }
    }

    async fn finish(self) -> (String, Vec<Acknowledged>) {
        match self {
            Self::Mqtt(sender) => sender.finish(PATIENCE).await.expect("a sender ends"),
            Self::Amqp(sender) => sender.finish(PATIENCE).await,
        }
    }
}

/// Eight senders at three layers send for as long as a nemesis works: it kills and restarts each
/// of the three hubs five times, in an order that a printed seed decides, and black-holes the
/// emulator for 20 s. Everything that was acknowledged is in the ledger, in order for each
/// sender, and duplicates stay below what was in flight when something was killed.
///
/// # Panics
/// When it is not so.
#[allow(
    clippy::print_stdout,
    reason = "the seed, with which a failure is repeated"
)]
pub async fn run(matrix: Matrix) {
    let seed = std::env::var("EDGEHUB_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    println!("EDGEHUB_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);

    let lab = LabBuilder::new()
        .layers(3)
        .leaves(4, "edge3")
        .leaf("mid1", "edge2")
        .module("edge3", "modA")
        .module("edge2", "modB")
        .module("edge1", "modC")
        .upstream(matrix.upstream)
        .start()
        .await
        .expect("the lab starts");
    let hubs = ["edge1", "edge2", "edge3"];
    for hub in hubs {
        slow_commits(&lab, hub).await;
    }
    let senders = start_senders(&lab, matrix.senders);
    assert_eq!(senders.len(), 8);
    for (_, sender) in &senders {
        wait_until(
            || sender.acknowledged() >= 20,
            || format!("{} sends", sender.id()),
        )
        .await;
    }

    let mut kills: Vec<&str> = hubs
        .iter()
        .copied()
        .cycle()
        .take(KILLS * hubs.len())
        .collect();
    kills.shuffle(&mut random);
    let black_hole_before = random.random_range(0..kills.len());
    for (round, hub) in kills.iter().enumerate() {
        if round == black_hole_before {
            println!("round {round}: the emulator answers nothing for {BLACK_HOLE:?}");
            lab.black_hole("edge1", HUB).await.expect("black hole");
            // A wait for time itself: the length of the outage.
            tokio::time::sleep(BLACK_HOLE).await;
            lab.heal("edge1", HUB).expect("heal");
        }
        // A wait for time itself: the moment of the kill is random.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..700))).await;
        kill_with_messages_in_flight(&lab, hub, &senders, round).await;
        lab.start(hub).await.expect("the hub starts again");
        slow_commits(&lab, hub).await;
    }

    let mut logs = Vec::new();
    for (_, sender) in senders {
        logs.push(sender.finish().await);
    }
    let verdict = lab
        .ledger()
        .settle(PATIENCE, &logs)
        .await
        .expect("the ledger is readable");
    println!("seed {seed}: {verdict}");
    assert!(verdict.passed(), "seed {seed}: {verdict}");
    // A kill repeats at most what its senders, the lanes into it and its own lanes had in flight.
    let for_each_kill = 8 * (u64::from(SENDER_WINDOW) + 2 * matrix.lane_window);
    let bound = for_each_kill * (kills.len() as u64 + 1);
    assert!(
        verdict.duplicates <= bound,
        "{} duplicates, at most {bound}",
        verdict.duplicates
    );
    lab.shutdown().await.expect("the lab ends");
}

/// Commits that take 20 to 40 ms keep messages in flight at any moment.
async fn slow_commits(lab: &Lab, hub: &str) {
    lab.faults(hub, "delay-commits 20000 40000")
        .await
        .expect("the faults socket answers");
}

/// The senders with the layer each is connected to.
fn start_senders(lab: &Lab, speech: Speech) -> Vec<(String, Sender)> {
    let identities = lab.identities().expect("identities");
    identities
        .iter()
        .map(|identity| {
            let layer = identity.parent.clone();
            let text = &identity.connection_string;
            let connection = ConnectionString::parse(text).expect("a string");
            let sender = match speech {
                Speech::Mqtt => {
                    let port = lab.host(&layer).expect("its host").ports.mqtts;
                    let mut options = SenderOptions::new(connection, lab.ca_file(), port);
                    options.window = SENDER_WINDOW;
                    options.interval = INTERVAL;
                    Sender::Mqtt(MqttSender::start(options).expect("a sender starts"))
                }
                Speech::Amqp => {
                    let pace = Pace {
                        window: SENDER_WINDOW.into(),
                        interval: INTERVAL,
                        ..Pace::default()
                    };
                    let device = connection.device_id.expect("a device");
                    let id = match connection.module_id {
                        Some(module) => format!("{device}/{module}"),
                        None => device,
                    };
                    Sender::Amqp(AmqpSender::start(lab, &id, &layer, pace))
                }
            };
            (layer, sender)
        })
        .collect()
}

async fn kill_with_messages_in_flight(
    lab: &Lab,
    hub: &str,
    senders: &[(String, Sender)],
    round: usize,
) {
    let in_flight = || -> u64 {
        senders
            .iter()
            .filter(|(layer, _)| layer == hub)
            .map(|(_, s)| s.in_flight())
            .sum()
    };
    wait_until(
        || in_flight() > 0,
        || format!("messages in flight at {hub}"),
    )
    .await;
    lab.kill(hub).await.expect("the hub is killed");
    // Nothing can be acknowledged any more: what is in flight now was when the kill landed.
    let caught = in_flight();
    report(round, hub, caught);
    assert!(
        caught > 0,
        "the kill of {hub} in round {round} landed with nothing in flight"
    );
}

#[allow(clippy::print_stdout, reason = "for the reader of a failure")]
fn report(round: usize, hub: &str, caught: u64) {
    println!("round {round}: {hub} killed with {caught} messages in flight");
}

async fn wait_until(mut condition: impl FnMut() -> bool, what: impl Fn() -> String) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let done = tokio::time::timeout(PATIENCE, poll).await;
    assert!(done.is_ok(), "not within {PATIENCE:?}: {}", what());
}

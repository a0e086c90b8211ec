//! `scripts/demo.sh`: a whole hierarchy at work, for a person to watch, and a verdict at the end.

mod leaves;
mod screen;
mod table;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tokio_util::sync::CancellationToken;

use crate::ledger::Tail;
use crate::process::Reaper;
use crate::topology::DeviceSpec;
use crate::{Acknowledged, ConnectionString, HUB, Lab, LabBuilder, Profile, Verdict, sas};
use leaves::Leaf;
use screen::Screen;
use table::{Figures, Row};

/// With at least this long each hub is killed once.
const KILLS_FROM: Duration = Duration::from_secs(20);

/// How long a killed hub stays away: long enough to see its children store and wait.
const KILLED_FOR: Duration = Duration::from_secs(1);

/// What is still queued at the end may take this long to the IoT Hub.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// A scrape that takes longer shows the layer as down.
const SCRAPE_MAX: Duration = Duration::from_millis(800);

/// The device that is there for the person who watches.
const VISITOR: &str = "visitor";

/// What to show.
#[derive(Clone, Debug)]
pub struct Options {
    /// Edge hubs, one below the other; at least one.
    pub layers: usize,
    /// Leaf devices below the bottom layer; at least one.
    pub leaves: usize,
    /// How long; `None` until `end`.
    pub duration: Option<Duration>,
    /// How hub and emulator are built.
    pub profile: Profile,
}

/// Runs a demo until its time is over or `end` is cancelled; true when the verdict is PASS.
///
/// # Errors
/// When the hierarchy cannot be started or a leaf ends by itself. A loss is a verdict.
///
/// # Cancel safety
/// Everything is ended.
pub async fn run(options: &Options, end: &CancellationToken) -> Result<bool> {
    ensure!(
        options.layers > 0 && options.leaves > 0,
        "at least one layer and one leaf"
    );
    leaves::check_sdk()?;
    let folder = tempfile::Builder::new().prefix("edgehub-demo-").tempdir()?;
    let started = Instant::now();
    let lab = tokio::select! {
        lab = builder(options, folder.path().to_owned()).start() => lab?,
        () = end.cancelled() => bail!("ended before it began"),
    };
    let mut demo = Demo::new(lab, options)?;
    demo.introduce(started.elapsed())?;
    let outcome = demo.show(end).await;
    let verdict = match outcome {
        Ok(()) => demo.judge().await,
        Err(error) => Err(error),
    };
    if !matches!(&verdict, Ok(verdict) if verdict.passed()) {
        let kept = folder.keep();
        Screen::new().note(&format!("logs and stores are kept in {}", kept.display()));
    }
    let verdict = verdict?;
    let took = started.elapsed().as_secs_f64();
    Screen::new().note(&format!("==> demo: {took:.1} s\n{verdict}"));
    Ok(verdict.passed())
}

fn builder(options: &Options, folder: PathBuf) -> LabBuilder {
    let bottom = format!("edge{}", options.layers);
    LabBuilder::new()
        .profile(options.profile)
        .state_dir(folder)
        .layers(options.layers)
        .leaves(options.leaves, &bottom)
        .device(DeviceSpec::new(VISITOR, Some(&bottom)))
}

struct Demo {
    lab: Arc<Lab>,
    duration: Option<Duration>,
    leaves: Vec<Leaf>,
    rows: Vec<Row>,
    ledger: Tail,
    at_hub: u64,
    screen: Screen,
    started: Instant,
    scraped: Instant,
}

impl Demo {
    fn new(lab: Lab, options: &Options) -> Result<Self> {
        let reaper = Reaper::start()?;
        let identities = lab
            .identities()?
            .into_iter()
            .filter(|identity| identity.id != VISITOR);
        let leaves = identities
            .enumerate()
            .map(|(index, identity)| Leaf::start(&lab, index, &identity, &reaper))
            .collect::<Result<_>>()?;
        let rows = lab.edges().map(|edge| Row::new(&edge.name)).collect();
        let ledger = Tail::of(&lab.ledger());
        let now = Instant::now();
        Ok(Self {
            lab: Arc::new(lab),
            duration: options.duration,
            leaves,
            rows,
            ledger,
            at_hub: 0,
            screen: Screen::new(),
            started: now,
            scraped: now,
        })
    }

    /// Everything that a person needs to take part.
    fn introduce(&mut self, took: Duration) -> Result<()> {
        let json = self.lab.lab_json()?;
        let mut text = format!("IoT Hub {} and", json.hub.hostname);
        for layer in &json.layers {
            let _ = write!(text, " {}", layer.hostname);
        }
        let sdk = self.leaves.len().min(leaves::SDK_LEAVES_MAX);
        let own = self.leaves.len() - sdk;
        let _ = write!(
            text,
            " are up after {:.1} s.\n{sdk} leaves are azure-iot-device",
            took.as_secs_f64()
        );
        if own > 0 {
            let _ = write!(text, ", {own} are our own senders");
        }
        let _ = write!(text, ".\nCA file: {}", json.ca_file.display());
        for identity in json.identities.iter().take(leaves::SDK_LEAVES_MAX) {
            let _ = write!(text, "\n{}: {}", identity.id, identity.connection_string);
        }
        let visitor = json
            .identities
            .iter()
            .find(|identity| identity.id == VISITOR);
        let visitor = visitor.context("the visitor is registered")?;
        let port = self.lab.host(&visitor.parent)?.ports.mqtts;
        let string = ConnectionString::parse(&visitor.connection_string)?;
        let line = mosquitto_pub(&string, port, &json.ca_file.to_string_lossy())?;
        let _ = write!(text, "\nSend a message of your own:\n{line}\n");
        self.screen.note(&text);
        Ok(())
    }

    /// The live part, up to the moment when the leaves are to end.
    async fn show(&mut self, end: &CancellationToken) -> Result<()> {
        let mut kills = self.kills();
        let mut under_way = tokio::task::JoinSet::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let over = self
            .duration
            .map(|duration| tokio::time::Instant::now() + duration);
        loop {
            tokio::select! {
                _ = tick.tick() => self.refresh().await?,
                Some(()) = at(kills.last().map(|(due, _)| *due)) => {
                    let Some((_, name)) = kills.pop() else { continue };
                    // What is counted after its last scrape dies with the process.
                    self.scrape().await;
                    self.screen.note(&format!("killing {name} (SIGKILL) and starting it again"));
                    let lab = Arc::clone(&self.lab);
                    under_way.spawn(async move {
                        lab.kill(&name).await?;
                        tokio::time::sleep(KILLED_FOR).await;
                        lab.start(&name).await
                    });
                }
                Some(restarted) = under_way.join_next() => restarted??,
                Some(()) = at(over) => break,
                () = end.cancelled() => break,
            }
        }
        while let Some(restarted) = under_way.join_next().await {
            restarted??;
        }
        self.refresh().await?;
        self.screen.keep();
        Ok(())
    }

    /// When each hub is killed: spread over the first four fifths, the top layer first. The next
    /// one is the last of the list.
    fn kills(&self) -> Vec<(tokio::time::Instant, String)> {
        let Some(duration) = self.duration.filter(|duration| *duration >= KILLS_FROM) else {
            return Vec::new();
        };
        let names: Vec<String> = self.lab.edges().map(|edge| edge.name.clone()).collect();
        let step = duration.mul_f64(0.8 / (names.len() + 1) as f64);
        let now = tokio::time::Instant::now();
        let due = (1_u32..).map(|number| now + step * number);
        let mut kills: Vec<_> = due.zip(names).collect();
        kills.reverse();
        kills
    }

    async fn refresh(&mut self) -> Result<()> {
        for leaf in &mut self.leaves {
            leaf.check()?;
        }
        self.scrape().await;
        self.at_hub += self.ledger.count_new()?;
        let acknowledged: u64 = self.leaves.iter().map(Leaf::acknowledged).sum();
        let passed = self.started.elapsed();
        let time = match self.duration {
            Some(whole) => table::progress(passed, whole),
            None => format!("{} s, Ctrl-C ends", passed.as_secs()),
        };
        let at_hub = self.at_hub;
        let status = format!("{time}  {acknowledged} acknowledged, {at_hub} at the IoT Hub");
        let mut lines = vec![];
        if self.screen.is_terminal() {
            lines.extend(table::table(&self.rows));
            lines.push(status);
        } else {
            lines.push(format!("{status}; {}", table::words(&self.rows)));
        }
        self.screen.draw(&lines);
        Ok(())
    }

    async fn scrape(&mut self) {
        let elapsed = self.scraped.elapsed();
        self.scraped = Instant::now();
        let names: Vec<String> = self.lab.edges().map(|edge| edge.name.clone()).collect();
        for (row, name) in self.rows.iter_mut().zip(&names) {
            let scrape = tokio::time::timeout(SCRAPE_MAX, self.lab.metrics(name)).await;
            let figures = scrape
                .ok()
                .and_then(Result::ok)
                .map(|metrics| Figures::of(&metrics));
            row.update(figures, elapsed);
        }
    }

    /// Ends the leaves, waits until the queues have emptied, and compares.
    async fn judge(mut self) -> Result<Verdict> {
        self.screen
            .note("ending the leaves, waiting for what is still on its way");
        for leaf in &mut self.leaves {
            leaf.ask_to_end();
        }
        let mut logs: Vec<(String, Vec<Acknowledged>)> = Vec::new();
        for leaf in self.leaves {
            logs.push(leaf.finish().await?);
        }
        let verdict = self.lab.ledger().settle(SETTLE_MAX, &logs).await?;
        let lab = Arc::into_inner(self.lab).with_context(|| format!("{HUB} is in use"))?;
        lab.shutdown().await?;
        Ok(verdict)
    }
}

/// Completes at `due`; never, when there is none.
async fn at(due: Option<tokio::time::Instant>) -> Option<()> {
    tokio::time::sleep_until(due?).await;
    Some(())
}

/// A line to copy into another terminal.
fn mosquitto_pub(string: &ConnectionString, port: u16, ca_file: &str) -> Result<String> {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let ConnectionString {
        host_name,
        shared_access_key,
        ..
    } = string;
    let id = string.device_id.as_deref().context("no DeviceId")?;
    let gateway = string.gateway_host_name.as_deref().unwrap_or(host_name);
    let resource = sas::resource(host_name, id, None);
    let token = sas::token(&resource, shared_access_key, sas::expires_in(DAY), None)?;
    let ca_file = quoted(ca_file);
    Ok(format!(
        "mosquitto_pub -V mqttv311 -h {gateway} -p {port} --cafile {ca_file} -i {id} \
         -u '{host_name}/{id}/?api-version=2021-04-12' -P '{token}' \
         -t devices/{id}/messages/events/ -q 1 -m 'hello from a visitor'"
    ))
}

/// A word for a shell, quoted when it needs to be.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_when_a_shell_would_split_it() {
        assert_eq!(quoted("/tmp/a-b_1.pem"), "/tmp/a-b_1.pem");
        assert_eq!(quoted("/tmp/my ca's.pem"), r"'/tmp/my ca'\''s.pem'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_line_for_the_visitor_can_be_pasted() {
        let string = "HostName=hub.lab40.example;DeviceId=visitor;SharedAccessKey=a2V5;\
                      GatewayHostName=edge3.lab40.example";
        let string = ConnectionString::parse(string).unwrap();
        let line = mosquitto_pub(&string, 8883, "/tmp/root-ca.pem").unwrap();
        assert!(line.starts_with(
            "mosquitto_pub -V mqttv311 -h edge3.lab40.example -p 8883 --cafile /tmp/root-ca.pem \
             -i visitor -u 'hub.lab40.example/visitor/?api-version=2021-04-12' \
             -P 'SharedAccessSignature sr=hub.lab40.example%2Fdevices%2Fvisitor&sig="
        ));
        assert!(
            line.ends_with("' -t devices/visitor/messages/events/ -q 1 -m 'hello from a visitor'")
        );
        assert!(!line.contains('\n'));
    }
}

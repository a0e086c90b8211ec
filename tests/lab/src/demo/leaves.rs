//! The demo's leaves: processes of the real Python SDK, and our own senders beside them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::mqtt_sender::{MqttSender, SenderOptions};
use crate::process::{Launch, Process, Reaper};
use crate::{Acknowledged, ConnectionString, Identity, Lab, SenderLog, binaries};

/// So many leaves are SDK processes; a machine has room for more senders than for more Pythons.
pub(super) const SDK_LEAVES_MAX: usize = 10;

/// Each leaf begins a message this often.
const INTERVAL: Duration = Duration::from_millis(50);

/// What was being sent when the end came may still be acknowledged for this long.
const LAST_MESSAGE_MAX: Duration = Duration::from_secs(20);

/// One leaf.
#[derive(Debug)]
pub(super) enum Leaf {
    /// `azure-iot-device`, unmodified, in a process of its own.
    Sdk {
        id: String,
        process: Process,
        log: PathBuf,
    },
    /// Ours.
    Own(MqttSender),
}

impl Leaf {
    /// The `index`-th leaf of a demo.
    pub(super) fn start(
        lab: &Lab,
        index: usize,
        identity: &Identity,
        reaper: &Arc<Reaper>,
    ) -> Result<Self> {
        if index < SDK_LEAVES_MAX {
            return start_sdk(lab, identity, reaper);
        }
        let string = ConnectionString::parse(&identity.connection_string)?;
        let port = lab.host(&identity.parent)?.ports.mqtts;
        let options = SenderOptions {
            window: 16,
            interval: INTERVAL,
            ..SenderOptions::new(string, lab.ca_file(), port)
        };
        Ok(Self::Own(MqttSender::start(options)?))
    }

    pub(super) fn acknowledged(&self) -> u64 {
        match self {
            Self::Sdk { log, .. } => SenderLog::count(log),
            Self::Own(sender) => sender.acknowledged(),
        }
    }

    /// An error when the leaf has ended by itself.
    pub(super) fn check(&mut self) -> Result<()> {
        if let Self::Sdk { id, process, .. } = self
            && let Some(status) = process.ended()?
        {
            anyhow::bail!(
                "{id} has ended by itself ({status}):\n{}",
                process.log_tail()
            );
        }
        Ok(())
    }

    /// Asks it to end after the message under way.
    pub(super) fn ask_to_end(&mut self) {
        match self {
            Self::Sdk { process, .. } => process.close_stdin(),
            Self::Own(sender) => sender.end_sending(),
        }
    }

    /// Ends it and returns its log.
    pub(super) async fn finish(self) -> Result<(String, Vec<Acknowledged>)> {
        match self {
            Self::Sdk {
                id,
                mut process,
                log,
            } => {
                process.close_stdin();
                process.wait(LAST_MESSAGE_MAX).await?;
                Ok((id, SenderLog::read(&log)?))
            }
            Self::Own(sender) => sender.finish(LAST_MESSAGE_MAX).await,
        }
    }
}

fn start_sdk(lab: &Lab, identity: &Identity, reaper: &Arc<Reaper>) -> Result<Leaf> {
    let folder = lab.state_dir().join("leaves");
    std::fs::create_dir_all(&folder)?;
    let log = folder.join(format!("{}.jsonl", identity.id));
    // Of an earlier demo in the same folder, whose messages this one's ledger may not have.
    let _ = std::fs::remove_file(&log);
    let sdk = sdk_folder();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let launch = Launch {
        program: python(&sdk)?,
        arguments: vec![
            text(&sdk.join("leaf.py")),
            "--ca".to_owned(),
            text(lab.ca_file()),
            "--log".to_owned(),
            text(&log),
            "--interval".to_owned(),
            INTERVAL.as_secs_f64().to_string(),
            "--exit-with-stdin".to_owned(),
        ],
        environment: vec![(
            "CONNECTION_STRING".to_owned(),
            identity.connection_string.clone(),
        )],
        log: folder.join(format!("{}.log", identity.id)),
        with_stdin: true,
    };
    let process = Process::start(&launch, reaper)?;
    Ok(Leaf::Sdk {
        id: identity.id.clone(),
        process,
        log,
    })
}

/// Where leaf.py and its Python are.
fn sdk_folder() -> PathBuf {
    binaries::workspace().join("tests/e2e/sdk/python")
}

/// The Python that has `azure-iot-device`.
fn python(sdk: &Path) -> Result<PathBuf> {
    let python = sdk.join(".venv/bin/python");
    ensure!(
        python.exists(),
        "{} is missing: scripts/lib/sdks.sh installs azure-iot-device there",
        python.display()
    );
    Ok(python)
}

/// Fails early when the SDK is not installed.
pub(super) fn check_sdk() -> Result<()> {
    python(&sdk_folder())
        .map(|_| ())
        .context("the demo's leaves are azure-iot-device processes")
}

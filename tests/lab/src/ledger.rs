//! Reads what reached IoT Hub.
//!
//! The emulator keeps its ledger in a file of JSON lines, oldest first, which it has written before
//! it acknowledges anything. The lab reads that file, not the control API: so the ledger can be
//! read while the emulator is killed, paused or cut off.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::seed::split_id;
use crate::{Acknowledged, Verdict};

/// How often a growing ledger is looked at.
const POLL: Duration = Duration::from_millis(20);

/// One line of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct LedgerEntry {
    /// Position, from 0.
    pub sequence: u64,
    /// When the hub took it.
    pub enqueued_utc: String,
    /// The device that the hub verified.
    pub device_id: String,
    /// The module that the hub verified.
    pub module_id: Option<String>,
    /// System properties by IoT Hub's names, stamps included.
    pub system: BTreeMap<String, Option<String>>,
    /// Application properties; one without a value is `None`.
    pub properties: BTreeMap<String, Option<String>>,
    /// The body.
    pub body_base64: String,
    /// Of the body, in lower-case hex.
    pub sha256: String,
}

impl LedgerEntry {
    /// The body's bytes.
    ///
    /// # Errors
    /// When the ledger's base64 is broken.
    pub fn body(&self) -> Result<Vec<u8>> {
        STANDARD
            .decode(&self.body_base64)
            .context("the ledger's body is not base64")
    }

    /// Whether it came from `device` or `device/module`.
    #[must_use]
    pub fn is_from(&self, id: &str) -> bool {
        split_id(id) == (self.device_id.as_str(), self.module_id.as_deref())
    }
}

/// Sender and digest of one line: all that a verdict needs, without the body in memory.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Arrival {
    device_id: String,
    module_id: Option<String>,
    /// Of the body, in lower-case hex.
    pub sha256: String,
}

impl Arrival {
    /// Whether it came from `device` or `device/module`.
    #[must_use]
    pub fn is_from(&self, id: &str) -> bool {
        split_id(id) == (self.device_id.as_str(), self.module_id.as_deref())
    }
}

/// The ledger of one lab.
#[derive(Clone, Debug)]
pub struct Ledger {
    path: PathBuf,
}

impl Ledger {
    /// The ledger in this file; there may be none yet.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// All entries with bodies.
    ///
    /// # Errors
    /// When the file cannot be read or a complete line is no entry.
    pub fn entries(&self) -> Result<Vec<LedgerEntry>> {
        self.collect()
    }

    /// All entries of one sender (`device` or `device/module`).
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn entries_of(&self, id: &str) -> Result<Vec<LedgerEntry>> {
        let mut entries = self.entries()?;
        entries.retain(|entry| entry.is_from(id));
        Ok(entries)
    }

    /// Senders and digests, oldest first.
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn arrivals(&self) -> Result<Vec<Arrival>> {
        self.collect()
    }

    /// How many messages there are.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn count(&self) -> Result<u64> {
        let mut count = 0;
        Tail::of(self).lines(|_| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    /// The verdict over these senders: (`device` or `device/module`, its log).
    ///
    /// # Errors
    /// As [`Self::entries`].
    pub fn judge(&self, senders: &[(String, Vec<Acknowledged>)]) -> Result<Verdict> {
        let arrivals = self.arrivals()?;
        let verdicts = senders.iter().map(|(id, log)| {
            let arrived = arrivals.iter().filter(|arrival| arrival.is_from(id));
            Verdict::of_sender(log, arrived.map(|arrival| arrival.sha256.as_str()))
        });
        Ok(verdicts.sum())
    }

    /// Waits until `enough` says so of what has arrived so far, and returns all of it.
    ///
    /// # Errors
    /// When it has not after `patience`, or the file cannot be read.
    ///
    /// # Cancel safety
    /// Cancel safe: it only reads.
    pub async fn wait_until(
        &self,
        patience: Duration,
        enough: impl Fn(&[Arrival]) -> bool,
    ) -> Result<Vec<Arrival>> {
        let deadline = Instant::now() + patience;
        let mut tail = Tail::of(self);
        let mut arrivals = Vec::new();
        loop {
            let before = arrivals.len();
            tail.lines(|line| {
                arrivals.push(parse(line)?);
                Ok(())
            })?;
            if (arrivals.len() != before || before == 0) && enough(&arrivals) {
                return Ok(arrivals);
            }
            let known = arrivals.len();
            ensure!(
                Instant::now() < deadline,
                "after {patience:?} the ledger has {known} entries"
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until everything acknowledged has arrived or `patience` is over, and judges then.
    ///
    /// # Errors
    /// As [`Self::entries`]; a loss is a verdict, not an error.
    ///
    /// # Cancel safety
    /// Cancel safe: it only reads.
    pub async fn settle(
        &self,
        patience: Duration,
        senders: &[(String, Vec<Acknowledged>)],
    ) -> Result<Verdict> {
        let digests = |log: &'_ [Acknowledged]| -> HashSet<String> {
            log.iter().map(|entry| entry.sha256.clone()).collect()
        };
        let mut missing: Vec<(&str, HashSet<String>)> = senders
            .iter()
            .map(|(id, log)| (id.as_str(), digests(log)))
            .collect();
        let deadline = Instant::now() + patience;
        let mut tail = Tail::of(self);
        loop {
            tail.lines(|line| {
                let arrival: Arrival = parse(line)?;
                if let Some((_, digests)) = missing.iter_mut().find(|(id, _)| arrival.is_from(id)) {
                    digests.remove(&arrival.sha256);
                }
                Ok(())
            })?;
            if missing.iter().all(|(_, digests)| digests.is_empty()) || Instant::now() >= deadline {
                return self.judge(senders);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Copies the complete lines to `out`, as they are.
    ///
    /// # Errors
    /// When the file cannot be read or `out` not be written.
    pub fn print(&self, out: &mut impl io::Write) -> Result<()> {
        Tail::of(self).lines(|line| {
            out.write_all(line)?;
            Ok(())
        })?;
        Ok(out.flush()?)
    }

    fn collect<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        let mut all = Vec::new();
        Tail::of(self).lines(|line| {
            all.push(parse(line)?);
            Ok(())
        })?;
        Ok(all)
    }
}

/// A reader that goes on where it stopped.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    offset: u64,
}

impl Tail {
    /// From the first entry on.
    #[must_use]
    pub fn of(ledger: &Ledger) -> Self {
        Self {
            path: ledger.path.clone(),
            offset: 0,
        }
    }

    /// How many entries came since the last call.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn count_new(&mut self) -> Result<u64> {
        let mut count = 0;
        self.lines(|_| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    /// Gives the complete lines that came since the last call to `each`, newline included.
    fn lines(&mut self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut file = match File::open(&self.path) {
            // The emulator has not been started yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.with_context(|| format!("cannot open {}", self.path.display()))?,
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::with_capacity(1 << 18, file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                return Ok(());
            }
            self.offset += length as u64;
            each(&line)?;
        }
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T> {
    serde_json::from_slice(line)
        .with_context(|| format!("no ledger entry: {}", String::from_utf8_lossy(line)))
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;

    use super::*;
    use crate::sender_log::sha256;

    fn line(sequence: u64, module: Option<&str>, body: &str) -> String {
        let module = serde_json::to_string(&module).unwrap();
        format!(
            "{{\"sequence\":{sequence},\"enqueued_utc\":\"2026-08-21T10:00:05.120Z\",\
             \"device_id\":\"edge3\",\"module_id\":{module},\"system\":{{\"message-id\":\"m\"}},\
             \"properties\":{{\"a\":\"b\",\"bare\":null}},\"body_base64\":\"{}\",\
             \"sha256\":\"{}\"}}\n",
            STANDARD.encode(body),
            sha256(body.as_bytes())
        )
    }

    #[tokio::test]
    async fn entries_are_read_judged_and_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let ledger = Ledger::at(&path);
        assert_eq!(ledger.count().unwrap(), 0, "no file yet is an empty ledger");
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        let (first, second) = (line(0, None, "one"), line(1, Some("modA"), "two"));
        file.write_all((first.clone() + &second[..20]).as_bytes())
            .unwrap();
        assert_eq!(
            ledger.count().unwrap(),
            1,
            "a line is there when it is complete"
        );
        let mut tail = Tail::of(&ledger);
        assert_eq!(tail.count_new().unwrap(), 1);
        file.write_all(&second.as_bytes()[20..]).unwrap();
        assert_eq!(tail.count_new().unwrap(), 1);

        let entries = ledger.entries().unwrap();
        assert_eq!(entries[0].body().unwrap(), b"one");
        assert_eq!(entries[0].properties["bare"], None);
        assert!(entries[0].is_from("edge3") && !entries[0].is_from("edge3/modA"));
        assert_eq!(ledger.entries_of("edge3/modA").unwrap()[0].sequence, 1);

        let log = |body: &str| vec![Acknowledged::new(1, body.as_bytes())];
        let good = [
            ("edge3".to_owned(), log("one")),
            ("edge3/modA".to_owned(), log("two")),
        ];
        assert!(ledger.settle(Duration::ZERO, &good).await.unwrap().passed());
        let swapped = [
            ("edge3".to_owned(), log("two")),
            ("edge3/modA".to_owned(), log("one")),
        ];
        assert_eq!(
            ledger.settle(Duration::ZERO, &swapped).await.unwrap().lost,
            2
        );

        let waiting = ledger.wait_until(Duration::from_secs(10), |all| all.len() == 3);
        let writing = async { file.write_all(line(2, None, "three").as_bytes()).unwrap() };
        assert_eq!(tokio::join!(waiting, writing).0.unwrap().len(), 3);
        assert!(
            ledger
                .wait_until(Duration::ZERO, |all| all.len() == 4)
                .await
                .is_err()
        );

        let mut copy = Vec::new();
        ledger.print(&mut copy).unwrap();
        assert_eq!(copy, std::fs::read(&path).unwrap());
    }
}

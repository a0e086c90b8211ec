//! What a sender was told is safe: a file of acknowledged messages, one JSON line each.
//!
//! `{"sequence":7,"sha256":"9f86…"}`: the sender's own number of the message and the digest of its
//! body. A line is written after the acknowledgement has arrived and before the next message is
//! counted on; a torn last line (the sender was killed) counts as not acknowledged.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// One acknowledged message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledged {
    /// The sender's number of the message; rises in the order of sending.
    pub sequence: u64,
    /// Of the body, in lower-case hex.
    pub sha256: String,
}

impl Acknowledged {
    /// The entry for a body.
    #[must_use]
    pub fn new(sequence: u64, body: &[u8]) -> Self {
        Self {
            sequence,
            sha256: sha256(body),
        }
    }
}

/// Lower-case hex of the SHA-256 of `body`, as in the ledger.
#[must_use]
pub fn sha256(body: &[u8]) -> String {
    let mut hex = String::with_capacity(64);
    for byte in digest(&SHA256, body).as_ref() {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

/// A log that is being written.
#[derive(Debug)]
pub struct SenderLog {
    file: File,
    text: Vec<u8>,
}

impl SenderLog {
    /// Continues the log at `path`, or starts it.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self {
            file,
            text: Vec::new(),
        })
    }

    /// Adds acknowledged messages with one write.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn append(&mut self, acknowledged: &[Acknowledged]) -> Result<()> {
        self.text.clear();
        for entry in acknowledged {
            serde_json::to_writer(&mut self.text, entry)?;
            self.text.push(b'\n');
        }
        self.file
            .write_all(&self.text)
            .context("cannot write the sender's log")
    }

    /// Reads a log.
    ///
    /// # Errors
    /// When the file cannot be read or a complete line is not an entry.
    pub fn read(path: &Path) -> Result<Vec<Acknowledged>> {
        let shown = path.display();
        let text = fs::read(path).with_context(|| format!("cannot read {shown}"))?;
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        let complete = lines.filter(|line| line.ends_with(b"\n"));
        complete
            .map(|line| {
                serde_json::from_slice(line).with_context(|| {
                    format!("{shown}: no entry: {}", String::from_utf8_lossy(line))
                })
            })
            .collect()
    }

    /// How many complete lines a log has; 0 when there is no such file yet.
    #[must_use]
    pub fn count(path: &Path) -> u64 {
        let text = fs::read(path).unwrap_or_default();
        text.iter().filter(|byte| **byte == b'\n').count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_continued_and_a_torn_line_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("leaf1.jsonl");
        assert_eq!(SenderLog::count(&path), 0);
        let entries = [Acknowledged::new(1, b"one"), Acknowledged::new(2, b"two")];
        SenderLog::open(&path)
            .unwrap()
            .append(&entries[..1])
            .unwrap();
        SenderLog::open(&path)
            .unwrap()
            .append(&entries[1..])
            .unwrap();
        assert_eq!(SenderLog::read(&path).unwrap(), entries);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"sequence\":3,\"sha2").unwrap();
        assert_eq!(SenderLog::read(&path).unwrap(), entries);
        assert_eq!(SenderLog::count(&path), 2);
        file.write_all(b"\n").unwrap();
        assert!(SenderLog::read(&path).is_err());
    }

    #[test]
    fn the_digest_is_sha_256_in_hex() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256(b""), empty);
    }
}

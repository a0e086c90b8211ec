//! What outlives the process besides the ledger: twins, sessions and C2D queues.
//!
//! A file of JSON lines beside the ledger, `{"key":"twin/leaf1","value":{…}}`. The last line of a
//! key counts, and a null deletes it. A change is written with one call before anybody hears of
//! it; the operating system has it then, so a killed emulator keeps it. A torn last line, which
//! only a kill inside that call can leave, was never answered and is cut off at the next start.
//! When most of the file is outdated it is written anew and renamed into place.
//!
//! Without a path nothing is kept.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use crate::limits::JOURNAL_SLACK_BYTES;

/// Why the journal can not be opened or does not take a change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    #[error("{path}: line {line} is no journal line")]
    Corrupt { path: PathBuf, line: u64 },
    #[error("the journal's record {key:?} is not what this emulator writes: {error}")]
    Record {
        key: String,
        error: serde_json::Error,
    },
    #[error("journal file: {0}")]
    Io(#[from] io::Error),
    #[error("a record has no JSON form: {0}")]
    Json(#[from] serde_json::Error),
}

/// One key with its new value.
#[derive(Debug)]
pub(crate) struct Change {
    key: String,
    /// The whole line, with its line break.
    line: String,
    is_delete: bool,
}

impl Change {
    pub(crate) fn put(key: String, value: &impl Serialize) -> Result<Self, JournalError> {
        let name = serde_json::to_string(&key)?;
        let value = serde_json::to_string(value)?;
        Ok(Self {
            line: format!("{{\"key\":{name},\"value\":{value}}}\n"),
            key,
            is_delete: false,
        })
    }

    pub(crate) fn delete(key: String) -> Result<Self, JournalError> {
        let name = serde_json::to_string(&key)?;
        Ok(Self {
            line: format!("{{\"key\":{name},\"value\":null}}\n"),
            key,
            is_delete: true,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    key: String,
    value: Value,
}

/// The journal of one emulator.
pub(crate) struct Journal {
    open: Option<Mutex<Open>>,
}

struct Open {
    path: PathBuf,
    file: File,
    /// Where the last line ends: the next one goes here.
    end: u64,
    /// Length of the line that counts, per key.
    lengths: BTreeMap<String, u64>,
    /// Sum of `lengths`.
    live: u64,
}

impl Journal {
    /// Opens the journal at `path`, or none.
    ///
    /// # Errors
    /// The file can not be read or written, or is no journal.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, JournalError> {
        let Some(path) = path else {
            return Ok(Self { open: None });
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let mut open = Open {
            path: path.to_owned(),
            file,
            end: 0,
            lengths: BTreeMap::new(),
            live: 0,
        };
        open.end = open.read(|_, _| {})?;
        open.file.set_len(open.end)?;
        let mut last: BTreeMap<String, (bool, u64)> = BTreeMap::new();
        open.read(|line, length| {
            last.insert(line.key, (line.value.is_null(), length));
        })?;
        for (key, (_, length)) in last.into_iter().filter(|(_, (deleted, _))| !deleted) {
            open.live += length;
            open.lengths.insert(key, length);
        }
        open.compact_if_worth_it()?;
        Ok(Self {
            open: Some(Mutex::new(open)),
        })
    }

    /// Reads the records whose key begins with `prefix`: the rest of the key, and the value.
    pub(crate) fn load<T: DeserializeOwned>(
        &self,
        prefix: &str,
    ) -> Result<Vec<(String, T)>, JournalError> {
        let Some(open) = &self.open else {
            return Ok(Vec::new());
        };
        let mut last: BTreeMap<String, Value> = BTreeMap::new();
        open.lock().read(|line, _| {
            if let Some(rest) = line.key.strip_prefix(prefix) {
                last.insert(rest.to_owned(), line.value);
            }
        })?;
        last.retain(|_, value| !value.is_null());
        last.into_iter()
            .map(|(key, value)| match T::deserialize(value) {
                Ok(value) => Ok((key, value)),
                Err(error) => Err(JournalError::Record { key, error }),
            })
            .collect()
    }

    /// Writes changes with one call to the operating system: all of them or none.
    ///
    /// # Errors
    /// The write failed; nothing of it counts then.
    pub(crate) fn write(&self, changes: &[Change]) -> Result<(), JournalError> {
        let Some(open) = self.open.as_ref().filter(|_| !changes.is_empty()) else {
            return Ok(());
        };
        let mut open = open.lock();
        let text: String = changes.iter().map(|change| change.line.as_str()).collect();
        if let Err(error) = open.file.write_all_at(text.as_bytes(), open.end) {
            // What a failed write left must not be taken for a line later.
            open.file.set_len(open.end)?;
            return Err(error.into());
        }
        open.end += text.len() as u64;
        for change in changes {
            let length = change.line.len() as u64;
            let known = if change.is_delete {
                open.lengths.remove(&change.key)
            } else {
                open.live += length;
                open.lengths.insert(change.key.clone(), length)
            };
            open.live = open.live.saturating_sub(known.unwrap_or(0));
        }
        if let Err(error) = open.compact_if_worth_it() {
            // The changes are written all the same.
            warn!(%error, "journal not compacted");
        }
        Ok(())
    }
}

impl Open {
    /// Hands out every whole line with its length, oldest first; returns where the last one ends.
    fn read(&self, mut take: impl FnMut(Line, u64)) -> Result<u64, JournalError> {
        let file = File::open(&self.path)?;
        let mut reader = BufReader::with_capacity(1 << 18, file);
        let (mut text, mut end, mut number) = (Vec::new(), 0, 0);
        loop {
            text.clear();
            let length = reader.read_until(b'\n', &mut text)? as u64;
            if text.last() != Some(&b'\n') {
                return Ok(end);
            }
            let line = serde_json::from_slice(&text).map_err(|_| JournalError::Corrupt {
                path: self.path.clone(),
                line: number,
            })?;
            take(line, length);
            end += length;
            number += 1;
        }
    }

    fn compact_if_worth_it(&mut self) -> Result<(), JournalError> {
        if self.end <= self.live.saturating_mul(2) + JOURNAL_SLACK_BYTES {
            return Ok(());
        }
        let mut last: BTreeMap<String, Value> = BTreeMap::new();
        self.read(|line, _| {
            last.insert(line.key, line.value);
        })?;
        let mut aside = self.path.as_os_str().to_owned();
        aside.push(".new");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&aside)?;
        let (mut lengths, mut end) = (BTreeMap::new(), 0);
        for (key, value) in last.into_iter().filter(|(_, value)| !value.is_null()) {
            let change = Change::put(key, &value)?;
            file.write_all(change.line.as_bytes())?;
            end += change.line.len() as u64;
            lengths.insert(change.key, change.line.len() as u64);
        }
        std::fs::rename(&aside, &self.path)?;
        *self = Self {
            path: std::mem::take(&mut self.path),
            file,
            end,
            lengths,
            live: end,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(journal: &Journal, key: &str, value: u32) {
        journal
            .write(&[Change::put(key.to_owned(), &value).unwrap()])
            .unwrap();
    }

    fn load(journal: &Journal, prefix: &str) -> Vec<(String, u32)> {
        journal.load(prefix).unwrap()
    }

    #[test]
    fn the_last_value_counts_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let journal = Journal::open(Some(&path)).unwrap();
        put(&journal, "a/1", 1);
        put(&journal, "a/2", 2);
        put(&journal, "b/1", 3);
        put(&journal, "a/1", 4);
        journal
            .write(&[Change::delete("a/2".to_owned()).unwrap()])
            .unwrap();
        assert_eq!(load(&journal, "a/"), [("1".to_owned(), 4)]);
        drop(journal);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(br#"{"key":"a/1","va"#).unwrap();
        let journal = Journal::open(Some(&path)).unwrap();
        put(&journal, "a/3", 5);
        drop(journal);
        let journal = Journal::open(Some(&path)).unwrap();
        assert_eq!(
            load(&journal, "a/"),
            [("1".to_owned(), 4), ("3".to_owned(), 5)]
        );
        assert_eq!(load(&journal, "b/"), [("1".to_owned(), 3)]);
    }

    #[test]
    fn an_outdated_file_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let journal = Journal::open(Some(&path)).unwrap();
        let big = "x".repeat(1 << 16);
        put(&journal, "small", 7);
        let rounds = 3 * JOURNAL_SLACK_BYTES / (1 << 16);
        for round in 0..rounds {
            let value = format!("{round}{big}");
            let change = Change::put("big".to_owned(), &value).unwrap();
            journal.write(&[change]).unwrap();
            let length = std::fs::metadata(&path).unwrap().len();
            assert!(length <= JOURNAL_SLACK_BYTES + 4 * (1 << 16), "{length}");
        }
        drop(journal);
        let journal = Journal::open(Some(&path)).unwrap();
        assert_eq!(load(&journal, "small"), [(String::new(), 7)]);
        let big: Vec<(String, String)> = journal.load("big").unwrap();
        assert!(big[0].1.starts_with(&format!("{}x", rounds - 1)));
    }

    #[test]
    fn a_file_that_is_no_journal_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "somebody's notes\n").unwrap();
        assert!(matches!(
            Journal::open(Some(file.path())),
            Err(JournalError::Corrupt { line: 0, .. })
        ));
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "somebody's notes\n"
        );
    }

    #[test]
    fn without_a_path_nothing_is_kept() {
        let journal = Journal::open(None).unwrap();
        put(&journal, "a", 1);
        assert_eq!(load(&journal, "a"), []);
    }
}

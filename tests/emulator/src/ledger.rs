//! The D2C ledger: what reached IoT Hub, in order, with sender and stamps.
//!
//! It is a file of JSON lines, one per message, in the form that the control API hands out; so a
//! dump is a copy of the file, and memory holds one offset per message. Without a given path the
//! file is a temporary one. A batch is written with one call before any of it is acknowledged;
//! the operating system has it then, so a killed emulator keeps it. A torn last line, which only
//! a kill inside that call can leave, was never acknowledged and is cut off at the next start.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use ring::digest::{SHA256, digest};
use serde::Serialize;
use tokio::sync::watch;

use crate::connections::Fence;

/// Why the ledger can not be opened or does not take a batch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    #[error("{path}: line {line} is not the ledger line with sequence {line}")]
    Corrupt { path: PathBuf, line: usize },
    #[error("the connection was closed or replaced before the batch was written")]
    Fenced,
    #[error("ledger file: {0}")]
    Io(#[from] io::Error),
}

/// The stamps that all messages of one connection share, as JSON text.
#[derive(Debug, Clone)]
pub(crate) struct Stamps {
    /// `"device_id":"d","module_id":null,"system":{` and the constant members, each with a comma.
    head: String,
}

/// Who sent, as the hub has verified it.
#[derive(Debug)]
pub(crate) struct Sender<'a> {
    pub(crate) device: &'a str,
    pub(crate) module: Option<&'a str>,
    /// Of the module if there is one.
    pub(crate) generation_id: &'a str,
    pub(crate) model_id: Option<&'a str>,
    /// Whether a shared access policy was presented instead of the identity's own key.
    pub(crate) by_policy: bool,
}

impl Stamps {
    pub(crate) fn new(sender: &Sender<'_>) -> Self {
        let scope = match sender.module {
            _ if sender.by_policy => "hub",
            None => "device",
            Some(_) => "module",
        };
        let method = format!(
            r#"{{"scope":"{scope}","type":"sas","issuer":"iothub","acceptingIpFilterRule":null}}"#
        );
        let mut head = format!(
            r#""device_id":{},"module_id":{},"system":{{"#,
            json(&sender.device),
            json(&sender.module)
        );
        let constants = [
            ("iothub-connection-device-id", Some(sender.device)),
            ("iothub-connection-module-id", sender.module),
            (
                "iothub-connection-auth-generation-id",
                Some(sender.generation_id),
            ),
            ("iothub-connection-auth-method", Some(method.as_str())),
            ("iothub-message-source", Some("Telemetry")),
            ("dt-dataschema", sender.model_id),
        ];
        for (name, value) in constants {
            if let Some(value) = value {
                head.push_str(&format!("{}:{},", json(&name), json(&value)));
            }
        }
        Self { head }
    }
}

/// Messages of one connection on their way to the file: lines without sequence and time.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    text: Vec<u8>,
    /// Where each line ends in `text`.
    ends: Vec<usize>,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    /// Adds a message. `system` are its own system properties by IoT Hub name; a property without
    /// a value is null in the ledger.
    pub(crate) fn push(
        &mut self,
        stamps: &Stamps,
        enqueued_utc: &str,
        system: &[(&str, String)],
        properties: &[(String, Option<String>)],
        body: &[u8],
    ) {
        let text = &mut self.text;
        text.extend_from_slice(stamps.head.as_bytes());
        for (name, value) in system {
            text.push(b'"');
            text.extend_from_slice(name.as_bytes());
            text.extend_from_slice(b"\":");
            push_json(text, value);
            text.push(b',');
        }
        text.extend_from_slice(b"\"iothub-enqueuedtime\":\"");
        text.extend_from_slice(enqueued_utc.as_bytes());
        text.extend_from_slice(b"\"},\"properties\":{");
        for (index, (name, value)) in properties.iter().enumerate() {
            if index > 0 {
                text.push(b',');
            }
            push_json(text, name);
            text.push(b':');
            push_json(text, value);
        }
        text.extend_from_slice(b"},\"body_base64\":\"");
        push_base64(text, body);
        text.extend_from_slice(b"\",\"sha256\":\"");
        push_hex(text, digest(&SHA256, body).as_ref());
        text.extend_from_slice(b"\"}\n");
        self.ends.push(text.len());
    }
}

/// The ledger of one emulator.
pub(crate) struct Ledger {
    file: Arc<File>,
    index: Mutex<Index>,
    count: watch::Sender<u64>,
    /// Keeps the temporary file until the end.
    _temporary: Option<tempfile::TempPath>,
}

#[derive(Debug, Default)]
struct Index {
    /// Where each line starts in the file.
    starts: Vec<u64>,
    /// Where the last line ends: the next one goes here, over whatever a failed write left.
    end: u64,
    /// Reused between batches.
    lines: Vec<u8>,
}

impl Ledger {
    /// Opens the ledger at `path`, or an empty temporary one.
    ///
    /// # Errors
    /// The file can not be read or written, or is no ledger.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, LedgerError> {
        let (file, index, temporary) = match path {
            Some(path) => {
                let mut options = OpenOptions::new();
                let file = options
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path)?;
                let index = Index::of(&file, path)?;
                file.set_len(index.end)?;
                (file, index, None)
            }
            None => {
                let (file, path) = tempfile::NamedTempFile::new()?.into_parts();
                (file, Index::default(), Some(path))
            }
        };
        let count = watch::Sender::new(index.starts.len() as u64);
        Ok(Self {
            file: Arc::new(file),
            index: Mutex::new(index),
            count,
            _temporary: temporary,
        })
    }

    pub(crate) fn count(&self) -> u64 {
        *self.count.borrow()
    }

    /// The count as it grows.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }

    /// Writes a batch with one call to the operating system: all of it or nothing.
    ///
    /// # Errors
    /// The fence is closed, or the write failed; nothing of the batch counts then.
    pub(crate) fn append(
        &self,
        batch: &Batch,
        enqueued_utc: &str,
        fence: Option<&Fence>,
    ) -> Result<(), LedgerError> {
        let mut index = self.index.lock();
        // Under the lock: a fence closed before a newer connection's first append is seen here.
        if fence.is_some_and(Fence::is_closed) {
            return Err(LedgerError::Fenced);
        }
        let Index { starts, end, lines } = &mut *index;
        let known = starts.len();
        lines.clear();
        let mut from = 0;
        for to in &batch.ends {
            starts.push(*end + lines.len() as u64);
            let sequence = starts.len() - 1;
            // Writing to a Vec can not fail.
            let _ = write!(
                lines,
                r#"{{"sequence":{sequence},"enqueued_utc":"{enqueued_utc}","#
            );
            lines.extend_from_slice(batch.text.get(from..*to).unwrap_or_default());
            from = *to;
        }
        if let Err(error) = self.file.write_all_at(lines, *end) {
            starts.truncate(known);
            return Err(error.into());
        }
        *end += lines.len() as u64;
        let count = starts.len() as u64;
        self.count.send_replace(count);
        Ok(())
    }

    /// Whole lines from `sequence` on: one at least if there is one, otherwise up to `bytes_max`.
    /// Blocks on the file, which is in the page cache.
    pub(crate) fn lines(&self, sequence: u64, bytes_max: u64) -> io::Result<Vec<String>> {
        let (start, end) = {
            let index = self.index.lock();
            let starts = usize::try_from(sequence).ok();
            let starts = starts.and_then(|at| index.starts.get(at..)).unwrap_or(&[]);
            let Some(start) = starts.first().copied() else {
                return Ok(Vec::new());
            };
            // Where lines end: each where the next one starts.
            let ends = starts.get(1..).unwrap_or(&[]);
            let limit = start.saturating_add(bytes_max);
            let fits = ends.partition_point(|end| *end <= limit);
            let fits = fits + usize::from(fits == ends.len() && index.end <= limit);
            let end = ends.get(fits.max(1) - 1).copied().unwrap_or(index.end);
            (start, end)
        };
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, start)?;
        let text = String::from_utf8(bytes).map_err(io::Error::other)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// The first message that was enqueued at this time or later. Times are taken to grow.
    pub(crate) fn first_at(&self, utc: &str) -> io::Result<u64> {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = low + (high - low) / 2;
            let line = self.lines(middle, 0)?;
            let line = line.first().map(String::as_str).unwrap_or_default();
            let is_before = enqueued_utc(line).is_some_and(|time| time < utc);
            if is_before {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// The bytes from the line `sequence` to the last one there is now, to be read piece by piece.
    pub(crate) fn dump(&self, sequence: u64) -> Dump {
        let index = self.index.lock();
        let start = usize::try_from(sequence)
            .ok()
            .and_then(|at| index.starts.get(at).copied());
        let end = index.end;
        let count = index.starts.len() as u64;
        Dump {
            file: self.file.clone(),
            next: start.unwrap_or(end),
            end,
            count,
        }
    }
}

impl Index {
    /// Finds the lines of an existing file. What follows the last line break is not a line.
    fn of(file: &File, path: &Path) -> Result<Self, LedgerError> {
        let mut index = Self::default();
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                return Ok(index);
            }
            let number = index.starts.len();
            if !line.starts_with(format!(r#"{{"sequence":{number},"#).as_bytes()) {
                return Err(LedgerError::Corrupt {
                    path: path.to_owned(),
                    line: number,
                });
            }
            index.starts.push(index.end);
            index.end += length as u64;
        }
    }
}

/// A part of the ledger that is being read. Later messages are not in it.
pub(crate) struct Dump {
    file: Arc<File>,
    next: u64,
    end: u64,
    count: u64,
}

impl Dump {
    /// Messages in the whole ledger when the dump began.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The next bytes; none at the end. Blocks on the file.
    pub(crate) fn read(&mut self, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        let length = usize::try_from(self.end - self.next)
            .unwrap_or(bytes_max)
            .min(bytes_max);
        if length == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, self.next)?;
        self.next += length as u64;
        Ok(Some(bytes))
    }
}

/// The time in a line.
fn enqueued_utc(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(r#""enqueued_utc":""#)?;
    rest.split_once('"').map(|(time, _)| time)
}

fn json(value: &impl Serialize) -> String {
    // Text and options of text always have a JSON form.
    serde_json::to_string(value).unwrap_or_default()
}

fn push_json(text: &mut Vec<u8>, value: &impl Serialize) {
    let _ = serde_json::to_writer(text, value);
}

fn push_base64(text: &mut Vec<u8>, body: &[u8]) {
    let start = text.len();
    text.resize(start + body.len().div_ceil(3) * 4, b'=');
    if let Some(space) = text.get_mut(start..) {
        // The space is exactly what the padded form needs.
        let _ = STANDARD.encode_slice(body, space);
    }
}

fn push_hex(text: &mut Vec<u8>, bytes: &[u8]) {
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamps(module: Option<&str>) -> Stamps {
        Stamps::new(&Sender {
            device: "edge3",
            module,
            generation_id: "6375",
            model_id: None,
            by_policy: false,
        })
    }

    fn append(ledger: &Ledger, body: &str) {
        let mut batch = Batch::default();
        let system = [("message-id", "m\"1".to_owned())];
        let properties = [
            ("a".to_owned(), Some("1".to_owned())),
            ("b".to_owned(), None),
        ];
        let utc = "2026-01-01T00:00:00.000Z";
        batch.push(
            &stamps(Some("modA")),
            utc,
            &system,
            &properties,
            body.as_bytes(),
        );
        ledger.append(&batch, utc, None).unwrap();
    }

    fn lines(ledger: &Ledger, from: u64) -> Vec<serde_json::Value> {
        let mut dump = ledger.dump(from);
        let mut text = Vec::new();
        while let Some(piece) = dump.read(7).unwrap() {
            text.extend(piece);
        }
        String::from_utf8(text)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn a_line_is_what_the_lab_documents() {
        let ledger = Ledger::open(None).unwrap();
        append(&ledger, "hello");
        let line = lines(&ledger, 0).remove(0);
        let method =
            r#"{"scope":"module","type":"sas","issuer":"iothub","acceptingIpFilterRule":null}"#;
        let wanted = serde_json::json!({
            "sequence": 0,
            "enqueued_utc": "2026-01-01T00:00:00.000Z",
            "device_id": "edge3",
            "module_id": "modA",
            "system": {
                "iothub-connection-device-id": "edge3",
                "iothub-connection-module-id": "modA",
                "iothub-connection-auth-generation-id": "6375",
                "iothub-connection-auth-method": method,
                "iothub-message-source": "Telemetry",
                "message-id": "m\"1",
                "iothub-enqueuedtime": "2026-01-01T00:00:00.000Z",
            },
            "properties": {"a": "1", "b": null},
            "body_base64": "aGVsbG8=",
            "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
        });
        assert_eq!(line, wanted);
        let names =
            "sequence enqueued_utc device_id module_id system properties body_base64 sha256";
        let text = String::from_utf8(ledger.dump(0).read(1 << 20).unwrap().unwrap()).unwrap();
        let places: Vec<_> = names
            .split(' ')
            .map(|name| text.find(&format!("\"{name}\":")).unwrap())
            .collect();
        assert!(
            places.is_sorted(),
            "the order of the lab's README: {places:?}"
        );
    }

    #[test]
    fn lines_are_found_by_number_size_and_time() {
        let ledger = Ledger::open(None).unwrap();
        assert_eq!(ledger.lines(0, 100).unwrap().len(), 0);
        for second in [1, 1, 3] {
            let mut batch = Batch::default();
            let utc = format!("2026-01-01T00:00:0{second}.000Z");
            batch.push(&stamps(None), &utc, &[], &[], b"x");
            ledger.append(&batch, &utc, None).unwrap();
        }
        let sequences = |from, bytes_max| -> Vec<u64> {
            let lines = ledger.lines(from, bytes_max).unwrap();
            let lines = lines.iter();
            let lines = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            lines
                .map(|line| line["sequence"].as_u64().unwrap())
                .collect()
        };
        let length = ledger.lines(0, 0).unwrap()[0].len() as u64 + 1;
        assert_eq!(sequences(0, 0), [0]);
        assert_eq!(sequences(0, length), [0]);
        assert_eq!(sequences(0, 2 * length), [0, 1]);
        assert_eq!(sequences(1, 2 * length - 1), [1]);
        assert_eq!(sequences(0, 1 << 20), [0, 1, 2]);
        assert_eq!(sequences(2, 0), [2]);
        assert!(sequences(3, 1 << 20).is_empty());
        for (utc, first) in [("00", 0), ("01", 0), ("02", 2), ("03", 2), ("04", 3)] {
            let utc = format!("2026-01-01T00:00:{utc}.000Z");
            assert_eq!(ledger.first_at(&utc).unwrap(), first, "{utc}");
        }
    }

    #[test]
    fn a_device_has_module_null() {
        let ledger = Ledger::open(None).unwrap();
        let mut batch = Batch::default();
        batch.push(&stamps(None), "t", &[], &[], b"");
        ledger.append(&batch, "t", None).unwrap();
        let line = lines(&ledger, 0).remove(0);
        assert_eq!(line["module_id"], serde_json::Value::Null);
        assert_eq!(line["system"].get("iothub-connection-module-id"), None);
        assert_eq!(line["body_base64"], "");
    }

    #[test]
    fn a_reopened_ledger_goes_on_and_drops_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger.jsonl");
        let ledger = Ledger::open(Some(&path)).unwrap();
        append(&ledger, "one");
        append(&ledger, "two");
        drop(ledger);
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(br#"{"sequence":2,"enqueued_utc":"20"#)
            .unwrap();
        let ledger = Ledger::open(Some(&path)).unwrap();
        assert_eq!(ledger.count(), 2);
        append(&ledger, "three");
        let bodies: Vec<_> = lines(&ledger, 1)
            .iter()
            .map(|l| l["body_base64"].clone())
            .collect();
        assert_eq!(bodies, ["dHdv", "dGhyZWU="]);
        assert_eq!(lines(&ledger, 2)[0]["sequence"], 2);
        assert!(lines(&ledger, 3).is_empty());
    }

    #[test]
    fn a_fenced_connection_writes_nothing_more() {
        let connections = crate::connections::Connections::default();
        let peer = "127.0.0.1:1".parse().unwrap();
        let connection = connections.open(crate::connections::Transport::Mqtt, peer, 0);
        let ledger = Ledger::open(None).unwrap();
        let mut batch = Batch::default();
        batch.push(&stamps(None), "t", &[], &[], b"x");
        ledger
            .append(&batch, "t", Some(connection.fence()))
            .unwrap();
        connections.close_matching(|_| true);
        let refused = ledger.append(&batch, "t", Some(connection.fence()));
        assert!(matches!(refused, Err(LedgerError::Fenced)));
        assert_eq!(ledger.count(), 1);
    }

    #[test]
    fn a_file_that_is_no_ledger_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "somebody's notes\n").unwrap();
        assert!(matches!(
            Ledger::open(Some(file.path())),
            Err(LedgerError::Corrupt { .. })
        ));
        assert_eq!(
            std::fs::read_to_string(file.path()).unwrap(),
            "somebody's notes\n"
        );
    }
}

//! Opening: whose folder it is, moving aside what is not ours, and recovery.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgehub_proto::clock::Clock;
use edgehub_proto::records::{Checkpoint, QueueInfo};
use prost::Message as _;
use rocksdb::{DB, ErrorKind, Options, WriteBatch};

use crate::config::StoreConfig;
use crate::db::{Db, Open};
use crate::error::{StoreError, WrapError};
use crate::layout::{
    Cf, META_DATA_KEY, META_FORMAT, META_QUEUE, META_SHARED, RECORD_VERSION, numbered, read_u32,
    read_u64,
};
use crate::limits::{DATA_KEYS_MAX, FORMAT_VERSION};
use crate::queue::{QueueId, QueueState};
use crate::read;
use crate::seal::{KeyWrap, Sealer};
use crate::settle::SettleSet;
use crate::store::Store;
use crate::writer;

/// An opened store, and what the operator has to hear.
#[derive(Debug)]
#[non_exhaustive]
pub struct Opened {
    /// The store.
    pub store: Store,
    /// A folder that was in its place and could not be used.
    pub moved_aside: Option<MovedAside>,
    /// Why values that were sealed earlier read as missing, or why nothing can be sealed.
    pub seal_problem: Option<WrapError>,
}

/// A folder that was moved out of the way; nothing in it was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MovedAside {
    /// Where it is now.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

/// What recovery hands to the writer.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) queues: Vec<Arc<QueueState>>,
    /// First id for shared messages.
    pub(crate) next_shared: u64,
    /// Data keys as stored.
    data_keys: Vec<(u32, Vec<u8>)>,
}

pub(crate) fn open(
    config: &StoreConfig,
    clock: Arc<dyn Clock>,
    wrap: &dyn KeyWrap,
) -> Result<Opened, StoreError> {
    let mut moved_aside = None;
    let (db, recovered) = match try_open(config) {
        Ok(opened) => opened,
        Err(Refused::Error(error)) => return Err(error),
        Err(Refused::Unusable { kind, reason }) => {
            let path = move_aside(&config.path, kind, clock.unix_ms())?;
            tracing::error!(path = %path.display(), %reason, "the store was moved aside");
            moved_aside = Some(MovedAside { path, reason });
            try_open(config).map_err(Refused::into_error)?
        }
    };
    let sealer = data_key(&db, &recovered, wrap)?;
    let seal_problem = sealer.problem();
    if let Some(problem) = &seal_problem {
        tracing::error!(%problem, kind = wrap.kind(), "sealed values of the store are not readable");
    }
    let store = writer::start(config, clock, db, sealer, recovered)?;
    Ok(Opened {
        store,
        moved_aside,
        seal_problem,
    })
}

/// Why a folder was not opened.
#[derive(Debug)]
enum Refused {
    /// It is to be moved aside, under this kind of name.
    Unusable { kind: &'static str, reason: String },
    /// It is to be left alone.
    Error(StoreError),
}

impl Refused {
    fn into_error(self) -> StoreError {
        match self {
            Self::Error(error) => error,
            Self::Unusable { reason, .. } => StoreError::Database {
                action: "be created",
                reason,
            },
        }
    }

    fn corrupt(reason: impl Into<String>) -> Self {
        Self::Unusable {
            kind: "corrupt",
            reason: reason.into(),
        }
    }
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Record { .. } => Self::corrupt(error.to_string()),
            other => Self::Error(other),
        }
    }
}

fn try_open(config: &StoreConfig) -> Result<(Db, Recovered), Refused> {
    let existing = column_families(&config.path)?;
    make_folder(&config.path)?;
    let db = Db::open(config, &existing).map_err(|error| judge(&config.path, &error))?;
    let recovered = db.with(|open| {
        check_format(open, &config.path)?;
        recover(open)
    })?;
    Ok((db, recovered))
}

/// The column families of what lies there, without opening it: empty when there is no store.
/// The C# hub's store is recognised by having some, but not our `meta`.
fn column_families(path: &Path) -> Result<Vec<String>, Refused> {
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|source| folder("look at", path, source))?,
    };
    if !metadata.is_dir() {
        return Err(Refused::corrupt("it is not a folder"));
    }
    if !path.join("CURRENT").exists() {
        return match holds_data(path)? {
            true => Err(Refused::corrupt("its CURRENT file is missing")),
            false => Ok(Vec::new()),
        };
    }
    let names = DB::list_cf(&Options::default(), path).map_err(|error| judge(path, &error))?;
    let ours = names.iter().any(|name| name == Cf::Meta.name());
    if ours || names.iter().all(|name| name == "default") {
        return Ok(names);
    }
    let reason = format!("it was written by another program, probably the C# hub ({names:?})");
    Err(Refused::Unusable {
        kind: "csharp",
        reason,
    })
}

/// Whether there are tables or logs: a creation cut short leaves neither.
fn holds_data(path: &Path) -> Result<bool, StoreError> {
    for file in fs::read_dir(path).map_err(|source| folder("list", path, source))? {
        let file = file.map_err(|source| folder("list", path, source))?;
        let name = file.file_name();
        let name = name.to_string_lossy();
        if [".sst", ".ldb", ".log"]
            .iter()
            .any(|suffix| name.ends_with(suffix))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What to do about RocksDB's refusal. Only what says that the files themselves are wrong moves
/// them: a full disk, missing rights or a second process must never cost a backlog.
fn judge(path: &Path, error: &rocksdb::Error) -> Refused {
    let text = error.to_string();
    if text.contains("While lock file") || text.contains("lock hold by current process") {
        return Refused::Error(StoreError::Locked {
            path: path.to_owned(),
        });
    }
    match error.kind() {
        ErrorKind::Corruption
        | ErrorKind::NotFound
        | ErrorKind::InvalidArgument
        | ErrorKind::NotSupported => Refused::corrupt(text),
        ErrorKind::IOError if text.contains("No such file or directory") => Refused::corrupt(text),
        _ => Refused::Error(StoreError::database("open", error)),
    }
}

fn folder(action: &'static str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Folder {
        action,
        path: path.to_owned(),
        source,
    }
}

fn make_folder(path: &Path) -> Result<(), StoreError> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path);
    made.map_err(|source| folder("make", path, source))?;
    let private = fs::set_permissions(path, fs::Permissions::from_mode(0o700));
    private.map_err(|source| folder("protect", path, source))
}

/// Renames the folder to `<name>.<kind>-<utc>`.
fn move_aside(path: &Path, kind: &str, unix_ms: u64) -> Result<PathBuf, StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let utc = utc_stamp(unix_ms);
    let mut target = path.with_file_name(format!("{name}.{kind}-{utc}"));
    let mut again = 1;
    while target.exists() {
        again += 1;
        target = path.with_file_name(format!("{name}.{kind}-{utc}-{again}"));
    }
    fs::rename(path, &target).map_err(|source| folder("move aside", path, source))?;
    if let Some(parent) = path.parent().and_then(|parent| fs::File::open(parent).ok()) {
        // So that a power loss does not bring the old name back beside a new store.
        let _ = parent.sync_all();
    }
    Ok(target)
}

/// `20260821T100005Z`.
fn utc_stamp(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

/// Year, month and day of a number of days since 1970-01-01: eras of 400 years that begin in
/// March, so that the leap day is a year's last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// Refuses what a later version wrote; marks a new store as ours.
fn check_format(open: &Open<'_>, path: &Path) -> Result<(), StoreError> {
    match open.get(Cf::Meta, META_FORMAT)? {
        None => {
            let mut batch = WriteBatch::default();
            batch.put_cf(
                open.cf(Cf::Meta)?,
                META_FORMAT,
                FORMAT_VERSION.to_be_bytes(),
            );
            open.write(batch, true)
        }
        Some(stored) => match read_u32(&stored, "format version")? {
            0 => Err(StoreError::Record {
                what: "format version",
            }),
            found if found > FORMAT_VERSION => Err(StoreError::NewerFormat {
                path: path.to_owned(),
                found,
                supported: FORMAT_VERSION,
            }),
            _ => Ok(()),
        },
    }
}

fn recover(open: &Open<'_>) -> Result<Recovered, StoreError> {
    let mut recovered = Recovered {
        next_shared: 1,
        ..Recovered::default()
    };
    if let Some(stored) = open.get(Cf::Meta, META_SHARED)? {
        recovered.next_shared = read_u64(&stored, "reserved id")?.max(1);
    }
    for (key, value) in open.scan(Cf::Meta, META_DATA_KEY)? {
        let number = read_u32(
            key.get(META_DATA_KEY.len()..).unwrap_or_default(),
            "data key",
        )?;
        recovered.data_keys.push((number, value.into_vec()));
    }
    for (_, value) in open.scan(Cf::Meta, META_QUEUE)? {
        let info = QueueInfo::decode(&*value).map_err(|_| StoreError::Record { what: "queue" })?;
        if usize::try_from(info.number).ok() != Some(recovered.queues.len()) {
            return Err(StoreError::Record {
                what: "queue numbers",
            });
        }
        recovered.queues.push(Arc::new(recover_queue(open, info)?));
    }
    Ok(recovered)
}

/// The checkpoint, and what was appended after it: entries are contiguous there and all of them
/// unsettled, because a settle writes a checkpoint.
fn recover_queue(open: &Open<'_>, info: QueueInfo) -> Result<QueueState, StoreError> {
    let damaged = |_| StoreError::Record { what: "checkpoint" };
    let checkpoint = match open.get(Cf::Checkpoints, &info.number.to_be_bytes())? {
        None => Checkpoint {
            version: RECORD_VERSION,
            ..Checkpoint::default()
        },
        Some(stored) => Checkpoint::decode(&*stored).map_err(|_| damaged(""))?,
    };
    if checkpoint.version != RECORD_VERSION
        || checkpoint.sparse_start.len() != checkpoint.sparse_length.len()
    {
        return Err(damaged(""));
    }
    let spans = checkpoint
        .sparse_start
        .iter()
        .zip(&checkpoint.sparse_length);
    let spans = spans.map(|(start, length)| *start..start.saturating_add(*length));
    let settled = SettleSet::recover(
        checkpoint.mark,
        checkpoint.next_offset,
        checkpoint.length,
        spans,
    )
    .map_err(damaged)?;
    let mut iterator = read::entries(open, info.number, checkpoint.next_offset, u64::MAX)?;
    iterator.seek_to_last();
    let next = match read::offset_at(&iterator)? {
        None => checkpoint.next_offset,
        Some(last) => last.saturating_add(1),
    };
    let id = QueueId {
        endpoint: info.endpoint,
        priority: info.priority,
    };
    Ok(QueueState::recovered(id, info.number, next, settled))
}

/// Unwraps the data keys; stores a new one when none can be used.
fn data_key(db: &Db, recovered: &Recovered, wrap: &dyn KeyWrap) -> Result<Sealer, StoreError> {
    let (sealer, new) = Sealer::open(&recovered.data_keys, wrap);
    let Some((number, record)) = new else {
        return Ok(sealer);
    };
    db.with(|open| {
        let meta = open.cf(Cf::Meta)?;
        let mut batch = WriteBatch::default();
        batch.put_cf(meta, numbered(META_DATA_KEY, number), record);
        let surplus = (recovered.data_keys.len() + 1).saturating_sub(DATA_KEYS_MAX);
        for (oldest, _) in recovered.data_keys.iter().take(surplus) {
            batch.delete_cf(meta, numbered(META_DATA_KEY, *oldest));
        }
        open.write(batch, true)
    })?;
    Ok(sealer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_dates() {
        assert_eq!(utc_stamp(0), "19700101T000000Z");
        assert_eq!(utc_stamp(951_782_399_999), "20000228T235959Z");
        assert_eq!(utc_stamp(951_782_400_000), "20000229T000000Z");
        assert_eq!(utc_stamp(1_787_306_405_120), "20260821T100005Z");
        assert_eq!(utc_stamp(4_107_542_400_000), "21000301T000000Z");
    }
}

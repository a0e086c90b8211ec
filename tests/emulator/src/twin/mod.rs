//! The twins of devices and modules (spec/upstream.md B6).
//!
//! A twin comes into being with version 1 when somebody first asks for it. A change is in the
//! journal before anybody hears of it. Who is told of a desired patch is told under the lock of
//! the twins, so that patches arrive in the order of their versions.

mod check;
mod document;

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

pub(crate) use document::{Notice, Object, ServiceChange, Twin};

use crate::connections::Fence;
use crate::identity::Identity;
use crate::journal::{Change, Journal, JournalError};
use crate::limits::{TWIN_DEPTH_MAX, TWIN_KEY_BYTES_MAX, TWIN_STRING_BYTES_MAX};

const PREFIX: &str = "twin/";

/// Why a twin is not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TwinError {
    #[error("objects and arrays are nested deeper than {TWIN_DEPTH_MAX}")]
    Depth,
    #[error("the etag does not match")]
    Etag,
    #[error("the connection was closed or replaced before the change")]
    Fenced,
    #[error("an integer is out of range")]
    Integer,
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(
        "the key {0:?} is empty, longer than {TWIN_KEY_BYTES_MAX} bytes, or has a control \
         character, `.`, `$` or a space"
    )]
    Key(String),
    #[error("an array has a null")]
    NullInArray,
    #[error("{section} would have {bytes} bytes, {bytes_max} are the most")]
    Size {
        section: &'static str,
        bytes: usize,
        bytes_max: usize,
    },
    #[error("a text is longer than {TWIN_STRING_BYTES_MAX} bytes")]
    String,
    #[error("the reported properties have version {current}, not {wanted}")]
    Version { wanted: u64, current: u64 },
}

impl TwinError {
    /// The status of the answer: 400 for what breaks a rule, 412 for a version or etag.
    pub(crate) fn status(&self) -> u16 {
        match self {
            Self::Etag | Self::Version { .. } => 412,
            Self::Fenced | Self::Journal(_) => 500,
            Self::Depth
            | Self::Integer
            | Self::Key(_)
            | Self::NullInArray
            | Self::Size { .. }
            | Self::String => 400,
        }
    }
}

/// All twins of one emulator.
pub(crate) struct Twins {
    twins: Mutex<BTreeMap<Identity, Twin>>,
    journal: Arc<Journal>,
}

impl Twins {
    /// Reads the twins of those who `exist`; others were created over REST in an earlier life of
    /// the emulator, and are gone with it.
    pub(crate) fn open(
        journal: Arc<Journal>,
        exists: impl Fn(&Identity) -> bool,
    ) -> Result<Self, JournalError> {
        let twins = journal.load(PREFIX)?.into_iter();
        let twins = twins.filter_map(|(key, twin)| Some((Identity::parse(&key).ok()?, twin)));
        let twins = twins.filter(|(identity, _)| exists(identity)).collect();
        Ok(Self {
            twins: Mutex::new(twins),
            journal,
        })
    }

    pub(crate) fn get(&self, identity: &Identity) -> Twin {
        self.twins.lock().get(identity).cloned().unwrap_or_default()
    }

    /// Merges a device's patch; returns the new version of the reported properties.
    ///
    /// # Errors
    /// The patch does not fit, or the fence is closed; nothing is changed then.
    pub(crate) fn report(
        &self,
        identity: &Identity,
        fence: &Fence,
        patch: &Object,
        wanted: Option<u64>,
        now_ms: u64,
    ) -> Result<u64, TwinError> {
        let mut twins = self.twins.lock();
        if fence.is_closed() {
            return Err(TwinError::Fenced);
        }
        let old = twins.get(identity).cloned().unwrap_or_default();
        let (next, version) = old.report(patch, wanted, now_ms)?;
        self.store(&mut twins, identity, next)?;
        Ok(version)
    }

    /// Carries out a change of the service side, and tells `notify` what devices have to know.
    ///
    /// # Errors
    /// The change does not fit, or `etag` is not the twin's; nothing is changed then.
    pub(crate) fn serve(
        &self,
        identity: &Identity,
        change: &ServiceChange,
        etag: Option<&str>,
        now_ms: u64,
        notify: impl FnOnce(&Notice),
    ) -> Result<Twin, TwinError> {
        let mut twins = self.twins.lock();
        let old = twins.get(identity).cloned().unwrap_or_default();
        if etag.is_some_and(|etag| etag != old.etag()) {
            return Err(TwinError::Etag);
        }
        let (next, notice) = old.serve(change, now_ms)?;
        self.store(&mut twins, identity, next.clone())?;
        if let Some(notice) = &notice {
            notify(notice);
        }
        Ok(next)
    }

    /// Whether the change would be accepted as things stand.
    pub(crate) fn check(
        &self,
        identity: &Identity,
        change: &ServiceChange,
    ) -> Result<(), TwinError> {
        self.get(identity).serve(change, 0).map(|_| ())
    }

    /// Drops the twin of an identity that is no more.
    pub(crate) fn forget(&self, identity: &Identity) -> Result<(), JournalError> {
        let mut twins = self.twins.lock();
        if twins.remove(identity).is_some() {
            self.journal.write(&[Change::delete(key(identity))?])?;
        }
        Ok(())
    }

    fn store(
        &self,
        twins: &mut BTreeMap<Identity, Twin>,
        identity: &Identity,
        twin: Twin,
    ) -> Result<(), JournalError> {
        self.journal.write(&[Change::put(key(identity), &twin)?])?;
        twins.insert(identity.clone(), twin);
        Ok(())
    }
}

fn key(identity: &Identity) -> String {
    format!("{PREFIX}{identity}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connections::{Connections, Transport};

    #[test]
    fn a_fenced_connection_reports_nothing() {
        let journal = Arc::new(Journal::open(None).unwrap());
        let twins = Twins::open(journal, |_| true).unwrap();
        let connections = Connections::default();
        let peer = "127.0.0.1:1".parse().unwrap();
        let connection = connections.open(Transport::Mqtt, peer, 0);
        let leaf = Identity::parse("leaf1").unwrap();
        let report = || twins.report(&leaf, connection.fence(), &Object::new(), None, 0);
        assert_eq!(report().unwrap(), 2);
        connections.close_matching(|_| true);
        assert!(matches!(report(), Err(TwinError::Fenced)));
        assert_eq!(twins.get(&leaf).version(), 2);
    }

    /// Twins of identities that the registry does not have any more are not read.
    #[test]
    fn only_twins_of_known_identities_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let open = |known: &'static str| {
            let journal = Arc::new(Journal::open(Some(&path)).unwrap());
            Twins::open(journal, move |identity| identity.to_string() == known).unwrap()
        };
        let leaf = Identity::parse("leaf1").unwrap();
        let change = ServiceChange {
            tags: Some(Object::new()),
            ..ServiceChange::default()
        };
        open("leaf1")
            .serve(&leaf, &change, None, 0, |_| {})
            .unwrap();
        assert_eq!(open("leaf1").get(&leaf).version(), 2);
        assert_eq!(open("leaf2").get(&leaf).version(), 1);
    }
}

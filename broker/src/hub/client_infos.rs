//! What clients say about themselves, by identity: kept across restarts, so that the upstream is told
//! of it also while the client is away (spec/upstream.md A3.4).
//!
//! Memory holds one small entry for each identity that has ever said something and is in the scope;
//! what changes is written in the background, the latest state only. Nobody waits for it: a crash
//! before the write loses what the client will say again when it connects.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use edgehub_proto::hub::ClientInfo;
use edgehub_proto::identity::Identity;
use edgehub_storage::{Column, KvOp, Store, StoreError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Bytes of a model id or product info that are kept; a longer one is ignored.
pub const INFO_BYTES_MAX: usize = 1_024;
/// How long a failed write waits until it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const PREFIX: &str = "client/";

/// A record of the store: key `client/` and the identity.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    product_info: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model_id: Option<String>,
}

/// What all clients have said.
#[derive(Debug)]
pub(super) struct ClientInfos {
    store: Store,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    infos: HashMap<Identity, ClientInfo>,
    unsaved: BTreeSet<Identity>,
}

impl ClientInfos {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Reads what was kept. What a client has said since counts more.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub(super) fn restore(&self) -> Result<(), StoreError> {
        let stored = stored_client_infos(&self.store)?;
        let mut state = self.state.lock();
        for (identity, info) in stored {
            state.infos.entry(identity).or_insert(info);
        }
        Ok(())
    }

    /// Takes what a client says. The whole of what is known, when that has changed.
    pub(super) fn record(&self, identity: &Identity, info: ClientInfo) -> Option<ClientInfo> {
        let info = ClientInfo {
            product_info: bounded(identity, "product info", info.product_info),
            model_id: bounded(identity, "model id", info.model_id),
        };
        let mut state = self.state.lock();
        if state.infos.get(identity).cloned().unwrap_or_default() == info {
            return None;
        }
        if info == ClientInfo::default() {
            state.infos.remove(identity);
        } else {
            state.infos.insert(identity.clone(), info.clone());
        }
        state.unsaved.insert(identity.clone());
        drop(state);
        self.changed.notify_one();
        Some(info)
    }

    /// What is known of a client.
    pub(super) fn get(&self, identity: &Identity) -> ClientInfo {
        let state = self.state.lock();
        state.infos.get(identity).cloned().unwrap_or_default()
    }

    /// Everything that is known.
    pub(super) fn all(&self) -> Vec<(Identity, ClientInfo)> {
        let state = self.state.lock();
        let all = state.infos.iter();
        all.map(|(identity, info)| (identity.clone(), info.clone()))
            .collect()
    }

    /// Forgets the others. Returns whom it forgot.
    pub(super) fn retain(&self, keep: impl Fn(&Identity) -> bool) -> Vec<Identity> {
        let mut state = self.state.lock();
        let gone: Vec<Identity> = state
            .infos
            .keys()
            .filter(|identity| !keep(identity))
            .cloned()
            .collect();
        for identity in &gone {
            state.infos.remove(identity);
            state.unsaved.insert(identity.clone());
        }
        drop(state);
        self.changed.notify_one();
        gone
    }

    /// Writes what changes, until `stop`.
    pub(super) async fn run(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = self.changed.notified() => {}
                () = stop.cancelled() => return,
            }
            while let Some((unsaved, operations)) = self.unsaved() {
                let Err(error) = self.store.write(operations).await else {
                    continue;
                };
                if !error.is_transient() {
                    tracing::warn!("What clients say about themselves is not stored: {error}");
                    continue;
                }
                self.state.lock().unsaved.extend(unsaved);
                tokio::select! {
                    () = tokio::time::sleep(RETRY_AFTER) => {}
                    () = stop.cancelled() => return,
                }
            }
        }
    }

    /// Takes what is to be written.
    fn unsaved(&self) -> Option<(BTreeSet<Identity>, Vec<KvOp>)> {
        let mut state = self.state.lock();
        let unsaved = std::mem::take(&mut state.unsaved);
        if unsaved.is_empty() {
            return None;
        }
        let operation = |identity: &Identity| {
            let column = Column::Sessions;
            let key = format!("{PREFIX}{identity}").into_bytes();
            let info = state.infos.get(identity).map(|info| Record {
                product_info: info.product_info.as_deref().map(str::to_owned),
                model_id: info.model_id.as_deref().map(str::to_owned),
            });
            match info.map(|record| serde_json::to_vec(&record)) {
                Some(Ok(value)) => KvOp::Put {
                    column,
                    key,
                    value,
                    sealed: false,
                },
                _ => KvOp::Delete { column, key },
            }
        };
        let operations = unsaved.iter().map(operation).collect();
        Some((unsaved, operations))
    }
}

/// What clients have said about themselves in earlier runs: for the bridge, which may connect for
/// somebody before there is a hub that could tell it. A record that cannot be read is left out.
///
/// # Errors
/// When the store cannot be read.
pub fn stored_client_infos(store: &Store) -> Result<Vec<(Identity, ClientInfo)>, StoreError> {
    let mut infos = Vec::new();
    for (key, value) in store.scan(Column::Sessions)? {
        let Some(identity) = identity(&key) else {
            continue;
        };
        let Ok(record) = serde_json::from_slice::<Record>(&value) else {
            tracing::warn!("What is kept about {identity} cannot be read: it is left out");
            continue;
        };
        let info = ClientInfo {
            product_info: record.product_info.map(Arc::from),
            model_id: record.model_id.map(Arc::from),
        };
        infos.push((identity, info));
    }
    Ok(infos)
}

fn identity(key: &[u8]) -> Option<Identity> {
    let text = std::str::from_utf8(key).ok()?;
    Identity::parse(text.strip_prefix(PREFIX)?).ok()
}

fn bounded(identity: &Identity, what: &str, text: Option<Arc<str>>) -> Option<Arc<str>> {
    let text = text.filter(|text| !text.trim().is_empty())?;
    if text.len() > INFO_BYTES_MAX {
        let bytes = text.len();
        tracing::debug!("The {what} of {identity} has {bytes} bytes and is ignored");
        return None;
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{TestHub, id};

    fn info(product: &str, model: Option<&str>) -> ClientInfo {
        ClientInfo {
            product_info: Some(product.into()),
            model_id: model.map(Arc::from),
        }
    }

    #[tokio::test]
    async fn what_is_said_is_there_after_a_restart_and_gone_when_forgotten() {
        let test = TestHub::new();
        let store = test.hub.store().clone();
        let infos = Arc::new(ClientInfos::new(store.clone()));
        let stop = CancellationToken::new();
        let writer = tokio::spawn({
            let (infos, stop) = (Arc::clone(&infos), stop.clone());
            async move { infos.run(stop).await }
        });
        let said = info("py", Some("dtmi:a;1"));
        assert_eq!(infos.record(&id("leaf1"), said.clone()), Some(said.clone()));
        assert_eq!(
            infos.record(&id("leaf1"), said.clone()),
            None,
            "nothing new"
        );
        infos.record(&id("leaf2"), info("node", None));
        let reopened = || {
            let again = ClientInfos::new(store.clone());
            again.restore().unwrap();
            again
        };
        wait_until(|| reopened().all().len() == 2).await;
        assert_eq!(reopened().get(&id("leaf1")), said);
        assert_eq!(
            infos.retain(|identity| *identity == id("leaf1")),
            [id("leaf2")]
        );
        wait_until(|| reopened().all().len() == 1).await;
        stop.cancel();
        writer.await.unwrap();
    }

    async fn wait_until(condition: impl Fn() -> bool) {
        let wait = async {
            while !condition() {
                tokio::task::yield_now().await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait)
            .await
            .expect("it is written");
    }

    #[test]
    fn blanks_and_what_is_too_long_are_nothing() {
        let long: Arc<str> = "x".repeat(INFO_BYTES_MAX + 1).into();
        assert_eq!(bounded(&id("d"), "model id", Some(long)), None);
        assert_eq!(bounded(&id("d"), "model id", Some(" ".into())), None);
        let kept = bounded(&id("d"), "model id", Some("dtmi:a".into()));
        assert_eq!(kept.as_deref(), Some("dtmi:a"));
    }
}

//! A scope API without a network.

use std::{collections::BTreeMap, sync::Arc};

use edgehub_auth::scope_cache::ScopeCache;
use edgehub_proto::{
    auth_chain::AuthChain,
    identity::Identity,
    scope::{Capabilities, Device, Module, ScopeResponse},
};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    api::{ScopeApi, ScopeError},
    http::HttpError,
    keeper::{ScopeConfig, ScopeKeeper},
};
use crate::test_support::{TestStore, id};

fn scope_of(device: &str) -> String {
    format!("ms-azure-iot-edge://{device}-1")
}

pub(super) fn device(id: &str, parent: Option<&str>, is_edge: bool) -> Device {
    let parent_scope = parent.map(scope_of);
    let key = edgehub_proto::scope::SymmetricKey {
        primary_key: Some("a2V5".to_owned()),
        secondary_key: Some("a2V5".to_owned()),
    };
    let authentication = edgehub_proto::scope::Authentication {
        symmetric_key: Some(key),
        x509_thumbprint: None,
        kind: "sas".to_owned(),
    };
    Device {
        device_id: id.to_owned(),
        generation_id: "1".to_owned(),
        status: "enabled".to_owned(),
        authentication: Some(authentication),
        capabilities: Some(Capabilities { iot_edge: is_edge }),
        device_scope: if is_edge {
            Some(scope_of(id))
        } else {
            parent_scope.clone()
        },
        parent_scopes: Some(parent_scope.into_iter().collect()),
    }
}

pub(super) fn module(device: &str, module: &str) -> Module {
    Module {
        module_id: module.to_owned(),
        device_id: device.to_owned(),
        generation_id: "1".to_owned(),
        managed_by: None,
        authentication: None,
    }
}

/// How the fake upstream answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mood {
    /// From its registry.
    #[default]
    Answers,
    /// With this status.
    Denies(u16),
    /// Never.
    Hangs,
    /// Not at all.
    IsAway,
}

#[derive(Debug, Default)]
pub(super) struct Upstream {
    /// Device, with its parent.
    pub(super) devices: BTreeMap<String, (Device, Option<String>)>,
    pub(super) modules: Vec<Module>,
    pub(super) pages: Mood,
    pub(super) identities: Mood,
    pub(super) pages_asked: usize,
    /// The page of this device is only answered once it is released.
    pub(super) held_page: Option<(String, Arc<Notify>)>,
    pub(super) identities_asked: Vec<(Identity, String)>,
}

impl Upstream {
    pub(super) fn add(&mut self, id: &str, parent: Option<&str>, is_edge: bool) {
        let record = (device(id, parent, is_edge), parent.map(str::to_owned));
        self.devices.insert(id.to_owned(), record);
    }
}

/// The fake API. Clones share one upstream.
#[derive(Clone, Debug, Default)]
pub(super) struct FakeApi(pub(super) Arc<Mutex<Upstream>>);

impl FakeApi {
    /// edge1 with leaf0 and edge2; edge2 with leaf2.
    pub(super) fn new() -> Self {
        let api = Self::default();
        {
            let mut upstream = api.0.lock();
            upstream.add("edge1", None, true);
            upstream.add("edge2", Some("edge1"), true);
            upstream.add("leaf0", Some("edge1"), false);
            upstream.add("leaf2", Some("edge2"), false);
            upstream.modules.push(module("edge1", "$edgeHub"));
        }
        api
    }
}

async fn answer(
    mood: Mood,
    response: impl FnOnce() -> ScopeResponse,
) -> Result<ScopeResponse, ScopeError> {
    match mood {
        Mood::Answers => Ok(response()),
        Mood::Denies(status) => Err(ScopeError::Status {
            status,
            message: "no".to_owned(),
        }),
        Mood::Hangs => std::future::pending().await,
        Mood::IsAway => Err(HttpError::Connection("away".to_owned()).into()),
    }
}

impl ScopeApi for FakeApi {
    async fn page(
        &self,
        chain: &AuthChain,
        _continuation: Option<String>,
    ) -> Result<ScopeResponse, ScopeError> {
        let edge = chain.target().as_str().to_owned();
        let (mood, held, page) = {
            let mut upstream = self.0.lock();
            upstream.pages_asked += 1;
            let of_edge = |(device, parent): &(Device, Option<String>)| {
                (device.device_id == edge || parent.as_ref() == Some(&edge)).then(|| device.clone())
            };
            let page = ScopeResponse {
                devices: upstream.devices.values().filter_map(of_edge).collect(),
                modules: upstream
                    .modules
                    .iter()
                    .filter(|m| m.device_id == edge)
                    .cloned()
                    .collect(),
                continuation_link: None,
            };
            let held = upstream.held_page.clone();
            (upstream.pages, held.filter(|(id, _)| *id == edge), page)
        };
        if let Some((_, release)) = held {
            release.notified().await;
        }
        answer(mood, || page).await
    }

    async fn identity(
        &self,
        target: &Identity,
        chain: &AuthChain,
    ) -> Result<ScopeResponse, ScopeError> {
        let (mood, response) = {
            let mut upstream = self.0.lock();
            upstream
                .identities_asked
                .push((target.clone(), chain.to_string()));
            let device = upstream
                .devices
                .get(target.device_id())
                .map(|(device, _)| device.clone());
            let is_target = |m: &&Module| {
                m.device_id == target.device_id() && Some(&*m.module_id) == target.module_id()
            };
            let response = ScopeResponse {
                devices: device.into_iter().collect(),
                modules: upstream.modules.iter().filter(is_target).cloned().collect(),
                continuation_link: None,
            };
            (upstream.identities, response)
        };
        answer(mood, || response).await
    }
}

pub(super) fn keeper(
    api: &FakeApi,
    store: &TestStore,
    config: ScopeConfig,
) -> Arc<ScopeKeeper<FakeApi>> {
    let cache = ScopeCache::new(&id("edge1"));
    let own_hub = id("edge1/$edgeHub");
    let keeper = ScopeKeeper::restore(api.clone(), cache, store.store.clone(), own_hub, config);
    Arc::new(keeper.unwrap())
}

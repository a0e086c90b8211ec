//! Tests of the walk: pages in any order, failures in any place.

use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use edgehub_proto::scope::{Capabilities, Device, Module};

use super::*;

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn scope_of(device: &str) -> String {
    format!("ms-azure-iot-edge://{device}-1")
}

fn device(id: &str, parent: Option<&str>, is_edge: bool) -> Device {
    let parent_scope = parent.map(scope_of);
    Device {
        device_id: id.to_owned(),
        generation_id: "1".to_owned(),
        status: "enabled".to_owned(),
        authentication: None,
        capabilities: Some(Capabilities { iot_edge: is_edge }),
        device_scope: if is_edge {
            Some(scope_of(id))
        } else {
            parent_scope.clone()
        },
        parent_scopes: Some(parent_scope.into_iter().collect()),
    }
}

fn module(device: &str, module: &str) -> Module {
    Module {
        module_id: module.to_owned(),
        device_id: device.to_owned(),
        generation_id: "1".to_owned(),
        managed_by: None,
        authentication: None,
    }
}

/// The upstream's registry: answers pages, each with one device or module.
struct Registry {
    devices: Vec<(Device, Option<&'static str>)>,
    modules: Vec<Module>,
    failing: Vec<&'static str>,
}

impl Registry {
    /// edge1 > edge2 > edge3, each with `$edgeHub`; leaf0 under edge1, leaf2 under edge2, leaf3 under
    /// edge3.
    fn new() -> Self {
        let devices = vec![
            (device("edge1", None, true), None),
            (device("edge2", Some("edge1"), true), Some("edge1")),
            (device("edge3", Some("edge2"), true), Some("edge2")),
            (device("leaf0", Some("edge1"), false), Some("edge1")),
            (device("leaf2", Some("edge2"), false), Some("edge2")),
            (device("leaf3", Some("edge3"), false), Some("edge3")),
        ];
        let modules = ["edge1", "edge2", "edge3"]
            .map(|edge| module(edge, "$edgeHub"))
            .to_vec();
        Self {
            devices,
            modules,
            failing: Vec::new(),
        }
    }

    fn remove(&mut self, id: &str) {
        self.devices.retain(|(device, _)| device.device_id != id);
        self.modules.retain(|module| module.device_id != id);
    }

    fn page(&self, visit: &Visit) -> Option<ScopeResponse> {
        let edge = visit.device.as_str();
        if self.failing.contains(&edge) {
            return None;
        }
        let mut items = ScopeResponse::default();
        for (device, parent) in &self.devices {
            if device.device_id == edge || *parent == Some(edge) {
                items.devices.push(device.clone());
            }
        }
        items
            .modules
            .extend(self.modules.iter().filter(|m| m.device_id == edge).cloned());
        // One item per page.
        let index: usize = visit
            .continuation
            .as_ref()
            .map_or(0, |link| link.parse().unwrap());
        let total = items.devices.len() + items.modules.len();
        let mut page = ScopeResponse::default();
        if index < items.devices.len() {
            page.devices.push(items.devices[index].clone());
        } else {
            page.modules
                .extend(items.modules.get(index - items.devices.len()).cloned());
        }
        page.continuation_link = (index + 1 < total).then(|| (index + 1).to_string());
        Some(page)
    }
}

/// Walks `registry` into `cache`.
fn walk(registry: &Registry, cache: &ScopeCache) -> (WalkResult, usize) {
    let mut walk = Walk::new(id("edge1"));
    let mut pages = 0;
    while !walk.is_done() {
        let visit = walk.next().expect("nothing to ask for, but not done");
        if cache.current().auth_chain(&visit.device).is_none() {
            walk.skipped(visit);
            continue;
        }
        pages += 1;
        match registry.page(&visit) {
            Some(page) => {
                let records = walk.page(visit, page);
                cache.apply(ScopeChange::Upsert(records));
            }
            None => walk.failed(visit),
        }
    }
    let result = walk.finish(&cache.current());
    cache.apply(ScopeChange::Remove(result.gone.clone()));
    (result, pages)
}

fn ids(cache: &ScopeCache) -> Vec<String> {
    cache
        .current()
        .iter()
        .map(|record| record.identity.to_string())
        .collect()
}

#[test]
fn a_walk_brings_everything_page_by_page() {
    let cache = ScopeCache::new(&id("edge1"));
    let (result, pages) = walk(&Registry::new(), &cache);
    assert_eq!(result, WalkResult::default());
    assert_eq!(
        ids(&cache),
        [
            "edge1",
            "edge1/$edgeHub",
            "edge2",
            "edge2/$edgeHub",
            "edge3",
            "edge3/$edgeHub",
            "leaf0",
            "leaf2",
            "leaf3"
        ]
    );
    // edge1 and edge2: self, hub, child edge, leaf; edge3: self, hub, leaf.
    assert_eq!(pages, 4 + 4 + 3);
    let chain = cache.current().auth_chain(&id("leaf3")).unwrap();
    assert_eq!(chain.to_string(), "leaf3;edge3;edge2;edge1");
}

#[test]
fn what_is_not_named_any_more_is_gone_with_all_below_it() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    registry.remove("edge2");
    let (result, _) = walk(&registry, &cache);
    // edge3 and below still exist at the hub, but nothing links them to us.
    assert_eq!(
        result.gone.iter().map(Identity::as_str).collect::<Vec<_>>(),
        [
            "edge2",
            "edge2/$edgeHub",
            "edge3",
            "edge3/$edgeHub",
            "leaf2",
            "leaf3"
        ]
    );
    assert_eq!(ids(&cache), ["edge1", "edge1/$edgeHub", "leaf0"]);
}

#[test]
fn a_failed_list_keeps_its_sub_tree_and_stops_nobody_else() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    registry.failing = vec!["edge2"];
    registry.remove("leaf0");
    registry.remove("leaf2");
    registry.remove("leaf3");
    let (result, _) = walk(&registry, &cache);
    assert_eq!(result.failed, [id("edge2")]);
    assert_eq!(
        result.gone,
        [id("leaf0")],
        "edge1's list came, edge2's and edge3's did not"
    );
}

#[test]
fn a_failed_root_removes_nothing() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    registry.failing = vec!["edge1"];
    let (result, _) = walk(&registry, &cache);
    assert_eq!((result.gone, result.failed), (vec![], vec![id("edge1")]));
}

#[test]
fn a_disabled_edge_device_is_passed_over_and_its_sub_tree_stays() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    registry.devices[1].0.status = "disabled".to_owned();
    registry.remove("leaf0");
    let (result, _) = walk(&registry, &cache);
    assert_eq!((result.gone, result.failed), (vec![id("leaf0")], vec![]));
    assert!(cache.current().auth_chain(&id("leaf2")).is_none());
    assert!(cache.current().get(&id("leaf2")).is_some());
    registry.devices[1].0.status = "enabled".to_owned();
    let (result, _) = walk(&registry, &cache);
    assert_eq!(result, WalkResult::default());
    assert!(cache.current().auth_chain(&id("leaf3")).is_some());
}

#[test]
fn a_moved_device_is_not_gone() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    registry.devices[5] = (device("leaf3", Some("edge1"), false), Some("edge1"));
    let (result, _) = walk(&registry, &cache);
    assert_eq!(result, WalkResult::default());
    let chain = cache.current().auth_chain(&id("leaf3")).unwrap();
    assert_eq!(chain.to_string(), "leaf3;edge1");
}

#[test]
fn modules_of_leaves_are_doubtful_when_no_list_names_them() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    let leaf_module = ServiceIdentity::try_from(module("leaf2", "modB")).unwrap();
    cache.apply(ScopeChange::Upsert(vec![leaf_module]));
    let (result, _) = walk(&registry, &cache);
    assert_eq!(
        (result.gone, result.doubtful),
        (vec![], vec![id("leaf2/modB")])
    );
    registry.remove("leaf2");
    let (result, _) = walk(&registry, &cache);
    assert_eq!(result.gone, [id("leaf2"), id("leaf2/modB")]);
}

#[test]
fn odd_records_and_endless_lists_stop_nothing() {
    let mut walk = Walk::new(id("edge1"));
    let visit = walk.next().unwrap();
    let page = ScopeResponse {
        devices: vec![
            device("bad/id", None, false),
            device("leaf0", Some("edge1"), false),
        ],
        modules: vec![module("edge1", "")],
        continuation_link: Some("again".to_owned()),
    };
    let records = walk.page(visit, page.clone());
    assert_eq!(records.len(), 1);
    // The same link again: the list does not end.
    let visit = walk.next().unwrap();
    walk.page(visit, page);
    assert!(walk.is_done());
    let cache = ScopeCache::new(&id("edge1"));
    assert_eq!(walk.finish(&cache.current()).failed, [id("edge1")]);
}

#[test]
fn our_own_identities_are_never_gone() {
    let cache = ScopeCache::new(&id("edge1"));
    let mut registry = Registry::new();
    walk(&registry, &cache);
    registry.devices.clear();
    registry.modules.clear();
    let mut empty = Walk::new(id("edge1"));
    let visit = empty.next().unwrap();
    empty.page(visit, ScopeResponse::default());
    let result = empty.finish(&cache.current());
    assert!(!result.gone.contains(&id("edge1")) && !result.gone.contains(&id("edge1/$edgeHub")));
    assert!(result.gone.contains(&id("edge2")));
}

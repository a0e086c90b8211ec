//! What the two scope calls answer (spec/auth-hierarchy-http.md 7).

use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use edgehub_auth::authenticator::{IdentityRefresh, RefreshOutcome};
use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use edgehub_auth::scope_tree::ServiceIdentity;
use edgehub_proto::clock::ManualClock;
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;

use super::{Answer, exchange, get, post};
use crate::http::scope_api::ScopeApi;
use crate::test_support::*;

/// Upstream in a box: learns `knows` into the cache, says `otherwise` about others.
pub(super) struct Upstream {
    cache: Arc<ScopeCache>,
    knows: Vec<ServiceIdentity>,
    otherwise: RefreshOutcome,
    pub(super) asked: Mutex<Vec<String>>,
}

impl IdentityRefresh for Upstream {
    fn refresh<'a>(
        &'a self,
        target: &'a Identity,
        on_behalf_of: &'a str,
    ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>> {
        self.asked
            .lock()
            .push(format!("{target} for {on_behalf_of}"));
        let known = self
            .knows
            .iter()
            .find(|record| record.identity == *target)
            .cloned();
        let outcome = match known {
            Some(record) => {
                self.cache.apply(ScopeChange::Upsert(vec![record]));
                RefreshOutcome::Refreshed
            }
            None => self.otherwise,
        };
        Box::pin(std::future::ready(outcome))
    }
}

/// The head of the hub on `edge1`.
pub(super) struct Head {
    pub(super) cache: Arc<ScopeCache>,
    pub(super) upstream: Arc<Upstream>,
    pub(super) router: Router,
}

pub(super) fn head(knows: Vec<ServiceIdentity>, otherwise: RefreshOutcome) -> Head {
    head_of(sample_cache(), knows, otherwise)
}

pub(super) fn head_of(
    cache: Arc<ScopeCache>,
    knows: Vec<ServiceIdentity>,
    otherwise: RefreshOutcome,
) -> Head {
    let upstream = Arc::new(Upstream {
        cache: Arc::clone(&cache),
        knows,
        otherwise,
        asked: Mutex::default(),
    });
    let clock = Arc::new(ManualClock::new(NOW_S * 1000));
    let authenticator = authenticator(&cache, &clock, Some(Arc::clone(&upstream) as _));
    let router = ScopeApi::new(Arc::clone(&cache), authenticator).router();
    Head {
        cache,
        upstream,
        router,
    }
}

pub(super) const SCOPE: &str = "devicesAndModulesInTargetDeviceScope";
pub(super) const IDENTITY: &str = "getDeviceAndModuleOnBehalfOf";

/// Calls as the hub on `device` does.
pub(super) async fn call(head: &Head, device: &str, what: &str, body: &str) -> Answer {
    let path = format!("/devices/{device}/modules/$edgeHub/{what}?api-version=2020-06-30-preview");
    let token = token(&format!("{device}/$edgeHub"));
    one(head, &post(&path, &[("Authorization", &token)], body)).await
}

pub(super) async fn one(head: &Head, request: &[u8]) -> Answer {
    let mut answers = exchange(head.router.clone(), request).await;
    assert_eq!(answers.len(), 1, "{answers:?}");
    let answer = answers.remove(0);
    assert!(answer.has("x-content-type-options: nosniff"), "{answer:?}");
    answer
}

/// Devices, then modules, as ids.
fn names(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, 200, "{answer:?}");
    let json = answer.json();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let devices = json["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| text(&d["deviceId"]));
    let modules = json["modules"].as_array().unwrap().iter();
    let modules = modules.map(|m| format!("{}/{}", text(&m["deviceId"]), text(&m["moduleId"])));
    devices.chain(modules).collect()
}

#[tokio::test]
async fn a_child_hub_is_told_what_is_below_it() {
    let head = head(vec![], RefreshOutcome::Unavailable);
    let own = call(
        &head,
        "edge2",
        SCOPE,
        r#"{"pageSize":100,"authChain":"edge2"}"#,
    )
    .await;
    let all = ["edge2", "edge3", "leaf1", "edge2/$edgeHub", "leaf1/modB"];
    assert_eq!(names(&own), all);
    // Properties in the reference's order, `type` last: the child's setters depend on it.
    assert!(
        own.body.starts_with(r#"{"devices":[{"deviceId":"#),
        "{}",
        own.body
    );
    assert!(
        own.body
            .contains(r#""type":"sas"},"capabilities":{"iotEdge":true}"#)
    );
    assert!(
        own.body
            .contains(&format!(r#"{{"primaryKey":"{}""#, key("leaf1", 0)))
    );
    assert!(own.body.ends_with(r#","continuationLink":null}"#));

    let deeper = call(&head, "edge2", SCOPE, r#"{"authChain":"edge3;edge2"}"#).await;
    assert_eq!(names(&deeper), ["edge3", "edge3/$edgeHub"]);
    assert!(
        head.upstream.asked.lock().is_empty(),
        "this call never asks upstream"
    );
}

#[tokio::test]
async fn pages_are_followed_by_their_links() {
    let head = head(vec![], RefreshOutcome::Unavailable);
    let mut link = serde_json::Value::Null;
    let mut seen = Vec::new();
    for _ in 0..5 {
        let body = serde_json::json!(
            {"pageSize": 1, "continuationLink": link, "authChain": "edge2"}
        );
        let page = call(&head, "edge2", SCOPE, &body.to_string()).await;
        seen.extend(names(&page));
        link = page.json()["continuationLink"].clone();
    }
    assert_eq!(
        seen,
        ["edge2", "edge3", "leaf1", "edge2/$edgeHub", "leaf1/modB"]
    );
    assert!(link.is_null());
}

#[tokio::test]
async fn one_identity_is_fetched_from_upstream_first() {
    let new = vec![leaf("new", "edge3")];
    let head = head(new, RefreshOutcome::NotFound);
    let body = r#"{"targetDeviceId":"new","authChain":"edge3;edge2"}"#;
    assert_eq!(names(&call(&head, "edge2", IDENTITY, body).await), ["new"]);
    assert_eq!(head.upstream.asked.lock().as_slice(), ["new for edge3"]);

    let body = r#"{"targetDeviceId":"leaf1","targetModuleId":"modB","authChain":"edge2"}"#;
    let answer = call(&head, "edge2", IDENTITY, body).await;
    assert_eq!(names(&answer), ["leaf1", "leaf1/modB"]);
    assert_eq!(
        head.upstream.asked.lock().last().unwrap(),
        "leaf1/modB for edge2"
    );
}

#[tokio::test]
async fn an_unknown_identity_is_denied_only_on_positive_evidence() {
    let body = r#"{"targetDeviceId":"nobody","authChain":"edge2"}"#;
    let denied = head(vec![], RefreshOutcome::NotFound);
    let answer = call(&denied, "edge2", IDENTITY, body).await;
    assert_eq!(
        answer.body,
        r#"{"devices":[],"modules":[],"continuationLink":null}"#
    );
    for outcome in [RefreshOutcome::Unavailable, RefreshOutcome::Limited] {
        let offline = head(vec![], outcome);
        let answer = call(&offline, "edge2", IDENTITY, body).await;
        assert_eq!(answer.status, 503);
        assert_eq!(answer.error(), "nobody is not known now");
        // What is known is told, whether upstream is there or not.
        let body = r#"{"targetDeviceId":"leaf1","authChain":"edge2"}"#;
        assert_eq!(
            names(&call(&offline, "edge2", IDENTITY, body).await),
            ["leaf1"]
        );
    }
}

#[tokio::test]
async fn ids_of_the_path_are_decoded_once() {
    let cache = sample_cache();
    cache.apply(ScopeChange::Upsert(vec![
        edge("a%41", Some("edge1")),
        module("a%41/$edgeHub"),
    ]));
    let head = head_of(cache, vec![], RefreshOutcome::NotFound);
    let token = token("a%41/$edgeHub");
    let call = async |path: &str| {
        let body = r#"{"authChain":"a%41"}"#;
        one(&head, &post(path, &[("Authorization", &token)], body)).await
    };
    for path in [
        format!("/devices/a%2541/modules/%24edgeHub/{SCOPE}"),
        format!("/devices/%61%25%34%31/modules/$edgeHub/{SCOPE}?x=%zz"),
    ] {
        assert_eq!(
            names(&call(&path).await),
            ["a%41", "a%41/$edgeHub"],
            "{path}"
        );
    }
    for path in [
        format!("/devices//modules/$edgeHub/{SCOPE}"),
        format!("/devices/a%252541/modules/$edgeHub/{SCOPE}"),
        format!("/devices/a%41/modules/$edgeHub/{SCOPE}"),
        format!("/devices/a%2541/modules/%2524edgeHub/{SCOPE}"),
        format!("/devices/a%2541/modules/$edgeHub%20/{SCOPE}"),
        format!("/devices/a%ff/modules/$edgeHub/{SCOPE}"),
        format!("/devices/..%2fa%2541/modules/$edgeHub/{SCOPE}"),
        format!("/devices/a%2541%2fmodules/modules/$edgeHub/{SCOPE}"),
    ] {
        assert_eq!(call(&path).await.status, 401, "{path}");
    }
}

#[tokio::test]
async fn other_paths_and_methods_are_not_served() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let scope = format!("/devices/edge2/modules/$edgeHub/{SCOPE}");
    for path in [
        "/",
        "/metrics",
        "/devices/edge2/modules/$edgeHub",
        "/devices/edge2/modules/$edgeHub/getModuleOnBehalfOf",
        "/devices/edge2/files",
        &format!("{scope}/"),
        &format!("/x/..{scope}"),
        &format!("/{scope}"),
    ] {
        let answer = one(&head, &post(path, &[("Authorization", "x")], "{}")).await;
        assert_eq!((answer.status, answer.body.as_str()), (404, ""), "{path}");
    }
    assert_eq!(one(&head, &get(&scope)).await.status, 405);
}

//! Who may connect, and who is made to leave when the scope changes
//! (spec/auth-hierarchy-http.md 4.6).

use edgehub_auth::authenticator::Credential;
use edgehub_auth::scope_cache::ScopeChange;
use edgehub_auth::scope_tree::{Authentication, KeyMaterial, ServiceIdentity, Status};
use edgehub_proto::message::Message;
use edgehub_proto::stored;
use edgehub_storage::{Append, AppendBatch, CommitProgress, CommitTicket, Target};
use metrics_exporter_prometheus::PrometheusBuilder;

use super::*;
use crate::test_support::*;

fn upsert(record: ServiceIdentity) -> ScopeChange {
    ScopeChange::Upsert(vec![record])
}

/// Connects these, applies a change, and returns who was told to close.
async fn closed_by(change: ScopeChange, identities: &[&str]) -> Vec<String> {
    let test = TestHub::new();
    closed_in(&test, identities, |scope| {
        scope.apply(change);
    })
    .await
}

async fn closed_in(
    test: &TestHub,
    identities: &[&str],
    change: impl FnOnce(&ScopeCache),
) -> Vec<String> {
    let mut connected = Vec::new();
    for identity in identities {
        connected.push(
            test.hub
                .connect(claim(identity), ConnectOptions::default())
                .await
                .unwrap(),
        );
    }
    let stop = CancellationToken::new();
    let watcher = Arc::clone(&test.hub).watch_scope(stop.clone());
    let check = async {
        // The watcher runs on this task: it has subscribed once it was polled, and has judged
        // everybody once it is polled after the change.
        tokio::task::yield_now().await;
        change(&test.scope);
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
    };
    tokio::join!(watcher, check);
    connected
        .iter()
        .filter(|connected| connected.registration.closed().is_cancelled())
        .map(|connected| connected.principal.identity().to_string())
        .collect()
}

#[tokio::test]
async fn whoever_is_removed_disabled_or_given_other_keys_is_closed() {
    let all = ["leaf0", "leaf1", "leaf1/modB", "leaf10"];
    let removed = ScopeChange::Remove(vec![id("leaf1")]);
    assert_eq!(closed_by(removed, &all).await, ["leaf1", "leaf1/modB"]);

    let disabled = ServiceIdentity {
        status: Status::Disabled,
        ..leaf("leaf1", "edge2")
    };
    assert_eq!(
        closed_by(upsert(disabled), &all).await,
        ["leaf1", "leaf1/modB"]
    );

    let new_key = Authentication::SymmetricKey {
        primary: KeyMaterial::new(&key("leaf0", 1)),
        secondary: None,
    };
    let rotated = ServiceIdentity {
        authentication: new_key,
        ..leaf("leaf0", "edge1")
    };
    assert_eq!(closed_by(upsert(rotated), &all).await, ["leaf0"]);

    // While a module's own key is rotated its connection ends, its device's does not.
    let new_key = Authentication::SymmetricKey {
        primary: KeyMaterial::new(&key("leaf1/modB", 1)),
        secondary: None,
    };
    let rotated = ServiceIdentity {
        authentication: new_key,
        ..module("leaf1/modB")
    };
    assert_eq!(closed_by(upsert(rotated), &all).await, ["leaf1/modB"]);
}

#[tokio::test]
async fn an_edge_device_takes_along_all_below_it() {
    let all = ["leaf0", "leaf1", "edge3/$edgeHub", "leaf10"];
    let below = ["leaf1", "edge3/$edgeHub"];
    let removed = ScopeChange::Remove(vec![id("edge2")]);
    assert_eq!(closed_by(removed, &all).await, below);
    let disabled = ServiceIdentity {
        status: Status::Disabled,
        ..edge("edge2", Some("edge1"))
    };
    assert_eq!(closed_by(upsert(disabled), &all).await, below);
    // Moved below an edge device that is none of ours.
    let moved = edge("edge2", Some("elsewhere"));
    assert_eq!(closed_by(upsert(moved), &all).await, below);
}

#[tokio::test]
async fn a_change_that_says_nothing_about_a_client_leaves_it_alone() {
    let all = ["leaf0", "leaf1", "leaf1/modB", "leaf10"];
    let none: [&str; 0] = [];
    assert_eq!(closed_by(upsert(leaf("leaf2", "edge2")), &all).await, none);
    // Moved within our scope.
    assert_eq!(closed_by(upsert(leaf("leaf1", "edge3")), &all).await, none);
    let old_key = KeyMaterial::new(&key("leaf0", 0));
    let authentication = Authentication::SymmetricKey {
        primary: KeyMaterial::new(&key("leaf0", 1)),
        secondary: old_key,
    };
    let renewing = ServiceIdentity {
        authentication,
        ..leaf("leaf0", "edge1")
    };
    assert_eq!(closed_by(upsert(renewing), &all).await, none);
}

#[tokio::test]
async fn absence_means_nothing_until_the_scope_is_initialised() {
    let scope = ScopeCache::new(&id("edge1"));
    scope.apply(ScopeChange::Upsert(sample_scope()));
    let test = TestHub::with_scope(scope);
    let none: [&str; 0] = [];
    let remove = |scope: &ScopeCache| {
        scope.apply(ScopeChange::Remove(vec![id("leaf1")]));
    };
    let all = ["leaf0", "leaf1"];
    assert_eq!(closed_in(&test, &all, remove).await, none);

    test.scope.apply(upsert(leaf("leaf1", "edge2")));
    let remove_and_know = |scope: &ScopeCache| {
        scope.apply(ScopeChange::Remove(vec![id("leaf1")]));
        scope.set_initialised();
    };
    assert_eq!(closed_in(&test, &all, remove_and_know).await, ["leaf1"]);
}

#[tokio::test]
async fn a_claim_that_fails_takes_no_place_and_closes_nobody() {
    let test = TestHub::new();
    let first = test
        .hub
        .connect(claim("leaf0"), ConnectOptions::default())
        .await
        .unwrap();
    let wrong = |key: String, expiry_s| Claim {
        credential: Credential::Sas(token_with("leaf0", &key, expiry_s)),
        ..claim("leaf0")
    };
    let long_ago = NOW_S - 301;
    for claim in [
        wrong(key("leaf1", 0), NOW_S + 60),
        wrong(key("leaf0", 0), long_ago),
    ] {
        let refused = test
            .hub
            .connect(claim, ConnectOptions::default())
            .await
            .unwrap_err();
        assert!(matches!(refused, ConnectError::Refused(error) if error.is_definite()));
    }
    assert!(!first.registration.closed().is_cancelled());
    let second = test
        .hub
        .connect(claim("leaf0"), ConnectOptions::default())
        .await
        .unwrap();
    assert!(first.registration.closed().is_cancelled());
    assert!(!second.registration.closed().is_cancelled());
}

#[tokio::test]
async fn the_client_limit_refuses_for_now() {
    let test = TestHub::new();
    let mut connected = Vec::new();
    for identity in ["leaf0", "leaf1", "leaf1/modB", "leaf10"] {
        connected.push(
            test.hub
                .connect(claim(identity), ConnectOptions::default())
                .await
                .unwrap(),
        );
    }
    let full = test
        .hub
        .connect(claim("edge1/modA"), ConnectOptions::default())
        .await
        .unwrap_err();
    assert!(matches!(full, ConnectError::Full(RegistryFull(4))));
    connected.pop();
    test.hub
        .connect(claim("edge1/modA"), ConnectOptions::default())
        .await
        .unwrap();
}

#[tokio::test]
async fn strangers_do_not_add_series() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let test = TestHub::new();
    for stranger in ["nobody", "nobody2", "edge1/nobody"] {
        test.hub
            .connect(claim(stranger), ConnectOptions::default())
            .await
            .unwrap_err();
    }
    let wrong = Claim {
        credential: Credential::None,
        ..claim("leaf0")
    };
    test.hub
        .connect(wrong, ConnectOptions::default())
        .await
        .unwrap_err();
    let text = handle.render();
    let of = |id: &str| {
        text.lines()
            .find(|line| line.contains(&format!("id=\"{id}\"")))
    };
    assert!(
        of(UNKNOWN_ID).is_some_and(|line| line.ends_with(" 3")),
        "{text}"
    );
    assert!(
        of("leaf0").is_some_and(|line| line.ends_with(" 1")),
        "{text}"
    );
    assert!(!text.contains("nobody"), "{text}");
}

#[tokio::test]
async fn expired_messages_are_settled_and_counted_for_who_sent_them() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _guard = ::metrics::set_default_local_recorder(&recorder);
    let test = TestHub::new();
    let queue = test.hub.store().queues().remove(0);
    let progress = CommitProgress::new();
    let now_ms = test.clock.unix_ms();
    let append = |sender: &str, expires_at_ms| {
        let target = Target {
            queue: queue.clone(),
            expires_at_ms,
        };
        Append {
            sender: id(sender),
            message: stored::encode_message(&Message::default()),
            enqueued_ms: now_ms,
            targets: [target].into_iter().collect(),
        }
    };
    // More than the store looks at in one step, and some that stay.
    let mut appends: Vec<Append> = (0..600)
        .map(|_| append("leaf0", Some(now_ms + 1000)))
        .collect();
    appends.extend((0..5).map(|_| append("leaf1", Some(now_ms + 1000))));
    appends.push(append("leaf1", Some(now_ms + 2000)));
    appends.push(append("leaf1", None));
    let ticket = CommitTicket {
        progress: Arc::clone(&progress),
        sequence: 1,
    };
    let batch = AppendBatch { appends, ticket };
    test.hub.store().append(batch).await.unwrap();
    while progress.committed() < 1 {
        progress.changed().await;
    }

    test.hub.expire_messages().await;
    assert_eq!(queue.length(), 607);
    test.clock.advance(Duration::from_secs(1));
    for _ in 0..2 {
        test.hub.expire_messages().await;
        assert_eq!(queue.length(), 2);
    }
    let text = handle.render();
    for (sender, count) in [("leaf0", 600), ("leaf1", 5)] {
        let line = format!(
            "edgehub_messages_dropped_total{{reason=\"ttl_expiry\",from=\"{sender}\",\
             from_route_output=\"\",ms_telemetry=\"True\"}} {count}"
        );
        assert!(text.lines().any(|l| l == line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn the_session_of_an_identity_that_left_is_forgotten_and_no_other() {
    use crate::session::{Session, StoredSubscription};
    let test = TestHub::new();
    let session = Session {
        subscriptions: vec![StoredSubscription {
            filter: "$iothub/twin/res/#".to_owned(),
            qos: 0,
        }],
    };
    for identity in ["leaf0", "leaf1", "leaf10"] {
        let mut saving = test.hub.sessions().save(&id(identity), session.clone());
        saving.done().await;
    }
    test.scope.apply(ScopeChange::Remove(vec![id("leaf1")]));
    test.hub.forget_strangers().await;
    for (identity, is_there) in [("leaf0", true), ("leaf1", false), ("leaf10", true)] {
        let found = test.hub.sessions().load(&id(identity)).await.unwrap();
        assert_eq!(found.is_some(), is_there, "{identity}");
    }
}

//! Tests of single refreshes: what is asked, what is remembered, what is believed.

use std::time::Duration;

use edgehub_proto::hub::Connectivity;
use tokio::time::advance;
use tokio_util::sync::CancellationToken;

use super::super::keeper::ScopeConfig;
use super::super::test_support::{FakeApi, Mood, keeper, module};
use super::*;
use crate::test_support::{HeldClock, TestStore, eventually, id, settle_down};

struct World {
    api: FakeApi,
    refresh: ScopeRefresh<FakeApi>,
    cancel: CancellationToken,
    _connectivity: watch::Sender<Connectivity>,
    _store: TestStore,
    _held: HeldClock,
}

impl World {
    /// A keeper that has walked.
    async fn new(config: ScopeConfig) -> Self {
        let held = HeldClock::new();
        let (api, store) = (FakeApi::new(), TestStore::new());
        let keeper = keeper(&api, &store, config);
        let (connectivity, receiver) = watch::channel(Connectivity::Disconnected);
        let cancel = CancellationToken::new();
        tokio::spawn(Arc::clone(&keeper).run(receiver, cancel.clone()));
        eventually("walk", || keeper.has_walked()).await;
        let refresh = ScopeRefresh::new(keeper, TaskTracker::new(), cancel.clone());
        Self {
            api,
            refresh,
            cancel,
            _connectivity: connectivity,
            _store: store,
            _held: held,
        }
    }

    async fn ask(&self, target: &str) -> RefreshOutcome {
        self.refresh.refresh(&id(target), "edge1").await
    }

    fn asked(&self) -> usize {
        self.api.0.lock().identities_asked.len()
    }

    fn knows(&self, identity: &str) -> bool {
        self.refresh
            .keeper
            .cache()
            .current()
            .get(&id(identity))
            .is_some()
    }

    fn set(&self, pages: Mood, identities: Mood) {
        let mut upstream = self.api.0.lock();
        upstream.pages = pages;
        upstream.identities = identities;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

#[tokio::test(start_paused = true)]
async fn a_new_identity_is_found_in_the_name_of_its_parent() {
    let world = World::new(ScopeConfig::default()).await;
    world.api.0.lock().add("leaf9", Some("edge2"), false);
    let outcome = world.refresh.refresh(&id("leaf9"), "edge2").await;
    assert_eq!(outcome, RefreshOutcome::Refreshed);
    let chain = world
        .refresh
        .keeper
        .cache()
        .current()
        .auth_chain(&id("leaf9"))
        .unwrap();
    assert_eq!(chain.to_string(), "leaf9;edge2;edge1");
    let asked = world.api.0.lock().identities_asked.clone();
    assert_eq!(asked, [(id("leaf9"), "edge2;edge1".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_module_brings_its_device() {
    let world = World::new(ScopeConfig::default()).await;
    world.api.0.lock().add("leaf9", Some("edge1"), false);
    world.api.0.lock().modules.push(module("leaf9", "m"));
    assert_eq!(world.ask("leaf9/m").await, RefreshOutcome::Refreshed);
    assert!(world.knows("leaf9") && world.knows("leaf9/m"));
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_the_identity_removes_it_and_is_remembered_for_a_while() {
    let world = World::new(ScopeConfig::default()).await;
    world.api.0.lock().devices.remove("leaf0");
    assert!(world.knows("leaf0"));
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::NotFound);
    assert!(!world.knows("leaf0"));
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::NotFound);
    assert_eq!(world.asked(), 1, "remembered");
    // Made again meanwhile: found once the memory has faded.
    world.api.0.lock().add("leaf0", Some("edge1"), false);
    advance(secs(10)).await;
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::Refreshed);
}

#[tokio::test(start_paused = true)]
async fn a_sibling_that_is_answered_nothing_removes_nobody() {
    let world = World::new(ScopeConfig::default()).await;
    for device in ["leaf0", "leaf2"] {
        world.api.0.lock().devices.remove(device);
    }
    for (target, stays) in [("leaf0", true), ("leaf2", false)] {
        let outcome = world.refresh.refresh(&id(target), "edge2").await;
        assert_eq!(outcome, RefreshOutcome::NotFound);
        assert_eq!(world.knows(target), stays, "{target} in the name of edge2");
    }
}

#[tokio::test(start_paused = true)]
async fn our_own_hub_is_never_removed() {
    let world = World::new(ScopeConfig::default()).await;
    world.api.0.lock().modules.clear();
    world.api.0.lock().devices.remove("edge1");
    assert_eq!(world.ask("edge1/$edgeHub").await, RefreshOutcome::NotFound);
    assert!(world.knows("edge1/$edgeHub") && world.knows("edge1"));
}

#[tokio::test(start_paused = true)]
async fn a_known_identity_is_not_asked_about_again_within_the_least_interval() {
    let world = World::new(ScopeConfig::default()).await;
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::Refreshed);
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::Limited);
    advance(secs(120)).await;
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::Refreshed);
    assert_eq!(world.asked(), 2);
    // Without a credential, there may be one any moment.
    assert_eq!(world.ask("edge1/$edgeHub").await, RefreshOutcome::Refreshed);
    assert_eq!(world.ask("edge1/$edgeHub").await, RefreshOutcome::Refreshed);
}

#[tokio::test(start_paused = true)]
async fn callers_for_one_identity_share_one_request() {
    let world = World::new(ScopeConfig::default()).await;
    world.set(Mood::Answers, Mood::Hangs);
    let callers: Vec<_> = (0..20)
        .map(|_| {
            let refresh = world.refresh.clone();
            tokio::spawn(async move { refresh.refresh(&id("leaf0"), "edge1").await })
        })
        .collect();
    settle_down().await;
    assert_eq!(world.asked(), 1);
    advance(secs(10)).await;
    for caller in callers {
        assert_eq!(
            caller.await.unwrap(),
            RefreshOutcome::Unavailable,
            "bounded wait"
        );
    }
    assert!(world.knows("leaf0"));
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_is_away_is_not_asked_by_every_client() {
    let world = World::new(ScopeConfig::default()).await;
    world.set(Mood::IsAway, Mood::IsAway);
    for _ in 0..10 {
        assert_eq!(world.ask("leaf9").await, RefreshOutcome::Unavailable);
    }
    assert_eq!(world.asked(), 1);
    advance(secs(2)).await;
    world.set(Mood::Answers, Mood::Answers);
    world.api.0.lock().add("leaf9", Some("edge1"), false);
    assert_eq!(world.ask("leaf9").await, RefreshOutcome::Refreshed);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_believed_only_with_a_complete_walk() {
    let world = World::new(ScopeConfig::default()).await;
    // The last complete walk is fresh: unknown and refused is a definite no.
    world.set(Mood::Answers, Mood::Denies(401));
    assert_eq!(world.ask("leaf9").await, RefreshOutcome::NotFound);
    // Known and refused: kept, because the refusal may be about us.
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::Refreshed);
    assert!(world.knows("leaf0"));
    // Much later, with an upstream that refuses everything: nothing is decided, nothing removed.
    world.set(Mood::Denies(401), Mood::Denies(401));
    advance(secs(200)).await;
    let asking = {
        let refresh = world.refresh.clone();
        tokio::spawn(async move { refresh.refresh(&id("leaf8"), "edge1").await })
    };
    assert_eq!(asking.await.unwrap(), RefreshOutcome::Unavailable);
    assert!(world.knows("leaf0"));
}

#[tokio::test(start_paused = true)]
async fn not_found_is_enough_for_what_we_do_not_know_either() {
    let world = World::new(ScopeConfig::default()).await;
    world.set(Mood::IsAway, Mood::Denies(404));
    advance(secs(200)).await;
    assert_eq!(world.ask("leaf9").await, RefreshOutcome::NotFound);
    assert!(world.knows("leaf0"));
}

#[tokio::test(start_paused = true)]
async fn a_refused_identity_that_a_walk_does_not_find_is_gone() {
    let world = World::new(ScopeConfig::default()).await;
    world.set(Mood::Answers, Mood::Denies(401));
    world.api.0.lock().devices.remove("leaf0");
    advance(secs(200)).await;
    assert_eq!(world.ask("leaf0").await, RefreshOutcome::NotFound);
    assert!(!world.knows("leaf0"));
}

#[tokio::test(start_paused = true)]
async fn invented_ids_cause_a_bounded_number_of_requests() {
    let world = World::new(ScopeConfig::default()).await;
    let mut limited = 0;
    for number in 0..300 {
        if world.ask(&format!("ghost{number}")).await == RefreshOutcome::Limited {
            limited += 1;
        }
    }
    assert_eq!((world.asked(), limited), (50, 250));
    advance(secs(1)).await;
    for number in 300..400 {
        world.ask(&format!("ghost{number}")).await;
    }
    assert_eq!(world.asked(), 60);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_actor_is_looked_for_by_a_walk() {
    let world = World::new(ScopeConfig::default()).await;
    advance(secs(200)).await;
    world.api.0.lock().add("edge9", Some("edge1"), true);
    world.api.0.lock().add("leaf9", Some("edge9"), false);
    let outcome = world.refresh.refresh(&id("leaf9"), "edge9").await;
    assert_eq!(outcome, RefreshOutcome::Refreshed);
    let outcome = world.refresh.refresh(&id("leaf9"), "stranger").await;
    assert_eq!(outcome, RefreshOutcome::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_question_whose_asking_died_is_asked_again() {
    let world = World::new(ScopeConfig::default()).await;
    let (dead, answer) = watch::channel(None);
    drop(dead);
    let question = (id("leaf2"), "edge1".to_owned());
    let refreshes = &world.refresh.keeper.refreshes;
    refreshes.state.lock().under_way.insert(question, answer);
    assert_eq!(world.ask("leaf2").await, RefreshOutcome::Refreshed);
}

#[tokio::test(start_paused = true)]
async fn who_is_fetched_during_a_walk_is_not_removed_by_its_end() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    let release = Arc::new(tokio::sync::Notify::new());
    api.0.lock().held_page = Some(("edge2".to_owned(), Arc::clone(&release)));
    let keeper = keeper(&api, &store, ScopeConfig::default());
    let (_connectivity, receiver) = watch::channel(Connectivity::Disconnected);
    let cancel = CancellationToken::new();
    let walking = tokio::spawn(Arc::clone(&keeper).run(receiver, cancel.clone()));
    eventually("second page", || api.0.lock().pages_asked == 2).await;
    // The first page, where it belongs, has come already.
    api.0.lock().add("leaf9", Some("edge1"), false);
    let refresh = ScopeRefresh::new(Arc::clone(&keeper), TaskTracker::new(), cancel.clone());
    let outcome = refresh.refresh(&id("leaf9"), "edge1").await;
    assert_eq!(outcome, RefreshOutcome::Refreshed);
    release.notify_one();
    eventually("walk", || keeper.has_walked()).await;
    cancel.cancel();
    walking.await.unwrap();
    assert!(keeper.cache().current().get(&id("leaf9")).is_some());
}

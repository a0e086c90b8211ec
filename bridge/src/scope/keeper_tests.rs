//! Tests of the keeper with a fake upstream, a real store and a clock moved by hand.

use tokio::task::JoinHandle;
use tokio::time::advance;

use super::super::test_support::{FakeApi, Mood, keeper, module};
use super::*;
use crate::test_support::{HeldClock, TestStore, eventually, id, settle_down};

struct Running {
    keeper: Arc<ScopeKeeper<FakeApi>>,
    connectivity: watch::Sender<Connectivity>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

fn run(api: &FakeApi, store: &TestStore, config: ScopeConfig) -> Running {
    let keeper = keeper(api, store, config);
    let (connectivity, receiver) = watch::channel(Connectivity::Disconnected);
    let cancel = CancellationToken::new();
    let task = tokio::spawn(Arc::clone(&keeper).run(receiver, cancel.clone()));
    Running {
        keeper,
        connectivity,
        cancel,
        task,
    }
}

impl Running {
    async fn walks(&self, count: u64) {
        eventually("walk", || self.keeper.walks.borrow().ended >= count).await;
        assert_eq!(self.keeper.walks.borrow().ended, count);
    }

    async fn no_further_walk(&self, count: u64) {
        settle_down().await;
        assert_eq!(self.keeper.walks.borrow().ended, count);
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

#[tokio::test(start_paused = true)]
async fn the_first_walk_fills_cache_and_disk_and_a_restart_offline_restores_them() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    let running = run(&api, &store, ScopeConfig::default());
    assert!(
        running
            .keeper
            .cache()
            .current()
            .auth_chain(&id("edge1/$edgeHub"))
            .is_some()
    );
    assert!(!running.keeper.cache().is_initialised());
    running.walks(1).await;
    assert!(running.keeper.cache().is_initialised() && running.keeper.has_walked());
    assert!(
        running
            .keeper
            .cache()
            .current()
            .auth_chain(&id("leaf2"))
            .is_some()
    );
    let before = running.keeper.cache().current();
    running.stop().await;

    api.0.lock().pages = Mood::IsAway;
    let restored = keeper(&api, &store, ScopeConfig::default());
    assert!(restored.cache().is_initialised() && !restored.has_walked());
    let (before, after) = (
        before.iter().collect::<Vec<_>>(),
        restored.cache().current(),
    );
    assert_eq!(before, after.iter().collect::<Vec<_>>(), "keys included");
}

#[tokio::test(start_paused = true)]
async fn removals_reach_the_disk() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    let running = run(&api, &store, ScopeConfig::default());
    running.walks(1).await;
    api.0.lock().devices.remove("leaf2");
    advance(secs(3601)).await;
    running.walks(2).await;
    running.stop().await;
    let restored = keeper(&api, &store, ScopeConfig::default());
    assert!(restored.cache().current().get(&id("leaf2")).is_none());
    assert!(restored.cache().current().get(&id("leaf0")).is_some());
}

#[tokio::test(start_paused = true)]
async fn what_the_disk_refused_is_written_with_the_next_walk() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    store.store.faults().fail_next(u32::MAX);
    let running = run(&api, &store, ScopeConfig::default());
    running.walks(1).await;
    assert!(running.keeper.cache().current().get(&id("leaf2")).is_some());
    store.store.faults().fail_next(0);
    advance(secs(3601)).await;
    running.walks(2).await;
    running.stop().await;
    let restored = keeper(&api, &store, ScopeConfig::default());
    assert!(restored.cache().current().get(&id("leaf2")).is_some());
}

#[tokio::test(start_paused = true)]
async fn without_the_upstream_walks_are_tried_again_with_growing_pauses() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    api.0.lock().pages = Mood::IsAway;
    let running = run(&api, &store, ScopeConfig::default());
    // The page's own retries: at once, and after a second.
    settle_down().await;
    let mut seconds = Vec::new();
    let mut last = 0;
    for second in 0..600 {
        advance(secs(1)).await;
        settle_down().await;
        let ended = running.keeper.walks.borrow().ended;
        if ended > last {
            last = ended;
            seconds.push(second);
        }
    }
    assert!((6..=11).contains(&seconds.len()), "{seconds:?}");
    let pauses: Vec<u64> = seconds.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(
        pauses.windows(2).all(|pair| pair[0] <= pair[1] + 40),
        "{pauses:?}"
    );
    assert!(*pauses.last().unwrap() >= 90, "{pauses:?}");
    assert!(!running.keeper.cache().is_initialised());
    api.0.lock().pages = Mood::Answers;
    for _ in 0..150 {
        advance(secs(1)).await;
        settle_down().await;
    }
    eventually("initialised", || running.keeper.cache().is_initialised()).await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_reconnect_starts_a_walk_but_not_within_the_least_interval() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    let running = run(&api, &store, ScopeConfig::default());
    running.walks(1).await;
    let reconnect = || {
        running
            .connectivity
            .send_replace(Connectivity::Disconnected);
        running.connectivity.send_replace(Connectivity::Connected);
    };
    reconnect();
    running.no_further_walk(1).await;
    advance(secs(119)).await;
    reconnect();
    running.no_further_walk(1).await;
    advance(secs(2)).await;
    running.no_further_walk(1).await;
    reconnect();
    running.walks(2).await;
    running
        .connectivity
        .send_replace(Connectivity::Disconnected);
    advance(secs(1000)).await;
    running.no_further_walk(2).await;
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_walk_that_failed_is_made_up_for_at_the_reconnect() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    api.0.lock().pages = Mood::Denies(500);
    let config = ScopeConfig {
        retry_min: secs(100),
        ..ScopeConfig::default()
    };
    let running = run(&api, &store, config);
    settle_down().await;
    advance(secs(2)).await;
    running.walks(1).await;
    api.0.lock().pages = Mood::Answers;
    running.connectivity.send_replace(Connectivity::Connected);
    running.no_further_walk(1).await;
    advance(secs(130)).await;
    running.walks(2).await;
    assert!(running.keeper.cache().is_initialised());
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn doubtful_modules_of_leaves_are_asked_about_and_removed_on_proof_only() {
    let _held = HeldClock::new();
    let (api, store) = (FakeApi::new(), TestStore::new());
    // Not named by any page: the fake lists only modules of edge devices.
    api.0.lock().modules.push(module("leaf2", "modB"));
    let running = run(&api, &store, ScopeConfig::default());
    running.walks(1).await;
    let known = ServiceIdentity::try_from(module("leaf2", "modB")).unwrap();
    running
        .keeper
        .cache()
        .apply(ScopeChange::Upsert(vec![known]));
    let is_known = || {
        running
            .keeper
            .cache()
            .current()
            .get(&id("leaf2/modB"))
            .is_some()
    };
    for (mood, stays) in [
        (Mood::Answers, true),
        (Mood::Denies(401), true),
        (Mood::IsAway, true),
    ] {
        api.0.lock().identities = mood;
        let count = running.keeper.walks.borrow().ended + 1;
        advance(secs(3601)).await;
        running.walks(count).await;
        assert_eq!(is_known(), stays, "{mood:?}");
    }
    let asked = api.0.lock().identities_asked[0].clone();
    assert_eq!(asked, (id("leaf2/modB"), "edge2;edge1".to_owned()));
    api.0
        .lock()
        .modules
        .retain(|module| module.device_id != "leaf2");
    api.0.lock().identities = Mood::Answers;
    let count = running.keeper.walks.borrow().ended + 1;
    advance(secs(3601)).await;
    running.walks(count).await;
    assert!(!is_known());
    running.stop().await;
}

//! When upstream is asked, how often, for how long, and what its silence means (design.md D6 and
//! D12). Time is paused: a wait that is too long shows as elapsed time, not as a slow test.

use std::time::Duration;

use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::clock::ManualClock;
use parking_lot::Mutex;

use super::*;
use crate::scope_cache::ScopeChange;
use crate::scope_tree::ServiceIdentity;
use crate::test_support::*;

/// Upstream in a box: applies a prepared change when an identity is asked for, then answers.
struct Upstream {
    cache: Arc<ScopeCache>,
    clock: Arc<ManualClock>,
    knows: Vec<ServiceIdentity>,
    otherwise: RefreshOutcome,
    takes: Duration,
    asked: Mutex<Vec<(String, String)>>,
}

impl IdentityRefresh for Upstream {
    fn refresh<'a>(
        &'a self,
        target: &'a Identity,
        on_behalf_of: &'a str,
    ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>> {
        Box::pin(async move {
            self.asked
                .lock()
                .push((target.to_string(), on_behalf_of.to_owned()));
            // How long upstream takes, in paused time.
            tokio::time::sleep(self.takes).await;
            self.clock.advance(self.takes);
            let known = self.knows.iter().find(|record| record.identity == *target);
            match known {
                Some(record) => {
                    self.cache.apply(ScopeChange::Upsert(vec![record.clone()]));
                    RefreshOutcome::Refreshed
                }
                None => self.otherwise,
            }
        })
    }
}

struct Setup {
    authenticator: Authenticator,
    upstream: Arc<Upstream>,
}

impl Setup {
    fn new(knows: Vec<ServiceIdentity>, otherwise: RefreshOutcome) -> Self {
        Self::slow(knows, otherwise, Duration::from_millis(50))
    }

    fn slow(knows: Vec<ServiceIdentity>, otherwise: RefreshOutcome, takes: Duration) -> Self {
        let cache = ScopeCache::new(&id("edge1"));
        cache.apply(ScopeChange::Upsert(sample_scope()));
        cache.set_initialised();
        let clock = Arc::new(ManualClock::new(NOW_MS));
        let upstream = Arc::new(Upstream {
            cache: Arc::clone(&cache),
            clock: Arc::clone(&clock),
            knows,
            otherwise,
            takes,
            asked: Mutex::default(),
        });
        let hosts = AudienceHosts::new(HUB_HOST, OWN_HOST);
        let refresh: Arc<dyn IdentityRefresh> = Arc::clone(&upstream) as _;
        Self {
            authenticator: Authenticator::new(cache, hosts, clock, Some(refresh)),
            upstream,
        }
    }

    async fn direct(&self, identity: &str, token: String) -> Result<Principal, AuthnError> {
        let credential = Credential::Sas(token);
        self.authenticator
            .authenticate(&Claim {
                identity: id(identity),
                chain: None,
                credential,
            })
            .await
    }

    async fn through(&self, chain: &str, token: String) -> Result<Principal, AuthnError> {
        let chain = AuthChain::parse(chain).unwrap();
        let (identity, credential) = (chain.target().clone(), Credential::Sas(token));
        self.authenticator
            .authenticate(&Claim {
                identity,
                chain: Some(chain),
                credential,
            })
            .await
    }

    /// Everything that upstream was asked, as `identity for on_behalf_of`.
    fn asked(&self) -> Vec<String> {
        let asked = self.upstream.asked.lock();
        asked
            .iter()
            .map(|(identity, device)| format!("{identity} for {device}"))
            .collect()
    }
}

fn undecided(identity: &str, cause: Undecided) -> AuthnError {
    AuthnError::Undecided {
        identity: id(identity),
        cause,
    }
}

fn with_key(mut record: ServiceIdentity, key: &str) -> ServiceIdentity {
    record.authentication = symmetric(key, "");
    record
}

#[tokio::test(start_paused = true)]
async fn a_good_token_of_a_known_identity_asks_nobody() {
    let setup = Setup::new(Vec::new(), RefreshOutcome::Unavailable);
    assert!(setup.direct("leaf1", token_of("leaf1")).await.is_ok());
    assert!(
        setup
            .through("leaf1;edge2", token_of("edge2/$edgeHub"))
            .await
            .is_ok()
    );
    assert!(setup.asked().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_new_identity_gets_in_after_one_question() {
    let setup = Setup::new(vec![leaf("new", "edge2")], RefreshOutcome::NotFound);
    let principal = setup.direct("new", token_of("new")).await.unwrap();
    assert_eq!(principal.identity(), &id("new"));
    assert_eq!(setup.asked(), ["new for edge1"]);
}

#[tokio::test(start_paused = true)]
async fn a_rotated_key_works_after_one_question() {
    let new_key = primary_key("rotated");
    let rotated = with_key(leaf("leaf1", "edge2"), &new_key);
    let setup = Setup::new(vec![rotated], RefreshOutcome::NotFound);
    assert!(
        setup
            .direct("leaf1", token_for("leaf1", &new_key))
            .await
            .is_ok()
    );
    assert_eq!(setup.asked(), ["leaf1 for edge1"]);
    // And the old key is history.
    let error = setup.direct("leaf1", token_of("leaf1")).await.unwrap_err();
    assert_eq!(
        error,
        AuthnError::WrongSignature {
            identity: id("leaf1")
        }
    );
}

#[tokio::test(start_paused = true)]
async fn a_rotated_actor_key_works_after_one_question() {
    let new_key = primary_key("rotated");
    let rotated = with_key(module("edge2/$edgeHub"), &new_key);
    let setup = Setup::new(vec![rotated], RefreshOutcome::NotFound);
    let token = token_for("edge2/$edgeHub", &new_key);
    assert!(setup.through("leaf1;edge2", token).await.is_ok());
    assert_eq!(setup.asked(), ["edge2/$edgeHub for edge1"]);
}

#[tokio::test(start_paused = true)]
async fn a_new_leaf_of_a_rotated_actor_takes_two_questions_and_no_more() {
    let new_key = primary_key("rotated");
    let knows = vec![
        with_key(module("edge2/$edgeHub"), &new_key),
        leaf("new", "edge2"),
    ];
    let setup = Setup::new(knows, RefreshOutcome::NotFound);
    let token = token_for("edge2/$edgeHub", &new_key);
    assert!(setup.through("new;edge2", token).await.is_ok());
    assert_eq!(setup.asked(), ["edge2/$edgeHub for edge1", "new for edge2"]);
}

#[tokio::test(start_paused = true)]
async fn a_leaf_that_has_moved_is_asked_about_and_let_in() {
    let setup = Setup::new(vec![leaf("leaf1", "edge10")], RefreshOutcome::NotFound);
    assert!(
        setup
            .through("leaf1;edge10", token_of("edge10/$edgeHub"))
            .await
            .is_ok()
    );
    assert_eq!(setup.asked(), ["leaf1 for edge10"]);
}

#[tokio::test(start_paused = true)]
async fn a_re_enabled_edge_device_is_asked_about() {
    let setup = Setup::new(vec![edge("edge2", Some("edge1"))], RefreshOutcome::NotFound);
    let off = disabled(edge("edge2", Some("edge1")));
    setup.upstream.cache.apply(ScopeChange::Upsert(vec![off]));
    assert!(setup.direct("leaf1", token_of("leaf1")).await.is_ok());
    assert_eq!(setup.asked(), ["edge2 for edge1"]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_identity_that_upstream_denies_is_a_definite_no() {
    let setup = Setup::new(Vec::new(), RefreshOutcome::NotFound);
    let error = setup
        .direct("nobody", token_of("nobody"))
        .await
        .unwrap_err();
    assert_eq!(
        error,
        AuthnError::UnknownIdentity {
            identity: id("nobody")
        }
    );
    assert!(error.is_definite());
    assert_eq!(setup.asked(), ["nobody for edge1"]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_identity_while_upstream_is_away_is_not_decided() {
    for (outcome, cause) in [
        (RefreshOutcome::Unavailable, Undecided::UpstreamUnavailable),
        (RefreshOutcome::Limited, Undecided::RefreshLimited),
    ] {
        let setup = Setup::new(Vec::new(), outcome);
        let error = setup
            .direct("nobody", token_of("nobody"))
            .await
            .unwrap_err();
        assert_eq!(error, undecided("nobody", cause));
        assert!(!error.is_definite());
        let token = token_of("edge2/$edgeHub");
        let error = setup.through("nobody;edge2", token).await.unwrap_err();
        assert_eq!(error, undecided("nobody", cause));
        let error = setup
            .through("leaf1;edge9", token_of("edge9/$edgeHub"))
            .await
            .unwrap_err();
        assert_eq!(error, undecided("edge9/$edgeHub", cause));
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_token_is_a_definite_no_whatever_upstream_does() {
    for outcome in [
        RefreshOutcome::Unavailable,
        RefreshOutcome::Limited,
        RefreshOutcome::NotFound,
    ] {
        let setup = Setup::new(Vec::new(), outcome);
        let error = setup
            .direct("leaf1", token_for("leaf1", "d3Jvbmc="))
            .await
            .unwrap_err();
        assert_eq!(
            error,
            AuthnError::WrongSignature {
                identity: id("leaf1")
            }
        );
        assert!(error.is_definite());
        assert_eq!(setup.asked(), ["leaf1 for edge1"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_wrong_token_asks_once_even_when_upstream_confirms_the_record() {
    let setup = Setup::new(vec![module("leaf1/modB")], RefreshOutcome::NotFound);
    let error = setup
        .direct("leaf1/modB", token_for("leaf1/modB", "d3Jvbmc="))
        .await
        .unwrap_err();
    assert_eq!(
        error,
        AuthnError::WrongSignature {
            identity: id("leaf1/modB")
        }
    );
    assert_eq!(setup.asked(), ["leaf1/modB for edge1"]);
}

#[tokio::test(start_paused = true)]
async fn other_evidence_is_definite_while_upstream_is_away() {
    let setup = Setup::new(Vec::new(), RefreshOutcome::Unavailable);
    let actor = setup
        .through("leaf1;edge10", token_of("edge10/$edgeHub"))
        .await
        .unwrap_err();
    assert_eq!(actor.reason(), "actor_not_ancestor");
    assert!(actor.is_definite());

    setup
        .upstream
        .cache
        .apply(ScopeChange::Upsert(vec![disabled(leaf("leaf1", "edge2"))]));
    let off = setup.direct("leaf1", token_of("leaf1")).await.unwrap_err();
    assert_eq!(
        off,
        AuthnError::Disabled {
            device: id("leaf1")
        }
    );
    assert!(off.is_definite());
}

#[tokio::test(start_paused = true)]
async fn garbage_asks_nobody() {
    let setup = Setup::new(Vec::new(), RefreshOutcome::NotFound);
    let expired = raw_token(
        &encode(&audience(HUB_HOST, "leaf1")),
        "1000",
        &primary_key("leaf1"),
    );
    let tokens = [
        String::new(),
        "password".to_owned(),
        expired,
        token_of("leaf10"),
    ];
    for token in tokens {
        let error = setup.direct("leaf1", token.clone()).await.unwrap_err();
        assert!(error.is_definite());
        assert!(
            setup
                .through("leaf1;edge2", token)
                .await
                .unwrap_err()
                .is_definite()
        );
    }
    assert!(
        setup
            .direct("nobody", token_of("leaf1"))
            .await
            .unwrap_err()
            .is_definite()
    );
    assert!(setup.asked().is_empty(), "{:?}", setup.asked());
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_upstream_ends_after_ten_seconds() {
    let setup = Setup::slow(
        Vec::new(),
        RefreshOutcome::NotFound,
        Duration::from_secs(3600),
    );
    let start = Instant::now();
    let error = setup
        .direct("nobody", token_of("nobody"))
        .await
        .unwrap_err();
    assert_eq!(error, undecided("nobody", Undecided::RefreshTimedOut));
    assert_eq!(start.elapsed(), REFRESH_WAIT);
    // Known and wrong stays definite, after the same wait at most.
    let start = Instant::now();
    let error = setup
        .direct("leaf1", token_for("leaf1", "d3Jvbmc="))
        .await
        .unwrap_err();
    assert!(error.is_definite());
    assert_eq!(start.elapsed(), REFRESH_WAIT);
}

#[tokio::test(start_paused = true)]
async fn two_questions_share_the_ten_seconds() {
    let new_key = primary_key("rotated");
    let knows = vec![
        with_key(module("edge2/$edgeHub"), &new_key),
        leaf("new", "edge2"),
    ];
    let setup = Setup::slow(knows, RefreshOutcome::NotFound, Duration::from_secs(6));
    let start = Instant::now();
    let token = token_for("edge2/$edgeHub", &new_key);
    let error = setup.through("new;edge2", token).await.unwrap_err();
    assert_eq!(error, undecided("new", Undecided::RefreshTimedOut));
    assert_eq!(start.elapsed(), REFRESH_WAIT);
    assert_eq!(setup.asked().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn before_the_first_walk_nothing_is_decided_and_nobody_asked() {
    let setup = Setup::new(Vec::new(), RefreshOutcome::NotFound);
    let cache = ScopeCache::new(&id("edge1"));
    cache.apply(ScopeChange::Upsert(sample_scope()));
    let setup = Setup {
        authenticator: Authenticator {
            cache,
            ..setup.authenticator
        },
        upstream: setup.upstream,
    };
    for (identity, token) in [
        ("nobody", token_of("nobody")),
        ("leaf1", token_for("leaf1", "d3Jvbmc=")),
    ] {
        let error = setup.direct(identity, token).await.unwrap_err();
        assert_eq!(error, undecided(identity, Undecided::NotInitialised));
    }
    assert!(setup.asked().is_empty());
    // What is known already is good enough, and what can never be right is refused.
    assert!(setup.direct("leaf1", token_of("leaf1")).await.is_ok());
    assert!(
        setup
            .direct("leaf1", "password".to_owned())
            .await
            .unwrap_err()
            .is_definite()
    );
}

#[tokio::test(start_paused = true)]
async fn without_an_upstream_the_cache_decides() {
    let setup = Setup::new(Vec::new(), RefreshOutcome::Unavailable);
    let authenticator = Authenticator {
        refresh: None,
        ..setup.authenticator
    };
    let setup = Setup {
        authenticator,
        upstream: setup.upstream,
    };
    let error = setup
        .direct("nobody", token_of("nobody"))
        .await
        .unwrap_err();
    assert_eq!(
        error,
        AuthnError::UnknownIdentity {
            identity: id("nobody")
        }
    );
    let query = RefreshQuery {
        identity: id("leaf1"),
        on_behalf_of: "edge1".to_owned(),
    };
    assert_eq!(
        setup.authenticator.refresh(&query).await,
        RefreshOutcome::Unavailable
    );
}

#[tokio::test(start_paused = true)]
async fn a_leaf_whose_parent_is_not_known_yet_waits_for_the_walk() {
    // Upstream has it below an edge device that our tree lacks: no reason to give up on it.
    let setup = Setup::new(vec![leaf("new", "edge9")], RefreshOutcome::NotFound);
    let error = setup.direct("new", token_of("new")).await.unwrap_err();
    assert_eq!(error, undecided("new", Undecided::AncestorUnknown));
    assert_eq!(setup.asked(), ["new for edge1"]);

    // Unless upstream denies it.
    let setup = Setup::new(Vec::new(), RefreshOutcome::NotFound);
    setup
        .upstream
        .cache
        .apply(ScopeChange::Upsert(vec![leaf("lost", "edge9")]));
    let error = setup.direct("lost", token_of("lost")).await.unwrap_err();
    assert_eq!(
        error,
        AuthnError::OutOfScope {
            identity: id("lost")
        }
    );
    assert!(error.is_definite());
}

#[tokio::test(start_paused = true)]
async fn a_token_may_expire_while_upstream_is_asked() {
    let takes = Duration::from_secs(2);
    let setup = Setup::slow(vec![leaf("new", "edge2")], RefreshOutcome::NotFound, takes);
    let se_s = NOW_S - 300;
    let sr = encode(&audience(HUB_HOST, "new"));
    let error = setup
        .direct(
            "new",
            raw_token(&sr, &se_s.to_string(), &primary_key("new")),
        )
        .await;
    assert_eq!(
        error.unwrap_err(),
        AuthnError::TokenExpired {
            expired_at_ms: se_s * 1000
        }
    );
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_attempt_leaves_nothing_behind() {
    let setup = Setup::slow(Vec::new(), RefreshOutcome::NotFound, Duration::from_secs(5));
    let attempt = setup.direct("nobody", token_of("nobody"));
    assert!(
        tokio::time::timeout(Duration::from_secs(1), attempt)
            .await
            .is_err()
    );
    assert_eq!(setup.asked().len(), 1);
    assert!(setup.direct("leaf1", token_of("leaf1")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_childs_question_waits_ten_seconds_at_most() {
    let setup = Setup::slow(
        Vec::new(),
        RefreshOutcome::NotFound,
        Duration::from_secs(60),
    );
    let query = RefreshQuery {
        identity: id("new"),
        on_behalf_of: "edge2".to_owned(),
    };
    let start = Instant::now();
    assert_eq!(
        setup.authenticator.refresh(&query).await,
        RefreshOutcome::Unavailable
    );
    assert_eq!(start.elapsed(), REFRESH_WAIT);
    assert_eq!(setup.asked(), ["new for edge2"]);
}

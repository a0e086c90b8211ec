//! Callers of the scope and registry API: route actor, chain actor and token owner must be one
//! (spec/auth-hierarchy-http.md 7 and row 3 of section 13).

use edgehub_proto::auth_chain::AuthChain;
use edgehub_proto::clock::ManualClock;

use super::*;
use crate::scope_cache::ScopeChange;
use crate::test_support::*;

fn judge(tree: &ScopeTree, caller: &str, chain: &str, token: String) -> Verdict<ServicePrincipal> {
    let claim = ServiceClaim {
        caller: id(caller),
        chain: AuthChain::parse(chain).unwrap(),
        credential: Credential::Sas(token),
    };
    verify_service(
        tree,
        &AudienceHosts::new(HUB_HOST, OWN_HOST),
        &claim,
        NOW_MS,
    )
}

fn refusal(verdict: Verdict<ServicePrincipal>) -> AuthnError {
    match verdict {
        Verdict::Accepted(principal) => panic!("accepted: {principal:?}"),
        Verdict::Refused(error) => error,
        Verdict::Stale(stale) => stale.error,
    }
}

#[test]
fn an_edge_hub_calls_for_itself_and_for_those_below() {
    let tree = sample_tree();
    let http_sr = "contoso.azure-devices.net%2Fdevices%2Fedge2%2Fmodules%2F%252524edgeHub";
    let token = raw_token(http_sr, "4102444800", &primary_key("edge2/$edgeHub"));
    for chain in ["edge2", "edge3;edge2"] {
        let verdict = judge(&tree, "edge2/$edgeHub", chain, token.clone());
        let Verdict::Accepted(principal) = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(principal.actor_device(), "edge2");
        assert_eq!(principal.caller(), &id("edge2/$edgeHub"));
        assert_eq!(principal.expires_at_ms(), 4_102_445_100_000);
    }
}

#[test]
fn only_edge_hubs_call() {
    let tree = sample_tree();
    for caller in [
        "edge2/modA",
        "edge2/$edgeAgent",
        "edge2",
        "leaf1",
        "leaf1/modB",
    ] {
        let error = refusal(judge(&tree, caller, "edge2", token_of(caller)));
        assert_eq!(error, AuthnError::NotEdgeHub { caller: id(caller) });
    }
}

#[test]
fn a_leaf_with_a_module_of_that_name_does_not_call() {
    let mut scope = sample_scope();
    scope.push(module("leaf1/$edgeHub"));
    let error = refusal(judge(
        &tree_of(scope),
        "leaf1/$edgeHub",
        "leaf1",
        token_of("leaf1/$edgeHub"),
    ));
    assert_eq!(
        error,
        AuthnError::NotEdgeHub {
            caller: id("leaf1/$edgeHub")
        }
    );
}

#[test]
fn route_token_and_chain_must_name_one_actor() {
    let tree = sample_tree();
    let (two, ten) = ("edge2/$edgeHub", "edge10/$edgeHub");
    // (route, chain's last, token) with one of the three, or two of them, different.
    for (route, chain, token, reason) in [
        (two, "edge3;edge10", two, "actor_not_caller"),
        (two, "edge3;edge2", ten, "wrong_audience"),
        (two, "edge10;edge10", ten, "actor_not_caller"),
        (ten, "edge3;edge2", two, "actor_not_caller"),
        (ten, "leaf10;edge2", ten, "actor_not_caller"),
        (two, "edge3", two, "actor_not_caller"),
        (two, "edge2;edge2/$edgeHub", two, "actor_not_caller"),
    ] {
        let error = refusal(judge(&tree, route, chain, token_of(token)));
        assert_eq!(error.reason(), reason, "{route}, {chain}, {token}");
        assert!(error.is_definite());
    }
    let forged = token_for(two, &primary_key(ten));
    assert_eq!(
        refusal(judge(&tree, two, "edge2", forged)).reason(),
        "wrong_signature"
    );
}

#[test]
fn the_devices_key_does_not_call() {
    let tree = sample_tree();
    for names in ["edge2", "edge2/$edgeHub"] {
        let token = token_for(names, &primary_key("edge2"));
        let error = refusal(judge(&tree, "edge2/$edgeHub", "edge2", token));
        assert_eq!(
            error,
            AuthnError::WrongSignature {
                identity: id("edge2/$edgeHub")
            }
        );
    }
}

#[test]
fn a_disabled_or_foreign_caller_is_refused() {
    let own = "edge2/$edgeHub";
    let off = sample_tree()
        .with(vec![disabled(edge("edge2", Some("edge1")))])
        .tree;
    let gone = sample_tree().without(vec![id("edge2")]).tree;
    for (tree, reason) in [(off, "disabled"), (gone, "out_of_scope")] {
        assert_eq!(
            refusal(judge(&tree, own, "edge2", token_of(own))).reason(),
            reason
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_async_form_knows_when_it_cannot_decide() {
    let cache = ScopeCache::new(&id("edge1"));
    let clock = Arc::new(ManualClock::new(NOW_MS));
    let hosts = AudienceHosts::new(HUB_HOST, OWN_HOST);
    let authenticator = Authenticator::new(Arc::clone(&cache), hosts, clock, None);
    let claim = ServiceClaim {
        caller: id("edge2/$edgeHub"),
        chain: AuthChain::parse("edge2").unwrap(),
        credential: Credential::Sas(token_of("edge2/$edgeHub")),
    };

    let error = authenticator
        .authenticate_service(&claim)
        .await
        .unwrap_err();
    assert!(!error.is_definite());

    cache.set_initialised();
    let error = authenticator
        .authenticate_service(&claim)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), "unknown_identity");
    assert!(error.is_definite());

    cache.apply(ScopeChange::Upsert(sample_scope()));
    let principal = authenticator.authenticate_service(&claim).await.unwrap();
    assert_eq!(principal.actor_device(), "edge2");
}

//! Who may come in, and for whom: section 5 of spec/auth-hierarchy-http.md, each refusal with a
//! token that is otherwise good.

use edgehub_proto::auth_chain::AuthChain;

use super::*;
use crate::test_support::*;

fn judge_with(
    tree: &ScopeTree,
    identity: &str,
    chain: Option<&str>,
    credential: Credential,
) -> Verdict {
    let chain = chain.map(|chain| AuthChain::parse(chain).unwrap());
    let claim = Claim {
        identity: id(identity),
        chain,
        credential,
    };
    verify(
        tree,
        &AudienceHosts::new(HUB_HOST, OWN_HOST),
        &claim,
        NOW_MS,
    )
}

fn judge(tree: &ScopeTree, identity: &str, chain: &str, token: String) -> Verdict {
    judge_with(tree, identity, Some(chain), Credential::Sas(token))
}

fn direct(tree: &ScopeTree, identity: &str) -> Verdict {
    judge_with(tree, identity, None, Credential::Sas(token_of(identity)))
}

fn stale(error: AuthnError, identity: &str, on_behalf_of: &str) -> Verdict {
    let query = RefreshQuery {
        identity: id(identity),
        on_behalf_of: on_behalf_of.to_owned(),
    };
    Verdict::Stale(Stale { error, query })
}

fn wrong_signature(identity: &str) -> Verdict {
    stale(
        AuthnError::WrongSignature {
            identity: id(identity),
        },
        identity,
        "edge1",
    )
}

fn not_above(actor: &str, target: &str) -> Verdict {
    let error = AuthnError::ActorNotAncestor {
        actor: id(actor),
        target: id(target),
    };
    stale(error, target, actor)
}

fn accepted(verdict: Verdict) -> Principal {
    match verdict {
        Verdict::Accepted(principal) => principal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_actor_opens_sessions_for_everything_below_it() {
    let tree = sample_tree();
    for (identity, chain) in [
        ("leaf1", "leaf1;edge2"),
        ("leaf1/modB", "leaf1/modB;leaf1;edge2"),
        ("leaf2", "leaf2;edge3;edge2"),
        ("edge2/$edgeHub", "edge2/$edgeHub;edge2"),
        ("edge2/modA", "edge2/modA;edge2"),
        ("edge3/$edgeHub", "edge3/$edgeHub;edge3;edge2"),
        ("edge2", "edge2;edge2"),
    ] {
        for token_names in ["edge2/$edgeHub", "edge2"] {
            let token = token_for(token_names, &primary_key("edge2/$edgeHub"));
            let principal = accepted(judge(&tree, identity, chain, token));
            assert_eq!(principal.identity(), &id(identity));
            assert_eq!(principal.actor(), Some(&id("edge2")));
            assert!(!principal.used_device_key());
        }
    }
}

#[test]
fn a_descendant_may_come_directly_from_any_depth() {
    // Layers may be skipped: a leaf of edge3 at edge1, and edge3's hub for it.
    let tree = sample_tree();
    assert_eq!(accepted(direct(&tree, "leaf2")).actor(), None);
    let token = token_of("edge3/$edgeHub");
    assert!(matches!(
        judge(&tree, "leaf2", "leaf2;edge3", token),
        Verdict::Accepted(_)
    ));
}

#[test]
fn a_chain_of_one_is_no_actor() {
    let principal = accepted(judge(&sample_tree(), "leaf1", "leaf1", token_of("leaf1")));
    assert_eq!(principal.actor(), None);
}

#[test]
fn a_sibling_cannot_act() {
    let token = token_of("edge10/$edgeHub");
    let verdict = judge(&sample_tree(), "leaf1", "leaf1;edge10", token);
    assert_eq!(verdict, not_above("edge10", "leaf1"));
}

#[test]
fn a_sibling_cannot_open_a_session_of_the_other_hub() {
    let token = token_of("edge10/$edgeHub");
    let verdict = judge(
        &sample_tree(),
        "edge2/$edgeHub",
        "edge2/$edgeHub;edge10",
        token,
    );
    assert_eq!(verdict, not_above("edge10", "edge2/$edgeHub"));
}

#[test]
fn a_child_cannot_act_for_its_parent() {
    let tree = sample_tree();
    let token = token_of("edge3/$edgeHub");
    for target in [
        "edge2",
        "edge2/$edgeHub",
        "leaf1",
        "edge1/modA",
        "edge1",
        "edge1/$edgeHub",
    ] {
        let chain = format!("{target};edge3");
        assert_eq!(
            judge(&tree, target, &chain, token.clone()),
            not_above("edge3", target)
        );
    }
}

#[test]
fn an_ancestor_of_ours_is_a_stranger_here() {
    // edge1 is the middle layer's own device; the top layer's hub has no business below it.
    let mut scope = sample_scope();
    scope[0] = edge("edge1", Some("edge0"));
    scope.push(edge("edge0", None));
    scope.push(module("edge0/$edgeHub"));
    let tree = tree_of(scope);
    let verdict = judge(&tree, "leaf1", "leaf1;edge0", token_of("edge0/$edgeHub"));
    let error = AuthnError::OutOfScope {
        identity: id("edge0/$edgeHub"),
    };
    assert_eq!(verdict, stale(error, "edge0/$edgeHub", "edge1"));
}

#[test]
fn names_that_are_prefixes_give_no_rights() {
    let mut scope = sample_scope();
    for device in ["edge", "edge100", "e"] {
        scope.push(edge(device, Some("edge1")));
        scope.push(module(&format!("{device}/$edgeHub")));
    }
    let tree = tree_of(scope);
    for (actor, target) in [
        ("edge10", "leaf1"),
        ("edge", "leaf1"),
        ("e", "leaf1"),
        ("edge100", "leaf10"),
        ("edge", "leaf10"),
        ("edge2", "leaf10"),
    ] {
        let token = token_of(&format!("{actor}/$edgeHub"));
        let verdict = judge(&tree, target, &format!("{target};{actor}"), token);
        assert_eq!(verdict, not_above(actor, target));
    }
    // leaf1's token is none of leaf10, whichever is the longer name.
    let wrong = |identity| {
        Verdict::Refused(AuthnError::WrongAudience {
            identity: id(identity),
        })
    };
    let present = |identity, token| judge_with(&tree, identity, None, Credential::Sas(token));
    assert_eq!(present("leaf10", token_of("leaf1")), wrong("leaf10"));
    assert_eq!(present("leaf1", token_of("leaf10")), wrong("leaf1"));
}

#[test]
fn the_token_must_be_the_actors() {
    // Good tokens of others, for a chain that would be fine.
    for owner in [
        "edge3/$edgeHub",
        "edge10/$edgeHub",
        "edge1/$edgeHub",
        "leaf1",
    ] {
        let verdict = judge(&sample_tree(), "leaf1", "leaf1;edge2", token_of(owner));
        let identity = id("edge2/$edgeHub");
        assert_eq!(
            verdict,
            Verdict::Refused(AuthnError::WrongAudience { identity }),
            "{owner}"
        );
    }
}

#[test]
fn an_audience_of_the_actor_needs_the_actors_key() {
    for owner in ["edge3/$edgeHub", "edge10/$edgeHub", "leaf1"] {
        let token = token_for("edge2/$edgeHub", &primary_key(owner));
        let verdict = judge(&sample_tree(), "leaf1", "leaf1;edge2", token);
        assert_eq!(verdict, wrong_signature("edge2/$edgeHub"), "{owner}");
    }
}

#[test]
fn a_device_key_does_not_act() {
    for audience_of in ["edge2", "edge2/$edgeHub"] {
        for key in [primary_key("edge2"), secondary_key("edge2")] {
            let token = token_for(audience_of, &key);
            let verdict = judge(&sample_tree(), "leaf1", "leaf1;edge2", token);
            assert_eq!(verdict, wrong_signature("edge2/$edgeHub"));
        }
    }
}

#[test]
fn another_module_of_the_actor_does_not_act() {
    let tree = sample_tree();
    let own_audience = judge(&tree, "leaf1", "leaf1;edge2", token_of("edge2/modA"));
    let identity = id("edge2/$edgeHub");
    assert_eq!(
        own_audience,
        Verdict::Refused(AuthnError::WrongAudience { identity })
    );
    for audience_of in ["edge2", "edge2/$edgeHub"] {
        let token = token_for(audience_of, &primary_key("edge2/modA"));
        let verdict = judge(&tree, "leaf1", "leaf1;edge2", token);
        assert_eq!(verdict, wrong_signature("edge2/$edgeHub"));
    }
}

#[test]
fn a_module_as_last_element_does_not_act() {
    for actor in ["edge2/$edgeHub", "edge2/modA"] {
        let verdict = judge(
            &sample_tree(),
            "leaf1",
            &format!("leaf1;{actor}"),
            token_of("edge2/$edgeHub"),
        );
        assert_eq!(
            verdict,
            Verdict::Refused(AuthnError::ActorNotDevice { actor: id(actor) })
        );
    }
}

#[test]
fn a_leaf_is_no_actor_even_with_a_module_of_that_name() {
    let mut scope = sample_scope();
    scope.push(module("leaf1/$edgeHub"));
    let tree = tree_of(scope);
    let token = token_of("leaf1/$edgeHub");
    let verdict = judge(&tree, "leaf1/modB", "leaf1/modB;leaf1", token.clone());
    assert_eq!(verdict, not_above("leaf1", "leaf1/modB"));
    assert_eq!(
        judge(&tree, "leaf1", "leaf1;leaf1", token),
        not_above("leaf1", "leaf1")
    );
}

#[test]
fn lies_in_the_middle_of_a_chain_change_nothing() {
    let tree = sample_tree();
    // Our own tree says that edge2 is above leaf2; whatever is written between does not count.
    for chain in [
        "leaf2;edge2",
        "leaf2;edge10;edge2",
        "leaf2;nobody;edge2/modA;edge2",
        "leaf2;edge2;leaf2;edge2",
    ] {
        let principal = accepted(judge(&tree, "leaf2", chain, token_of("edge2/$edgeHub")));
        assert_eq!(principal.actor(), Some(&id("edge2")));
    }
    // And it does not help a sibling to write the right ones.
    for chain in [
        "leaf2;edge3;edge2;edge10",
        "leaf2;edge10;edge3;edge2;edge10",
    ] {
        let verdict = judge(&tree, "leaf2", chain, token_of("edge10/$edgeHub"));
        assert_eq!(verdict, not_above("edge10", "leaf2"));
    }
}

#[test]
fn the_chain_must_begin_with_the_sessions_identity() {
    let tree = sample_tree();
    for (identity, chain) in [
        ("leaf1", "leaf2;edge2"),
        ("leaf10", "leaf1;edge2"),
        ("leaf1", "leaf1/modB;leaf1;edge2"),
        ("leaf1/modB", "leaf1;edge2"),
        ("leaf1", "edge2;edge2"),
    ] {
        let target = AuthChain::parse(chain).unwrap().target().clone();
        let verdict = judge(&tree, identity, chain, token_of("edge2/$edgeHub"));
        let error = AuthnError::ChainNotForIdentity {
            target,
            identity: id(identity),
        };
        assert_eq!(verdict, Verdict::Refused(error));
    }
    let verdict = judge(&tree, "leaf1", "leaf2", token_of("leaf1"));
    assert!(matches!(
        verdict,
        Verdict::Refused(AuthnError::ChainNotForIdentity { .. })
    ));
}

#[test]
fn a_chain_of_a_hundred_is_no_chain() {
    let chain = vec!["leaf1"; 99].join(";") + ";edge2";
    assert!(AuthChain::parse(&chain).is_err());
    assert!(AuthChain::parse(";").is_err());
    assert!(AuthChain::parse("").is_err());
}

#[test]
fn a_target_that_nobody_knows_is_asked_about_in_the_name_of_the_proven_actor() {
    let tree = sample_tree();
    let verdict = judge(&tree, "new", "new;edge3;edge2", token_of("edge2/$edgeHub"));
    let error = AuthnError::UnknownIdentity {
        identity: id("new"),
    };
    assert_eq!(verdict, stale(error, "new", "edge2"));
    // An actor that is not proven does not get that far.
    let forged = token_for("edge2/$edgeHub", &primary_key("leaf1"));
    let verdict = judge(&tree, "new", "new;edge3;edge2", forged);
    assert_eq!(verdict, wrong_signature("edge2/$edgeHub"));
}

#[test]
fn an_actor_that_nobody_knows_is_asked_about_in_our_own_name() {
    let verdict = judge(
        &sample_tree(),
        "leaf1",
        "leaf1;edge9",
        token_of("edge9/$edgeHub"),
    );
    let error = AuthnError::UnknownIdentity {
        identity: id("edge9/$edgeHub"),
    };
    assert_eq!(verdict, stale(error, "edge9/$edgeHub", "edge1"));
}

#[test]
fn an_unknown_client_is_asked_about_in_our_own_name() {
    let tree = sample_tree();
    for unknown in ["nobody", "leaf1/other", "LEAF1"] {
        let error = AuthnError::UnknownIdentity {
            identity: id(unknown),
        };
        assert_eq!(direct(&tree, unknown), stale(error, unknown, "edge1"));
    }
}

#[test]
fn a_disabled_leaf_stays_out_and_so_do_its_modules() {
    let tree = sample_tree()
        .with(vec![disabled(leaf("leaf1", "edge2"))])
        .tree;
    let off = stale(
        AuthnError::Disabled {
            device: id("leaf1"),
        },
        "leaf1",
        "edge1",
    );
    assert_eq!(direct(&tree, "leaf1"), off);
    assert_eq!(direct(&tree, "leaf1/modB"), off);
    // Also for an actor: what IoT Hub has disabled gains nothing by coming through a child.
    let token = token_of("edge2/$edgeHub");
    assert_eq!(judge(&tree, "leaf1", "leaf1;edge2", token.clone()), off);
    assert!(matches!(
        judge(&tree, "leaf2", "leaf2;edge3;edge2", token),
        Verdict::Accepted(_)
    ));
}

#[test]
fn below_a_disabled_edge_device_nothing_comes_in() {
    let tree = sample_tree()
        .with(vec![disabled(edge("edge2", Some("edge1")))])
        .tree;
    for identity in ["leaf1", "leaf1/modB", "edge3", "edge3/$edgeHub", "leaf2"] {
        let error = AuthnError::EdgeDeviceDisabled {
            identity: id(identity),
            edge_device: id("edge2"),
        };
        assert_eq!(
            direct(&tree, identity),
            stale(error, "edge2", "edge1"),
            "{identity}"
        );
    }
    let off = stale(
        AuthnError::Disabled {
            device: id("edge2"),
        },
        "edge2",
        "edge1",
    );
    for identity in ["edge2", "edge2/$edgeHub", "edge2/modA"] {
        assert_eq!(direct(&tree, identity), off, "{identity}");
    }
    // As an actor it is out too, and a deeper actor with it.
    assert_eq!(
        judge(&tree, "leaf1", "leaf1;edge2", token_of("edge2/$edgeHub")),
        off
    );
    let error = AuthnError::EdgeDeviceDisabled {
        identity: id("edge3/$edgeHub"),
        edge_device: id("edge2"),
    };
    let verdict = judge(&tree, "leaf2", "leaf2;edge3", token_of("edge3/$edgeHub"));
    assert_eq!(verdict, stale(error, "edge2", "edge1"));
    assert!(matches!(direct(&tree, "leaf10"), Verdict::Accepted(_)));
}

#[test]
fn an_enabled_actor_cannot_act_below_a_disabled_edge_device() {
    let tree = sample_tree()
        .with(vec![disabled(edge("edge3", Some("edge2")))])
        .tree;
    let verdict = judge(
        &tree,
        "leaf2",
        "leaf2;edge3;edge2",
        token_of("edge2/$edgeHub"),
    );
    let error = AuthnError::EdgeDeviceDisabled {
        identity: id("leaf2"),
        edge_device: id("edge3"),
    };
    assert_eq!(verdict, stale(error, "edge3", "edge1"));
}

#[test]
fn who_is_not_connected_to_us_stays_out_with_a_good_token() {
    let tree = sample_tree().without(vec![id("edge2")]).tree;
    for identity in ["leaf1", "leaf1/modB", "leaf2", "edge2/$edgeHub"] {
        let error = AuthnError::OutOfScope {
            identity: id(identity),
        };
        assert_eq!(direct(&tree, identity), stale(error, identity, "edge1"));
    }
}

#[test]
fn who_is_too_deep_stays_out() {
    let mut scope = sample_scope();
    for (device, parent) in [("e4", "edge3"), ("e5", "e4"), ("e6", "e5")] {
        scope.push(edge(device, Some(parent)));
    }
    scope.push(leaf("deep", "e6"));
    let error = AuthnError::TooDeep {
        identity: id("deep"),
    };
    assert_eq!(
        direct(&tree_of(scope), "deep"),
        stale(error, "deep", "edge1")
    );
}

#[test]
fn a_moved_leaf_follows_its_new_parent() {
    let tree = sample_tree().with(vec![leaf("leaf1", "edge10")]).tree;
    let by = |actor: &str| {
        judge(
            &tree,
            "leaf1",
            &format!("leaf1;{actor}"),
            token_of(&format!("{actor}/$edgeHub")),
        )
    };
    assert!(matches!(by("edge10"), Verdict::Accepted(_)));
    assert_eq!(by("edge2"), not_above("edge2", "leaf1"));
}

#[test]
fn other_credentials_are_refused_by_name() {
    let tree = sample_tree();
    let certificate = Credential::Certificate(vec![0x30]);
    for (credential, error) in [
        (certificate, AuthnError::CertificateNotSupported),
        (Credential::None, AuthnError::NoCredential),
    ] {
        assert!(error.is_definite());
        for chain in [None, Some("leaf1;edge2")] {
            let verdict = judge_with(&tree, "leaf1", chain, credential.clone());
            assert_eq!(verdict, Verdict::Refused(error.clone()));
        }
    }
}

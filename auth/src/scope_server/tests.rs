//! What a child hub is told, and what it is not (spec/auth-hierarchy-http.md 7).

use edgehub_proto::scope::ScopeResponse;

use super::*;
use crate::authenticator::{
    AudienceHosts, Credential, ServiceClaim, ServicePrincipal, Verdict, verify_service,
};
use crate::test_support::*;

/// The proof that the hub of `device` calls. There is no other way to get one.
fn caller_in(tree: &ScopeTree, device: &str) -> ServicePrincipal {
    let hub = format!("{device}/$edgeHub");
    let claim = ServiceClaim {
        caller: id(&hub),
        chain: AuthChain::parse(device).unwrap(),
        credential: Credential::Sas(token_of(&hub)),
    };
    match verify_service(
        tree,
        &AudienceHosts::new(HUB_HOST, OWN_HOST),
        &claim,
        NOW_MS,
    ) {
        Verdict::Accepted(principal) => principal,
        other => panic!("{other:?}"),
    }
}

fn caller(device: &str) -> ServicePrincipal {
    caller_in(&sample_tree(), device)
}

fn scope_request(auth_chain: &str) -> ScopeRequest {
    ScopeRequest {
        page_size: None,
        continuation_link: None,
        auth_chain: auth_chain.to_owned(),
    }
}

fn identity_request(target: &str, auth_chain: &str) -> IdentityRequest {
    let target = id(target);
    IdentityRequest {
        target_device_id: target.device_id().to_owned(),
        target_module_id: target.module_id().map(str::to_owned),
        auth_chain: auth_chain.to_owned(),
    }
}

fn ask(
    tree: &ScopeTree,
    caller: &ServicePrincipal,
    target: &str,
    auth_chain: &str,
    refreshed: RefreshOutcome,
) -> Result<ScopeResponse, ScopeDenied> {
    let request = identity_request(target, auth_chain);
    IdentityQuery::new(tree, caller, &request)?.answer(tree, refreshed)
}

/// Devices, then modules, as ids.
fn names(response: &ScopeResponse) -> Vec<String> {
    let devices = response
        .devices
        .iter()
        .map(|device| device.device_id.clone());
    let modules = response
        .modules
        .iter()
        .map(|module| format!("{}/{}", module.device_id, module.module_id));
    devices.chain(modules).collect()
}

fn not_in_scope(identity: &str) -> ScopeDenied {
    ScopeDenied::NotInScope {
        identity: id(identity),
    }
}

#[test]
fn a_page_has_the_device_its_children_and_its_leaves_modules() {
    let tree = sample_tree();
    let response = answer_scope(&tree, &caller("edge2"), &scope_request("edge2")).unwrap();
    assert_eq!(
        names(&response),
        [
            "edge2",
            "edge3",
            "leaf1",
            "edge2/$edgeHub",
            "edge2/modA",
            "leaf1/modB"
        ]
    );
    assert_eq!(response.continuation_link, None);
    let leaf1 = response
        .devices
        .iter()
        .find(|device| device.device_id == "leaf1")
        .unwrap();
    let keys = leaf1.authentication.clone().unwrap().symmetric_key.unwrap();
    assert_eq!(keys.primary_key, Some(primary_key("leaf1")));
    assert_eq!(leaf1.parent_scopes, Some(vec![scope_of("edge2")]));
}

#[test]
fn an_ancestor_may_ask_for_a_deeper_device() {
    let tree = sample_tree();
    let response = answer_scope(&tree, &caller("edge2"), &scope_request("edge3;edge2")).unwrap();
    assert_eq!(names(&response), ["edge3", "leaf2", "edge3/$edgeHub"]);
}

#[test]
fn siblings_ancestors_and_leaves_are_not_told() {
    let tree = sample_tree();
    for (actor, target) in [
        ("edge10", "edge2"),
        ("edge2", "edge10"),
        ("edge2", "edge1"),
        ("edge3", "edge2"),
        ("edge2", "nobody"),
        ("edge2", "leaf10"),
        ("edge2", "edge"),
    ] {
        let request = scope_request(&format!("{target};{actor}"));
        let denied = answer_scope(&tree, &caller(actor), &request).unwrap_err();
        assert_eq!(denied, not_in_scope(target));
        assert_eq!(denied.status(), 401);
    }
}

#[test]
fn the_chain_must_end_with_the_caller() {
    let tree = sample_tree();
    // Authenticated with another chain than it now asks with.
    for chain in [
        "edge3",
        "edge10;edge10",
        "edge2;edge10",
        "edge2;edge2/$edgeHub",
    ] {
        let denied = answer_scope(&tree, &caller("edge2"), &scope_request(chain)).unwrap_err();
        assert_eq!(denied, ScopeDenied::ActorNotCaller, "{chain}");
        assert_eq!(denied.status(), 401);
        let denied = ask(
            &tree,
            &caller("edge2"),
            "leaf1",
            chain,
            RefreshOutcome::Refreshed,
        )
        .unwrap_err();
        assert_eq!(denied, ScopeDenied::ActorNotCaller, "{chain}");
    }
}

#[test]
fn senseless_requests_are_bad_requests() {
    let tree = sample_tree();
    let edge2 = caller("edge2");
    let long = vec!["edge2"; 100].join(";");
    for chain in [
        "",
        ";",
        "edge2/modA;edge2",
        "a/b/c;edge2",
        "a b;edge2",
        long.as_str(),
    ] {
        let denied = answer_scope(&tree, &edge2, &scope_request(chain)).unwrap_err();
        assert_eq!(denied.status(), 400, "{chain}: {denied}");
    }
    for link in ["!!", "AAAA", "bm90IGFuIGlk", "edge2"] {
        let mut request = scope_request("edge2");
        request.continuation_link = Some(link.to_owned());
        let denied = answer_scope(&tree, &edge2, &request).unwrap_err();
        assert_eq!(denied, ScopeDenied::InvalidContinuation, "{link}");
        assert_eq!(denied.status(), 400);
    }
    let mut request = identity_request("leaf1", "edge2");
    request.target_device_id = "leaf1/modB".to_owned();
    let denied = IdentityQuery::new(&tree, &edge2, &request).unwrap_err();
    assert_eq!(denied.status(), 400);
}

#[test]
fn a_disabled_device_gets_no_scope() {
    let edge2 = caller("edge2");
    let tree = sample_tree()
        .with(vec![disabled(edge("edge2", Some("edge1")))])
        .tree;
    // Its proof is older than the change.
    let denied = answer_scope(&tree, &edge2, &scope_request("edge2")).unwrap_err();
    assert_eq!(denied, not_in_scope("edge2"));
    let denied = answer_scope(&tree, &edge2, &scope_request("edge3;edge2")).unwrap_err();
    assert_eq!(denied, not_in_scope("edge3"));
}

#[test]
fn disabled_children_are_listed_as_such() {
    let tree = sample_tree()
        .with(vec![
            disabled(edge("edge3", Some("edge2"))),
            disabled(leaf("leaf1", "edge2")),
        ])
        .tree;
    let response = answer_scope(&tree, &caller("edge2"), &scope_request("edge2")).unwrap();
    let status = |device: &str| {
        response
            .devices
            .iter()
            .find(|it| it.device_id == device)
            .unwrap()
            .status
            .clone()
    };
    assert_eq!(status("edge3"), "disabled");
    assert_eq!(status("leaf1"), "disabled");
    assert_eq!(status("edge2"), "enabled");
    let denied = answer_scope(&tree, &caller("edge2"), &scope_request("edge3;edge2"));
    assert_eq!(denied, Err(not_in_scope("edge3")), "nothing below it");
}

/// Follows the links to the end.
fn walk(tree: &ScopeTree, size: Option<i64>) -> Vec<ScopeResponse> {
    let mut request = ScopeRequest {
        page_size: size,
        ..scope_request("edge2")
    };
    let mut pages = Vec::new();
    loop {
        let page = answer_scope(tree, &caller("edge2"), &request).unwrap();
        request.continuation_link = page.continuation_link.clone();
        pages.push(page);
        if request.continuation_link.is_none() {
            return pages;
        }
        assert!(pages.len() < 10_000, "the links do not end");
    }
}

#[test]
fn every_page_size_yields_the_same_identities_once() {
    let tree = sample_tree();
    let whole = names(&walk(&tree, None)[0]);
    assert_eq!(whole.len(), 6);
    for size in 1..=8 {
        let pages = walk(&tree, Some(size));
        let size = usize::try_from(size).unwrap();
        assert_eq!(
            pages.len(),
            whole.len().div_ceil(size),
            "no empty page at the end"
        );
        assert!(pages.iter().all(|page| names(page).len() <= size));
        let all: Vec<String> = pages.iter().flat_map(names).collect();
        assert_eq!(all, whole, "{size}");
    }
    let blank = ScopeRequest {
        continuation_link: Some(" ".to_owned()),
        ..scope_request("edge2")
    };
    assert_eq!(
        names(&answer_scope(&tree, &caller("edge2"), &blank).unwrap()),
        whole
    );
}

#[test]
fn page_sizes_have_a_default_and_a_limit() {
    let mut scope = sample_scope();
    scope.extend((0..2500).map(|n| leaf(&format!("many{n:04}"), "edge2")));
    let tree = tree_of(scope);
    for (asked, first_page) in [
        (None, SCOPE_PAGE_SIZE_DEFAULT),
        (Some(0), SCOPE_PAGE_SIZE_DEFAULT),
        (Some(-5), SCOPE_PAGE_SIZE_DEFAULT),
        (Some(10), 10),
        (Some(i64::MAX), SCOPE_PAGE_SIZE_MAX),
        (Some(1001), SCOPE_PAGE_SIZE_MAX),
    ] {
        let request = ScopeRequest {
            page_size: asked,
            ..scope_request("edge2")
        };
        let page = answer_scope(&tree, &caller("edge2"), &request).unwrap();
        assert_eq!(names(&page).len(), first_page, "{asked:?}");
        assert!(page.continuation_link.is_some());
    }
    let all: usize = walk(&tree, Some(i64::MAX))
        .iter()
        .map(|page| names(page).len())
        .sum();
    assert_eq!(all, 2506);
}

#[test]
fn a_change_between_two_pages_neither_repeats_nor_skips_the_others() {
    let tree = sample_tree();
    let mut request = ScopeRequest {
        page_size: Some(2),
        ..scope_request("edge2")
    };
    let first = answer_scope(&tree, &caller("edge2"), &request).unwrap();
    assert_eq!(names(&first), ["edge2", "edge3"]);
    request.continuation_link = first.continuation_link;
    request.page_size = None;

    // The last one of the first page goes, one before it and one after it come.
    let tree = tree.without(vec![id("edge3")]).tree;
    let tree = tree
        .with(vec![leaf("aaa", "edge2"), leaf("zzz", "edge2")])
        .tree;
    let second = answer_scope(&tree, &caller("edge2"), &request).unwrap();
    assert_eq!(
        names(&second),
        ["leaf1", "zzz", "edge2/$edgeHub", "edge2/modA", "leaf1/modB"]
    );
}

#[test]
fn a_link_gives_no_rights() {
    let tree = sample_tree();
    let request = ScopeRequest {
        page_size: Some(1),
        ..scope_request("edge2")
    };
    let link = answer_scope(&tree, &caller("edge2"), &request)
        .unwrap()
        .continuation_link;
    let request = ScopeRequest {
        continuation_link: link,
        ..scope_request("edge10")
    };
    let page = answer_scope(&tree, &caller("edge10"), &request).unwrap();
    assert!(
        names(&page).iter().all(|name| name.contains("10")),
        "{page:?}"
    );
}

#[test]
fn one_identity_comes_with_its_device() {
    let tree = sample_tree();
    let edge2 = caller("edge2");
    for (target, chain, expected) in [
        ("leaf1", "edge2", vec!["leaf1"]),
        ("leaf1/modB", "edge2", vec!["leaf1", "leaf1/modB"]),
        ("leaf2", "edge3;edge2", vec!["leaf2"]),
        ("edge3", "edge3;edge2", vec!["edge3"]),
        ("edge3/$edgeHub", "edge2", vec!["edge3", "edge3/$edgeHub"]),
    ] {
        let response = ask(&tree, &edge2, target, chain, RefreshOutcome::Refreshed).unwrap();
        assert_eq!(names(&response), expected);
        assert_eq!(response.continuation_link, None);
        // Also when upstream is away: what we know counts.
        let response = ask(&tree, &edge2, target, chain, RefreshOutcome::Unavailable).unwrap();
        assert_eq!(names(&response), expected);
    }
    let blank = IdentityRequest {
        target_module_id: Some(String::new()),
        ..identity_request("leaf1", "edge2")
    };
    let query = IdentityQuery::new(&tree, &edge2, &blank).unwrap();
    assert_eq!(query.refresh_query().identity, id("leaf1"));
    assert_eq!(query.refresh_query().on_behalf_of, "edge2");
}

#[test]
fn an_identity_outside_of_the_originators_scope_is_not_told() {
    let tree = sample_tree();
    for (actor, target, chain) in [
        // A sibling's child, a sibling, an ancestor, its module.
        ("edge2", "leaf10", "edge2"),
        ("edge2", "edge10", "edge2"),
        ("edge2", "edge10/$edgeHub", "edge2"),
        ("edge2", "edge1", "edge2"),
        ("edge2", "edge1/modA", "edge2"),
        ("edge2", "edge1/$edgeHub", "edge2"),
        ("edge2", "leaf0", "edge2"),
        // Below the actor, but not below the originator.
        ("edge2", "leaf1", "edge3;edge2"),
        ("edge2", "edge2", "edge3;edge2"),
    ] {
        let denied = ask(
            &tree,
            &caller(actor),
            target,
            chain,
            RefreshOutcome::Refreshed,
        )
        .unwrap_err();
        assert_eq!(denied, not_in_scope(target), "{actor}, {chain}");
        assert_eq!(denied.status(), 401);
    }
}

#[test]
fn an_originator_outside_of_the_actors_scope_does_not_reach_upstream() {
    let tree = sample_tree();
    for (actor, originator) in [
        ("edge2", "edge10"),
        ("edge10", "edge2"),
        ("edge3", "edge2"),
        ("edge2", "edge1"),
    ] {
        let request = identity_request("leaf10", &format!("{originator};{actor}"));
        let denied = IdentityQuery::new(&tree, &caller(actor), &request).unwrap_err();
        assert_eq!(denied, not_in_scope(originator));
    }
}

#[test]
fn an_originator_that_has_moved_away_meanwhile_is_not_answered() {
    let tree = sample_tree();
    let edge2 = caller("edge2");
    let query = IdentityQuery::new(&tree, &edge2, &identity_request("leaf2", "edge3;edge2"));
    let query = query.unwrap();
    assert!(query.answer(&tree, RefreshOutcome::Refreshed).is_ok());
    // While upstream was asked, edge3 was given to the sibling, or the caller was disabled.
    for change in [
        edge("edge3", Some("edge10")),
        disabled(edge("edge2", Some("edge1"))),
    ] {
        let later = tree.with(vec![change]).tree;
        for refreshed in [RefreshOutcome::Refreshed, RefreshOutcome::NotFound] {
            let answer = query.answer(&later, refreshed);
            assert_eq!(answer, Err(not_in_scope("edge3")));
        }
    }
}

#[test]
fn an_unknown_identity_is_denied_only_on_evidence() {
    let tree = sample_tree();
    let ask = |refreshed| ask(&tree, &caller("edge2"), "nobody", "edge2", refreshed);
    assert_eq!(ask(RefreshOutcome::NotFound), Ok(ScopeResponse::default()));
    for refreshed in [
        RefreshOutcome::Unavailable,
        RefreshOutcome::Limited,
        // Upstream has it, our tree does not: no evidence that it does not exist.
        RefreshOutcome::Refreshed,
    ] {
        let denied = ask(refreshed).unwrap_err();
        assert_eq!(
            denied,
            ScopeDenied::Undecided {
                identity: id("nobody")
            }
        );
        assert_eq!(denied.status(), 503);
    }
}

#[test]
fn a_disabled_edge_device_is_told_to_its_parent_and_nothing_below_it() {
    let tree = sample_tree()
        .with(vec![disabled(edge("edge3", Some("edge2")))])
        .tree;
    let refreshed = RefreshOutcome::Refreshed;
    let to_parent = |target| ask(&tree, &caller("edge2"), target, "edge2", refreshed);
    assert_eq!(to_parent("edge3").unwrap().devices[0].status, "disabled");
    for below in ["leaf2", "edge3/$edgeHub"] {
        assert_eq!(to_parent(below), Err(not_in_scope(below)));
    }
    let to_uncle = ask(&tree, &caller("edge10"), "edge3", "edge10", refreshed);
    assert_eq!(to_uncle, Err(not_in_scope("edge3")));
}

#[test]
fn the_decision_table_of_the_reference_holds() {
    // Own chains: l3;l4;l5, leaf1/leafmod;leaf1;l3;l4;l5.
    let layers = vec![
        edge("l5", None),
        edge("l4", Some("l5")),
        module("l4/$edgeHub"),
        module("l4/mod1"),
        edge("l3", Some("l4")),
        module("l3/$edgeHub"),
        leaf("leaf1", "l3"),
        module("leaf1/leafmod"),
        edge("sibling", Some("l4")),
        leaf("nephew", "sibling"),
    ];
    let tree = ScopeTree::new(&id("l5")).with(layers).tree;
    let (l4, l3) = (caller_in(&tree, "l4"), caller_in(&tree, "l3"));

    assert!(answer_scope(&tree, &l4, &scope_request("l3;l4")).is_ok());
    assert_eq!(
        answer_scope(&tree, &l3, &scope_request("l4"))
            .unwrap_err()
            .status(),
        401
    );
    assert_eq!(
        answer_scope(&tree, &l3, &scope_request("l4;l3"))
            .unwrap_err()
            .status(),
        401
    );

    let ask = |target, chain| ask(&tree, &l4, target, chain, RefreshOutcome::Refreshed);
    assert_eq!(
        names(&ask("leaf1/leafmod", "l3;l4").unwrap()),
        ["leaf1", "leaf1/leafmod"]
    );
    for target in ["l4/mod1", "l4", "nephew", "sibling"] {
        assert_eq!(ask(target, "l3;l4").unwrap_err().status(), 401, "{target}");
    }
}

#[test]
fn denials_are_short_texts_without_secrets() {
    let tree = sample_tree();
    let edge2 = caller("edge2");
    for denied in [
        answer_scope(&tree, &edge2, &scope_request("edge10;edge2")).unwrap_err(),
        answer_scope(&tree, &edge2, &scope_request("")).unwrap_err(),
        ask(&tree, &edge2, "nobody", "edge2", RefreshOutcome::Limited).unwrap_err(),
    ] {
        let text = denied.to_string();
        assert!(!text.is_empty() && text.len() < 300, "{text}");
    }
    let response = answer_scope(&tree, &edge2, &scope_request("edge2")).unwrap();
    for shown in [format!("{edge2:?}"), format!("{response:?}")] {
        for identity in ["edge2", "edge2/$edgeHub", "leaf1"] {
            assert!(!shown.contains(&primary_key(identity)), "{shown}");
            assert!(!shown.contains(&secondary_key(identity)), "{shown}");
        }
    }
}

//! The tree's rules one by one (spec/auth-hierarchy-http.md 4.2 and 12.2).

use super::*;
use crate::test_support::*;

#[test]
fn chains_lead_from_the_target_to_our_device() {
    let tree = sample_tree();
    for (identity, chain) in [
        ("edge1", "edge1"),
        ("edge1/$edgeHub", "edge1/$edgeHub;edge1"),
        ("edge1/modA", "edge1/modA;edge1"),
        ("leaf0", "leaf0;edge1"),
        ("edge2", "edge2;edge1"),
        ("edge2/$edgeHub", "edge2/$edgeHub;edge2;edge1"),
        ("leaf1", "leaf1;edge2;edge1"),
        ("leaf1/modB", "leaf1/modB;leaf1;edge2;edge1"),
        ("leaf2", "leaf2;edge3;edge2;edge1"),
        ("leaf10", "leaf10;edge10;edge1"),
    ] {
        assert_eq!(
            chain_text(&tree, identity).as_deref(),
            Some(chain),
            "{identity}"
        );
        assert_eq!(
            tree.try_auth_chain(&id(identity)),
            tree.auth_chain(&id(identity))
        );
    }
}

#[test]
fn our_device_and_hub_have_a_chain_even_in_an_empty_tree() {
    let tree = ScopeTree::new(&id("edge1"));
    assert!(tree.is_empty());
    assert_eq!(chain_text(&tree, "edge1").as_deref(), Some("edge1"));
    assert_eq!(
        chain_text(&tree, "edge1/$edgeHub").as_deref(),
        Some("edge1/$edgeHub;edge1")
    );
    assert_eq!(
        tree.resolve_auth_chain(&id("edge1/modA")),
        Err(NoChain::Unknown)
    );
    assert_eq!(
        tree.resolve_auth_chain(&id("edge10/$edgeHub")),
        Err(NoChain::Unknown)
    );
    assert_eq!(
        ScopeTree::new(&id("edge1/$edgeHub")).own_device(),
        &id("edge1")
    );
}

#[test]
fn an_orphan_has_no_chain() {
    let tree = tree_of(vec![
        edge("edge1", None),
        leaf("leaf9", "edge9"),
        module("leaf8/mod"),
    ]);
    for orphan in ["leaf9", "leaf8/mod"] {
        assert_eq!(
            tree.resolve_auth_chain(&id(orphan)),
            Err(NoChain::Dangling {
                highest: id(orphan)
            })
        );
        assert_eq!(tree.try_auth_chain(&id(orphan)), None);
    }
}

#[test]
fn nothing_but_our_hub_has_a_chain_while_our_own_record_is_missing() {
    let mut scope = sample_scope();
    scope.remove(0);
    let tree = tree_of(scope);
    assert_eq!(chain_text(&tree, "leaf0"), None);
    assert_eq!(chain_text(&tree, "edge1/modA"), None);
    assert_eq!(chain_text(&tree, "leaf1"), None);
    assert_eq!(
        chain_text(&tree, "edge1/$edgeHub").as_deref(),
        Some("edge1/$edgeHub;edge1")
    );
}

#[test]
fn a_leaf_without_parent_scopes_has_no_chain() {
    let mut orphan = leaf("leaf9", "edge1");
    orphan.parent_scopes.clear();
    let tree = tree_of(vec![edge("edge1", None), orphan]);
    assert_eq!(chain_text(&tree, "leaf9"), None);
}

#[test]
fn the_order_of_insertion_does_not_matter() {
    let mut scope = sample_scope();
    scope.reverse();
    let mut tree = ScopeTree::new(&id("edge1"));
    for record in scope {
        tree = tree.with(vec![record]).tree;
    }
    for record in sample_scope() {
        let identity = record.identity;
        assert_eq!(
            tree.auth_chain(&identity),
            sample_tree().auth_chain(&identity),
            "{identity}"
        );
        assert!(tree.auth_chain(&identity).is_some(), "{identity}");
    }
}

#[test]
fn a_subtree_appears_when_its_parent_does() {
    let tree = tree_of(vec![
        edge("edge1", None),
        leaf("leaf2", "edge3"),
        module("edge3/$edgeHub"),
    ]);
    assert_eq!(chain_text(&tree, "leaf2"), None);
    let tree = tree.with(vec![edge("edge3", Some("edge2"))]).tree;
    assert_eq!(
        tree.resolve_auth_chain(&id("leaf2")),
        Err(NoChain::Dangling {
            highest: id("edge3")
        })
    );
    let tree = tree.with(vec![edge("edge2", Some("edge1"))]).tree;
    assert_eq!(
        chain_text(&tree, "leaf2").as_deref(),
        Some("leaf2;edge3;edge2;edge1")
    );
    assert_eq!(
        chain_text(&tree, "edge3/$edgeHub").as_deref(),
        Some("edge3/$edgeHub;edge3;edge2;edge1")
    );
}

#[test]
fn moving_an_edge_device_moves_everything_below_it() {
    let applied = sample_tree().with(vec![edge("edge3", Some("edge10"))]);
    assert_eq!(applied.changes, [IdentityChange::Changed(id("edge3"))]);
    let tree = applied.tree;
    assert_eq!(
        chain_text(&tree, "leaf2").as_deref(),
        Some("leaf2;edge3;edge10;edge1")
    );
    assert!(tree.contains_ancestor("edge10", &id("leaf2")));
    assert!(!tree.contains_ancestor("edge2", &id("leaf2")));
    assert!(
        tree.children_of("edge2")
            .all(|child| child.identity != id("edge3"))
    );
    assert!(
        tree.children_of("edge10")
            .any(|child| child.identity == id("edge3"))
    );
}

#[test]
fn moving_a_leaf_moves_its_modules() {
    let tree = sample_tree().with(vec![leaf("leaf1", "edge10")]).tree;
    assert_eq!(
        chain_text(&tree, "leaf1/modB").as_deref(),
        Some("leaf1/modB;leaf1;edge10;edge1")
    );
}

#[test]
fn a_device_created_again_with_another_scope_loses_its_children() {
    let mut again = edge("edge2", Some("edge1"));
    again.device_scope = Some("ms-azure-iot-edge://edge2-637500000000000999".to_owned());
    let tree = sample_tree().with(vec![again]).tree;
    assert_eq!(chain_text(&tree, "leaf1"), None);
    assert_eq!(
        chain_text(&tree, "edge2/$edgeHub").as_deref(),
        Some("edge2/$edgeHub;edge2;edge1"),
        "modules belong to the device by its id"
    );
}

#[test]
fn removing_a_device_keeps_the_nodes_below_without_chain() {
    let applied = sample_tree().without(vec![id("edge2"), id("nobody")]);
    assert_eq!(applied.changes, [IdentityChange::Removed(id("edge2"))]);
    let tree = applied.tree;
    for below in ["leaf1", "leaf1/modB", "edge2/$edgeHub", "edge3", "leaf2"] {
        assert!(tree.get(&id(below)).is_some(), "{below}");
        assert_eq!(chain_text(&tree, below), None, "{below}");
    }
    assert!(chain_text(&tree, "leaf10").is_some());
    let tree = tree.with(vec![edge("edge2", Some("edge1"))]).tree;
    assert_eq!(
        chain_text(&tree, "leaf2").as_deref(),
        Some("leaf2;edge3;edge2;edge1")
    );
}

#[test]
fn a_disabled_edge_device_hides_itself_and_all_below() {
    let tree = sample_tree()
        .with(vec![disabled(edge("edge2", Some("edge1")))])
        .tree;
    for hidden in [
        "edge2",
        "edge2/$edgeHub",
        "leaf1",
        "leaf1/modB",
        "edge3",
        "leaf2",
    ] {
        assert_eq!(
            tree.resolve_auth_chain(&id(hidden)),
            Err(NoChain::Disabled {
                edge_device: id("edge2")
            }),
            "{hidden}"
        );
        assert!(tree.try_auth_chain(&id(hidden)).is_some(), "{hidden}");
        assert!(!tree.contains_ancestor("edge1", &id(hidden)), "{hidden}");
    }
    assert!(chain_text(&tree, "leaf0").is_some());
    assert!(chain_text(&tree, "leaf10").is_some());
}

#[test]
fn our_own_device_disabled_hides_all_but_ourselves() {
    let tree = sample_tree().with(vec![disabled(edge("edge1", None))]).tree;
    assert_eq!(chain_text(&tree, "leaf0"), None);
    assert_eq!(chain_text(&tree, "edge1/modA"), None);
    assert_eq!(chain_text(&tree, "edge1").as_deref(), Some("edge1"));
    assert_eq!(
        chain_text(&tree, "edge1/$edgeHub").as_deref(),
        Some("edge1/$edgeHub;edge1")
    );
}

#[test]
fn a_disabled_leaf_has_a_chain() {
    let tree = sample_tree()
        .with(vec![disabled(leaf("leaf1", "edge2"))])
        .tree;
    assert_eq!(
        chain_text(&tree, "leaf1").as_deref(),
        Some("leaf1;edge2;edge1")
    );
}

#[test]
fn the_sixth_edge_device_has_no_chain() {
    let mut scope = vec![edge("edge1", None)];
    for (device, parent) in [
        ("e2", "edge1"),
        ("e3", "e2"),
        ("e4", "e3"),
        ("e5", "e4"),
        ("e6", "e5"),
    ] {
        scope.push(edge(device, Some(parent)));
    }
    scope.push(leaf("leaf5", "e5"));
    scope.push(module("leaf5/mod"));
    scope.push(module("e5/$edgeHub"));
    scope.push(leaf("leaf6", "e6"));
    scope.push(module("e6/$edgeHub"));
    let tree = tree_of(scope);
    assert_eq!(
        chain_text(&tree, "e5").as_deref(),
        Some("e5;e4;e3;e2;edge1")
    );
    assert_eq!(
        chain_text(&tree, "leaf5/mod").as_deref(),
        Some("leaf5/mod;leaf5;e5;e4;e3;e2;edge1")
    );
    assert!(chain_text(&tree, "e5/$edgeHub").is_some());
    for deep in ["e6", "leaf6", "e6/$edgeHub"] {
        assert_eq!(
            tree.resolve_auth_chain(&id(deep)),
            Err(NoChain::TooDeep),
            "{deep}"
        );
        assert_eq!(tree.try_auth_chain(&id(deep)), None, "{deep}");
    }
    assert!(
        tree.children_of("e5")
            .any(|child| child.identity == id("e6"))
    );
}

#[test]
fn an_unchanged_update_keeps_the_node() {
    let tree = sample_tree();
    let applied = tree.with(vec![leaf("leaf1", "edge2"), leaf("leaf99", "edge2")]);
    assert_eq!(applied.changes, [IdentityChange::Added(id("leaf99"))]);
    let (before, after) = (tree.get(&id("leaf1")), applied.tree.get(&id("leaf1")));
    assert!(Arc::ptr_eq(before.unwrap(), after.unwrap()));
}

#[test]
fn every_field_counts_as_a_change() {
    let tree = sample_tree();
    let same = || leaf("leaf1", "edge2");
    for record in [
        ServiceIdentity {
            generation_id: "2".to_owned(),
            ..same()
        },
        ServiceIdentity {
            status: Status::Disabled,
            ..same()
        },
        ServiceIdentity {
            is_edge: true,
            device_scope: Some("own".to_owned()),
            ..same()
        },
        ServiceIdentity {
            device_scope: None,
            ..same()
        },
        ServiceIdentity {
            parent_scopes: vec![scope_of("edge2"), "b".to_owned()],
            ..same()
        },
        ServiceIdentity {
            authentication: symmetric("YQ==", "Yg=="),
            ..same()
        },
    ] {
        let changes = tree.with(vec![record.clone()]).changes;
        assert_eq!(
            changes,
            [IdentityChange::Changed(id("leaf1"))],
            "{record:?}"
        );
    }
}

#[test]
fn a_cycle_is_refused_for_that_insertion_only() {
    let tree = sample_tree();
    let applied = tree.with(vec![
        leaf("leaf77", "edge2"),
        edge("edge2", Some("edge3")),
        edge("edge10", Some("edge2")),
    ]);
    assert_eq!(
        applied.rejected,
        [RejectedIdentity {
            identity: id("edge2"),
            reason: RejectReason::Cycle
        }]
    );
    assert_eq!(
        applied.changes,
        [
            IdentityChange::Changed(id("edge10")),
            IdentityChange::Added(id("leaf77"))
        ]
    );
    assert_eq!(
        chain_text(&applied.tree, "leaf1").as_deref(),
        Some("leaf1;edge2;edge1")
    );
    assert_eq!(
        chain_text(&applied.tree, "leaf10").as_deref(),
        Some("leaf10;edge10;edge2;edge1")
    );
}

#[test]
fn a_device_that_is_its_own_parent_is_refused() {
    let applied = sample_tree().with(vec![edge("edge9", Some("edge9"))]);
    assert_eq!(applied.rejected.len(), 1);
    assert!(applied.tree.get(&id("edge9")).is_none());
}

#[test]
fn a_cycle_apart_from_our_tree_is_refused_when_it_closes() {
    let applied = sample_tree().with(vec![edge("a", Some("b"))]);
    assert!(applied.rejected.is_empty(), "dangling is no error");
    let applied = applied
        .tree
        .with(vec![edge("b", Some("a")), leaf("below", "a")]);
    assert_eq!(applied.rejected.len(), 1);
    assert!(applied.tree.get(&id("b")).is_none());
    assert!(applied.tree.get(&id("a")).is_some());
    assert_eq!(chain_text(&applied.tree, "below"), None);
}

#[test]
fn our_own_parent_closes_no_cycle() {
    let applied = sample_tree().with(vec![edge("edge1", Some("edge3"))]);
    assert!(applied.rejected.is_empty());
    assert_eq!(
        chain_text(&applied.tree, "leaf2").as_deref(),
        Some("leaf2;edge3;edge2;edge1")
    );
}

#[test]
fn one_batch_may_swap_two_devices_in_any_order() {
    let swapped = [edge("edge3", Some("edge1")), edge("edge2", Some("edge3"))];
    for batch in [swapped.to_vec(), swapped.iter().rev().cloned().collect()] {
        let applied = sample_tree().with(batch);
        assert!(applied.rejected.is_empty(), "{:?}", applied.rejected);
        assert_eq!(
            chain_text(&applied.tree, "leaf1").as_deref(),
            Some("leaf1;edge2;edge3;edge1")
        );
    }
}

#[test]
fn ids_that_are_prefixes_of_others_stay_apart() {
    let mut scope = sample_scope();
    scope.push(leaf("leaf", "edge2"));
    scope.push(edge("edge", Some("edge1")));
    let tree = tree_of(scope);
    assert!(!tree.contains_ancestor("edge", &id("leaf1")));
    assert!(!tree.contains_ancestor("edge2", &id("leaf10")));
    assert!(!tree.contains_ancestor("edge10", &id("leaf1")));
    assert!(!tree.contains_ancestor("edge", &id("leaf10")));
    assert_eq!(tree.children_of("edge").count(), 0);
    assert_eq!(tree.get(&id("LEAF1")), None, "ids are case-sensitive");
}

#[test]
fn only_edge_devices_count_as_ancestors() {
    let tree = sample_tree();
    assert!(tree.contains_ancestor("edge1", &id("leaf2")));
    assert!(tree.contains_ancestor("edge3", &id("edge3")), "itself");
    assert!(!tree.contains_ancestor("leaf1", &id("leaf1")));
    assert!(!tree.contains_ancestor("leaf1", &id("leaf1/modB")));
    assert!(!tree.contains_ancestor("edge2/$edgeHub", &id("leaf1")));
    assert!(!tree.contains_ancestor("", &id("leaf1")));
    assert!(!tree.contains_ancestor("edge1", &id("nobody")));
}

#[test]
fn children_are_the_immediate_ones_in_order() {
    let tree = sample_tree();
    let children = |device: &str| -> Vec<String> {
        tree.children_of(device)
            .map(|child| child.identity.to_string())
            .collect()
    };
    assert_eq!(
        children("edge2"),
        ["edge2/$edgeHub", "edge2/modA", "edge3", "leaf1"]
    );
    assert_eq!(children("leaf1"), ["leaf1/modB"]);
    assert_eq!(children("leaf0"), [""; 0]);
    assert_eq!(children("edge1").len(), 5);
    assert_eq!(children("not an id"), [""; 0]);
}

#[test]
fn two_devices_with_one_scope_never_take_turns() {
    let mut twin = edge("aaa", Some("edge1"));
    twin.device_scope = Some(scope_of("edge1"));
    let tree = sample_tree().with(vec![twin.clone()]).tree;
    assert_eq!(
        chain_text(&tree, "leaf0").as_deref(),
        Some("leaf0;edge1"),
        "ours wins"
    );

    twin.device_scope = Some(scope_of("edge2"));
    let one_way = sample_tree().with(vec![twin.clone()]).tree;
    let mut scope = sample_scope();
    scope.insert(0, twin);
    assert_eq!(
        chain_text(&one_way, "leaf1"),
        chain_text(&tree_of(scope), "leaf1")
    );
}

#[test]
fn the_limit_refuses_new_identities_and_keeps_the_old() {
    use crate::limits::SCOPE_IDENTITIES_MAX;
    let mut scope = sample_scope();
    let free = SCOPE_IDENTITIES_MAX - scope.len();
    scope.extend((0..free).map(|n| module(&format!("edge1/m{n:06}"))));
    let full = tree_of(scope);
    assert_eq!(full.len(), SCOPE_IDENTITIES_MAX);

    let applied = full.with(vec![
        leaf("surplus", "edge1"),
        disabled(leaf("leaf0", "edge1")),
    ]);
    assert_eq!(
        applied.rejected,
        [RejectedIdentity {
            identity: id("surplus"),
            reason: RejectReason::TooMany
        }]
    );
    assert_eq!(applied.changes, [IdentityChange::Changed(id("leaf0"))]);
    assert_eq!(applied.tree.len(), SCOPE_IDENTITIES_MAX);
}

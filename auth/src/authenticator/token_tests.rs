//! Tokens: signatures, audiences, expiry and keys (spec/auth-hierarchy-http.md 2.2-2.5).

use super::*;
use crate::limits::TOKEN_SKEW_MS;
use crate::scope_tree::{Authentication, ServiceIdentity};
use crate::test_support::*;

const PRIMARY: &str = "cHJpbWFyeS1rZXktMDEyMzQ1Njc4OWFiY2RlZjAxMjM=";
const SECONDARY: &str = "c2Vjb25kYXJ5LWtleS0wMTIzNDU2Nzg5YWJjZGVmMDE=";

fn hosts() -> AudienceHosts {
    AudienceHosts::new(HUB_HOST, OWN_HOST)
}

fn judge_at(tree: &ScopeTree, identity: &str, token: &str, now_ms: u64) -> Verdict {
    let credential = Credential::Sas(token.to_owned());
    let claim = Claim {
        identity: id(identity),
        chain: None,
        credential,
    };
    verify(tree, &hosts(), &claim, now_ms)
}

fn judge(tree: &ScopeTree, identity: &str, token: &str) -> Verdict {
    judge_at(tree, identity, token, NOW_MS)
}

fn is_accepted(tree: &ScopeTree, identity: &str, token: &str) -> bool {
    matches!(judge(tree, identity, token), Verdict::Accepted(_))
}

/// The refusal, whether it is final or may be out of date.
fn refusal(verdict: Verdict) -> AuthnError {
    match verdict {
        Verdict::Accepted(principal) => panic!("accepted: {principal:?}"),
        Verdict::Refused(error) => error,
        Verdict::Stale(stale) => stale.error,
    }
}

fn with_keys(mut record: ServiceIdentity, primary: &str, secondary: &str) -> ServiceIdentity {
    record.authentication = symmetric(primary, secondary);
    record
}

/// leaf1 and edge1/$edgeHub with the keys of the test vectors.
fn vector_tree() -> ScopeTree {
    tree_of(vec![
        edge("edge1", None),
        with_keys(leaf("leaf1", "edge1"), PRIMARY, SECONDARY),
        with_keys(module("edge1/$edgeHub"), PRIMARY, SECONDARY),
    ])
}

#[test]
fn all_test_vectors_pass() {
    let hub_module = "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub";
    for (identity, sr, signature) in [
        (
            "leaf1",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1",
            "6sF7tkohqVI1CRLNje01Ad5UG9tMovIaZoL8XkVm5Zc=",
        ),
        (
            "leaf1",
            "contoso.azure-devices.net%2fdevices%2fleaf1",
            "JkZE8Gt0ciPgMAuPaoryc1PSY1RYLfsZoJqC8YZFdgw=",
        ),
        (
            "leaf1",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1",
            "hm7doHPHa6Fb0xr++7iFU2CNkYNxA/1w15+9O/1Wrj8=",
        ),
        (
            "edge1/$edgeHub",
            hub_module,
            "F6fyURxneqjSfaaqmeHGIuD5ZSurRW0AyZ1bxGqvOL0=",
        ),
    ] {
        let signature = encode(signature);
        for token in [
            format!("SharedAccessSignature sr={sr}&sig={signature}&se=4102444800"),
            format!("SharedAccessSignature SE=4102444800&skn=&Sig={signature}&SR={sr}"),
        ] {
            let Verdict::Accepted(principal) = judge(&vector_tree(), identity, &token) else {
                panic!("{token}");
            };
            assert_eq!(principal.identity(), &id(identity));
            assert_eq!(principal.actor(), None);
            assert_eq!(
                principal.expires_at_ms(),
                Some(4_102_444_800_000 + TOKEN_SKEW_MS)
            );
            assert!(!principal.used_device_key());
        }
    }
}

#[test]
fn the_vectors_signatures_belong_to_their_strings() {
    // The signature of the upper-case form on the lower-case one and the other way round: the
    // raw text is what is signed.
    for (sr, signature) in [
        (
            "contoso.azure-devices.net%2fdevices%2fleaf1",
            "6sF7tkohqVI1CRLNje01Ad5UG9tMovIaZoL8XkVm5Zc=",
        ),
        (
            "contoso.azure-devices.net%2Fdevices%2Fleaf1",
            "JkZE8Gt0ciPgMAuPaoryc1PSY1RYLfsZoJqC8YZFdgw=",
        ),
    ] {
        let signature = encode(signature);
        let token = format!("SharedAccessSignature sr={sr}&sig={signature}&se=4102444800");
        assert_eq!(
            refusal(judge(&vector_tree(), "leaf1", &token)),
            AuthnError::WrongSignature {
                identity: id("leaf1")
            }
        );
    }
}

#[test]
fn an_unencoded_signature_is_read_all_the_same() {
    // 13 #20; the secondary vector's signature has `+`, `/` and `=`.
    let token = "SharedAccessSignature sr=contoso.azure-devices.net%2Fdevices%2Fleaf1\
                 &sig=hm7doHPHa6Fb0xr++7iFU2CNkYNxA/1w15+9O/1Wrj8=&se=4102444800";
    assert!(is_accepted(&vector_tree(), "leaf1", token));
    let without_padding = token.replace("Wrj8=", "Wrj8");
    assert!(is_accepted(&vector_tree(), "leaf1", &without_padding));
}

#[test]
fn every_bit_of_the_signature_counts() {
    let tree = sample_tree();
    let good = token_of("leaf1");
    let start = good.find("sig=").unwrap() + 4;
    let end = good.find("&se=").unwrap();
    let mut changed = 0;
    for at in start..end {
        let old = good.as_bytes()[at];
        if !old.is_ascii_alphanumeric() || good[..at].ends_with(['%']) {
            continue;
        }
        let new = if old == b'A' { "B" } else { "A" };
        let mut token = good.clone();
        token.replace_range(at..=at, new);
        assert!(!is_accepted(&tree, "leaf1", &token), "{token}");
        changed += 1;
    }
    assert!(changed > 40, "{changed}");
}

#[test]
fn every_encoding_of_the_audience_passes() {
    // The table of 2.3 and its accepted relatives (13 #19).
    let tree = tree_of(vec![
        edge("edge1", None),
        leaf("Leaf1", "edge1"),
        module("edge1/$edgeHub"),
        leaf("50%off", "edge1"),
        leaf("50%25off", "edge1"),
    ]);
    for (identity, sr) in [
        ("Leaf1", "contoso.azure-devices.net%2Fdevices%2FLeaf1"),
        ("Leaf1", "contoso.azure-devices.net%2fdevices%2fLeaf1"),
        ("Leaf1", "contoso.azure-devices.net/devices/Leaf1"),
        ("Leaf1", "contoso.azure-devices.net%2Fdevices%2Fleaf1"),
        ("Leaf1", "CONTOSO.azure-devices.net%2Fdevices%2FLEAF1"),
        ("Leaf1", "gateway.local%2Fdevices%2FLeaf1"),
        ("Leaf1", "Gateway.Local%2Fdevices%2FLeaf1"),
        ("Leaf1", "%20contoso.azure-devices.net%2Fdevices%2FLeaf1%20"),
        ("Leaf1", "contoso.azure-devices.net%252Fdevices%252FLeaf1"),
        (
            "edge1/$edgeHub",
            "contoso.azure-devices.net/devices/edge1/modules/$edgeHub",
        ),
        (
            "edge1/$edgeHub",
            "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%24edgeHub",
        ),
        (
            "edge1/$edgeHub",
            "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
        ),
        (
            "edge1/$edgeHub",
            "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%252524edgeHub",
        ),
        (
            "edge1/$edgeHub",
            "contoso.azure-devices.net%2fdevices%2fedge1%2fmodules%2f%24edgehub",
        ),
        (
            "edge1/$edgeHub",
            "contoso.azure-devices.net%2Fdevices%2Fedge1",
        ),
        ("50%off", "contoso.azure-devices.net/devices/50%off"),
        ("50%off", "contoso.azure-devices.net%2Fdevices%2F50%25off"),
        (
            "50%off",
            "contoso.azure-devices.net%2Fdevices%2F50%252525off",
        ),
        (
            "50%25off",
            "contoso.azure-devices.net%2Fdevices%2F50%2525off",
        ),
        (
            "50%25off",
            "contoso.azure-devices.net%2Fdevices%2F50%252525off",
        ),
    ] {
        let token = raw_token(sr, "4102444800", &primary_key(identity));
        assert!(is_accepted(&tree, identity, &token), "{identity}: {sr}");
    }
}

#[test]
fn other_audiences_are_refused_whatever_the_signature() {
    let tree = sample_tree();
    for (identity, sr) in [
        // Another hub, none, or one that only contains ours.
        ("leaf1", "fabrikam.azure-devices.net%2Fdevices%2Fleaf1"),
        ("leaf1", "%2Fdevices%2Fleaf1"),
        (
            "leaf1",
            "contoso.azure-devices.net.evil.example%2Fdevices%2Fleaf1",
        ),
        ("leaf1", "evil.contoso.azure-devices.net%2Fdevices%2Fleaf1"),
        ("leaf1", "contoso%2Fdevices%2Fleaf1"),
        // Sibling, prefix, longer name.
        ("leaf1", "contoso.azure-devices.net%2Fdevices%2Fleaf2"),
        ("leaf1", "contoso.azure-devices.net%2Fdevices%2Fleaf10"),
        ("leaf1", "contoso.azure-devices.net%2Fdevices%2Fleaf"),
        ("leaf1", "contoso.azure-devices.net%2Fdevices%2F"),
        // A device with a module's audience; a module with another's.
        (
            "leaf1",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1%2Fmodules%2FmodB",
        ),
        (
            "leaf1/modB",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1%2Fmodules%2FmodA",
        ),
        (
            "leaf1/modB",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1%2Fmodules%2F",
        ),
        (
            "edge2/modA",
            "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2FmodA",
        ),
        ("edge2/modA", "contoso.azure-devices.net%2Fdevices%2Fedge1"),
        // Another shape.
        ("leaf1", "contoso.azure-devices.net"),
        ("leaf1", "contoso.azure-devices.net%2Fdevices"),
        (
            "leaf1",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1%2Fmodules",
        ),
        ("leaf1", "contoso.azure-devices.net%2Fdevices%2Fleaf1%2F"),
        (
            "leaf1",
            "contoso.azure-devices.net%2Fdevices%2Fleaf1%2Fmodules%2FmodB%2Fmore",
        ),
        ("leaf1", "leaf1"),
        // More than three decodings.
        (
            "leaf1",
            "contoso.azure-devices.net%2525252Fdevices%2525252Fleaf1",
        ),
    ] {
        let token = raw_token(sr, "4102444800", &primary_key(identity));
        assert_eq!(
            judge(&tree, identity, &token),
            Verdict::Refused(AuthnError::WrongAudience {
                identity: id(identity)
            }),
            "{identity}: {sr}"
        );
    }
}

#[test]
fn a_blank_host_is_nobody() {
    let hosts = AudienceHosts::new("", "  ");
    assert!(!hosts.contains(""));
    assert!(!hosts.contains("  "));
    assert!(AudienceHosts::new(HUB_HOST, "").contains(HUB_HOST));
}

#[test]
fn a_token_counts_until_five_minutes_after_its_expiry() {
    let tree = sample_tree();
    let sr = encode(&audience(HUB_HOST, "leaf1"));
    let token = |se_s: u64| raw_token(&sr, &se_s.to_string(), &primary_key("leaf1"));
    let end_ms = NOW_MS + TOKEN_SKEW_MS;

    let accepted = judge_at(&tree, "leaf1", &token(NOW_S), end_ms);
    let Verdict::Accepted(principal) = accepted else {
        panic!("{accepted:?}")
    };
    assert_eq!(principal.expires_at_ms(), Some(end_ms));
    assert_eq!(
        judge_at(&tree, "leaf1", &token(NOW_S), end_ms + 1),
        Verdict::Refused(AuthnError::TokenExpired {
            expired_at_ms: NOW_MS
        })
    );
    // No upper bound, no "not before": S18 `future`.
    assert!(is_accepted(&tree, "leaf1", &token(NOW_S * 100)));
    // 1970, and the far end.
    assert_eq!(
        refusal(judge(&tree, "leaf1", &token(0))),
        AuthnError::TokenExpired { expired_at_ms: 0 }
    );
    assert!(is_accepted(&tree, "leaf1", &token(u64::MAX)));
}

#[test]
fn the_expiry_is_signed_as_it_was_written() {
    let tree = sample_tree();
    let sr = encode(&audience(HUB_HOST, "leaf1"));
    let token = raw_token(&sr, "4102444800.5", &primary_key("leaf1"));
    assert!(is_accepted(&tree, "leaf1", &token));
    assert!(!is_accepted(
        &tree,
        "leaf1",
        &token.replace("4102444800.5", "4102444800.50")
    ));
    assert!(!is_accepted(
        &tree,
        "leaf1",
        &token.replace("4102444800.5", "4102444801.5")
    ));
}

#[test]
fn unreadable_tokens_are_refused_for_good() {
    let tree = sample_tree();
    let good = token_of("leaf1");
    let twice = format!("{good}&se=4102444800");
    for token in [
        " ",
        "password",
        "SharedAccessSignature",
        "SharedAccessSignature ",
        "SharedAccessSignature sr=a&sig=b",
        "SharedAccessSignature sr=a&se=1",
        "SharedAccessSignature sig=b&se=1",
        "SharedAccessSignature sr=a&sig=b&se=never",
        "SharedAccessSignature sr&sig=b&se=1",
        "sharedaccesssignature sr=a&sig=b&se=4102444800",
        twice.as_str(),
    ] {
        let verdict = judge(&tree, "leaf1", token);
        let Verdict::Refused(error) = verdict else {
            panic!("{token}: {verdict:?}")
        };
        assert!(
            matches!(error, AuthnError::MalformedToken(_)),
            "{token}: {error:?}"
        );
        assert!(error.is_definite());
    }
}

#[test]
fn an_empty_password_is_none() {
    let refused = Verdict::Refused(AuthnError::NoCredential);
    assert_eq!(judge(&sample_tree(), "leaf1", ""), refused);
}

#[test]
fn a_signature_that_is_no_base64_is_wrong() {
    let tree = sample_tree();
    let sr = encode(&audience(HUB_HOST, "leaf1"));
    for signature in ["%3F%3F%3F", "AAAA", "%00", "A"] {
        let token = format!("SharedAccessSignature sr={sr}&sig={signature}&se=4102444800");
        assert_eq!(
            refusal(judge(&tree, "leaf1", &token)),
            AuthnError::WrongSignature {
                identity: id("leaf1")
            }
        );
    }
}

#[test]
fn either_key_of_the_identity_counts() {
    let tree = sample_tree();
    for identity in ["leaf1", "edge2", "leaf1/modB", "edge2/$edgeHub"] {
        assert!(is_accepted(
            &tree,
            identity,
            &token_for(identity, &primary_key(identity))
        ));
        assert!(is_accepted(
            &tree,
            identity,
            &token_for(identity, &secondary_key(identity))
        ));
    }
    let stranger = token_for("leaf1", &primary_key("leaf2"));
    assert!(!is_accepted(&tree, "leaf1", &stranger));
}

#[test]
fn an_absent_or_odd_key_does_not_spoil_the_other() {
    let good = primary_key("leaf1");
    for (primary, secondary) in [
        ("", good.as_str()),
        (good.as_str(), ""),
        ("no base64!", &good),
    ] {
        let record = with_keys(leaf("leaf1", "edge1"), primary, secondary);
        let tree = tree_of(vec![edge("edge1", None), record]);
        assert!(
            is_accepted(&tree, "leaf1", &token_for("leaf1", &good)),
            "{primary}|{secondary}"
        );
    }
}

#[test]
fn without_a_usable_key_nobody_gets_in() {
    let kinds = [
        symmetric("", ""),
        symmetric("  ", "no base64!"),
        symmetric("====", ""),
        Authentication::None,
        Authentication::CertificateAuthority,
        Authentication::Thumbprint {
            primary: Some("AB".to_owned()),
            secondary: None,
        },
    ];
    for authentication in kinds {
        let record = ServiceIdentity {
            authentication,
            ..leaf("leaf1", "edge1")
        };
        let tree = tree_of(vec![edge("edge1", None), record.clone()]);
        assert_eq!(
            refusal(judge(&tree, "leaf1", &token_of("leaf1"))),
            AuthnError::NoUsableKey {
                identity: id("leaf1")
            },
            "{record:?}"
        );
    }
}

#[test]
fn a_module_may_use_its_devices_key() {
    let tree = sample_tree();
    let device_key = primary_key("leaf1");
    for audience_of in ["leaf1/modB", "leaf1"] {
        for key in [&device_key, &secondary_key("leaf1")] {
            let Verdict::Accepted(principal) =
                judge(&tree, "leaf1/modB", &token_for(audience_of, key))
            else {
                panic!("{audience_of}");
            };
            assert_eq!(principal.identity(), &id("leaf1/modB"));
            assert!(principal.used_device_key());
        }
    }
    // A module's key is no key of its device, and its own key works with both audiences.
    assert!(!is_accepted(
        &tree,
        "leaf1",
        &token_for("leaf1", &primary_key("leaf1/modB"))
    ));
    assert!(is_accepted(
        &tree,
        "leaf1/modB",
        &token_for("leaf1", &primary_key("leaf1/modB"))
    ));
}

#[test]
fn a_module_without_keys_may_use_its_devices_key() {
    let bare = ServiceIdentity {
        authentication: Authentication::None,
        ..module("leaf1/modB")
    };
    let mut scope = sample_scope();
    scope.retain(|record| record.identity != bare.identity);
    scope.push(bare);
    let token = token_for("leaf1/modB", &primary_key("leaf1"));
    assert!(is_accepted(&tree_of(scope), "leaf1/modB", &token));
}

#[test]
fn an_edge_hub_never_uses_its_devices_key() {
    let tree = sample_tree();
    let token = token_for("edge2/$edgeHub", &primary_key("edge2"));
    assert_eq!(
        refusal(judge(&tree, "edge2/$edgeHub", &token)),
        AuthnError::WrongSignature {
            identity: id("edge2/$edgeHub")
        }
    );
}

#[test]
fn a_module_cannot_use_another_modules_key() {
    let mut scope = sample_scope();
    scope.push(module("edge2/modB"));
    let tree = tree_of(scope);
    let token = token_for("edge2/modA", &primary_key("edge2/modB"));
    assert!(!is_accepted(&tree, "edge2/modA", &token));
}

#[test]
fn ids_that_differ_in_case_are_different_devices() {
    let mut scope = sample_scope();
    scope.push(leaf("LEAF1", "edge2"));
    let tree = tree_of(scope);
    // The audience matches in any case, the key tells them apart.
    assert!(!is_accepted(&tree, "LEAF1", &token_of("leaf1")));
    assert!(is_accepted(
        &tree,
        "LEAF1",
        &token_for("leaf1", &primary_key("LEAF1"))
    ));
}

//! No `Debug` or `Display` of any type that holds a key or a token shows it.

use edgehub_proto::auth_chain::AuthChain;

use super::*;
use crate::scope_tree::{KeyMaterial, ScopeChange};
use crate::test_support::*;

/// Every form in which a secret of leaf1 could show: keys, their bytes, the signature.
fn secrets(token: &str) -> Vec<String> {
    let signature = token
        .split("sig=")
        .nth(1)
        .unwrap()
        .split('&')
        .next()
        .unwrap();
    vec![
        primary_key("leaf1"),
        secondary_key("leaf1"),
        "primary key of leaf1".to_owned(),
        signature.to_owned(),
        signature
            .replace("%2B", "+")
            .replace("%2F", "/")
            .replace("%3D", "="),
        "SharedAccessSignature sr".to_owned(),
        "sig=".to_owned(),
    ]
}

fn assert_no_secret(text: &str, token: &str) {
    for secret in secrets(token) {
        assert!(!text.contains(&secret), "{secret} in {text}");
    }
}

#[test]
fn claims_and_credentials_hide_their_token() {
    let token = token_of("leaf1");
    let credential = Credential::Sas(token.clone());
    let chain = AuthChain::parse("leaf1;edge2").unwrap();
    let claim = Claim {
        identity: id("leaf1"),
        chain: Some(chain.clone()),
        credential: credential.clone(),
    };
    let service = ServiceClaim {
        caller: id("edge2/$edgeHub"),
        chain,
        credential: credential.clone(),
    };
    for text in [
        format!("{credential:?} {credential:#?}"),
        format!("{claim:?} {claim:#?}"),
        format!("{service:?} {service:#?}"),
    ] {
        assert!(text.contains("***"), "{text}");
        assert_no_secret(&text, &token);
    }
}

#[test]
fn records_trees_and_changes_hide_their_keys() {
    let token = token_of("leaf1");
    let tree = sample_tree();
    let record = leaf("leaf1", "edge2");
    let change = ScopeChange::Upsert(vec![record.clone()]);
    let applied = tree.with(vec![record.clone()]);
    let cache = ScopeCache::new(&id("edge1"));
    cache.apply(ScopeChange::Upsert(sample_scope()));
    let key = KeyMaterial::new(&primary_key("leaf1")).unwrap();
    for text in [
        format!("{record:?} {record:#?}"),
        format!("{tree:?}"),
        format!("{change:?}"),
        format!("{applied:?}"),
        format!("{cache:?}"),
        format!("{key:?}"),
        format!("{:?}", record.authentication),
    ] {
        assert!(text.contains("***"), "{text}");
        assert_no_secret(&text, &token);
    }
}

#[test]
fn verdicts_and_errors_hide_what_was_presented() {
    let tree = sample_tree();
    let hosts = AudienceHosts::new(HUB_HOST, OWN_HOST);
    let good = token_of("leaf1");
    let se = format!("se={}", NOW_S + 3600);
    let tokens = [
        good.clone(),
        good.replace("se=", "se=x"),
        good.replace(&se, "se=0"),
        format!("{good}&sig=again"),
        good.replace("SharedAccessSignature ", "SharedAccessSignature"),
        good.replace("sr=", "rs="),
        good.replace("leaf1", "leaf2"),
    ];
    for token in tokens {
        let credential = Credential::Sas(token);
        for identity in ["leaf1", "leaf2", "nobody"] {
            let claim = Claim {
                identity: id(identity),
                chain: None,
                credential: credential.clone(),
            };
            let verdict = verify(&tree, &hosts, &claim, NOW_MS);
            assert_no_secret(&format!("{verdict:?}"), &good);
            let error = match verdict {
                Verdict::Accepted(_) => continue,
                Verdict::Refused(error) => error,
                Verdict::Stale(stale) => stale.error,
            };
            assert_no_secret(&format!("{error} {error:?} {}", error.reason()), &good);
        }
    }
}

#[test]
fn an_authenticator_hides_everything() {
    let cache = ScopeCache::new(&id("edge1"));
    cache.apply(ScopeChange::Upsert(sample_scope()));
    let hosts = AudienceHosts::new(HUB_HOST, OWN_HOST);
    let clock = Arc::new(edgehub_proto::clock::ManualClock::new(NOW_MS));
    let authenticator = Authenticator::new(cache, hosts, clock, None);
    assert_no_secret(&format!("{authenticator:?}"), &token_of("leaf1"));
}

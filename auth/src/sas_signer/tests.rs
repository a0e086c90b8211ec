//! Signatures and our own tokens.

use std::time::{Duration, Instant};

use edgehub_proto::clock::ManualClock;

use super::*;
use crate::test_support::{HUB_HOST, NOW_MS, NOW_S};

const PRIMARY: &str = "cHJpbWFyeS1rZXktMDEyMzQ1Njc4OWFiY2RlZjAxMjM=";
const SECONDARY: &str = "c2Vjb25kYXJ5LWtleS0wMTIzNDU2Nzg5YWJjZGVmMDE=";
const LEAF: &str = "contoso.azure-devices.net%2Fdevices%2Fleaf1\n4102444800";

fn source(clock: Arc<dyn Clock>) -> TokenSource {
    TokenSource::new(PRIMARY, HUB_HOST, "edge1", "$edgeHub", clock).unwrap()
}

/// `sr`, decoded `sig` and `se` of a token.
fn parts(token: &str) -> (String, String, u64) {
    let fields = token.strip_prefix("SharedAccessSignature ").unwrap();
    let field = |name: &str| {
        fields
            .split('&')
            .find_map(|field| field.strip_prefix(name))
            .unwrap()
            .to_owned()
    };
    let decoded = field("sig=")
        .replace("%2B", "+")
        .replace("%2F", "/")
        .replace("%3D", "=");
    (field("sr="), decoded, field("se=").parse().unwrap())
}

#[test]
fn signatures_equal_the_test_vectors() {
    for (sr, key, signature) in [
        (
            "%2Fdevices%2Fleaf1",
            PRIMARY,
            "6sF7tkohqVI1CRLNje01Ad5UG9tMovIaZoL8XkVm5Zc=",
        ),
        (
            "%2fdevices%2fleaf1",
            PRIMARY,
            "JkZE8Gt0ciPgMAuPaoryc1PSY1RYLfsZoJqC8YZFdgw=",
        ),
        (
            "%2Fdevices%2Fleaf1",
            SECONDARY,
            "hm7doHPHa6Fb0xr++7iFU2CNkYNxA/1w15+9O/1Wrj8=",
        ),
        (
            "%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
            PRIMARY,
            "F6fyURxneqjSfaaqmeHGIuD5ZSurRW0AyZ1bxGqvOL0=",
        ),
    ] {
        let text = format!("contoso.azure-devices.net{sr}\n4102444800");
        assert_eq!(sign(key, &text).unwrap(), signature);
        assert_eq!(verify(key, &text, signature), Ok(true));
    }
}

#[test]
fn a_signature_of_another_key_text_or_length_is_wrong() {
    let good = sign(PRIMARY, LEAF).unwrap();
    assert_eq!(verify(SECONDARY, LEAF, &good), Ok(false));
    assert_eq!(
        verify(PRIMARY, &LEAF.replace("leaf1", "leaf2"), &good),
        Ok(false)
    );
    assert_eq!(verify(PRIMARY, LEAF, ""), Ok(false));
    assert_eq!(verify(PRIMARY, LEAF, &good[..good.len() - 4]), Ok(false));
    assert_eq!(verify(PRIMARY, LEAF, &format!("{good}AAAA")), Ok(false));
    assert_eq!(verify(PRIMARY, LEAF, "not base64!"), Ok(false));
    assert_eq!(
        verify(PRIMARY, LEAF, good.trim_end_matches('=')),
        Ok(true),
        "padding is optional"
    );
}

#[test]
fn an_unusable_key_is_an_error_and_not_an_open_door() {
    for (key, error) in [
        ("", KeyError::Empty),
        ("   ", KeyError::Empty),
        ("no base64!", KeyError::NotBase64),
        ("=", KeyError::NotBase64),
    ] {
        assert_eq!(sign(key, LEAF), Err(error), "{key:?}");
        assert_eq!(verify(key, LEAF, "AAAA"), Err(error), "{key:?}");
    }
    let clock = Arc::new(ManualClock::new(0));
    assert!(TokenSource::new("", HUB_HOST, "edge1", "$edgeHub", clock).is_err());
}

#[test]
fn own_tokens_have_the_encodings_of_the_reference() {
    let source = source(Arc::new(ManualClock::new(NOW_MS)));
    for (token, sr) in [
        (
            source.device_token(),
            "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
        ),
        (
            source.http_token(),
            "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%252524edgeHub",
        ),
    ] {
        let (resource, signature, expiry_s) = parts(&token);
        assert_eq!(resource, sr);
        assert_eq!(expiry_s, NOW_S + 3600);
        assert_eq!(
            sign(PRIMARY, &format!("{sr}\n{expiry_s}")).unwrap(),
            signature
        );
    }
}

#[test]
fn a_token_is_used_again_until_half_its_life_remains() {
    let clock = Arc::new(ManualClock::new(NOW_MS));
    let source = source(Arc::clone(&clock) as Arc<dyn Clock>);
    let first = source.signed_device_token();
    assert_eq!(first.expires_at_ms(), NOW_MS + OWN_TOKEN_TTL_MS);

    clock.advance(Duration::from_millis(
        OWN_TOKEN_TTL_MS - OWN_TOKEN_RENEW_BEFORE_MS - 1,
    ));
    assert_eq!(source.device_token(), first.text());
    assert_eq!(source.expires_at_ms(), first.expires_at_ms());

    clock.advance(Duration::from_millis(1));
    let second = source.signed_device_token();
    assert_ne!(second, first);
    assert_eq!(
        second.expires_at_ms(),
        first.expires_at_ms() + OWN_TOKEN_RENEW_BEFORE_MS
    );
    assert_eq!(source.expires_at_ms(), second.expires_at_ms());
}

/// A clock that tests set anywhere.
#[derive(Debug, Default)]
struct AnyClock(std::sync::atomic::AtomicU64);

impl Clock for AnyClock {
    fn unix_ms(&self) -> u64 {
        self.0.load(std::sync::atomic::Ordering::Relaxed)
    }

    fn instant(&self) -> Instant {
        ManualClock::new(0).instant()
    }
}

#[test]
fn a_clock_that_is_set_back_makes_a_new_token() {
    let clock = Arc::new(AnyClock(NOW_MS.into()));
    let source = source(Arc::clone(&clock) as Arc<dyn Clock>);
    let from_the_future = source.device_token();
    clock.0.store(
        NOW_MS - 24 * OWN_TOKEN_TTL_MS,
        std::sync::atomic::Ordering::Relaxed,
    );
    assert_ne!(source.device_token(), from_the_future);
    assert_eq!(source.expires_at_ms(), NOW_MS - 23 * OWN_TOKEN_TTL_MS);
}

#[test]
fn the_end_of_time_does_not_overflow() {
    let source = source(Arc::new(ManualClock::new(u64::MAX)));
    assert!(source.expires_at_ms() > 0);
}

#[test]
fn nothing_here_prints_a_secret() {
    let source = source(Arc::new(ManualClock::new(NOW_MS)));
    let token = source.signed_device_token();
    let (_, signature, _) = parts(token.text());
    for text in [
        format!("{source:?}"),
        format!("{token:?}"),
        format!("{source:#?}"),
    ] {
        assert!(text.contains("***"), "{text}");
        for secret in [PRIMARY, "primary-key", signature.as_str(), "sig="] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

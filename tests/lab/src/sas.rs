//! Shared access signatures as a client makes them (spec/auth-hierarchy-http.md 2).
//!
//! Written apart from the hub's own code on purpose: a shared mistake would be invisible.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

/// The `sr` of a device or a module as the device SDKs write it: encoded once.
#[must_use]
pub fn resource(hub_host: &str, device_id: &str, module_id: Option<&str>) -> String {
    encode(&match module_id {
        Some(module_id) => format!("{hub_host}/devices/{device_id}/modules/{module_id}"),
        None => format!("{hub_host}/devices/{device_id}"),
    })
}

/// A token for an `sr` that is already encoded, valid until `expires_s` (unix seconds).
///
/// # Errors
/// When the key is not base64.
pub fn token(
    resource: &str,
    key_base64: &str,
    expires_s: u64,
    key_name: Option<&str>,
) -> Result<String> {
    let signature = encode(&sign(key_base64, &format!("{resource}\n{expires_s}"))?);
    let mut token = format!("SharedAccessSignature sr={resource}&sig={signature}&se={expires_s}");
    if let Some(name) = key_name {
        let _ = write!(token, "&skn={}", encode(name));
    }
    Ok(token)
}

/// Base64 of the HMAC-SHA256 of `text` under a base64 key.
///
/// # Errors
/// When the key is not base64.
pub fn sign(key_base64: &str, text: &str) -> Result<String> {
    let key = STANDARD
        .decode(key_base64)
        .context("the key is not base64")?;
    let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
    Ok(STANDARD.encode(hmac::sign(&key, text.as_bytes())))
}

/// Unix seconds of now plus `lifetime`: the usual `expires_s`.
#[must_use]
pub fn expires_in(lifetime: Duration) -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (now + lifetime).as_secs()
}

/// Percent-encodes everything but the unreserved characters of RFC 3986.
#[must_use]
pub fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "cHJpbWFyeS1rZXktMDEyMzQ1Njc4OWFiY2RlZjAxMjM=";
    const SECONDARY: &str = "c2Vjb25kYXJ5LWtleS0wMTIzNDU2Nzg5YWJjZGVmMDE=";

    /// The vectors of spec/auth-hierarchy-http.md 2.2.
    #[test]
    fn signatures_equal_the_test_vectors() {
        let leaf1 = resource("contoso.azure-devices.net", "leaf1", None);
        assert_eq!(leaf1, "contoso.azure-devices.net%2Fdevices%2Fleaf1");
        for (key, sr, signature) in [
            (
                PRIMARY,
                leaf1.as_str(),
                "6sF7tkohqVI1CRLNje01Ad5UG9tMovIaZoL8XkVm5Zc=",
            ),
            (
                SECONDARY,
                leaf1.as_str(),
                "hm7doHPHa6Fb0xr++7iFU2CNkYNxA/1w15+9O/1Wrj8=",
            ),
            (
                PRIMARY,
                "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
                "F6fyURxneqjSfaaqmeHGIuD5ZSurRW0AyZ1bxGqvOL0=",
            ),
        ] {
            assert_eq!(sign(key, &format!("{sr}\n4102444800")).unwrap(), signature);
        }
    }

    #[test]
    fn a_token_is_spelled_as_the_sdks_spell_it() {
        let sr = resource("h", "edge1", Some("modA"));
        let token = token(&sr, PRIMARY, 4_102_444_800, Some("owner")).unwrap();
        assert!(
            token.starts_with("SharedAccessSignature sr=h%2Fdevices%2Fedge1%2Fmodules%2FmodA&")
        );
        assert!(token.ends_with("%3D&se=4102444800&skn=owner"));
    }

    #[test]
    fn a_key_that_is_not_base64_is_an_error() {
        assert!(sign("not base64!", "x").is_err());
    }
}

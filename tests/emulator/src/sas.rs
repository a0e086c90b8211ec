//! Shared access signatures: grammar, signature, audience (spec/upstream.md B3,
//! spec/auth-hierarchy-http.md 2.2).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::percent_decode_str;
use ring::hmac;

/// Why a text is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SasError {
    #[error("the credential does not start with `SharedAccessSignature `")]
    Prefix,
    #[error("a field of the token has no `=`, occurs twice or is not text")]
    Field,
    #[error("the token lacks sr, sig or se")]
    Missing,
    #[error("the token's se is not a number of seconds")]
    Expiry,
    #[error("the token's sig is not base64")]
    Signature,
}

/// A parsed token. Nothing about it is proven until [`SasToken::is_signed_with`] says so.
pub(crate) struct SasToken {
    /// `sr` exactly as received, because that is what was signed.
    resource_raw: String,
    expiry_text: String,
    signature: Vec<u8>,
    /// End of the token's life, milliseconds since 1970.
    pub(crate) expires_at_ms: u64,
    /// `skn`: the shared access policy; none for a device's or module's own key.
    pub(crate) policy: Option<String>,
}

impl SasToken {
    pub(crate) fn parse(text: &str) -> Result<Self, SasError> {
        let fields = text
            .strip_prefix("SharedAccessSignature ")
            .ok_or(SasError::Prefix)?;
        let (mut sr, mut sig, mut se, mut skn) = (None, None, None, None);
        for field in fields.split('&').filter(|field| !field.is_empty()) {
            let (name, value) = field.split_once('=').ok_or(SasError::Field)?;
            let slot = match name {
                "sr" => &mut sr,
                "sig" => &mut sig,
                "se" => &mut se,
                "skn" => &mut skn,
                _ => continue,
            };
            if slot.replace(value).is_some() {
                return Err(SasError::Field);
            }
        }
        let (Some(sr), Some(sig), Some(se)) = (sr, sig, se) else {
            return Err(SasError::Missing);
        };
        let signature = STANDARD
            .decode(decode(sig)?)
            .map_err(|_| SasError::Signature)?;
        let policy = skn.map(decode).transpose()?.filter(|name| !name.is_empty());
        let expires_at_ms = se
            .parse::<u64>()
            .map_err(|_| SasError::Expiry)?
            .saturating_mul(1_000);
        Ok(Self {
            resource_raw: sr.to_owned(),
            expiry_text: se.to_owned(),
            signature,
            expires_at_ms,
            policy,
        })
    }

    /// Whether the token was signed with this base64 key. Constant time in the signature.
    ///
    /// Event Hubs clients, whose resource is a URL `sb://…`, sign with the key's text.
    pub(crate) fn is_signed_with(&self, key_base64: &str) -> bool {
        let audiences = self.audiences();
        let is_url = |audience: &Vec<String>| audience.first().is_some_and(|part| part == "sb:");
        let key = if audiences.iter().any(is_url) {
            key_base64.as_bytes().to_vec()
        } else if let Ok(key) = STANDARD.decode(key_base64) {
            key
        } else {
            return false;
        };
        let signed = format!("{}\n{}", self.resource_raw, self.expiry_text);
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        hmac::verify(&key, signed.as_bytes(), &self.signature).is_ok()
    }

    /// The audience as it may have been meant: `sr` decoded once, twice and three times, because
    /// edgeHub encodes ids once or twice before it encodes the whole (spec/upstream.md A3.3).
    /// The host, then the path's segments.
    pub(crate) fn audiences(&self) -> Vec<Vec<String>> {
        let mut decoded = self.resource_raw.clone();
        let mut audiences = Vec::with_capacity(3);
        for _ in 0..3 {
            let Ok(once_more) = decode(&decoded) else {
                break;
            };
            decoded = once_more;
            audiences.push(decoded.split('/').map(str::to_owned).collect());
        }
        audiences
    }
}

impl fmt::Debug for SasToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SasToken")
            .field("sr", &self.resource_raw)
            .field("se", &self.expiry_text)
            .field("skn", &self.policy)
            .finish_non_exhaustive()
    }
}

fn decode(text: &str) -> Result<String, SasError> {
    percent_decode_str(text)
        .decode_utf8()
        .map(Into::into)
        .map_err(|_| SasError::Field)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "cHJpbWFyeS1rZXktMDEyMzQ1Njc4OWFiY2RlZjAxMjM=";
    const SECONDARY: &str = "c2Vjb25kYXJ5LWtleS0wMTIzNDU2Nzg5YWJjZGVmMDE=";

    /// The vectors of spec/auth-hierarchy-http.md 2.2.
    #[test]
    fn published_vectors_verify_with_their_key_only() {
        let leaf = "contoso.azure-devices.net%2Fdevices%2Fleaf1";
        let lower = "contoso.azure-devices.net%2fdevices%2fleaf1";
        let hub = "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub";
        for (sr, key, other, sig) in [
            (
                leaf,
                PRIMARY,
                SECONDARY,
                "6sF7tkohqVI1CRLNje01Ad5UG9tMovIaZoL8XkVm5Zc%3D",
            ),
            (
                lower,
                PRIMARY,
                SECONDARY,
                "JkZE8Gt0ciPgMAuPaoryc1PSY1RYLfsZoJqC8YZFdgw%3D",
            ),
            (
                leaf,
                SECONDARY,
                PRIMARY,
                "hm7doHPHa6Fb0xr%2B%2B7iFU2CNkYNxA%2F1w15%2B9O%2F1Wrj8%3D",
            ),
            (
                hub,
                PRIMARY,
                SECONDARY,
                "F6fyURxneqjSfaaqmeHGIuD5ZSurRW0AyZ1bxGqvOL0%3D",
            ),
        ] {
            let text = format!("SharedAccessSignature sig={sig}&se=4102444800&skn=&sr={sr}");
            let token = SasToken::parse(&text).unwrap();
            assert!(token.is_signed_with(key));
            assert!(!token.is_signed_with(other));
            assert!(!token.is_signed_with("not base64"));
            assert_eq!(token.expires_at_ms, 4_102_444_800_000);
            assert_eq!(token.policy, None);
            assert!(!format!("{token:?}").contains("sig"));
        }
    }

    #[test]
    fn audiences_are_decoded_up_to_three_times() {
        let token = |sr: &str| {
            SasToken::parse(&format!("SharedAccessSignature sr={sr}&sig=AA%3D%3D&se=1")).unwrap()
        };
        let wanted = ["h", "devices", "L5", "modules", EDGE];
        const EDGE: &str = "$edgeHub";
        for sr in [
            "h%2Fdevices%2FL5%2Fmodules%2F$edgeHub",
            "h%2Fdevices%2FL5%2Fmodules%2F%2524edgeHub",
            "h%2Fdevices%2FL5%2Fmodules%2F%252524edgeHub",
        ] {
            assert!(
                token(sr)
                    .audiences()
                    .iter()
                    .any(|audience| audience == &wanted),
                "{sr}"
            );
        }
        let four_times = token("h%2Fdevices%2FL5%2Fmodules%2F%25252524edgeHub");
        assert!(
            !four_times
                .audiences()
                .iter()
                .any(|audience| audience == &wanted)
        );
    }

    #[test]
    fn malformed_tokens_are_refused() {
        for (text, error) in [
            ("", SasError::Prefix),
            (
                "sharedaccesssignature sr=a&sig=AA%3D%3D&se=1",
                SasError::Prefix,
            ),
            ("SharedAccessSignature sr=a&sig=AA%3D%3D", SasError::Missing),
            (
                "SharedAccessSignature sr=a&sig=AA%3D%3D&se=1&se=2",
                SasError::Field,
            ),
            (
                "SharedAccessSignature sr=a&sig=AA%3D%3D&se=1&x",
                SasError::Field,
            ),
            (
                "SharedAccessSignature sr=a&sig=AA%3D%3D&se=-1",
                SasError::Expiry,
            ),
            (
                "SharedAccessSignature sr=a&sig=AA%3D%3D&se=1.5",
                SasError::Expiry,
            ),
            ("SharedAccessSignature sr=a&sig=%FF&se=1", SasError::Field),
            ("SharedAccessSignature sr=a&sig=A&se=1", SasError::Signature),
        ] {
            assert_eq!(SasToken::parse(text).unwrap_err(), error, "{text}");
        }
    }
}

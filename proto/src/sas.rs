//! The grammar of SAS tokens; no cryptography and no clock (spec/auth-hierarchy-http.md 2.1-2.3).
//!
//! `SharedAccessSignature sr={resource}&sig={base64}&se={unix seconds}[&skn={name}]`

use std::fmt;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::limits::SAS_LENGTH_MAX;

/// What the reference's encoder leaves as it is.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'!')
    .remove(b'*')
    .remove(b'(')
    .remove(b')');

/// A parsed token. `Debug` does not show the signature.
#[derive(Clone, PartialEq, Eq)]
pub struct SasToken {
    resource_raw: String,
    signature: String,
    expiry_text: String,
    expires_at_ms: u64,
    key_name: Option<String>,
}

/// Why a text is no token. Never contains a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SasError {
    /// Longer than [`SAS_LENGTH_MAX`].
    #[error("the token is too long")]
    TooLong,
    /// It does not begin with `SharedAccessSignature` and one part behind it.
    #[error("the text is not a SharedAccessSignature")]
    NotASignature,
    /// A field without `=`.
    #[error("a field of the token has no value")]
    FieldWithoutValue,
    /// A field twice.
    #[error("a field of the token is repeated")]
    Repeated,
    /// `sr`, `sig` or `se` is absent or empty.
    #[error("the token has no field {0}")]
    Missing(&'static str),
    /// `se` is no number of seconds.
    #[error("the expiry of the token is not a number")]
    Expiry,
    /// A field is not UTF-8 once decoded.
    #[error("a field of the token is not UTF-8")]
    NotUtf8,
}

impl SasToken {
    /// Reads a token.
    ///
    /// Fields come in any order, names in any case. A value ends at the field: an un-encoded
    /// base64 `=` or `+` in the signature is taken for what it means (13 #20).
    ///
    /// # Errors
    /// Why the text is no token.
    pub fn parse(text: &str) -> Result<Self, SasError> {
        if text.len() > SAS_LENGTH_MAX {
            return Err(SasError::TooLong);
        }
        let mut words = text.split_ascii_whitespace();
        let (Some("SharedAccessSignature"), Some(fields), None) =
            (words.next(), words.next(), words.next())
        else {
            return Err(SasError::NotASignature);
        };
        let (mut resource, mut signature, mut expiry, mut key_name) = (None, None, None, None);
        for field in fields.split('&').filter(|field| !field.is_empty()) {
            let (name, value) = field.split_once('=').ok_or(SasError::FieldWithoutValue)?;
            let slot = match name.to_ascii_lowercase().as_str() {
                "sr" => &mut resource,
                "sig" => &mut signature,
                "se" => &mut expiry,
                "skn" => &mut key_name,
                _ => continue,
            };
            if slot.replace(value).is_some() {
                return Err(SasError::Repeated);
            }
        }
        let required = |value: Option<&str>, name| {
            value
                .filter(|v| !v.is_empty())
                .map(str::to_owned)
                .ok_or(SasError::Missing(name))
        };
        let expiry_text = decode(&required(expiry, "se")?)?;
        Ok(Self {
            resource_raw: required(resource, "sr")?,
            // Base64 has no blank: one can only have been a plus.
            signature: decode(&required(signature, "sig")?)?.replace(' ', "+"),
            expires_at_ms: expiry_ms(&expiry_text).ok_or(SasError::Expiry)?,
            expiry_text,
            key_name: key_name.map(decode).transpose()?,
        })
    }

    /// `sr` as it came, which is what was signed.
    #[must_use]
    pub fn resource_raw(&self) -> &str {
        &self.resource_raw
    }

    /// The signature's base64 text, decoded from the field.
    #[must_use]
    pub fn signature(&self) -> &str {
        &self.signature
    }

    /// `se` as it was signed.
    #[must_use]
    pub fn expiry_text(&self) -> &str {
        &self.expiry_text
    }

    /// The expiry in Unix milliseconds; saturates.
    #[must_use]
    pub fn expires_at_ms(&self) -> u64 {
        self.expires_at_ms
    }

    /// `skn`, the name of a shared access policy.
    #[must_use]
    pub fn key_name(&self) -> Option<&str> {
        self.key_name.as_deref()
    }

    /// What the signature signs: `sr` and `se`, joined by a newline (2.2).
    #[must_use]
    pub fn string_to_sign(&self) -> String {
        format!("{}\n{}", self.resource_raw, self.expiry_text)
    }
}

impl fmt::Debug for SasToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SasToken")
            .field("resource_raw", &self.resource_raw)
            .field("signature", &"***")
            .field("expiry_text", &self.expiry_text)
            .field("key_name", &self.key_name)
            .finish()
    }
}

/// Seconds, possibly with a fraction; finite and not negative.
fn expiry_ms(text: &str) -> Option<u64> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(seconds.saturating_mul(1000));
    }
    let seconds: f64 = text.parse().ok()?;
    if !seconds.is_finite() || seconds < 0.0 {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "not negative, and the cast saturates"
    )]
    let ms = (seconds * 1000.0) as u64;
    Some(ms)
}

/// Form decoding: `+` is a blank, `%XX` a byte, a broken escape stays.
fn decode(text: &str) -> Result<String, SasError> {
    let plus = text.replace('+', " ");
    let decoded = percent_decode_str(&plus)
        .decode_utf8()
        .map_err(|_| SasError::NotUtf8)?;
    Ok(decoded.into_owned())
}

/// Composes a token from an encoded resource and a base64 signature.
#[must_use]
pub fn format(resource_encoded: &str, signature_base64: &str, expiry_s: u64) -> String {
    let signature = encode_resource(signature_base64);
    format!("SharedAccessSignature sr={resource_encoded}&sig={signature}&se={expiry_s}")
}

/// Percent-encodes a resource or a part of one, upper-case hex.
#[must_use]
pub fn encode_resource(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// What an audience names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audience {
    /// The host.
    pub host: String,
    /// The device.
    pub device_id: String,
    /// The module, for an audience of five parts.
    pub module_id: Option<String>,
}

/// The readings of a raw `sr`: decoded once, twice and three times, since clients encode ids and
/// the whole as they like (2.3, 13 #19). Readings that are no audience are left out, equal ones
/// come once.
pub fn audiences(resource_raw: &str) -> impl Iterator<Item = Audience> {
    let mut readings: Vec<Audience> = Vec::new();
    let mut text = resource_raw.to_owned();
    for _ in 0..3 {
        let Ok(decoded) = decode(&text) else { break };
        let audience = audience(decoded.trim());
        let settled = decoded == text;
        text = decoded;
        if let Some(audience) = audience.filter(|audience| !readings.contains(audience)) {
            readings.push(audience);
        }
        if settled {
            break;
        }
    }
    readings.into_iter()
}

fn audience(text: &str) -> Option<Audience> {
    let parts: Vec<&str> = text.split('/').collect();
    let (host, device, module) = match parts.as_slice() {
        [host, _, device] => (host, device, None),
        [host, _, device, _, module] => (host, device, Some(module)),
        _ => return None,
    };
    if host.is_empty() || device.is_empty() || module.is_some_and(|module| module.is_empty()) {
        return None;
    }
    Some(Audience {
        host: (*host).to_owned(),
        device_id: (*device).to_owned(),
        module_id: module.map(|module| (*module).to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_come_in_any_order_and_case() {
        let token = SasToken::parse(
            "SharedAccessSignature SE=4102444800&skn=iothubowner&Sig=a%2Bb%3D&sr=h%2Fdevices%2Fd",
        )
        .unwrap();
        assert_eq!(token.resource_raw(), "h%2Fdevices%2Fd");
        assert_eq!(token.signature(), "a+b=");
        assert_eq!(token.expires_at_ms(), 4_102_444_800_000);
        assert_eq!(token.key_name(), Some("iothubowner"));
        assert_eq!(token.string_to_sign(), "h%2Fdevices%2Fd\n4102444800");
        assert!(!format!("{token:?}").contains("a+b"));
    }

    #[test]
    fn the_vectors_of_the_specification_are_read_and_written() {
        // spec/auth-hierarchy-http.md 2.2; that the signatures are right is tested in auth.
        for (resource, signature) in [
            (
                "contoso.azure-devices.net%2Fdevices%2Fleaf1",
                "6sF7tkohqVI1CRLNje01Ad5UG9tMovIaZoL8XkVm5Zc=",
            ),
            (
                "contoso.azure-devices.net%2fdevices%2fleaf1",
                "JkZE8Gt0ciPgMAuPaoryc1PSY1RYLfsZoJqC8YZFdgw=",
            ),
            (
                "contoso.azure-devices.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
                "F6fyURxneqjSfaaqmeHGIuD5ZSurRW0AyZ1bxGqvOL0=",
            ),
        ] {
            let token = SasToken::parse(&format(resource, signature, 4_102_444_800)).unwrap();
            assert_eq!(token.signature(), signature);
            assert_eq!(token.string_to_sign(), format!("{resource}\n4102444800"));
        }
        assert_eq!(
            encode_resource("h.net/devices/$a~ b"),
            "h.net%2Fdevices%2F%24a%7E%20b"
        );
    }

    #[test]
    fn an_audience_of_a_prefix_is_another_one() {
        let raw = "h%2Fdevices%2Fedge10%2Fmodules%2F%2524edgeHub";
        assert!(audiences(raw).all(|audience| audience.device_id == "edge10"));
        assert_eq!(
            audiences("h%2Fdevices%2Fa%2F..%2Fb").count(),
            1,
            "never a device alone"
        );
        let smuggled = audiences("h%2Fdevices%2Fedge1%252Fmodules%252Fm")
            .next()
            .unwrap();
        assert_eq!(smuggled.device_id, "edge1%2Fmodules%2Fm");
    }

    #[test]
    fn an_unencoded_signature_passes() {
        let token = SasToken::parse("SharedAccessSignature sr=h&sig=a+b/c==&se=1").unwrap();
        assert_eq!(token.signature(), "a+b/c==");
    }

    #[test]
    fn what_is_no_token_is_diagnosed() {
        let parse = SasToken::parse;
        assert_eq!(parse(""), Err(SasError::NotASignature));
        assert_eq!(
            parse("sharedaccesssignature sr=a&sig=b&se=1"),
            Err(SasError::NotASignature)
        );
        let three = "SharedAccessSignature sr=a&sig=b &se=1";
        assert_eq!(parse(three), Err(SasError::NotASignature));
        let field = "SharedAccessSignature sr=a&sig&se=1";
        assert_eq!(parse(field), Err(SasError::FieldWithoutValue));
        let twice = "SharedAccessSignature sr=a&sig=b&se=1&SR=c";
        assert_eq!(parse(twice), Err(SasError::Repeated));
        assert_eq!(
            parse("SharedAccessSignature sr=a&se=1"),
            Err(SasError::Missing("sig"))
        );
        assert_eq!(
            parse("SharedAccessSignature sr=&sig=b&se=1"),
            Err(SasError::Missing("sr"))
        );
        for expiry in ["soon", "-1", "NaN", "inf", "infinity", "1e999", "%2B1+"] {
            let text = format!("SharedAccessSignature sr=a&sig=b&se={expiry}");
            assert_eq!(parse(&text), Err(SasError::Expiry), "{expiry}");
        }
        let long = format!("SharedAccessSignature sr={}&sig=b&se=1", "a".repeat(5000));
        assert_eq!(parse(&long), Err(SasError::TooLong));
        let huge = "SharedAccessSignature sr=a&sig=b&se=99999999999999999999999";
        assert_eq!(parse(huge).unwrap().expires_at_ms(), u64::MAX);
        let fraction = parse("SharedAccessSignature sr=a&sig=b&se=1.5").unwrap();
        assert_eq!(fraction.expires_at_ms(), 1500);
        assert_eq!(fraction.expiry_text(), "1.5");
    }

    #[test]
    fn all_encodings_of_an_audience_lead_to_it() {
        for raw in [
            "h.net%2Fdevices%2Fedge1%2Fmodules%2F$edgeHub",
            "h.net%2Fdevices%2Fedge1%2Fmodules%2F%24edgeHub",
            "h.net%2Fdevices%2Fedge1%2Fmodules%2F%2524edgeHub",
            "h.net%2Fdevices%2Fedge1%2Fmodules%2F%252524edgeHub",
            "h.net/devices/edge1/modules/$edgeHub",
        ] {
            let found = audiences(raw).any(|audience| {
                audience.host == "h.net"
                    && audience.device_id == "edge1"
                    && audience.module_id.as_deref() == Some("$edgeHub")
            });
            assert!(found, "{raw}");
        }
        assert_eq!(
            audiences("h.net%2Fdevices%2Fd").next().unwrap().module_id,
            None
        );
        assert_eq!(audiences("h.net").count(), 0);
        assert_eq!(audiences("h%2Fdevices%2Fd%2Fmodules").count(), 0);
        assert_eq!(audiences("%2Fdevices%2Fd").count(), 0);
    }

    proptest! {
        #[test]
        fn a_token_survives_its_text(
            resource in "[a-z.]{1,10}(%2F[a-zA-Z0-9$]{1,10}){2,4}",
            signature in "[A-Za-z0-9+/]{1,43}=?",
            expiry in 0u64..4_200_000_000,
        ) {
            let token = SasToken::parse(&format(&resource, &signature, expiry)).unwrap();
            prop_assert_eq!(token.resource_raw(), resource);
            prop_assert_eq!(token.signature(), signature);
            prop_assert_eq!(token.expires_at_ms(), expiry * 1000);
        }
    }
}

//! HMAC signatures of SAS tokens: checking those of others, making our own.
//!
//! The grammar of a token is [`edgehub_proto::sas`]; which key and audience count is
//! [`crate::authenticator`].
//!
//! # Where this behaviour comes from
//! spec/auth-hierarchy-http.md 2.2 (signature), 2.3 (the encodings of the audience), 2.6 (own
//! tokens).

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use edgehub_proto::clock::Clock;
use edgehub_proto::sas;
use parking_lot::Mutex;
use ring::hmac;
use thiserror::Error;

use crate::limits::{OWN_TOKEN_RENEW_BEFORE_MS, OWN_TOKEN_TTL_MS};

/// Standard alphabet; padding is optional, because clients that do not encode `=` in `sig` lose
/// it on the way.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A key that cannot sign.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// It has no bytes: anybody could sign with it.
    #[error("the key is empty")]
    Empty,
    /// It is not base64.
    #[error("the key is not base64")]
    NotBase64,
}

/// Signs `string_to_sign` with HMAC-SHA256; the result is base64, not yet percent-encoded.
///
/// # Errors
/// [`KeyError`] if the key is unusable.
pub fn sign(key_base64: &str, string_to_sign: &str) -> Result<String, KeyError> {
    Ok(sign_with(&decode_key(key_base64)?, string_to_sign))
}

/// Whether `signature_base64` is the signature of `string_to_sign` with this key. Compares in
/// constant time; text that is no base64 is simply no signature.
///
/// # Errors
/// [`KeyError`] if the key is unusable, which says nothing about the signature.
pub fn verify(
    key_base64: &str,
    string_to_sign: &str,
    signature_base64: &str,
) -> Result<bool, KeyError> {
    let key = decode_key(key_base64)?;
    let Ok(signature) = LENIENT.decode(signature_base64) else {
        return Ok(false);
    };
    Ok(hmac::verify(&key, string_to_sign.as_bytes(), &signature).is_ok())
}

fn decode_key(base64: &str) -> Result<hmac::Key, KeyError> {
    let bytes = LENIENT
        .decode(base64.trim())
        .map_err(|_| KeyError::NotBase64)?;
    if bytes.is_empty() {
        return Err(KeyError::Empty);
    }
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
}

fn sign_with(key: &hmac::Key, string_to_sign: &str) -> String {
    STANDARD.encode(hmac::sign(key, string_to_sign.as_bytes()))
}

/// Makes and caches the tokens of our own `$edgeHub`.
///
/// A token lives [`OWN_TOKEN_TTL_MS`] and is handed out until [`OWN_TOKEN_RENEW_BEFORE_MS`] or
/// less remain. The audience always names the IoT Hub, also when upstream is a parent's hub.
/// One instance serves all lanes; any thread may call it.
pub struct TokenSource {
    key: hmac::Key,
    device: Form,
    http: Form,
    clock: Arc<dyn Clock>,
}

/// One encoding of our audience with the token that was last signed for it.
struct Form {
    resource: String,
    cached: Mutex<Option<SignedToken>>,
}

/// A token that we signed. `Debug` prints `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedToken {
    text: String,
    expires_at_ms: u64,
}

impl SignedToken {
    /// The whole token, beginning with `SharedAccessSignature`.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its `se`, as Unix milliseconds.
    pub fn expires_at_ms(&self) -> u64 {
        self.expires_at_ms
    }

    /// The whole token, without a copy.
    pub fn into_text(self) -> String {
        self.text
    }
}

impl fmt::Debug for SignedToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            text: _,
            expires_at_ms,
        } = self;
        write!(
            formatter,
            "SignedToken(***, expires_at_ms: {expires_at_ms})"
        )
    }
}

impl TokenSource {
    /// Tokens for module `module_id` of `device_id` at the IoT Hub `hub_host`, signed with the
    /// module's key.
    ///
    /// # Errors
    /// [`KeyError`] if the key is unusable.
    pub fn new(
        key_base64: &str,
        hub_host: &str,
        device_id: &str,
        module_id: &str,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, KeyError> {
        let once = |id: &str| sas::encode_resource(id);
        let twice = |id: &str| once(&once(id));
        let whole = |device: String, module: String| Form {
            resource: once(&format!("{hub_host}/devices/{device}/modules/{module}")),
            cached: Mutex::new(None),
        };
        Ok(Self {
            key: decode_key(key_base64)?,
            device: whole(once(device_id), once(module_id)),
            http: whole(twice(device_id), twice(module_id)),
            clock,
        })
    }

    /// The token for MQTT and AMQP: ids encoded, then the whole audience (`%2524edgeHub`).
    pub fn device_token(&self) -> String {
        self.current(&self.device).into_text()
    }

    /// As [`Self::device_token`], with its expiry: what a lane needs that renews by reconnecting.
    pub fn signed_device_token(&self) -> SignedToken {
        self.current(&self.device)
    }

    /// The token for scope and registry calls: ids encoded twice, then the whole audience
    /// (`%252524edgeHub`).
    pub fn http_token(&self) -> String {
        self.current(&self.http).into_text()
    }

    /// Expiry of the token that [`Self::device_token`] hands out now, as Unix milliseconds.
    pub fn expires_at_ms(&self) -> u64 {
        self.current(&self.device).expires_at_ms
    }

    fn current(&self, form: &Form) -> SignedToken {
        let now_ms = self.clock.unix_ms();
        let mut cached = form.cached.lock();
        if let Some(token) = cached.as_ref() {
            let remaining_ms = token.expires_at_ms.saturating_sub(now_ms);
            // A clock that was set back must not keep a token from the future alive.
            if remaining_ms > OWN_TOKEN_RENEW_BEFORE_MS && remaining_ms <= OWN_TOKEN_TTL_MS {
                return token.clone();
            }
        }
        let token = self.sign(&form.resource, now_ms);
        *cached = Some(token.clone());
        token
    }

    fn sign(&self, resource: &str, now_ms: u64) -> SignedToken {
        let expiry_s = now_ms.saturating_add(OWN_TOKEN_TTL_MS) / 1000;
        let signature = sign_with(&self.key, &format!("{resource}\n{expiry_s}"));
        SignedToken {
            text: sas::format(resource, &signature, expiry_s),
            expires_at_ms: expiry_s.saturating_mul(1000),
        }
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("TokenSource")
            .field("key", &"***")
            .field("resource", &self.device.resource)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;

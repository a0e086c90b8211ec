//! SAS tokens, right and wrong.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use ring::hmac;

use super::{HOST, now_secs};

/// The seed's primary key of an identity or policy.
pub(crate) fn key(name: &str) -> String {
    STANDARD.encode(format!("a key for tests, of {name}"))
}

/// A token that can be bent in every part before it is signed.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) host: String,
    /// The path below the host, ids in the clear.
    pub(crate) path: Vec<String>,
    pub(crate) key: String,
    pub(crate) expires_at: u64,
    pub(crate) policy: Option<String>,
    /// How often ids are encoded before the whole is: 0 as SDKs, 1 or 2 as edgeHub.
    pub(crate) id_encodings: u32,
}

impl Token {
    /// The token of `device` or `device/module`, signed with its own key, for an hour.
    pub(crate) fn of(identity: &str) -> Self {
        let path = match identity.split_once('/') {
            None => vec!["devices", identity],
            Some((device, module)) => vec!["devices", device, "modules", module],
        };
        Self {
            host: HOST.to_owned(),
            path: path.into_iter().map(str::to_owned).collect(),
            key: key(identity),
            expires_at: now_secs() + 3_600,
            policy: None,
            id_encodings: 1,
        }
    }

    /// The token of an edge device's hub.
    pub(crate) fn of_hub(device: &str) -> Self {
        Self::of(&format!("{device}/$edgeHub"))
    }

    /// The token of a shared access policy.
    pub(crate) fn of_policy(name: &str) -> Self {
        Self {
            path: vec![],
            key: key(name),
            policy: Some(name.to_owned()),
            ..Self::of("x")
        }
    }

    /// For another identity, but signed with the key that this one has.
    pub(crate) fn for_path_of(self, identity: &str) -> Self {
        Self {
            path: Self::of(identity).path,
            ..self
        }
    }

    pub(crate) fn signed_by(self, name: &str) -> Self {
        Self {
            key: key(name),
            ..self
        }
    }

    pub(crate) fn text(&self) -> String {
        let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        let ids = self
            .path
            .iter()
            .map(|id| (0..self.id_encodings).fold(id.clone(), |id, _| encode(&id)));
        let resource: Vec<String> = std::iter::once(self.host.clone()).chain(ids).collect();
        let resource = encode(&resource.join("/"));
        let key = hmac::Key::new(hmac::HMAC_SHA256, &STANDARD.decode(&self.key).unwrap());
        let signed = format!("{resource}\n{}", self.expires_at);
        let signature = encode(&STANDARD.encode(hmac::sign(&key, signed.as_bytes())));
        let policy = self
            .policy
            .as_ref()
            .map(|name| format!("&skn={name}"))
            .unwrap_or_default();
        let expires_at = self.expires_at;
        format!("SharedAccessSignature sr={resource}&sig={signature}&se={expires_at}{policy}")
    }
}

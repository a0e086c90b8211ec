//! Tokens as a client would present them, right or wrong in any part.

use std::time::Duration;

use edgehub_lab::{HUB, Lab, sas};

/// A token that outlives every test.
const LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The parts of a SAS token. [`Self::of`] is right; the other methods bend one part each.
#[derive(Clone)]
pub struct Token {
    host: String,
    names: String,
    key: String,
    expires_s: u64,
}

impl Token {
    /// The token of a registered `device` or `device/module`: named after it, signed with its
    /// primary key, for the lab's IoT Hub.
    #[must_use]
    pub fn of(lab: &Lab, id: &str) -> Self {
        Self {
            host: lab.host(HUB).expect("a lab has a hub").hostname.clone(),
            names: id.to_owned(),
            key: lab
                .seed()
                .primary_key(id)
                .expect("a registered identity")
                .to_owned(),
            expires_s: sas::expires_in(LIFETIME),
        }
    }

    /// Names another identity in its `sr`.
    #[must_use]
    pub fn naming(self, id: &str) -> Self {
        Self {
            names: id.to_owned(),
            ..self
        }
    }

    /// Names another IoT Hub in its `sr`.
    #[must_use]
    pub fn for_host(self, host: &str) -> Self {
        Self {
            host: host.to_owned(),
            ..self
        }
    }

    /// Signed with the secondary key of a registered identity, as good as the primary one.
    #[must_use]
    pub fn by_secondary_key_of(self, lab: &Lab, id: &str) -> Self {
        let key = lab
            .seed()
            .secondary_key(id)
            .expect("a registered identity")
            .to_owned();
        Self { key, ..self }
    }

    /// Signed with this key (base64).
    #[must_use]
    pub fn signed_with(self, key: &str) -> Self {
        Self {
            key: key.to_owned(),
            ..self
        }
    }

    /// Expired longer ago than the five minutes that clocks may differ.
    #[must_use]
    pub fn expired(self) -> Self {
        Self {
            expires_s: sas::expires_in(Duration::ZERO) - 301,
            ..self
        }
    }

    /// Expired within the five minutes that clocks may differ.
    #[must_use]
    pub fn just_expired(self) -> Self {
        Self {
            expires_s: sas::expires_in(Duration::ZERO) - 120,
            ..self
        }
    }

    /// The token.
    #[must_use]
    pub fn text(&self) -> String {
        let (device, module) = match self.names.split_once('/') {
            Some((device, module)) => (device, Some(module)),
            None => (self.names.as_str(), None),
        };
        let resource = sas::resource(&self.host, device, module);
        sas::token(&resource, &self.key, self.expires_s, None).expect("a key in base64")
    }

    /// The token of the service side: the policy `iothubowner`.
    #[must_use]
    pub fn of_owner(lab: &Lab) -> String {
        let policies = &lab.seed().policies;
        let owner = policies.iter().find(|policy| policy.name == "iothubowner");
        let key = owner
            .and_then(|policy| policy.key.as_deref())
            .expect("a policy with a key");
        let resource = sas::encode(&lab.host(HUB).expect("a lab has a hub").hostname);
        sas::token(
            &resource,
            key,
            sas::expires_in(LIFETIME),
            Some("iothubowner"),
        )
        .expect("a key in base64")
    }
}

//! Names, addresses and properties of an identity's links (spec/upstream.md A3.4).

use edgehub_amqp::message::MessageId;
use edgehub_proto::{identity::Identity, sas};

use super::ports::Group;
use crate::lanes::SessionId;

const CLIENT_VERSION: &str = "com.microsoft:client-version";
const API_VERSION: &str = "com.microsoft:api-version";
const AUTH_CHAIN: &str = "com.microsoft:auth-chain";
const MODEL_ID: &str = "com.microsoft:model-id";
const CORRELATION: &str = "com.microsoft:channel-correlation-id";

/// The API version that the reference's upstream client states.
const API_VERSION_VALUE: &str = "2020-09-30";

/// What the links of one identity say about it.
#[derive(Clone, Debug)]
pub(super) struct Labels {
    /// Its product information and ours.
    pub(super) product_info: String,
    pub(super) auth_chain: String,
    pub(super) model_id: Option<String>,
}

/// Makes the names and addresses of an identity's links.
#[derive(Debug)]
pub(super) struct Addresses<'a> {
    pub(super) host: &'a str,
    pub(super) identity: &'a Identity,
    pub(super) labels: &'a Labels,
    pub(super) session: SessionId,
    /// Counts the links of the session.
    pub(super) links: &'a mut u64,
}

impl Addresses<'_> {
    /// The reference's name, and what makes it unique on a connection.
    pub(super) fn name(&mut self, name: &str) -> String {
        *self.links += 1;
        format!("{name}_{}_{}", self.session, self.links)
    }

    /// The node that takes telemetry.
    pub(super) fn telemetry(&self) -> String {
        self.node("messages/events")
    }

    /// The node of a group.
    pub(super) fn of(&self, group: Group) -> String {
        self.node(match group {
            Group::Twin => "twin",
            Group::Methods => "methods/deviceBound",
            Group::CloudToDevice => "messages/deviceBound",
        })
    }

    fn node(&self, tail: &str) -> String {
        let device = sas::encode_resource(self.identity.device_id());
        let module = self.identity.module_id();
        let module = module.map_or_else(String::new, |module| {
            format!("/modules/{}", sas::encode_resource(module))
        });
        format!("amqps://{}/devices/{device}{module}/{tail}", self.host)
    }

    /// What pairs the links of a group: a fresh id each time.
    pub(super) fn correlation(&self, group: Group) -> Option<String> {
        let kind = match group {
            Group::Twin => "twin",
            Group::Methods => "methods",
            Group::CloudToDevice => return None,
        };
        let id = MessageId::Uuid(rand::random());
        Some(format!("{kind}:{id}"))
    }

    /// Properties of the telemetry link.
    pub(super) fn telemetry_properties(&self) -> Vec<(&'static str, String)> {
        let mut properties = self.properties(None);
        let model = self.labels.model_id.clone();
        properties.extend(model.map(|model| (MODEL_ID, model)));
        properties
    }

    pub(super) fn properties(&self, correlation: Option<&str>) -> Vec<(&'static str, String)> {
        let labels = self.labels;
        let mut properties = vec![
            (CLIENT_VERSION, labels.product_info.clone()),
            (API_VERSION, API_VERSION_VALUE.to_owned()),
            (AUTH_CHAIN, labels.auth_chain.clone()),
        ];
        properties.extend(correlation.map(|id| (CORRELATION, id.to_owned())));
        properties
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::id;

    fn labels() -> Labels {
        Labels {
            product_info: "client EdgeHub/1".to_owned(),
            auth_chain: "leaf1;edge2".to_owned(),
            model_id: Some("dtmi:a;1".to_owned()),
        }
    }

    #[test]
    fn addresses_are_those_of_the_reference() {
        let (labels, mut links) = (labels(), 0);
        for (identity, group, expected) in [
            ("leaf1", None, "amqps://h/devices/leaf1/messages/events"),
            (
                "edge2/mod:A",
                None,
                "amqps://h/devices/edge2/modules/mod%3AA/messages/events",
            ),
            (
                "edge2/$edgeHub",
                Some(Group::Twin),
                "amqps://h/devices/edge2/modules/%24edgeHub/twin",
            ),
            (
                "leaf1",
                Some(Group::Methods),
                "amqps://h/devices/leaf1/methods/deviceBound",
            ),
            (
                "leaf1",
                Some(Group::CloudToDevice),
                "amqps://h/devices/leaf1/messages/deviceBound",
            ),
        ] {
            let identity = id(identity);
            let mut addresses = Addresses {
                host: "h",
                identity: &identity,
                labels: &labels,
                session: SessionId(7),
                links: &mut links,
            };
            let address = match group {
                None => addresses.telemetry(),
                Some(group) => addresses.of(group),
            };
            assert_eq!(address, expected);
            assert_ne!(addresses.name("x"), addresses.name("x"));
        }
    }

    #[test]
    fn only_telemetry_names_the_model_and_only_pairs_a_correlation() {
        let (labels, mut links, identity) = (labels(), 0, id("leaf1"));
        let addresses = Addresses {
            host: "h",
            identity: &identity,
            labels: &labels,
            session: SessionId(7),
            links: &mut links,
        };
        let expected = [
            (CLIENT_VERSION, "client EdgeHub/1"),
            (API_VERSION, "2020-09-30"),
            (AUTH_CHAIN, "leaf1;edge2"),
            (MODEL_ID, "dtmi:a;1"),
        ];
        let expected = expected.map(|(key, value)| (key, value.to_owned()));
        assert_eq!(addresses.telemetry_properties(), expected);
        assert_eq!(addresses.correlation(Group::CloudToDevice), None);
        let pair = addresses.correlation(Group::Twin).unwrap();
        assert!(pair.starts_with("twin:") && pair.len() == 5 + 36, "{pair}");
        let properties = addresses.properties(Some(&pair));
        assert_eq!(properties.last(), Some(&(CORRELATION, pair)));
        assert_eq!(properties.len(), 4);
    }
}

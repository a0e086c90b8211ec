//! How much the devices' side has been asked: so that a test can bound what a hub asks in a phase.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde_json::Value;

use crate::identity::Identity;

/// What is counted. The names are those of the control API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Counter {
    /// Links that were asked for, refused ones included.
    AmqpAttaches,
    /// Accepted TCP connections of the AMQP port. They belong to no identity.
    AmqpConnections,
    /// Connections of the AMQP port that got past TLS, and WebSockets of AMQP. They belong to no
    /// identity.
    AmqpHandshakes,
    /// Put-tokens, refused ones included; they belong to the identity that their name says, to
    /// nobody when it is none of the registry.
    AmqpPutTokens,
    /// Deliveries of devices with telemetry, refused ones included. A batch is one.
    AmqpTransfers,
    /// C2D messages sent, redeliveries included.
    C2dDeliveries,
    /// Accepted CONNECTs, and identities that an AMQP connection begins to serve.
    Connects,
    /// CONNECTs that got another code than 0. They belong to no identity.
    ConnectsRefused,
    /// Desired patches sent.
    DesiredNotices,
    /// Accepted TCP connections of the HTTPS port. They belong to no identity.
    HttpsConnections,
    /// Methods sent.
    MethodRequests,
    MethodResponses,
    /// Accepted TCP connections of the MQTT port. They belong to no identity.
    MqttConnections,
    Pings,
    /// PUBACKs of C2D messages.
    Pubacks,
    /// Registry calls, which belong to no identity.
    RegistryCalls,
    /// Scope calls, which belong to no identity.
    ScopeCalls,
    /// Twin, method and C2D calls of the service side, which belong to no identity.
    ServiceCalls,
    /// SUBSCRIBE packets.
    Subscribes,
    /// Telemetry messages, refused ones included.
    Telemetry,
    TwinGets,
    TwinPatches,
    /// UNSUBSCRIBE packets.
    Unsubscribes,
}

const COUNTERS: [(Counter, &str); 23] = [
    (Counter::AmqpAttaches, "amqp_attaches"),
    (Counter::AmqpConnections, "amqp_connections"),
    (Counter::AmqpHandshakes, "amqp_handshakes"),
    (Counter::AmqpPutTokens, "amqp_put_tokens"),
    (Counter::AmqpTransfers, "amqp_transfers"),
    (Counter::C2dDeliveries, "c2d_deliveries"),
    (Counter::Connects, "connects"),
    (Counter::ConnectsRefused, "connects_refused"),
    (Counter::DesiredNotices, "desired_notices"),
    (Counter::HttpsConnections, "https_connections"),
    (Counter::MethodRequests, "method_requests"),
    (Counter::MethodResponses, "method_responses"),
    (Counter::MqttConnections, "mqtt_connections"),
    (Counter::Pings, "pings"),
    (Counter::Pubacks, "pubacks"),
    (Counter::RegistryCalls, "registry_calls"),
    (Counter::ScopeCalls, "scope_calls"),
    (Counter::ServiceCalls, "service_calls"),
    (Counter::Subscribes, "subscribes"),
    (Counter::Telemetry, "telemetry"),
    (Counter::TwinGets, "twin_gets"),
    (Counter::TwinPatches, "twin_patches"),
    (Counter::Unsubscribes, "unsubscribes"),
];

/// One set of counters.
type Counts = [u64; COUNTERS.len()];

/// All counters of one emulator, since its start or since they were cleared.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Only identities that were admitted are here, so the registry bounds it.
    identities: BTreeMap<Identity, Counts>,
    /// What belongs to no identity.
    others: Counts,
}

impl Counters {
    /// Counts something that an admitted identity does, or that is done to it.
    pub(crate) fn add(&self, identity: &Identity, counter: Counter) {
        self.add_many(identity, counter, 1);
    }

    pub(crate) fn add_many(&self, identity: &Identity, counter: Counter, count: u64) {
        let mut table = self.table.lock();
        let counts = match table.identities.get_mut(identity) {
            Some(counts) => counts,
            None => table.identities.entry(identity.clone()).or_default(),
        };
        add(counts, counter, count);
    }

    /// Counts something that belongs to no identity.
    pub(crate) fn add_other(&self, counter: Counter) {
        add(&mut self.table.lock().others, counter, 1);
    }

    /// The counters of one identity, or the sums of all.
    pub(crate) fn show(&self, identity: Option<&Identity>) -> Value {
        let table = self.table.lock();
        let mut sums = Counts::default();
        let mut sum = |counts: &Counts| {
            for (sum, value) in sums.iter_mut().zip(counts) {
                *sum += value;
            }
        };
        match identity {
            Some(identity) => table.identities.get(identity).into_iter().for_each(sum),
            None => {
                table.identities.values().for_each(&mut sum);
                sum(&table.others);
            }
        }
        let named = COUNTERS.iter().filter_map(|(counter, name)| {
            let value = sums.get(*counter as usize)?;
            Some(((*name).to_owned(), Value::from(*value)))
        });
        Value::Object(named.collect())
    }

    /// Sets everything to 0.
    pub(crate) fn clear(&self) {
        *self.table.lock() = Table::default();
    }
}

fn add(counts: &mut Counts, counter: Counter, count: u64) {
    if let Some(value) = counts.get_mut(counter as usize) {
        *value += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_add_up_and_are_cleared() {
        for (at, (counter, name)) in COUNTERS.iter().enumerate() {
            assert_eq!(*counter as usize, at, "{name}");
        }
        let counters = Counters::default();
        let [leaf1, leaf2] = ["leaf1", "leaf2"].map(|id| Identity::parse(id).unwrap());
        counters.add(&leaf1, Counter::Connects);
        counters.add_many(&leaf2, Counter::Connects, 2);
        counters.add(&leaf2, Counter::Unsubscribes);
        counters.add_other(Counter::ScopeCalls);
        let all = counters.show(None);
        assert_eq!(
            (&all["connects"], &all["unsubscribes"], &all["scope_calls"]),
            (&3.into(), &1.into(), &1.into())
        );
        let one = counters.show(Some(&leaf1));
        assert_eq!(
            (&one["connects"], &one["unsubscribes"], &one["scope_calls"]),
            (&1.into(), &0.into(), &0.into())
        );
        counters.clear();
        assert_eq!(counters.show(None)["connects"], 0);
    }
}

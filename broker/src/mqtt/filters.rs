//! Topic filters of a session (MQTT 3.1.1 section 4.7).
//!
//! Nothing here knows whose topics these are: what a filter may be for is judged in
//! [`features`](super::features).

use ntex_mqtt::QoS;

use super::limits::{SESSION_FILTER_BYTES_MAX, SESSION_FILTERS_MAX};
use crate::session::{Session, StoredSubscription};

/// Whether a well-formed filter matches a topic. A filter that begins with a wildcard matches no
/// topic that begins with `$` (MQTT-4.7.2-1).
pub(super) fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['#', '+']) {
        return false;
    }
    let mut filter = filter.split('/');
    let mut topic = topic.split('/');
    loop {
        match (filter.next(), topic.next()) {
            // Also the parent level: `a/#` matches `a`.
            (Some("#"), _) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// What became of a new subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    /// The session changed.
    Changed,
    /// It was there already, with this QoS.
    Same,
    /// The session has no room for it.
    Full,
}

#[derive(Clone, Debug)]
struct Subscription {
    filter: String,
    granted: QoS,
}

/// The subscriptions of a session, bounded in number and in bytes.
#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    list: Vec<Subscription>,
    bytes: usize,
}

impl Subscriptions {
    /// Those of a stored session that are still allowed.
    pub(super) fn restore(session: &Session, allowed: impl Fn(&str) -> bool) -> Self {
        let mut subscriptions = Self::default();
        for stored in &session.subscriptions {
            if allowed(&stored.filter) {
                let granted = if stored.qos == 0 {
                    QoS::AtMostOnce
                } else {
                    QoS::AtLeastOnce
                };
                subscriptions.add(&stored.filter, granted);
            }
        }
        subscriptions
    }

    /// What a session keeps of them.
    pub(super) fn stored(&self) -> Session {
        let stored = |subscription: &Subscription| StoredSubscription {
            filter: subscription.filter.clone(),
            qos: u8::from(subscription.granted != QoS::AtMostOnce),
        };
        Session {
            subscriptions: self.list.iter().map(stored).collect(),
        }
    }

    /// Adds a subscription, or replaces the QoS of the one that is there (MQTT-3.8.4-3).
    pub(super) fn add(&mut self, filter: &str, granted: QoS) -> Added {
        if let Some(known) = self.list.iter_mut().find(|known| known.filter == filter) {
            if known.granted == granted {
                return Added::Same;
            }
            known.granted = granted;
            return Added::Changed;
        }
        let bytes = self.bytes + filter.len();
        if self.list.len() >= SESSION_FILTERS_MAX || bytes > SESSION_FILTER_BYTES_MAX {
            return Added::Full;
        }
        self.bytes = bytes;
        self.list.push(Subscription {
            filter: filter.to_owned(),
            granted,
        });
        Added::Changed
    }

    /// Removes a subscription; whether it was there.
    pub(super) fn remove(&mut self, filter: &str) -> bool {
        let Some(at) = self.list.iter().position(|known| known.filter == filter) else {
            return false;
        };
        self.bytes -= self.list.remove(at).filter.len();
        true
    }

    /// The highest QoS that was granted for a topic (MQTT-3.3.5-1); none when no filter matches.
    pub(super) fn granted(&self, topic: &str) -> Option<QoS> {
        self.list
            .iter()
            .filter(|subscription| matches(&subscription.filter, topic))
            .map(|subscription| subscription.granted)
            .max_by_key(|granted| u8::from(*granted))
    }

    /// The filters.
    pub(super) fn filters(&self) -> impl Iterator<Item = &str> {
        self.list
            .iter()
            .map(|subscription| subscription.filter.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn filters_match_as_the_standard_says() {
        for (filter, topic, expected) in [
            ("a/b", "a/b", true),
            ("a/b", "a/B", false),
            ("a/b", "a/b/", false),
            ("a", "/a", false),
            ("/a", "/a", true),
            ("+", "a", true),
            ("+", "/a", false),
            ("/+", "/a", true),
            ("+/+", "/a", true),
            ("a/+", "a/b", true),
            ("a/+", "a/", true),
            ("a/+", "a", false),
            ("a/+", "a/b/c", false),
            ("a/+/c", "a/b/c", true),
            ("a/#", "a", true),
            ("a/#", "a/", true),
            ("a/#", "a/b/c", true),
            ("a/#", "ab", false),
            ("#", "a/b", true),
            ("#", "$iothub/twin/res/200/?$rid=1", false),
            ("+/#", "$iothub/twin/res/200/?$rid=1", false),
            ("+/twin/#", "$iothub/twin/res/200/?$rid=1", false),
            ("$iothub/twin/res/#", "$iothub/twin/res/200/?$rid=1", true),
            ("$iothub/+/res/#", "$iothub/twin/res/200/?$rid=1", true),
            ("$iothub/#", "$iothub/twin/res/200/?$rid=1", true),
            ("a/+", "a/$b", true),
        ] {
            assert_eq!(matches(filter, topic), expected, "{filter} {topic}");
        }
    }

    #[test]
    fn a_repeated_filter_replaces_its_qos_and_overlapping_ones_give_the_highest() {
        let mut subscriptions = Subscriptions::default();
        assert_eq!(subscriptions.add("a/+", QoS::AtLeastOnce), Added::Changed);
        assert_eq!(subscriptions.add("a/+", QoS::AtLeastOnce), Added::Same);
        assert_eq!(subscriptions.add("a/+", QoS::AtMostOnce), Added::Changed);
        assert_eq!(subscriptions.filters().count(), 1);
        assert_eq!(subscriptions.granted("a/b"), Some(QoS::AtMostOnce));
        subscriptions.add("#", QoS::AtLeastOnce);
        assert_eq!(subscriptions.granted("a/b"), Some(QoS::AtLeastOnce));
        assert!(subscriptions.remove("#"));
        assert!(!subscriptions.remove("#"));
        assert_eq!(subscriptions.granted("a/b"), Some(QoS::AtMostOnce));
        assert_eq!(subscriptions.granted("b"), None);
    }

    #[test]
    fn a_session_is_bounded_in_number_and_bytes() {
        let mut many = Subscriptions::default();
        for number in 0..SESSION_FILTERS_MAX {
            assert_eq!(
                many.add(&number.to_string(), QoS::AtLeastOnce),
                Added::Changed
            );
        }
        assert_eq!(many.add("more", QoS::AtLeastOnce), Added::Full);
        assert_eq!(
            many.add("7", QoS::AtMostOnce),
            Added::Changed,
            "it is there"
        );
        assert!(many.remove("7"));
        assert_eq!(many.add("more", QoS::AtLeastOnce), Added::Changed);

        let mut long = Subscriptions::default();
        let half = "x".repeat(SESSION_FILTER_BYTES_MAX / 2);
        for suffix in ["1", "2"] {
            let filter = format!("{}{suffix}", &half[1..]);
            assert_eq!(long.add(&filter, QoS::AtLeastOnce), Added::Changed);
        }
        assert_eq!(long.add("x", QoS::AtLeastOnce), Added::Full);
        assert!(long.remove(&format!("{}2", &half[1..])));
        assert_eq!(long.add("x", QoS::AtLeastOnce), Added::Changed);
    }

    #[test]
    fn a_stored_session_comes_back_without_what_is_not_allowed_any_more() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.add("a/#", QoS::AtLeastOnce);
        subscriptions.add("b", QoS::AtMostOnce);
        let stored = subscriptions.stored();
        assert_eq!(Subscriptions::restore(&stored, |_| true).stored(), stored);
        let restored = Subscriptions::restore(&stored, |filter| filter != "a/#");
        assert_eq!(restored.granted("a/b"), None);
        assert_eq!(restored.granted("b"), Some(QoS::AtMostOnce));
    }

    proptest! {
        /// Against the matcher of the codec's crate.
        #[test]
        fn matching_agrees_with_another_matcher(
            filter in "[$]?[ab+]?(/[ab+]?){0,4}(/#)?",
            topic in "[$]?[ab]?(/[ab]?){0,4}",
        ) {
            let Ok(other) = filter.parse::<ntex_mqtt::TopicFilter>() else {
                return Ok(());
            };
            prop_assert_eq!(matches(&filter, &topic), other.matches_topic(topic.as_str()));
        }
    }
}

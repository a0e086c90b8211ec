//! What a session is subscribed to against what it should be: which change comes next.
//!
//! Pure. One change at a time is under way, and each is the whole difference at that moment, so
//! needs that flap do not pile packets up. A session that the server kept from earlier may hold more
//! than this one knows: what arrives unasked shows it, and is given up once.

use edgehub_proto::{hub::Needs, identity::Identity};

/// Something that a session can subscribe to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    TwinResponses,
    Desired,
    Methods,
    CloudToDevice,
}

impl Filter {
    const ALL: [Self; 4] = [
        Self::TwinResponses,
        Self::Desired,
        Self::Methods,
        Self::CloudToDevice,
    ];

    /// The topic filter of `identity`.
    pub(super) fn topic(self, identity: &Identity) -> String {
        match self {
            Self::TwinResponses => "$iothub/twin/res/#".to_owned(),
            Self::Desired => "$iothub/twin/PATCH/properties/desired/#".to_owned(),
            Self::Methods => "$iothub/methods/POST/#".to_owned(),
            Self::CloudToDevice => {
                format!("devices/{}/messages/devicebound/#", identity.device_id())
            }
        }
    }

    /// Only what must not get lost is asked for at QoS 1.
    pub(super) fn is_at_least_once(self) -> bool {
        self == Self::CloudToDevice
    }

    /// Value of a metric's label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::TwinResponses => "twin_responses",
            Self::Desired => "desired",
            Self::Methods => "methods",
            Self::CloudToDevice => "cloud_to_device",
        }
    }

    const fn bit(self) -> u8 {
        match self {
            Self::TwinResponses => 1,
            Self::Desired => 2,
            Self::Methods => 4,
            Self::CloudToDevice => 8,
        }
    }
}

/// A set of filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Filters(u8);

impl Filters {
    pub(super) fn iter(self) -> impl Iterator<Item = Filter> {
        Filter::ALL
            .into_iter()
            .filter(move |filter| self.contains(*filter))
    }

    pub(super) fn contains(self, filter: Filter) -> bool {
        self.0 & filter.bit() != 0
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn with(self, filter: Filter, present: bool) -> Self {
        if present {
            Self(self.0 | filter.bit())
        } else {
            self
        }
    }

    const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// The next packet about subscriptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Subscribe(Filters),
    Unsubscribe(Filters),
}

/// The subscriptions of one session.
#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    needed: Filters,
    /// A twin request was made in this session: its answers are listened for from then on.
    asks: bool,
    /// Granted by the server.
    held: Filters,
    /// Refused by the server; asked for again when it was not wanted in between.
    refused: Filters,
    /// Not ours, but something of it arrived.
    stale: Filters,
    /// Given up as stale once: the server was told, more would be a loop.
    dismissed: Filters,
    under_way: Option<Change>,
    /// What is needed is to be announced once it is subscribed.
    to_announce: bool,
    was_announced: bool,
}

impl Subscriptions {
    /// States what the identity needs from now on.
    pub(super) fn need(&mut self, needs: Needs) {
        let before = self.needed;
        self.needed = Filters::default()
            // Who hears of changes fetches the whole when it has missed one.
            .with(Filter::TwinResponses, needs.desired)
            .with(Filter::Desired, needs.desired)
            .with(Filter::Methods, needs.methods)
            .with(Filter::CloudToDevice, needs.cloud_to_device);
        let gained = self.needed.without(before);
        self.refused = self.refused.both(self.wanted());
        if !needs.any() {
            self.to_announce = false;
        } else if !self.was_announced || gained.contains(Filter::Desired) {
            self.to_announce = true;
        }
    }

    /// A twin request is to be made.
    pub(super) fn ask(&mut self) {
        self.asks = true;
    }

    /// Something of `filter` arrived that nobody needs.
    pub(super) fn unwanted(&mut self, filter: Filter) {
        let one = Filters::default().with(filter, true);
        self.stale = self.stale.union(one.without(self.dismissed));
    }

    #[cfg(test)]
    fn wants(&self, filter: Filter) -> bool {
        self.wanted().contains(filter)
    }

    pub(super) fn holds(&self, filter: Filter) -> bool {
        self.held.contains(filter)
    }

    pub(super) fn is_refused(&self, filter: Filter) -> bool {
        self.refused.contains(filter)
    }

    /// The change that is due, which is under way from then on.
    pub(super) fn begin_change(&mut self) -> Option<Change> {
        if self.under_way.is_some() {
            return None;
        }
        let wanted = self.wanted();
        let missing = wanted.without(self.held).without(self.refused);
        let surplus = self.held.union(self.stale).without(wanted);
        let change = if !missing.is_empty() {
            Change::Subscribe(missing)
        } else if !surplus.is_empty() {
            self.held = self.held.without(surplus);
            self.dismissed = self.dismissed.union(surplus);
            self.stale = Filters::default();
            Change::Unsubscribe(surplus)
        } else {
            return None;
        };
        self.under_way = Some(change);
        Some(change)
    }

    /// The server answered the SUBSCRIBE that is under way. Gives the filters that it refused.
    pub(super) fn subscribed(&mut self, granted: &[bool]) -> Filters {
        let Some(Change::Subscribe(asked)) = self.under_way.take() else {
            return Filters::default();
        };
        let mut refused = Filters::default();
        for (filter, granted) in asked.iter().zip(granted) {
            self.held = self.held.with(filter, *granted);
            refused = refused.with(filter, !granted);
        }
        self.refused = self.refused.union(refused);
        refused
    }

    /// The server answered the UNSUBSCRIBE that is under way.
    pub(super) fn unsubscribed(&mut self) {
        self.under_way = None;
    }

    /// Whether the session is to be announced now: once when what it needs is subscribed (or
    /// refused), and again when changes of desired properties were not listened for in between.
    pub(super) fn take_announcement(&mut self) -> bool {
        let answered = self.held.union(self.refused);
        let is_complete = self.wanted().without(answered).is_empty();
        if !self.to_announce || !is_complete {
            return false;
        }
        self.to_announce = false;
        self.was_announced = true;
        true
    }

    fn wanted(&self) -> Filters {
        self.needed.with(Filter::TwinResponses, self.asks)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn needs(bits: u8) -> Needs {
        Needs {
            desired: bits & 1 != 0,
            methods: bits & 2 != 0,
            cloud_to_device: bits & 4 != 0,
        }
    }

    fn labels(change: Option<Change>) -> (bool, Vec<&'static str>) {
        let (subscribes, filters) = match change {
            None => return (false, Vec::new()),
            Some(Change::Subscribe(filters)) => (true, filters),
            Some(Change::Unsubscribe(filters)) => (false, filters),
        };
        (subscribes, filters.iter().map(Filter::label).collect())
    }

    #[test]
    fn filters_are_those_of_the_specification() {
        let leaf = Identity::parse("leaf1").unwrap();
        let topics = Filter::ALL.map(|filter| filter.topic(&leaf));
        assert_eq!(
            topics,
            [
                "$iothub/twin/res/#",
                "$iothub/twin/PATCH/properties/desired/#",
                "$iothub/methods/POST/#",
                "devices/leaf1/messages/devicebound/#",
            ]
        );
        let qos_1 = Filter::ALL.map(Filter::is_at_least_once);
        assert_eq!(qos_1, [false, false, false, true]);
    }

    #[test]
    fn everything_that_is_needed_goes_into_one_packet_and_is_announced_when_it_is_there() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.need(needs(7));
        let all = vec!["twin_responses", "desired", "methods", "cloud_to_device"];
        assert_eq!(labels(subscriptions.begin_change()), (true, all));
        assert_eq!(subscriptions.begin_change(), None, "one at a time");
        assert!(!subscriptions.take_announcement());
        assert!(subscriptions.subscribed(&[true; 4]).is_empty());
        assert!(subscriptions.take_announcement());
        assert!(!subscriptions.take_announcement(), "once");
        assert_eq!(subscriptions.begin_change(), None);
    }

    #[test]
    fn only_the_difference_is_changed_and_flapping_needs_cost_nothing() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.need(needs(2));
        subscriptions.begin_change();
        subscriptions.subscribed(&[true]);
        assert!(subscriptions.take_announcement());
        // Both gone and there again before anything could be sent.
        subscriptions.need(needs(0));
        subscriptions.need(needs(2));
        assert_eq!(subscriptions.begin_change(), None);
        assert!(!subscriptions.take_announcement(), "nothing was missed");
        subscriptions.need(needs(5));
        let added = vec!["twin_responses", "desired", "cloud_to_device"];
        assert_eq!(labels(subscriptions.begin_change()), (true, added));
        subscriptions.subscribed(&[true; 3]);
        assert!(subscriptions.take_announcement(), "desired is new");
        assert_eq!(
            labels(subscriptions.begin_change()),
            (false, vec!["methods"])
        );
        subscriptions.need(needs(7));
        subscriptions.unsubscribed();
        assert_eq!(
            labels(subscriptions.begin_change()),
            (true, vec!["methods"])
        );
    }

    #[test]
    fn a_refusal_is_no_reason_to_ask_again_and_again() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.need(needs(6));
        subscriptions.begin_change();
        let refused = subscriptions.subscribed(&[true, false]);
        assert_eq!(refused.iter().collect::<Vec<_>>(), [Filter::CloudToDevice]);
        assert!(subscriptions.take_announcement());
        assert_eq!(subscriptions.begin_change(), None);
        subscriptions.need(needs(2));
        subscriptions.need(needs(6));
        let again = vec!["cloud_to_device"];
        assert_eq!(labels(subscriptions.begin_change()), (true, again));
    }

    #[test]
    fn what_an_old_session_left_is_given_up_once() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.need(needs(0));
        subscriptions.unwanted(Filter::CloudToDevice);
        subscriptions.unwanted(Filter::CloudToDevice);
        let stale = vec!["cloud_to_device"];
        assert_eq!(labels(subscriptions.begin_change()), (false, stale));
        subscriptions.unsubscribed();
        subscriptions.unwanted(Filter::CloudToDevice);
        assert_eq!(subscriptions.begin_change(), None, "it was told");
    }

    #[test]
    fn a_twin_request_subscribes_to_answers_and_that_stays() {
        let mut subscriptions = Subscriptions::default();
        subscriptions.ask();
        let answers = vec!["twin_responses"];
        assert_eq!(labels(subscriptions.begin_change()), (true, answers));
        subscriptions.subscribed(&[true]);
        assert!(!subscriptions.take_announcement(), "no needs");
        subscriptions.need(needs(1));
        subscriptions.begin_change();
        subscriptions.subscribed(&[true]);
        subscriptions.need(needs(0));
        assert_eq!(
            labels(subscriptions.begin_change()),
            (false, vec!["desired"])
        );
        assert!(subscriptions.holds(Filter::TwinResponses));
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Need(u8),
        Ask,
        Answer(u8),
        Unwanted(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (0..8_u8).prop_map(Op::Need),
            1 => Just(Op::Ask),
            3 => (0..16_u8).prop_map(Op::Answer),
            1 => (0..4_usize).prop_map(Op::Unwanted),
        ]
    }

    proptest! {
        /// However needs, answers and old subscriptions interleave: the server ends up with exactly
        /// what is wanted, as far as it grants it, after a bounded number of packets.
        #[test]
        fn the_server_ends_up_with_what_is_wanted(
            left in 0..16_u8,
            ops in proptest::collection::vec(op(), 0..60),
        ) {
            let mut subscriptions = Subscriptions::default();
            // What the server has, and what the last packet asked for.
            let mut server = Filters(left);
            let mut packets = 0;
            let step = |subscriptions: &mut Subscriptions, server: &mut Filters, grants: u8| {
                match subscriptions.under_way {
                    None => subscriptions.begin_change().is_some(),
                    Some(Change::Subscribe(filters)) => {
                        let granted: Vec<bool> =
                            filters.iter().map(|filter| grants & filter.bit() != 0).collect();
                        for (filter, granted) in filters.iter().zip(&granted) {
                            *server = server.with(filter, *granted);
                        }
                        subscriptions.subscribed(&granted);
                        false
                    }
                    Some(Change::Unsubscribe(filters)) => {
                        *server = server.without(filters);
                        subscriptions.unsubscribed();
                        false
                    }
                }
            };
            let mut needed = needs(0);
            let changes = ops.len();
            for op in ops {
                match op {
                    Op::Need(bits) => {
                        needed = needs(bits);
                        subscriptions.need(needed);
                    }
                    Op::Ask => subscriptions.ask(),
                    Op::Answer(grants) => {
                        packets += usize::from(step(&mut subscriptions, &mut server, grants));
                    }
                    Op::Unwanted(index) => {
                        let filter = Filter::ALL[index];
                        if server.contains(filter) && !subscriptions.wants(filter) {
                            subscriptions.unwanted(filter);
                        }
                    }
                }
            }
            // Whatever the server still has unasked shows itself.
            for filter in Filter::ALL {
                if server.contains(filter) && !subscriptions.wants(filter) {
                    subscriptions.unwanted(filter);
                }
            }
            for _ in 0..12 {
                packets += usize::from(step(&mut subscriptions, &mut server, 15));
            }
            prop_assert!(subscriptions.under_way.is_none());
            let wanted = subscriptions.wanted();
            prop_assert_eq!(wanted.without(server).without(subscriptions.refused), Filters(0));
            let undismissed = server.without(wanted).without(subscriptions.dismissed);
            prop_assert_eq!(undismissed, Filters(0));
            prop_assert_eq!(subscriptions.held.without(server), Filters(0));
            prop_assert!(packets <= changes + 6, "{} packets", packets);
            if needed.any() {
                prop_assert!(subscriptions.was_announced || subscriptions.take_announcement());
            }
        }
    }
}

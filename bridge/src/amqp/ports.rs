//! The links of one identity beside telemetry: which are wanted, which are there.
//!
//! Pure. Links that belong together (twin, methods) come and go together: the upstream pairs them by
//! a correlation id. A group that was refused or lost is attached again after a wait, without an
//! effect on the session.

use std::time::{Duration, Instant};

use edgehub_proto::hub::Needs;

use super::{
    client::{Client, Direction, LinkKey, LinkSpec, SessionKey},
    links::Addresses,
};
use crate::limits;

/// Waits before a group is attached again: the first, and the longest.
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A group that was there for this long has its refusals forgotten.
const PROVEN_AFTER: Duration = Duration::from_secs(30);

/// How long the upstream may take to answer the attaches of a group.
const ATTACH_MAX: Duration = Duration::from_secs(30);

/// Links that come and go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Twin,
    Methods,
    CloudToDevice,
}

impl Group {
    pub(super) const ALL: [Self; 3] = [Self::Twin, Self::Methods, Self::CloudToDevice];

    /// Value of a metric's label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Twin => "twin",
            Self::Methods => "methods",
            Self::CloudToDevice => "cloud_to_device",
        }
    }

    /// Whether identities with these needs use it.
    pub(super) fn is_needed(self, needs: Needs) -> bool {
        match self {
            Self::Twin => needs.desired,
            Self::Methods => needs.methods,
            Self::CloudToDevice => needs.cloud_to_device,
        }
    }

    /// Its links: names, directions.
    fn links(self) -> &'static [(&'static str, Direction)] {
        const REPLIES: Direction = Direction::Down {
            credit: limits::AMQP_REPLY_CREDIT,
            second: false,
        };
        match self {
            Self::Twin => &[
                ("TwinReceiverLink", REPLIES),
                ("TwinSenderLink", Direction::Up),
            ],
            Self::Methods => &[
                ("MethodsReceiverLink", REPLIES),
                ("MethodsSenderLink", Direction::Up),
            ],
            Self::CloudToDevice => &[(
                "TelemetryReceiverLink",
                Direction::Down {
                    credit: limits::AMQP_CLOUD_TO_DEVICE_CREDIT,
                    second: true,
                },
            )],
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Port {
    link: LinkKey,
    is_up: bool,
    attached: bool,
}

/// The links of one group.
#[derive(Debug, Default)]
pub(super) struct Ports {
    ports: Vec<Port>,
    /// When they were asked for.
    since: Option<Instant>,
    retry_at: Option<Instant>,
    refusals: u32,
}

/// A link is gone; its group with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    /// The link had been attached.
    pub(super) was_attached: bool,
}

impl Ports {
    /// All links are attached.
    pub(super) fn is_attached(&self) -> bool {
        !self.ports.is_empty() && self.ports.iter().all(|port| port.attached)
    }

    /// Waits to be attached again.
    pub(super) fn is_refused(&self) -> bool {
        self.retry_at.is_some()
    }

    /// The link that we send on, once all are attached.
    pub(super) fn up(&self) -> Option<LinkKey> {
        let ports = self.ports.iter().filter(|_| self.is_attached());
        ports
            .into_iter()
            .find(|port| port.is_up)
            .map(|port| port.link)
    }

    /// The link that we receive on, once all are attached.
    pub(super) fn down(&self) -> Option<LinkKey> {
        let ports = self.ports.iter().filter(|_| self.is_attached());
        ports
            .into_iter()
            .find(|port| !port.is_up)
            .map(|port| port.link)
    }

    pub(super) fn has(&self, link: LinkKey) -> bool {
        self.ports.iter().any(|port| port.link == link)
    }

    /// Brings the group to where it should be.
    pub(super) fn pursue(
        &mut self,
        group: Group,
        is_wanted: bool,
        client: &mut Client,
        session: SessionKey,
        addresses: &mut Addresses<'_>,
        now: Instant,
    ) {
        if !is_wanted {
            self.retry_at = None;
            self.refusals = 0;
            self.give_up(client);
            return;
        }
        if !self.ports.is_empty() || self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_at = None;
        self.since = Some(now);
        let correlation = addresses.correlation(group);
        for (name, direction) in group.links() {
            let spec = LinkSpec {
                name: addresses.name(name),
                direction: *direction,
                settled: group != Group::CloudToDevice,
                address: addresses.of(group),
                own_address: addresses.identity.as_str().to_owned(),
                properties: addresses.properties(correlation.as_deref()),
            };
            if let Some(link) = client.attach(session, spec) {
                self.ports.push(Port {
                    link,
                    is_up: *direction == Direction::Up,
                    attached: false,
                });
            }
        }
    }

    /// Detaches what is there.
    pub(super) fn give_up(&mut self, client: &mut Client) {
        for port in self.ports.drain(..) {
            client.detach(port.link);
        }
        self.since = None;
    }

    /// The upstream took a link. Tells whether that was the last one of the group.
    pub(super) fn attached(&mut self, link: LinkKey) -> bool {
        let port = self.ports.iter_mut().find(|port| port.link == link);
        if let Some(port) = port {
            port.attached = true;
        }
        self.has(link) && self.is_attached()
    }

    /// The upstream refused or detached a link: the others go too, and all come again later. None if
    /// it is none of the group's.
    pub(super) fn detached(
        &mut self,
        link: LinkKey,
        client: &mut Client,
        now: Instant,
    ) -> Option<Gone> {
        let index = self.ports.iter().position(|port| port.link == link)?;
        let port = self.ports.remove(index);
        self.fail(client, now);
        Some(Gone {
            was_attached: port.attached,
        })
    }

    /// When an answer to the attaches is overdue, or they are to be made again.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let overdue = self.since.filter(|_| !self.is_attached());
        let overdue = overdue.map(|since| since + ATTACH_MAX);
        self.retry_at.or(overdue)
    }

    /// Gives attaches up whose answer is overdue.
    pub(super) fn handle_timeout(&mut self, client: &mut Client, now: Instant) {
        let is_overdue = self.since.is_some_and(|since| now >= since + ATTACH_MAX);
        if is_overdue && !self.ports.is_empty() && !self.is_attached() {
            self.fail(client, now);
        }
    }

    fn fail(&mut self, client: &mut Client, now: Instant) {
        if self.is_proven(now) {
            self.refusals = 0;
        }
        let wait = RETRY_BASE.saturating_mul(1 << self.refusals.min(10));
        self.refusals = self.refusals.saturating_add(1);
        self.retry_at = Some(now + wait.min(RETRY_MAX));
        self.give_up(client);
    }

    fn is_proven(&self, now: Instant) -> bool {
        self.since
            .is_some_and(|since| now.saturating_duration_since(since) >= PROVEN_AFTER)
    }
}

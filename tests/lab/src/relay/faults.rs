//! What is wrong with which link, as data.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

/// One end of a link.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// A host of the lab, by name. It is recognised by its private address.
    Host(String),
    /// Everybody who is no host of the lab: leaves, modules, tools.
    Clients,
    /// Whoever it may be; with a host at the other end this means the whole host.
    Any,
}

impl Party {
    /// `client` and `*` name the two groups, everything else a host.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        match name {
            "client" | "clients" => Self::Clients,
            "*" => Self::Any,
            host => Self::Host(host.to_owned()),
        }
    }

    fn covers(&self, other: &Self) -> bool {
        *self == Self::Any || self == other
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(name) => f.write_str(name),
            Self::Clients => f.write_str("client"),
            Self::Any => f.write_str("*"),
        }
    }
}

/// A direction: connections that `source` makes to `target`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    /// Who connects.
    pub source: Party,
    /// Who is connected to.
    pub target: Party,
}

impl Link {
    /// Connections from `source` to `target`.
    #[must_use]
    pub const fn new(source: Party, target: Party) -> Self {
        Self { source, target }
    }

    /// Both directions between two parties given by name ([`Party::parse`]).
    #[must_use]
    pub fn between(a: &str, b: &str) -> [Self; 2] {
        let (a, b) = (Party::parse(a), Party::parse(b));
        [Self::new(a.clone(), b.clone()), Self::new(b, a)]
    }

    /// Whether a fault on this link touches a connection on `other`.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        self.source.covers(&other.source) && self.target.covers(&other.target)
    }
}

/// How a link behaves; ordered from harmless to severe, and where several entries cover a
/// connection the most severe one wins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Everything passes.
    #[default]
    Open,
    /// Connections are accepted and stay open, and no byte passes until the link is healed. What
    /// was sent meanwhile passes then, as TCP's retransmission would have it.
    BlackHole,
    /// New connections are reset at once; existing ones go on.
    Refuse,
    /// Existing connections are reset and new ones refused.
    Cut,
}

/// Mode and latency of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Whether and how bytes pass.
    pub mode: Mode,
    /// Added to every byte in each direction.
    pub delay: Duration,
}

/// All faults of a lab.
#[derive(Clone, Debug, Default)]
pub struct FaultTable {
    entries: HashMap<Link, Fault>,
}

impl FaultTable {
    /// Changes one link's entry; a harmless entry is forgotten.
    pub fn change(&mut self, link: &Link, change: impl FnOnce(&mut Fault)) {
        let mut fault = self.entries.get(link).copied().unwrap_or_default();
        change(&mut fault);
        if fault == Fault::default() {
            self.entries.remove(link);
        } else {
            self.entries.insert(link.clone(), fault);
        }
    }

    /// Forgets every fault.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// What a connection on `link` experiences: the most severe mode and the longest delay of all
    /// entries that cover it.
    #[must_use]
    pub fn effective(&self, link: &Link) -> Fault {
        let mut effective = Fault::default();
        for (_, fault) in self.entries.iter().filter(|(entry, _)| entry.covers(link)) {
            effective.mode = effective.mode.max(fault.mode);
            effective.delay = effective.delay.max(fault.delay);
        }
        effective
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(source: &str, target: &str) -> Link {
        Link::new(Party::parse(source), Party::parse(target))
    }

    #[test]
    fn a_fault_touches_exactly_the_links_that_it_covers() {
        let mut table = FaultTable::default();
        table.change(&link("edge2", "edge1"), |fault| fault.mode = Mode::Cut);
        assert_eq!(table.effective(&link("edge2", "edge1")).mode, Mode::Cut);
        for other in [
            ("edge1", "edge2"),
            ("edge3", "edge1"),
            ("client", "edge1"),
            ("edge2", "hub"),
        ] {
            assert_eq!(table.effective(&link(other.0, other.1)), Fault::default());
        }
        table.change(&link("edge2", "edge1"), |fault| fault.mode = Mode::Open);
        assert_eq!(table.effective(&link("edge2", "edge1")), Fault::default());
    }

    #[test]
    fn a_whole_host_is_any_party_at_the_other_end_and_the_severest_entry_wins() {
        let mut table = FaultTable::default();
        table.change(&link("*", "edge1"), |fault| fault.mode = Mode::BlackHole);
        table.change(&link("client", "edge1"), |fault| {
            fault.mode = Mode::Refuse;
            fault.delay = Duration::from_millis(5);
        });
        assert_eq!(
            table.effective(&link("edge2", "edge1")).mode,
            Mode::BlackHole
        );
        let client = table.effective(&link("client", "edge1"));
        assert_eq!(
            (client.mode, client.delay),
            (Mode::Refuse, Duration::from_millis(5))
        );
        assert_eq!(table.effective(&link("edge1", "hub")).mode, Mode::Open);
        table.clear();
        assert_eq!(table.effective(&link("client", "edge1")), Fault::default());
    }
}

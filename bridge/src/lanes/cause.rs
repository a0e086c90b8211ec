//! The error table: why a session ended and what follows from it.
//!
//! Nothing in this table gives a message up. An error that fits no row is retried.

use std::sync::Arc;

/// Why a lane's session ended, in words that every upstream protocol shares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseCause {
    /// The upstream cannot serve now (MQTT: CONNACK 3).
    Busy(Arc<str>),
    /// The upstream ended an open session (AMQP: detach or end) on a connection that goes on.
    Detached(Arc<str>),
    /// Something on our side, such as a token that could not be made.
    Local(Arc<str>),
    /// An open session broke or fell silent.
    Lost(Arc<str>),
    /// Our own tree has no usable chain for the identity.
    OutOfScope,
    /// The peer does not keep to the protocol.
    Protocol(Arc<str>),
    /// The upstream refused this identity (MQTT: CONNACK 2, 4, 5).
    Refused(Arc<str>),
    /// The scheduler asked for it.
    Requested,
    /// No connection could be made: name, address, time-out, TLS.
    Unreachable(Arc<str>),
    /// We ended it so that the upstream takes back what was not settled and delivers it again.
    Unsettled(Arc<str>),
}

impl std::fmt::Display for CloseCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Busy(text) => write!(f, "upstream is not available: {text}"),
            Self::Detached(text) => write!(f, "detached by the upstream: {text}"),
            Self::Local(text) => write!(f, "cannot connect for a local reason: {text}"),
            Self::Lost(text) => write!(f, "connection lost: {text}"),
            Self::OutOfScope => f.write_str("identity has no usable auth chain in the scope"),
            Self::Protocol(text) => write!(f, "protocol error: {text}"),
            Self::Refused(text) => write!(f, "refused by the upstream: {text}"),
            Self::Requested => f.write_str("closed on request"),
            Self::Unreachable(text) => write!(f, "upstream cannot be reached: {text}"),
            Self::Unsettled(text) => write!(f, "closed to hand messages back: {text}"),
        }
    }
}

/// What a close says about the link to the upstream as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkEvidence {
    /// The upstream spoke to us.
    Answered,
    /// It did not.
    Silent,
    /// Nothing either way.
    Neutral,
}

/// What follows from a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reaction {
    /// A failure of this lane: it backs off. Otherwise it may reconnect at once.
    pub(crate) failure: bool,
    /// What it says about the link.
    pub(crate) link: LinkEvidence,
    /// The back-off ends early when another lane gets through after an outage.
    pub(crate) cut_short: bool,
    /// The identity itself is in doubt: ask the upstream about it, once per row of failures.
    pub(crate) refresh: bool,
    /// The message at the head may be what ends the session.
    pub(crate) suspect_head: bool,
    /// What was handed back comes again as soon as the lane does.
    pub(crate) hands_back: bool,
}

impl CloseCause {
    /// The table.
    pub(crate) fn reaction(&self) -> Reaction {
        use LinkEvidence::{Answered, Neutral, Silent};
        let row = |failure, link, cut_short, refresh, suspect_head| Reaction {
            failure,
            link,
            cut_short,
            refresh,
            suspect_head,
            hands_back: matches!(self, Self::Unsettled(_)),
        };
        match self {
            //                          failure  link   cut short  refresh  suspect head
            Self::Busy(_) => row(true, Answered, true, false, false),
            Self::Detached(_) => row(true, Answered, false, false, true),
            Self::Local(_) => row(true, Neutral, false, false, false),
            Self::Lost(_) => row(true, Silent, true, false, true),
            Self::OutOfScope => row(true, Neutral, false, true, false),
            Self::Protocol(_) => row(true, Answered, false, false, true),
            Self::Refused(_) => row(true, Answered, false, true, false),
            Self::Requested => row(false, Neutral, false, false, false),
            Self::Unreachable(_) => row(true, Silent, true, false, false),
            Self::Unsettled(_) => row(true, Neutral, false, false, false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_doubtful_identity_is_refreshed_and_only_link_trouble_is_cut_short() {
        let text = || Arc::<str>::from("x");
        let all = [
            CloseCause::Busy(text()),
            CloseCause::Detached(text()),
            CloseCause::Local(text()),
            CloseCause::Lost(text()),
            CloseCause::OutOfScope,
            CloseCause::Protocol(text()),
            CloseCause::Refused(text()),
            CloseCause::Requested,
            CloseCause::Unreachable(text()),
            CloseCause::Unsettled(text()),
        ];
        for cause in all {
            let reaction = cause.reaction();
            let doubtful = matches!(cause, CloseCause::OutOfScope | CloseCause::Refused(_));
            assert_eq!(reaction.refresh, doubtful, "{cause}");
            assert!(!(reaction.refresh && reaction.cut_short), "{cause}");
            assert_eq!(reaction.failure, cause != CloseCause::Requested, "{cause}");
            if reaction.link == LinkEvidence::Silent {
                assert!(reaction.cut_short, "{cause}");
            }
        }
    }
}

//! What a connection of this side is like.

use std::time::Duration;

use crate::limits::{
    CHANNEL_MAX, DELIVERY_BYTES_MAX, FRAME_BYTES_MAX, HANDLE_MAX, INCOMING_WINDOW, LINKS_MAX,
    OUTPUT_BYTES_MAX, PARTIAL_BYTES_MAX, SESSIONS_MAX,
};
use crate::sasl::Mechanism;

/// Terms and bounds of a connection. [`Config::new`] has those of spec/amqp.md.
#[derive(Clone, Debug)]
pub struct Config {
    /// Our container.
    pub container_id: String,
    /// Our host name, if it is said.
    pub hostname: Option<String>,
    /// Largest frame that is taken, bytes.
    pub frame_bytes_max: u32,
    /// Highest channel.
    pub channel_max: u16,
    /// Highest handle of a link.
    pub handle_max: u32,
    /// The idle time-out that the peer is told.
    pub idle_advertised: Duration,
    /// Silence after which the connection is closed.
    pub idle_enforced: Duration,
    /// From the beginning to the peer's open, SASL included.
    pub open_max: Duration,
    /// SASL mechanisms in the order in which they are offered.
    pub mechanisms: Vec<Mechanism>,
    /// Sessions at once; a further one is ended at once.
    pub sessions_max: usize,
    /// Links of all sessions at once; a further one is refused.
    pub links_max: usize,
    /// Transfers that the peer may send in a session before it hears of us.
    pub incoming_window: u32,
    /// Largest delivery on a link that says no limit, bytes.
    pub delivery_bytes_max: u64,
    /// Bytes of deliveries that have arrived in part, over all links. Beyond it the connection is
    /// closed.
    pub partial_bytes_max: usize,
    /// Bytes of output beyond which no deliveries are sent and no input is wanted.
    pub output_bytes_max: usize,
}

impl Config {
    /// The defaults under a name.
    #[must_use]
    pub fn new(container_id: impl Into<String>) -> Self {
        Self {
            container_id: container_id.into(),
            hostname: None,
            frame_bytes_max: FRAME_BYTES_MAX,
            channel_max: CHANNEL_MAX,
            handle_max: HANDLE_MAX,
            idle_advertised: Duration::from_secs(120),
            idle_enforced: Duration::from_secs(240),
            open_max: Duration::from_secs(60),
            mechanisms: vec![
                Mechanism::Anonymous,
                Mechanism::Mssbcbs,
                Mechanism::Plain,
                Mechanism::External,
            ],
            sessions_max: SESSIONS_MAX,
            links_max: LINKS_MAX,
            incoming_window: INCOMING_WINDOW,
            delivery_bytes_max: DELIVERY_BYTES_MAX,
            partial_bytes_max: PARTIAL_BYTES_MAX,
            output_bytes_max: OUTPUT_BYTES_MAX,
        }
    }
}

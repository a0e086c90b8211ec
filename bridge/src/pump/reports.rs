//! What the pump tells a person: log lines and gauges, and its look after silent sessions.

use tokio::time::{Duration, Instant};
use tracing::{debug, error, warn};

use super::Pump;
use crate::lanes::{CloseCause, LaneCounts, Report};

/// How often sessions are looked after and gauges are set.
const LOOK_AFTER_EVERY: Duration = Duration::from_secs(5);

impl Pump {
    pub(super) fn report(&mut self, report: Report) {
        match report {
            Report::Failed {
                identity,
                cause,
                failures,
                retry_in,
            } => {
                let now = Instant::now().into_std();
                if self.failure_log.take(now) {
                    warn!(%identity, %cause, failures, ?retry_in, "upstream lane failed");
                } else {
                    debug!(%identity, %cause, failures, ?retry_in, "upstream lane failed");
                }
            }
            Report::SuspectMessage {
                identity,
                priority,
                offset,
                times,
            } => {
                warn!(
                    %identity, priority, offset, times,
                    "the same message ends the connection again and again; it is kept and retried"
                );
                let from = identity.as_str().to_owned();
                metrics::counter!("edgehub_upstream_suspect_messages_total", "from" => from)
                    .increment(1);
            }
        }
    }

    /// Finds sessions whose task died without a word, and sets the gauges.
    pub(super) fn look_after_sessions(&mut self, counts: LaneCounts) {
        if Instant::now() < self.look_after_at {
            return;
        }
        self.look_after_at = Instant::now() + LOOK_AFTER_EVERY;
        let mut dead = Vec::new();
        for (id, session) in &mut self.sessions {
            // Closed once may mean that the close event is on the way.
            if session.commands.is_closed() && std::mem::replace(&mut session.is_suspect, true) {
                dead.push(*id);
            }
        }
        let now = self.now();
        for session in dead {
            error!(%session, "an upstream session's task died");
            self.sessions.remove(&session);
            self.scheduler
                .closed(session, &CloseCause::Local("task died".into()), now);
        }
        if counts.lanes >= self.parts.config.lanes_max {
            warn!(
                lanes = counts.lanes,
                "too many senders wait: no further ones are looked at"
            );
        }
        metrics::gauge!("edgehub_upstream_lanes").set(counts.lanes as f64);
        metrics::gauge!("edgehub_upstream_connections").set(counts.sessions as f64);
        metrics::gauge!("edgehub_upstream_buffered_bytes").set(counts.bytes as f64);
    }
}

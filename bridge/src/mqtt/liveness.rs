//! Whether the other side still lives: probes after a silence, and a verdict when they stay
//! unanswered.

use std::time::{Duration, Instant};

use super::terms::{MachineConfig, MachineError};

/// What was heard and said last on one connection.
#[derive(Debug)]
pub(super) struct Liveness {
    last_inbound: Instant,
    last_outbound: Instant,
    /// Since when the server has owed us some answer.
    awaiting_since: Option<Instant>,
    /// Last PUBACK, or the publish that ended an empty window.
    last_progress: Instant,
    /// When the unanswered PINGREQ was written.
    ping_sent: Option<Instant>,
}

impl Liveness {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            last_inbound: now,
            last_outbound: now,
            awaiting_since: None,
            last_progress: now,
            ping_sent: None,
        }
    }

    /// A packet came.
    pub(super) fn heard(&mut self, now: Instant) {
        self.last_inbound = now;
    }

    /// A packet was written.
    pub(super) fn said(&mut self, now: Instant) {
        self.last_outbound = now;
    }

    /// The probe was answered.
    pub(super) fn pong(&mut self) {
        self.ping_sent = None;
    }

    /// Publishes move on.
    pub(super) fn progress(&mut self, now: Instant) {
        self.last_progress = now;
    }

    pub(super) fn last_progress(&self) -> Instant {
        self.last_progress
    }

    /// Whether the server owes us some answer: then a dead link must be found sooner.
    pub(super) fn awaits(&mut self, now: Instant, awaits: bool) {
        if !awaits {
            self.awaiting_since = None;
        } else if self.awaiting_since.is_none() {
            self.awaiting_since = Some(now);
        }
    }

    /// Tells whether a probe is to be written now.
    pub(super) fn check(
        &mut self,
        config: &MachineConfig,
        now: Instant,
    ) -> Result<bool, MachineError> {
        match self.ping_sent {
            Some(sent) if now >= self.dead_at(config, sent) => {
                Err(MachineError::PingTimeout(self.patience(config)))
            }
            Some(_) => Ok(false),
            None => {
                let is_due = now >= self.probe_at(config);
                self.ping_sent = is_due.then_some(now);
                Ok(is_due)
            }
        }
    }

    /// When [`Liveness::check`] has something to do next.
    pub(super) fn next_check(&self, config: &MachineConfig) -> Instant {
        match self.ping_sent {
            None => self.probe_at(config),
            Some(sent) => self.dead_at(config, sent),
        }
    }

    fn probe_at(&self, config: &MachineConfig) -> Instant {
        let silence = match self.awaiting_since {
            None => config.ping_interval,
            Some(_) => config.ack_timeout / 2,
        };
        // With answers outstanding the silence that counts starts with the first question.
        let asked = self.awaiting_since.unwrap_or(self.last_inbound);
        let by_silence = self.last_inbound.max(asked) + silence;
        // The server closes after 1.5 keep-alives without a packet from us, whatever it sends.
        let half_keep_alive = Duration::from_secs(u64::from(config.keep_alive_secs)) / 2;
        if config.keep_alive_secs == 0 {
            by_silence
        } else {
            by_silence.min(self.last_outbound + half_keep_alive)
        }
    }

    fn dead_at(&self, config: &MachineConfig, ping_sent: Instant) -> Instant {
        ping_sent.max(self.last_inbound) + self.patience(config)
    }

    fn patience(&self, config: &MachineConfig) -> Duration {
        match self.awaiting_since {
            None => config.ping_timeout,
            Some(_) => config.ping_timeout.min(config.ack_timeout / 2),
        }
    }
}

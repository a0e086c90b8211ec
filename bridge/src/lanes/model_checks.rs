//! What the world of `model_tests` checks in each step.

use super::message::is_expired;
use super::model_tests::{Nature, World};
use super::*;

impl World {
    pub(super) fn check_send(&mut self, id: SessionId, batch: Vec<Outgoing>) {
        let now = self.now();
        let session = self.sessions.get_mut(&id).expect("send on a dead session");
        assert!(session.opened && !session.close_asked);
        for out in batch {
            let (queue, offset) = (out.priority as usize, out.entry.offset);
            assert_eq!(out.token, session.next_token);
            session.next_token += 1;
            assert_eq!(out.entry.sender, session.sender);
            let last = session.last.insert(queue, offset);
            assert!(
                last.is_none_or(|last| last < offset),
                "order within a session"
            );
            assert_eq!(
                out.resend,
                !self.ever_sent.insert((queue, offset)),
                "DUP flag"
            );
            assert!(
                !is_expired(&out.entry, now.unix_ms),
                "sent after its time to live"
            );
            assert!(
                !self.given_settles.contains(&(queue, offset)),
                "sent after it was settled"
            );
            session.sent.insert((queue, offset));
            session.pending.push_back((out.token, queue, offset));
            // Nothing older of this sender may be left out, in this queue or a more urgent one.
            for (q, entries) in self.stored.iter().enumerate().take(queue + 1) {
                let end = if q == queue {
                    offset
                } else {
                    self.known_tail[q]
                };
                for (older, stored) in entries.iter().enumerate().take(end as usize) {
                    let key = (q, older as u64);
                    let accounted = stored.sender != session.sender
                        || self.given_settles.contains(&key)
                        || stored.settled.is_some()
                        || stored.expires_at_ms.is_some_and(|at| at <= now.unix_ms)
                        || session.sent.contains(&key);
                    assert!(accounted, "{key:?} was left out before {queue}/{offset}");
                }
            }
        }
        assert!(session.pending.len() <= self.config.window, "window");
    }

    pub(super) fn check_discard(&mut self, discarded: &Discarded) {
        let entry = &discarded.entry;
        match discarded.reason {
            DropReason::TtlExpiry => assert!(is_expired(entry, self.now().unix_ms)),
            DropReason::DeviceInvalidState => {
                assert_eq!(self.nature(&entry.sender), Nature::Refused);
            }
            other => panic!("{other:?}"),
        }
        let queue = discarded.priority as usize;
        self.given_settles.insert((queue, entry.offset));
    }

    pub(super) fn check_bounds(&self) {
        let counts = self.scheduler.counts();
        assert!(counts.sessions <= self.config.connections_max);
        assert_eq!(counts.sessions, self.sessions.len());
        let slack = self.config.connections_max * (self.max_message + 128);
        assert!(counts.bytes <= self.config.bytes_max + slack, "{counts:?}");
        self.scheduler.check_consistency();
        // The rate of connects over every stretch of time.
        let opens = &self.opens;
        if let Some(last) = opens.last() {
            for (index, first) in opens.iter().enumerate() {
                let count = (opens.len() - index) as f64;
                let seconds = (last - first) as f64 / 1000.0;
                let allowed = f64::from(self.config.connects_burst)
                    + seconds * self.config.connects_per_second
                    + 1e-6;
                assert!(count <= allowed, "{count} connects in {seconds} s");
            }
        }
    }
}

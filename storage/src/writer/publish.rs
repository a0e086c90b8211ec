//! After a commit: who is told, and of what. After a failed one: what is undone.

use super::{Group, Outcomes, Writer, WriterQueue};
use crate::error::StoreError;
use crate::stats::add;

impl Writer {
    /// Lets everybody see the staged group, which is committed now.
    pub(super) fn publish(&mut self, group: Group) {
        if std::mem::take(&mut self.failing) {
            tracing::info!("commits of the store succeed again");
        }
        let touched = std::mem::take(&mut self.touched);
        for number in &touched {
            self.publish_queue(*number);
        }
        self.tails.trim(&self.counters);
        add(&self.counters.appends, group.messages);
        add(&self.counters.append_bytes, group.message_bytes);
        let control_cost = group
            .settles
            .iter()
            .map(|(_, cost)| *cost as usize)
            .sum::<usize>();
        self.intake
            .release(group.append_cost, control_cost + group.write_cost);
        // All sequences first: who is woken sees the last of its own.
        for ticket in &self.tickets {
            ticket.progress.advance(ticket.sequence);
        }
        for ticket in self.tickets.drain(..) {
            ticket.progress.wake_once(self.commit);
        }
        for ((item, _), news) in group.settles.into_iter().zip(group.news) {
            if let Some(reply) = item.reply {
                // Who asked may have gone.
                let _ = reply.send(news);
            }
        }
        for item in group.writes {
            let _ = item.reply.send(Ok(()));
        }
        for reply in group.flushes {
            let _ = reply.send(Ok(()));
        }
        for number in &touched {
            self.shed(*number);
        }
        self.check_messages();
        self.touched = touched;
        self.touched.clear();
    }

    fn publish_queue(&mut self, number: u32) {
        let Some(queue) = self.queues.get_mut(number as usize) else {
            return;
        };
        queue.touched = false;
        let entries = queue.entries.len() as u64;
        if entries > 0 {
            self.tails.extend(&queue.state, &mut queue.entries);
            queue.next += entries;
            queue.state.publish(queue.next, queue.earliest_expiry_ms);
            queue.earliest_expiry_ms = u64::MAX;
            add(&self.counters.entries, entries);
            add(&queue.state.counters.entries, entries);
        }
        if let Some(set) = queue.settled.take() {
            *queue.state.settled.lock() = set;
            self.tails.remove(&queue.state, &queue.taken);
            queue.unreclaimed += queue.taken.len() as u64;
            queue.taken.clear();
            let outcomes = std::mem::take(&mut queue.outcomes);
            add(&self.counters.settled, outcomes.done);
            add(&self.counters.expired, outcomes.expired);
            add(&self.counters.dropped, outcomes.dropped);
            add(&queue.state.counters.settled, outcomes.done);
            add(&queue.state.counters.expired, outcomes.expired);
            add(&queue.state.counters.dropped, outcomes.dropped);
            let deleted = std::mem::take(&mut queue.deleted);
            if deleted.is_empty() {
                self.reclaim_waits = true;
            } else {
                self.deleted(number, &deleted);
            }
        }
    }

    /// Undoes the staged group, which is not committed: connections hear that they failed,
    /// writers of values get the error, settles wait for the next commit.
    pub(super) fn fail(&mut self, group: Group, error: &StoreError) {
        add(&self.counters.commits_failed, 1);
        if !std::mem::replace(&mut self.failing, true) {
            tracing::error!(%error, "a commit of the store failed");
        }
        let touched = std::mem::take(&mut self.touched);
        for number in touched {
            if let Some(queue) = self.queues.get_mut(number as usize) {
                queue.unstage();
            }
        }
        self.refs.clear();
        // The reservation may not have been written.
        self.shared.reserved = self.shared.next;
        self.intake.release(group.append_cost, group.write_cost);
        for ticket in self.tickets.drain(..) {
            ticket.progress.fail();
            ticket.progress.wake_once(self.commit);
        }
        let reason = error.to_string();
        let failed = || {
            Err(StoreError::CommitFailed {
                reason: reason.clone(),
            })
        };
        for item in group.writes {
            let _ = item.reply.send(failed());
        }
        for reply in group.flushes {
            let _ = reply.send(failed());
        }
        self.carried = group.settles;
    }
}

impl WriterQueue {
    fn unstage(&mut self) {
        self.touched = false;
        self.entries.clear();
        self.earliest_expiry_ms = u64::MAX;
        self.settled = None;
        self.taken.clear();
        self.outcomes = Outcomes::default();
        self.deleted.clear();
    }
}

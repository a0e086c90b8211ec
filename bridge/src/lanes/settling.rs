//! Settles on their way to the store.

use std::time::Duration;

use super::{
    actions::Action,
    message::Settled,
    scheduler::{Now, Scheduler},
};

impl Scheduler {
    /// The store settled `settled` of the queue at `queue`.
    pub fn settled(&mut self, queue: usize, settled: &[Settled]) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        state.confirm(settled);
        state.settling = false;
        self.unblock();
    }

    /// The store could not settle: tried again a second later.
    pub fn settle_failed(&mut self, queue: usize, mut settled: Vec<Settled>, now: Now) {
        let Some(state) = self.queues.get_mut(queue) else {
            return;
        };
        settled.append(&mut state.to_settle);
        state.to_settle = settled;
        state.settling = false;
        state.settle_retry_at = Some(now.instant + Duration::from_secs(1));
    }

    pub(super) fn start_settles(&mut self, now: Now) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if queue.settle_retry_at.is_some_and(|at| at > now.instant) {
                continue;
            }
            queue.settle_retry_at = None;
            if !queue.settling && !queue.to_settle.is_empty() {
                queue.settling = true;
                let settled = std::mem::take(&mut queue.to_settle);
                self.out.push(Action::Settle {
                    queue: index,
                    settled,
                });
            }
        }
    }
}

//! What waits for one identity's worker, in order and bounded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::limits::{ALL_COMMAND_BYTES_MAX, COMMAND_BYTES_MAX, COMMANDS_MAX};
use super::{TwinError, TwinReply};

/// Something to do for one identity.
#[derive(Debug)]
pub(super) enum Command {
    Report(Report),
    Get(oneshot::Sender<TwinReply>),
    Desired(Bytes),
    Signal(Signal),
}

/// Reported properties.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) patch: Bytes,
    /// Whether routing is to hear of it.
    pub(super) notify: bool,
    pub(super) reply: oneshot::Sender<Result<(), TwinError>>,
}

/// An event without contents: one that waits already stands for the next one, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    Established,
    Online,
    Subscribed,
    /// Changes from upstream found no room here.
    Lost,
    Removed,
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    queue: VecDeque<Queued>,
    requests: usize,
    changes: usize,
    bytes: usize,
}

/// A command and the memory that it may use until it is done.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) command: Command,
    _charge: Charge,
}

impl Inbox {
    /// Adds a command; refuses a request when there is no room. A change from upstream that
    /// finds no room leaves a [`Signal::Lost`].
    pub(super) fn push(&mut self, command: Command, budget: &Budget) -> Result<(), TwinError> {
        let bytes = match &command {
            Command::Report(report) => report.patch.len(),
            Command::Desired(patch) => patch.len(),
            Command::Get(_) => 0,
            Command::Signal(signal) => {
                self.signal(*signal, budget);
                return Ok(());
            }
        };
        let is_change = matches!(command, Command::Desired(_));
        let count = if is_change {
            self.changes
        } else {
            self.requests
        };
        let fits =
            count < COMMANDS_MAX && (self.bytes == 0 || self.bytes + bytes <= COMMAND_BYTES_MAX);
        let charge = fits.then(|| budget.charge(bytes)).flatten();
        match charge {
            Some(charge) => {
                if is_change {
                    self.changes += 1;
                } else {
                    self.requests += 1;
                }
                self.bytes += bytes;
                self.queue.push_back(Queued {
                    command,
                    _charge: charge,
                });
                Ok(())
            }
            None if is_change => {
                self.signal(Signal::Lost, budget);
                Ok(())
            }
            None => Err(TwinError::Busy),
        }
    }

    fn signal(&mut self, signal: Signal, budget: &Budget) {
        let waits = |queued: &Queued| matches!(queued.command, Command::Signal(waiting) if waiting == signal);
        // An earlier removal does not remove what came after it.
        let waits = signal != Signal::Removed && self.queue.iter().any(waits);
        if signal == Signal::Removed {
            // Whoever waits is told by the loss of his answer; nothing else is left to do.
            *self = Self::default();
        }
        if !waits && let Some(charge) = budget.charge(0) {
            self.queue.push_back(Queued {
                command: Command::Signal(signal),
                _charge: charge,
            });
        }
    }

    /// All that waits.
    pub(super) fn take(&mut self) -> VecDeque<Queued> {
        std::mem::take(self).queue
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// The memory that all inboxes may use.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget(Arc<AtomicUsize>);

/// A part of a [`Budget`], given back when it goes.
#[derive(Debug)]
pub(super) struct Charge {
    budget: Budget,
    bytes: usize,
}

impl Budget {
    fn charge(&self, bytes: usize) -> Option<Charge> {
        let fits = |used: usize| {
            used.checked_add(bytes)
                .filter(|used| bytes == 0 || *used <= ALL_COMMAND_BYTES_MAX)
        };
        // Relaxed: a count that guards no other memory.
        let charged = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        charged.ok().map(|_| Charge {
            budget: self.clone(),
            bytes,
        })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(bytes: usize) -> Command {
        let (reply, _) = oneshot::channel();
        Command::Report(Report {
            patch: vec![b' '; bytes].into(),
            notify: true,
            reply,
        })
    }

    fn get() -> Command {
        Command::Get(oneshot::channel().0)
    }

    fn signals(inbox: &mut Inbox) -> Vec<Signal> {
        let signal = |queued: Queued| match queued.command {
            Command::Signal(signal) => Some(signal),
            _ => None,
        };
        inbox.take().into_iter().filter_map(signal).collect()
    }

    #[test]
    fn requests_are_refused_when_too_many_wait() {
        let (mut inbox, budget) = (Inbox::default(), Budget::default());
        for _ in 0..COMMANDS_MAX {
            inbox.push(get(), &budget).unwrap();
        }
        assert_eq!(inbox.push(get(), &budget), Err(TwinError::Busy));
        assert_eq!(inbox.push(report(1), &budget), Err(TwinError::Busy));
        // A change from upstream has room of its own.
        inbox.push(Command::Desired("{}".into()), &budget).unwrap();
        assert_eq!(inbox.take().len(), COMMANDS_MAX + 1);
        inbox.push(get(), &budget).unwrap();
    }

    #[test]
    fn bytes_are_bounded_for_one_and_for_all_and_given_back() {
        let budget = Budget::default();
        let mut inbox = Inbox::default();
        inbox.push(report(COMMAND_BYTES_MAX + 5), &budget).unwrap();
        assert_eq!(inbox.push(report(1), &budget), Err(TwinError::Busy));
        drop(inbox.take());
        let mut inboxes = Vec::new();
        for _ in 0..ALL_COMMAND_BYTES_MAX / COMMAND_BYTES_MAX {
            let mut inbox = Inbox::default();
            inbox.push(report(COMMAND_BYTES_MAX), &budget).unwrap();
            inboxes.push(inbox);
        }
        assert_eq!(inbox.push(report(1), &budget), Err(TwinError::Busy));
        let taken = inboxes.pop().unwrap().take();
        assert_eq!(inbox.push(report(1), &budget), Err(TwinError::Busy));
        drop(taken);
        inbox.push(report(1), &budget).unwrap();
    }

    #[test]
    fn a_change_that_finds_no_room_leaves_a_mark() {
        let (mut inbox, budget) = (Inbox::default(), Budget::default());
        for _ in 0..COMMANDS_MAX + 3 {
            inbox.push(Command::Desired("{}".into()), &budget).unwrap();
        }
        assert_eq!(signals(&mut inbox), [Signal::Lost]);
    }

    #[test]
    fn signals_add_up_and_a_removal_ends_what_waits() {
        let (mut inbox, budget) = (Inbox::default(), Budget::default());
        let push = |inbox: &mut Inbox, signal| {
            inbox.push(Command::Signal(signal), &budget).unwrap();
        };
        push(&mut inbox, Signal::Online);
        push(&mut inbox, Signal::Established);
        push(&mut inbox, Signal::Online);
        assert_eq!(signals(&mut inbox), [Signal::Online, Signal::Established]);
        push(&mut inbox, Signal::Online);
        push(&mut inbox, Signal::Removed);
        push(&mut inbox, Signal::Online);
        assert_eq!(signals(&mut inbox), [Signal::Removed, Signal::Online]);
    }
}

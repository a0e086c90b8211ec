//! What identities want to hear, and the sessions that this keeps open.

use std::time::Duration;

use edgehub_proto::{hub::Needs, identity::Identity};

use super::{
    actions::Action,
    lane::LaneState,
    scheduler::{Now, Scheduler},
};

/// Between two sessions of a lane that are replaced because of what the client says about itself:
/// it may say something else each time that it connects.
const RENEW_EVERY: Duration = Duration::from_secs(30);

impl Scheduler {
    /// What the upstream is told about `identity` when a session opens is another from now on: an
    /// open session is replaced once what is in flight is settled. Messages that are read later go
    /// over the next one.
    pub fn renew(&mut self, identity: &Identity, now: Now) {
        let Some(lane) = self
            .lanes
            .find(identity)
            .and_then(|key| self.lanes.get_mut(key))
        else {
            return;
        };
        let is_live = matches!(lane.state, LaneState::Opening(_) | LaneState::Ready(_));
        if !is_live || lane.renew_from.is_some() {
            return;
        }
        let earliest = lane.renewed_at.map(|at| at + RENEW_EVERY);
        let from = earliest.map_or(now.instant, |at| at.max(now.instant));
        lane.renew_from = Some(from);
        lane.renewed_at = Some(from);
        self.maintain_at = self.maintain_at.min(now.instant);
    }

    /// States what `identity` wants to hear from now on; replaces what was said before.
    pub fn need(&mut self, identity: &Identity, needs: Needs) {
        let needs = Needs {
            // Only devices have it: IoT Hub refuses the subscription of a module.
            cloud_to_device: needs.cloud_to_device && !identity.is_module(),
            ..needs
        };
        let key = match self.lanes.find(identity) {
            Some(key) => key,
            None if needs.any() => self.new_lane(identity.clone()),
            None => return,
        };
        let Some(lane) = self.lanes.get_mut(key) else {
            return;
        };
        let before = std::mem::replace(&mut lane.needs, needs);
        if before == needs {
            return;
        }
        if needs.any() != before.any() {
            lane.released = before.any();
            if needs.any() {
                self.needy += 1;
            } else {
                self.needy = self.needy.saturating_sub(1);
            }
        }
        let live = match &mut lane.state {
            LaneState::Opening(session) => Some(*session),
            LaneState::Ready(ready) => {
                // Counted anew, with the patience that is due now.
                ready.idle_since = None;
                Some(ready.session)
            }
            // A lane that backs off stays, also without needs: a client that comes and goes must
            // not cut the wait short.
            LaneState::BackOff { .. }
            | LaneState::Closing(_)
            | LaneState::Dropping
            | LaneState::Waiting => None,
        };
        if let Some(session) = live {
            self.out.push(Action::Needs { session, needs });
        }
        self.touch(key);
    }

    /// The session has handed something down whose answer it waits for, or does so no more. It is
    /// not renewed meanwhile while there is time.
    pub fn engaged(&mut self, session: super::SessionId, engaged: bool) {
        if let Some(key) = self.lanes.find_session(session)
            && let Some(lane) = self.lanes.get_mut(key)
        {
            lane.engaged = engaged;
        }
    }
}

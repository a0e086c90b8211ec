//! The driver's word on a link: accepted, refused, or detached later (part 2, 2.6.3 to 2.6.6).

use super::event::{Event, LinkId, LinkTerms};
use super::link::{Direction, Phase};
use super::{Attach, Connection};
use crate::performative::{self, ErrorInfo};

impl Connection {
    /// Accepts a link that the peer wants. Credit that it gave already is told behind it.
    pub fn accept(&mut self, id: LinkId, terms: &LinkTerms) {
        let Some(attach) = self.verdict(id, Phase::Attached) else {
            return;
        };
        let reply = attach.reply(terms);
        self.performative(id.channel, |out| performative::encode_attach(&reply, out));
        let mut owes_echo = false;
        if let Some(link) = self.link(id) {
            match &mut link.direction {
                Direction::Receiving(receiving) => {
                    receiving.max_message_size = terms.max_message_size.filter(|size| *size > 0);
                    receiving.target = terms.credit;
                    receiving.flow_due |= terms.credit > 0;
                }
                Direction::Sending(sending) => {
                    if terms.exceeds_max_message_size {
                        sending.max_message_size = None;
                    }
                    owes_echo = std::mem::take(&mut sending.echo);
                    let (credit, drain) = (sending.credit, sending.drain);
                    if credit > 0 || drain {
                        self.events.push_back(Event::Credit {
                            link: id,
                            credit,
                            drain,
                        });
                    }
                }
            }
        }
        if owes_echo {
            self.sender_flow(id);
        }
        self.list(id);
        self.flush_session(id.channel);
    }

    /// Refuses a link that the peer wants (part 2, 2.6.3).
    pub fn refuse(&mut self, id: LinkId, error: &ErrorInfo) {
        let Some(attach) = self.verdict(id, Phase::Detaching) else {
            return;
        };
        if let Some(session) = self.sessions.get_mut(&id.channel) {
            session.free_name(id);
        }
        let reply = attach.refusal();
        if !self.performative(id.channel, |out| performative::encode_attach(&reply, out)) {
            return;
        }
        self.frame(id.channel, |out| {
            performative::encode_detach(id.handle, true, Some(error), out);
        });
    }

    /// Answers an attach: the link's phase is another from now on.
    fn verdict(&mut self, id: LinkId, phase: Phase) -> Option<Attach> {
        let link = self.link(id)?;
        let Phase::Asked(attach) = &link.phase else {
            return None;
        };
        let attach = attach.clone();
        link.phase = phase;
        self.asked_bytes = self.asked_bytes.saturating_sub(attach.bytes());
        Some(attach)
    }

    /// Detaches a link that was accepted. What is unsettled on it is forgotten; its last
    /// dispositions leave first. No [`Event::Detached`] follows.
    pub fn detach(&mut self, id: LinkId, error: Option<&ErrorInfo>) {
        if !self
            .link(id)
            .is_some_and(|link| matches!(link.phase, Phase::Attached))
        {
            return;
        }
        self.flush_session(id.channel);
        self.give_up(id);
        self.frame(id.channel, |out| {
            performative::encode_detach(id.handle, true, error, out);
        });
    }
}

//! Which queue of a module has which slot, that is, which part of its packet ids.
//!
//! A slot is given at the first use and kept, also over a restart of the hub: a message that a
//! client had under one packet id comes again under the same (MQTT-4.4.0-1). The last slot is for
//! all queues that come too late for one of their own.

use edgehub_proto::records::InputSlots;
use edgehub_storage::QueueId;
use prost::Message as _;

use super::limits::SHARED_SLOT;

const VERSION: u32 = 1;

/// The slots of one module.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SlotTable {
    slots: Vec<(QueueId, u16)>,
}

impl SlotTable {
    /// Reads a table; what makes no sense is left out, its queues get slots anew.
    pub(super) fn decode(record: &[u8]) -> Self {
        let Ok(record) = InputSlots::decode(record) else {
            return Self::default();
        };
        if record.version != VERSION {
            return Self::default();
        }
        let mut table = Self::default();
        let names = record.endpoints.into_iter().zip(record.priorities);
        for ((endpoint, priority), slot) in names.zip(record.slots) {
            let id = QueueId { endpoint, priority };
            let Ok(slot) = u16::try_from(slot) else {
                continue;
            };
            let taken = slot != SHARED_SLOT && table.slots.iter().any(|(_, used)| *used == slot);
            if slot <= SHARED_SLOT && !taken && table.get(&id).is_none() {
                table.slots.push((id, slot));
            }
        }
        table
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let ids = || self.slots.iter().map(|(id, _)| id);
        InputSlots {
            version: VERSION,
            endpoints: ids().map(|id| id.endpoint.clone()).collect(),
            priorities: ids().map(|id| id.priority).collect(),
            slots: self
                .slots
                .iter()
                .map(|(_, slot)| u32::from(*slot))
                .collect(),
        }
        .encode_to_vec()
    }

    fn get(&self, id: &QueueId) -> Option<u16> {
        let found = self.slots.iter().find(|(known, _)| known == id)?;
        Some(found.1)
    }

    /// The slot of a queue in use; `in_use` names all of them. A slot of a queue that is not in use
    /// is taken over only when there is no free one. Tells whether the table has changed, too.
    pub(super) fn assign(&mut self, id: &QueueId, in_use: &[QueueId]) -> (u16, bool) {
        if let Some(slot) = self.get(id) {
            return (slot, false);
        }
        let free = (0..SHARED_SLOT).find(|slot| self.slots.iter().all(|(_, used)| used != slot));
        let slot = free.unwrap_or_else(|| {
            let unused = |(id, slot): &(QueueId, u16)| *slot != SHARED_SLOT && !in_use.contains(id);
            match self.slots.iter().position(unused) {
                Some(index) => self.slots.remove(index).1,
                None => SHARED_SLOT,
            }
        });
        // Those that share the last one and are gone would pile up.
        self.slots
            .retain(|(id, slot)| *slot != SHARED_SLOT || in_use.contains(id));
        self.slots.push((id.clone(), slot));
        (slot, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(number: usize) -> QueueId {
        QueueId {
            endpoint: format!("edge1/modA/in{number}"),
            priority: 7,
        }
    }

    fn assign(table: &mut SlotTable, numbers: &[usize]) -> Vec<u16> {
        let in_use: Vec<_> = numbers.iter().map(|number| queue(*number)).collect();
        let slots = in_use.iter().map(|id| table.assign(id, &in_use).0);
        slots.collect()
    }

    #[test]
    fn a_queue_keeps_its_slot_whatever_comes_and_goes() {
        let mut table = SlotTable::default();
        assert_eq!(assign(&mut table, &[1, 2, 3]), [0, 1, 2]);
        assert_eq!(assign(&mut table, &[3, 1]), [2, 0]);
        assert_eq!(assign(&mut table, &[0, 3]), [3, 2]);
        let mut table = SlotTable::decode(&table.encode());
        assert_eq!(assign(&mut table, &[3, 0, 2, 1]), [2, 3, 1, 0]);
        let other_priority = QueueId {
            priority: 8,
            ..queue(1)
        };
        assert_eq!(table.assign(&other_priority, &[]), (4, true));
        assert_eq!(table.assign(&other_priority, &[]), (4, false));
    }

    #[test]
    fn late_queues_share_the_last_slot_and_gone_ones_give_theirs_up() {
        let mut table = SlotTable::default();
        let own: Vec<usize> = (0..usize::from(SHARED_SLOT)).collect();
        assign(&mut table, &own);
        let all: Vec<usize> = (0..20).collect();
        let slots = assign(&mut table, &all);
        assert!(
            slots[14..].iter().all(|slot| *slot == SHARED_SLOT),
            "{slots:?}"
        );
        let mut table = SlotTable::decode(&table.encode());
        assert_eq!(assign(&mut table, &all), slots);
        // 3 is gone: the next new one gets its place. Then there is none left again.
        let rest: Vec<usize> = (0..14).filter(|n| *n != 3).chain([20]).collect();
        assert_eq!(assign(&mut table, &rest)[13], 3);
        let full: Vec<usize> = rest.iter().copied().chain([21]).collect();
        assert_eq!(assign(&mut table, &full)[14], SHARED_SLOT);
        assert_eq!(
            table.slots.len(),
            15,
            "those that shared and are gone are forgotten"
        );
    }

    #[test]
    fn a_damaged_record_gives_no_slot_twice_and_none_that_there_is_not() {
        let record = InputSlots {
            version: VERSION,
            endpoints: ["a", "b", "c", "a", "d"].map(str::to_owned).into(),
            priorities: vec![1; 5],
            slots: vec![2, 2, 99, 3, 70_000],
        };
        let table = SlotTable::decode(&record.encode_to_vec());
        assert_eq!(table.slots.len(), 1);
        assert_eq!(SlotTable::decode(&[0xff, 0xff]), SlotTable::default());
        let later = InputSlots {
            version: 2,
            ..record
        };
        let table = SlotTable::decode(&later.encode_to_vec());
        assert_eq!(table, SlotTable::default());
    }
}

//! The table of mapped slots that both adapters keep, and the checks that no hypervisor needs to repeat.

use std::sync::Arc;

use super::{
    GuestAddress, HostMapping, HypervisorError, PAGE_SIZE, SlotAccess, SlotId, SlotMapping,
};

/// Mapped slots, sorted by guest-physical address; no two overlap.
#[derive(Debug, Clone, Default)]
pub(super) struct SlotTable {
    slots: Vec<Slot>,
}

/// One mapped slot. Holding the `Arc` is what keeps the host memory mapped under the guest.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) id: SlotId,
    pub(super) guest: u64,
    pub(super) len: u64,
    pub(super) memory: Arc<HostMapping>,
    pub(super) offset: u64,
    pub(super) access: SlotAccess,
}

impl Slot {
    /// Checks everything about a slot that does not depend on other slots.
    pub(super) fn new(id: SlotId, mapping: SlotMapping) -> Result<Slot, HypervisorError> {
        let SlotMapping { guest, memory, offset, len, access } = mapping;
        for (what, value) in [("guest address", guest.0), ("offset", offset), ("length", len)] {
            if value % PAGE_SIZE != 0 {
                return Err(HypervisorError::Misaligned { slot: id, what, value });
            }
        }
        let available = memory.len();
        let fits_memory = offset.checked_add(len).is_some_and(|end| end <= available);
        let fits_guest = guest.0.checked_add(len).is_some();
        if len == 0 || !fits_memory || !fits_guest {
            return Err(HypervisorError::BadRange { slot: id, guest, offset, len, available });
        }
        Ok(Slot { id, guest: guest.0, len, memory, offset, access })
    }

    /// End of the guest-physical range, exclusive.
    fn end(&self) -> u64 {
        self.guest + self.len
    }
}

impl SlotTable {
    /// Where `slot` would go, if nothing is in its way.
    fn position_for(&self, slot: &Slot) -> Result<usize, HypervisorError> {
        if self.slots.iter().any(|other| other.id == slot.id) {
            return Err(HypervisorError::SlotInUse { slot: slot.id });
        }
        let at = self.slots.partition_point(|other| other.end() <= slot.guest);
        match self.slots.get(at) {
            Some(other) if other.guest < slot.end() => Err(HypervisorError::SlotOverlap {
                slot: slot.id,
                guest: GuestAddress(slot.guest),
                other: other.id,
            }),
            _ => Ok(at),
        }
    }

    /// Checks that `slot` could be inserted.
    pub(super) fn admits(&self, slot: &Slot) -> Result<(), HypervisorError> {
        self.position_for(slot).map(|_| ())
    }

    pub(super) fn insert(&mut self, slot: Slot) -> Result<(), HypervisorError> {
        let at = self.position_for(&slot)?;
        self.slots.insert(at, slot);
        Ok(())
    }

    pub(super) fn get(&self, id: SlotId) -> Result<&Slot, HypervisorError> {
        self.slots.iter().find(|slot| slot.id == id).ok_or(HypervisorError::NoSuchSlot { slot: id })
    }

    pub(super) fn remove(&mut self, id: SlotId) -> Result<Slot, HypervisorError> {
        let at = self.slots.iter().position(|slot| slot.id == id);
        at.map(|at| self.slots.remove(at)).ok_or(HypervisorError::NoSuchSlot { slot: id })
    }

    /// The slot that has `address`.
    pub(super) fn find(&self, address: u64) -> Option<&Slot> {
        let at = self.slots.partition_point(|slot| slot.end() <= address);
        self.slots.get(at).filter(|slot| slot.guest <= address)
    }

    /// The slot that has `address`, and where in the slot's memory that is.
    pub(super) fn locate(&self, address: u64) -> Option<(&Slot, u64)> {
        self.find(address).map(|slot| (slot, slot.offset + (address - slot.guest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE;

    fn slot(id: u32, guest: u64, offset: u64, len: u64) -> Result<Slot, HypervisorError> {
        let memory = Arc::new(HostMapping::anonymous(4 * PAGE).unwrap());
        let (guest, access) = (GuestAddress(guest), SlotAccess::ReadWrite);
        Slot::new(SlotId(id), SlotMapping { guest, memory, offset, len, access })
    }

    #[test]
    fn impossible_slots_are_refused_with_the_reason() {
        type Check = fn(&HypervisorError) -> bool;
        let misaligned: Check = |e| matches!(e, HypervisorError::Misaligned { .. });
        let bad_range: Check = |e| matches!(e, HypervisorError::BadRange { .. });
        let rows: [(&str, u64, u64, u64, Check); 8] = [
            ("guest address inside a page", 1, 0, PAGE, misaligned),
            ("offset inside a page", 0, 0x800, PAGE, misaligned),
            ("length not whole pages", 0, 0, PAGE + 1, misaligned),
            ("empty", 0, 0, 0, bad_range),
            ("longer than the memory", 0, 0, 5 * PAGE, bad_range),
            ("passes the end of the memory", 0, 3 * PAGE, 2 * PAGE, bad_range),
            ("offset + length overflows", 0, u64::MAX - PAGE + 1, 2 * PAGE, bad_range),
            ("guest range wraps around", u64::MAX - PAGE + 1, 0, PAGE, bad_range),
        ];
        for (name, guest, offset, len, expected) in rows {
            let error = slot(0, guest, offset, len).expect_err(name);
            assert!(expected(&error), "{name}: {error}");
        }
    }

    #[test]
    fn neighbours_fit_and_overlaps_do_not() {
        let mut table = SlotTable::default();
        table.insert(slot(1, 4 * PAGE, 0, 2 * PAGE).unwrap()).unwrap();
        table.insert(slot(2, 6 * PAGE, 0, PAGE).unwrap()).unwrap();
        table.insert(slot(3, 3 * PAGE, 0, PAGE).unwrap()).unwrap();

        for (guest, len, other) in [
            (5 * PAGE, PAGE, 1),
            (2 * PAGE, 2 * PAGE, 3),
            (6 * PAGE, 4 * PAGE, 2),
            (0, 4 * PAGE, 3),
        ] {
            let error = table.insert(slot(9, guest, 0, len).unwrap()).expect_err("overlap");
            assert!(
                matches!(error, HypervisorError::SlotOverlap { other: o, .. } if o == SlotId(other)),
                "{error}"
            );
        }
        let error = table.insert(slot(1, 0, 0, PAGE).unwrap()).expect_err("same id");
        assert!(matches!(error, HypervisorError::SlotInUse { slot: SlotId(1) }), "{error}");
    }

    #[test]
    fn an_address_finds_its_slot_until_the_slot_is_removed() {
        let mut table = SlotTable::default();
        table.insert(slot(1, 4 * PAGE, 0, 2 * PAGE).unwrap()).unwrap();
        let found = |table: &SlotTable, address| table.find(address).map(|slot| slot.id);
        assert_eq!(found(&table, 4 * PAGE - 1), None);
        assert_eq!(found(&table, 4 * PAGE), Some(SlotId(1)));
        assert_eq!(found(&table, 6 * PAGE - 1), Some(SlotId(1)));
        assert_eq!(found(&table, 6 * PAGE), None);

        table.remove(SlotId(1)).unwrap();
        assert_eq!(found(&table, 4 * PAGE), None);
        let error = table.remove(SlotId(1)).expect_err("absent");
        assert!(matches!(error, HypervisorError::NoSuchSlot { slot: SlotId(1) }), "{error}");
    }
}

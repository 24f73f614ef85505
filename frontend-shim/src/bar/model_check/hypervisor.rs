//! Memory slots whose removal waits for accesses, as KVM's does.

use std::io;
use std::sync::Arc;

use super::device::{Access, BAR2_SIZE, Device, parts};
use crate::hypervisor::{Hypervisor, HypervisorError, HypervisorKind, SlotId, SlotMapping};
use crate::sync::{Mutex, lock};

/// RAM, claimed by the VMM. Its backing has vanished: every access faults.
pub(super) const RAM_SIZE: u64 = 0x10_0000;

#[derive(Debug)]
pub(super) struct ModelHypervisor {
    /// What each slot number is for: a function, and a part of its BAR2.
    plan: Vec<(Arc<Device>, u64, u64)>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    mapped: Vec<(SlotId, SlotMapping)>,
    /// Every other call from now on fails, this often.
    failures: u32,
    calls: u32,
}

/// What becomes of a guest access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Landed(u32),
    Fault,
    /// No slot is there.
    Mmio,
}

impl ModelHypervisor {
    /// For these functions, attached in this order with slots from 0 on.
    pub(super) fn new(devices: &[Arc<Device>]) -> Self {
        let plan = devices.iter().flat_map(|device| {
            let parts = parts(device.kind.sparse).into_iter();
            parts.map(|part| (Arc::clone(device), part.offset, part.size))
        });
        Self { plan: plan.collect(), slots: Mutex::new(Slots::default()) }
    }

    /// A guest access. The lock is held until it has landed: whoever removes a slot waits for it.
    pub(super) fn access(&self, address: u64, access: Access) -> Outcome {
        if address < RAM_SIZE {
            return Outcome::Fault;
        }
        let slots = lock(&self.slots);
        let found = slots.mapped.iter().find_map(|(slot, mapping)| {
            let offset = address.checked_sub(mapping.guest.0)?;
            (offset < mapping.len).then_some((slot, mapping, offset))
        });
        let Some((slot, mapping, offset)) = found else { return Outcome::Mmio };
        let (device, part, _) = &self.plan[slot.0 as usize];
        let of_process = || mapping.memory.load_u32(mapping.offset + offset).ok();
        match device.touch(address, part + mapping.offset + offset, access, of_process) {
            Some(value) => Outcome::Landed(value),
            None => Outcome::Fault,
        }
    }

    /// How many slots a function has.
    pub(super) fn slots_of(&self, device: &Device) -> usize {
        let slots = lock(&self.slots);
        let own = |slot: &SlotId| self.plan[slot.0 as usize].0.index == device.index;
        slots.mapped.iter().filter(|(slot, _)| own(slot)).count()
    }

    pub(super) fn fail(&self, failures: u32) {
        lock(&self.slots).failures = failures;
    }
}

impl Hypervisor for ModelHypervisor {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Model
    }

    fn map_slot(&self, slot: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        let mut slots = lock(&self.slots);
        let (device, part, size) = &self.plan[slot.0 as usize];
        let end = |mapping: &SlotMapping| mapping.guest.0 + mapping.len;
        let placed = mapping.guest.0 - part;
        assert!(
            device.lock().is_placed_at(placed),
            "{mapping:x?} is where the guest has not put it"
        );
        assert!(mapping.offset == 0 && mapping.len == *size, "{mapping:x?} is not its part");
        assert!(end(&mapping) <= placed + BAR2_SIZE, "{mapping:x?} passes the end of the BAR");
        assert!(mapping.guest.0 >= RAM_SIZE, "{mapping:x?} lies over RAM");
        slots.try_call("map")?;
        if slots.mapped.iter().any(|(other, _)| *other == slot) {
            return Err(HypervisorError::SlotInUse { slot });
        }
        let overlaps =
            |other: &SlotMapping| mapping.guest.0 < end(other) && other.guest.0 < end(&mapping);
        if let Some((other, _)) = slots.mapped.iter().find(|(_, other)| overlaps(other)) {
            let (guest, other) = (mapping.guest, *other);
            return Err(HypervisorError::SlotOverlap { slot, guest, other });
        }
        slots.mapped.push((slot, mapping));
        Ok(())
    }

    fn unmap_slot(&self, slot: SlotId) -> Result<(), HypervisorError> {
        let mut slots = lock(&self.slots);
        slots.try_call("unmap")?;
        let at = slots.mapped.iter().position(|(other, _)| *other == slot);
        slots.mapped.swap_remove(at.ok_or(HypervisorError::NoSuchSlot { slot })?);
        Ok(())
    }
}

impl Slots {
    fn try_call(&mut self, call: &'static str) -> Result<(), HypervisorError> {
        self.calls += 1;
        if self.failures == 0 || self.calls.is_multiple_of(3) {
            return Ok(());
        }
        self.failures -= 1;
        Err(HypervisorError::Call { call, source: io::ErrorKind::OutOfMemory.into() })
    }
}

//! The slots of a partition, and what of them the hypervisor has mapped.
//!
//! Virtual CPUs look slots up in a snapshot, without a lock, while other threads add and remove them. What
//! a lookup found may be gone by the time it is acted upon, so every slot has a generation, and
//! [`Regions::resolve`] checks it under the lock that `map_slot` and `unmap_slot` hold across their
//! hypercalls: a slot that was removed in between is never mapped again, not even if another one has
//! taken its number and place.
//!
//! One page is mapped once. What the hypervisor would say to a second mapping of it is never asked: the
//! record here says that it is mapped, and since when. Two virtual CPUs that touch the same page at the
//! same time both get [`Resolution::Mapped`], after one call. A page that was mapped before a virtual CPU
//! entered the guest, and that the guest still could not access, has lost its host memory: then the
//! mapping is removed, and the slot is suspended until a later access finds its memory back.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use arc_swap::{ArcSwap, Guard};

use super::hypercalls::{CallErrorKind, Partition};
use super::policy::{GuestFrame, HostFrame, MapPlan, MapPolicy};
use crate::hypervisor::slots::{Slot, SlotTable};
use crate::hypervisor::{
    GuestAddress, HypervisorError, PAGE_SIZE, SlotAccess, SlotId, SlotMapping,
};
use crate::x86::Ram;

/// The slots of one partition.
#[derive(Debug)]
pub(super) struct Regions<P> {
    // Declared before the slots, so that the partition goes before the host memory in it.
    partition: P,
    policy: MapPolicy,
    /// What virtual CPUs look up.
    current: ArcSwap<Table>,
    /// Held across hypercalls, so that this record and the hypervisor's change together.
    mapped: Mutex<BTreeMap<SlotId, Live>>,
    /// Moves after every mapping; see [`Moment`].
    clock: AtomicU64,
    generations: AtomicU64,
    /// Held for reading around every access that is made here on behalf of the guest, so that removing
    /// a slot can wait for them.
    accesses: RwLock<()>,
}

#[derive(Debug, Clone, Default)]
struct Table {
    slots: SlotTable,
    generations: BTreeMap<SlotId, Generation>,
}

/// Tells two slots apart that have the same number, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Generation(u64);

/// A point in time, as mappings order it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(u64);

/// What is mapped of a slot.
#[derive(Debug)]
struct Live {
    generation: Generation,
    /// By first frame; no two overlap.
    parts: BTreeMap<GuestFrame, Part>,
}

#[derive(Debug)]
struct Part {
    plan: MapPlan,
    since: Moment,
}

/// A slot as a lookup found it.
#[derive(Debug)]
pub(super) struct Found {
    slot: Slot,
    generation: Generation,
}

/// What became of an access that the guest could not make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resolution {
    /// The page is mapped.
    Mapped,
    /// The slot is not what it was when it was looked up, or the call was interrupted.
    Changed,
    /// The page can't be mapped: its host memory refuses.
    Suspended,
}

impl Found {
    /// Whether writes reach the memory.
    pub(super) fn is_writable(&self) -> bool {
        self.slot.access == SlotAccess::ReadWrite
    }
}

impl Live {
    fn part_with(&self, frame: GuestFrame) -> Option<&Part> {
        let (_, part) = self.parts.range(..=frame).next_back()?;
        part.plan.contains(frame).then_some(part)
    }
}

impl<P: Partition> Regions<P> {
    pub(super) fn new(partition: P, policy: MapPolicy) -> Regions<P> {
        Regions {
            partition,
            policy,
            current: ArcSwap::default(),
            mapped: Mutex::default(),
            clock: AtomicU64::new(0),
            generations: AtomicU64::new(0),
            accesses: RwLock::new(()),
        }
    }

    pub(super) fn partition(&self) -> &P {
        &self.partition
    }

    /// Now. What was mapped up to here is mapped for a virtual CPU that enters the guest later.
    pub(super) fn now(&self) -> Moment {
        Moment(self.clock.load(Ordering::Acquire))
    }

    /// The slot that has `address`, if any. Never waits.
    pub(super) fn find(&self, address: u64) -> Option<Found> {
        let table = self.current.load();
        let slot = table.slots.find(address)?;
        let generation = *table.generations.get(&slot.id)?;
        Some(Found { slot: slot.clone(), generation })
    }

    /// Registers a slot. RAM is mapped at once, a device's memory when the guest first accesses it.
    pub(super) fn add(&self, id: SlotId, mapping: SlotMapping) -> Result<(), HypervisorError> {
        let slot = Slot::new(id, mapping)?;
        let mut mapped = self.lock();
        let mut table = Table::clone(&self.current.load());
        table.slots.admits(&slot)?;
        let mut parts = BTreeMap::new();
        if !slot.memory.is_of_device() {
            let plan = region(&slot);
            self.partition.map_gpa(plan, slot.access)?;
            parts.insert(plan.guest, Part { plan, since: self.tick() });
        }
        let generation = Generation(self.generations.fetch_add(1, Ordering::Relaxed));
        mapped.insert(id, Live { generation, parts });
        table.generations.insert(id, generation);
        table.slots.insert(slot)?;
        self.current.store(table.into());
        Ok(())
    }

    /// Removes a slot and everything that is mapped of it.
    ///
    /// Where a call fails, the slot stays, and with it what was not unmapped yet.
    pub(super) fn remove(&self, id: SlotId) -> Result<(), HypervisorError> {
        let mut mapped = self.lock();
        let live = mapped.get_mut(&id).ok_or(HypervisorError::NoSuchSlot { slot: id })?;
        while let Some(part) = live.parts.first_entry() {
            self.unmap(part.get().plan)?;
            part.remove();
        }
        mapped.remove(&id);
        let mut table = Table::clone(&self.current.load());
        table.slots.remove(id)?;
        table.generations.remove(&id);
        self.current.store(table.into());
        // Who comes later sees the new table. Who came earlier has left when this lock is ours.
        drop(self.accesses.write().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Maps what the guest could not access at `frame`, unless it is mapped by now.
    ///
    /// `entered` is a moment before the virtual CPU entered the guest.
    pub(super) fn resolve(
        &self,
        found: &Found,
        frame: GuestFrame,
        entered: Moment,
    ) -> Result<Resolution, HypervisorError> {
        let mut mapped = self.lock();
        let live = mapped.get_mut(&found.slot.id);
        let Some(live) = live.filter(|live| live.generation == found.generation) else {
            return Ok(Resolution::Changed);
        };
        match live.part_with(frame) {
            Some(part) if part.since > entered => Ok(Resolution::Mapped),
            Some(part) => {
                let plan = part.plan;
                self.unmap(plan)?;
                live.parts.remove(&plan.guest);
                Ok(Resolution::Suspended)
            }
            None => {
                let Some(plan) = self.policy.plan(region(&found.slot), frame) else {
                    return Ok(Resolution::Changed);
                };
                match self.partition.map_gpa(plan, found.slot.access) {
                    Ok(()) => {
                        live.parts.insert(plan.guest, Part { plan, since: self.tick() });
                        Ok(Resolution::Mapped)
                    }
                    Err(error) => match error.kind {
                        CallErrorKind::NoBacking => Ok(Resolution::Suspended),
                        CallErrorKind::Interrupted => Ok(Resolution::Changed),
                        _ => Err(error.into()),
                    },
                }
            }
        }
    }

    /// The slots, for accesses that are made here on behalf of the guest. Removing a slot waits until the
    /// view is dropped.
    pub(super) fn view(&self) -> View<'_> {
        let under_way = self.accesses.read().unwrap_or_else(PoisonError::into_inner);
        View { table: self.current.load(), _under_way: under_way }
    }

    /// Like the hypercall, but what is gone already is no error: the host memory took it along.
    fn unmap(&self, plan: MapPlan) -> Result<(), HypervisorError> {
        match self.partition.unmap_gpa(plan) {
            Err(error) if !matches!(error.kind, CallErrorKind::NotMapped) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The moment of a mapping that has just been made.
    fn tick(&self) -> Moment {
        // Release: who sees this moment enters the guest after the hypercall.
        Moment(self.clock.fetch_add(1, Ordering::Release) + 1)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SlotId, Live>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Regions::view`].
pub(super) struct View<'a> {
    // Declared before `_under_way`: the table is let go first.
    table: Guard<Arc<Table>>,
    _under_way: RwLockReadGuard<'a, ()>,
}

impl View<'_> {
    /// The memory at `address`, if there is some that takes the access.
    pub(super) fn ram(&self, address: GuestAddress, write: bool) -> Option<Ram<'_>> {
        let slot = self.table.slots.find(address.0)?;
        let takes = !write || slot.access == SlotAccess::ReadWrite;
        let offset = slot.offset + (address.0 - slot.guest);
        takes.then_some(Ram { memory: &slot.memory, offset })
    }
}

/// All of a slot.
fn region(slot: &Slot) -> MapPlan {
    MapPlan {
        guest: GuestFrame::of(slot.guest),
        host: HostFrame::of(slot.memory.host_address() + slot.offset),
        pages: slot.len / PAGE_SIZE,
    }
}

//! One VM.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::around::Around;
use super::slots::{Place, Region, Slot, Slots};
use super::tables::{Entry, Use};
use crate::device::{BarMapping, Decode, DeviceId};
use crate::status::{Count, FailOpen};
use crate::system::{Answer, System};

/// A VM of KVM, as the VMM sees it and as the kernel has it.
#[derive(Debug)]
pub(super) struct Vm {
    state: Use,
    /// How many keep it alive: 1 as long as the VMM has a descriptor of it, and 1 for each virtual CPU that has one.
    holders: AtomicU32,
    /// Locked across every ioctl that changes slots, so that both sides change together.
    slots: Mutex<Slots>,
    /// Moves whenever slots change.
    changes: AtomicU64,
    /// Whether there has ever been a slot with memory of a BAR.
    bars: AtomicBool,
    /// A range that has all suspended slots in it. It is changed under the lock and read without: its ends
    /// may not belong together, but what is suspended all the time is inside of any mix of them.
    start: AtomicU64,
    end: AtomicU64,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            state: Use::default(),
            holders: AtomicU32::new(0),
            slots: Mutex::default(),
            changes: AtomicU64::new(0),
            bars: AtomicBool::new(false),
            start: AtomicU64::new(u64::MAX),
            end: AtomicU64::new(0),
        }
    }
}

impl Entry for Vm {
    fn state(&self) -> &Use {
        &self.state
    }
}

impl Vm {
    /// Begins anew, for another VM.
    pub(super) fn begin(&self) {
        let mut slots = self.slots();
        *slots = Slots::default();
        self.publish(&slots);
        self.bars.store(false, Ordering::Release);
        self.holders.store(1, Ordering::Release);
    }

    /// One more keeps it alive. Returns false if it is gone.
    pub(super) fn hold(&self) -> bool {
        let more = |holders: u32| (holders > 0).then(|| holders + 1);
        self.holders.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    /// One less does. Returns true to one caller: there is none left.
    pub(super) fn let_go(&self) -> bool {
        let less = |holders: u32| holders.checked_sub(1);
        self.holders.fetch_update(Ordering::AcqRel, Ordering::Acquire, less) == Ok(1)
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    pub(super) fn has_bars(&self) -> bool {
        self.bars.load(Ordering::Acquire)
    }

    pub(super) fn may_have_suspended(&self, guest: u64) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start <= guest && guest < self.end.load(Ordering::Acquire)
    }

    /// The suspended slot that has an address, and the BAR that it is a part of. Costs no lock where there is
    /// none nearby.
    pub(super) fn suspended_at(&self, space: u32, guest: u64) -> Option<(Region, BarMapping)> {
        if !self.may_have_suspended(guest) {
            return None;
        }
        match *self.slots().at(space, guest)? {
            Slot { region, place: Place::Suspended(bar), .. } => Some((region, bar)),
            Slot { place: Place::Installed, .. } => None,
        }
    }

    /// `KVM_SET_USER_MEMORY_REGION` or its second form, with the structure at `argument`. The kernel
    /// answers what it would have answered without us: what it depends on is given back first.
    pub(super) fn set_region<A: Around>(
        &self,
        around: &A,
        number: u32,
        (fd, request, argument): (RawFd, u64, usize),
    ) -> Answer<i32> {
        let forward = || around.system().ioctl(fd, request, argument);
        let mut bytes = [0; Region::SIZE];
        if let Err(error) = around.system().read_memory(argument, &mut bytes) {
            if error != Errno::FAULT {
                around.status().fail_open(FailOpen::MemoryUnreadable);
            }
            return forward();
        }
        let asked = Region::from_bytes(&bytes);
        let mut slots = self.slots();
        if slots.delete_suspended(&asked) {
            self.publish(&slots);
            return Ok(0);
        }
        for waiting in slots.in_the_way(&asked) {
            slots.restore(around.system(), fd, waiting)?;
            around.status().count(Count::SlotsRestored);
            self.publish(&slots);
        }
        let answer = forward()?;
        let _ = around.shielded(|| {
            let bar = asked.is_plain().then(|| around.mapping(asked.host, asked.size)).flatten();
            slots.note(asked);
            if let Some(bar) = bar.filter(|_| asked.size != 0) {
                self.bars.store(true, Ordering::Release);
                around.belongs(bar.device, number);
            }
            self.publish(&slots);
        });
        Ok(answer)
    }

    /// Takes slots from the kernel. Returns how many were there; `None` if the kernel refuses.
    pub(super) fn suspend<A: Around>(
        &self,
        around: &A,
        number: u32,
        wanted: &[(Slot, BarMapping)],
    ) -> Option<usize> {
        if wanted.is_empty() {
            return Some(0);
        }
        // Locked, since the number may be another VM's once this one is closed.
        let mut slots = self.slots();
        let Some(fd) = around.descriptor_of(number) else {
            around.status().fail_open(FailOpen::NoVmDescriptor);
            return None;
        };
        let mut suspended = 0;
        for (slot, bar) in wanted {
            match slots.suspend(around.system(), fd, &slot.region, *bar) {
                Ok(true) => {
                    suspended += 1;
                    around.status().count(Count::SlotsSuspended);
                }
                Ok(false) => {}
                Err(_) => {
                    around.status().fail_open(FailOpen::SlotNotSuspended);
                    self.publish(&slots);
                    return None;
                }
            }
        }
        self.publish(&slots);
        Some(suspended)
    }

    /// Gives a slot back to the kernel, if the VMM has not changed it meanwhile. If the kernel refuses, it stays
    /// suspended.
    pub(super) fn restore<A: Around>(&self, around: &A, number: u32, region: &Region) {
        let mut slots = self.slots();
        if slots.get(region.slot).is_none_or(|slot| slot.region != *region) {
            return;
        }
        let fd = around.descriptor_of(number);
        match fd.map(|fd| slots.restore(around.system(), fd, region.slot)) {
            Some(Ok(restored)) => {
                if restored {
                    around.status().count(Count::SlotsRestored);
                    self.publish(&slots);
                }
            }
            Some(Err(_)) => around.status().fail_open(FailOpen::SlotNotRestored),
            None => around.status().fail_open(FailOpen::NoVmDescriptor),
        }
    }

    /// Gives back what is suspended of a device, as far as it decodes.
    pub(super) fn restore_device<A: Around>(&self, around: &A, number: u32, device: DeviceId) {
        if self.end.load(Ordering::Acquire) == 0 {
            return;
        }
        // Asked without the lock: the answer can take its time.
        let suspended: Vec<(Region, BarMapping)> = self
            .slots()
            .iter()
            .filter_map(|slot| match slot.place {
                Place::Suspended(bar) if bar.device == device => Some((slot.region, bar)),
                _ => None,
            })
            .collect();
        for (region, bar) in suspended {
            if around.decode(bar.device, bar.bar) == Decode::On {
                self.restore(around, number, &region);
            }
        }
    }

    fn publish(&self, slots: &Slots) {
        let (start, end) = slots.suspended();
        self.start.store(start, Ordering::Release);
        self.end.store(end, Ordering::Release);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }
}

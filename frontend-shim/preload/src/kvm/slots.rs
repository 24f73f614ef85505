//! Memory slots: those that the VMM believes in, and which of them the kernel has.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_dirty_log, kvm_userspace_memory_region,
};
use rustix::io::Errno;

use super::abi;
use crate::device::{BarAddress, BarMapping};
use crate::system::{Answer, System};

const PAGE: u64 = 4096;
/// What a slot may be asked for that is only memory of the host.
const KNOWN_FLAGS: u32 = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;

/// A slot as the VMM asks for it. The upper half of its number is its address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) slot: u32,
    pub(super) flags: u32,
    /// Guest-physical address.
    pub(super) guest: u64,
    /// In bytes. 0 deletes.
    pub(super) size: u64,
    /// Host address.
    pub(super) host: u64,
}

/// A slot that the VMM believes to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) region: Region,
    pub(super) place: Place,
    /// Pages may have been written whose log went with the slot.
    pub(super) log_lost: bool,
}

/// Where a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The kernel has it.
    Installed,
    /// Taken from the kernel behind the VMM's back. It is a part of this BAR.
    Suspended(BarMapping),
}

/// The slots of a VM, by number.
#[derive(Debug, Default)]
pub(super) struct Slots(BTreeMap<u32, Slot>);

impl Region {
    pub(super) const SIZE: usize = size_of::<kvm_userspace_memory_region>();

    /// From the beginning of either structure that the kernel takes.
    pub(super) fn from_bytes(bytes: &[u8; Self::SIZE]) -> Region {
        let word = |at: usize| {
            let word: [u8; 8] = std::array::from_fn(|byte| bytes[at + byte]);
            u64::from_le_bytes(word)
        };
        let half = |at: usize| {
            let half: [u8; 4] = std::array::from_fn(|byte| bytes[at + byte]);
            u32::from_le_bytes(half)
        };
        Region { slot: half(0), flags: half(4), guest: word(8), size: word(16), host: word(24) }
    }

    pub(super) fn space(&self) -> u32 {
        self.slot >> 16
    }

    pub(super) fn end(&self) -> u64 {
        self.guest.saturating_add(self.size)
    }

    pub(super) fn contains(&self, guest: u64) -> bool {
        (self.guest..self.end()).contains(&guest)
    }

    pub(super) fn overlaps(&self, other: &Region) -> bool {
        self.space() == other.space() && self.guest < other.end() && other.guest < self.end()
    }

    /// Where in a BAR an address inside of the region is.
    pub(super) fn in_bar(&self, bar: &BarMapping, guest: u64) -> BarAddress {
        let host = self.host.wrapping_add(guest.wrapping_sub(self.guest));
        let offset = bar.offset.wrapping_add(host.wrapping_sub(bar.start as u64));
        BarAddress { device: bar.device, bar: bar.bar, offset }
    }

    /// Whether its memory is in more than the host's mapping: memory of confidential guests, and what
    /// is not known here.
    pub(super) fn is_plain(&self) -> bool {
        self.flags & !KNOWN_FLAGS == 0
    }

    /// A deletion that no kernel refuses if the slot is there.
    fn is_plain_deletion(&self) -> bool {
        let aligned = self.guest.is_multiple_of(PAGE) && self.host.is_multiple_of(PAGE);
        // Half of the address space is the process's.
        self.size == 0 && aligned && self.host >> 47 == 0 && self.is_plain()
    }

    /// Has the kernel make a slot of it, or delete it.
    pub(super) fn set(&self, system: &impl System, vm: RawFd) -> Answer<()> {
        let mut region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: self.flags,
            guest_phys_addr: self.guest,
            memory_size: self.size,
            userspace_addr: self.host,
        };
        let argument = (&raw mut region).expose_provenance();
        system.ioctl(vm, abi::SET_USER_MEMORY_REGION.into(), argument).map(|_| ())
    }
}

impl Slot {
    pub(super) fn is_installed(&self) -> bool {
        self.place == Place::Installed
    }

    pub(super) fn logs(&self) -> bool {
        self.region.flags & KVM_MEM_LOG_DIRTY_PAGES != 0
    }

    fn pages(&self) -> u64 {
        self.region.size / PAGE
    }
}

impl Slots {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.values()
    }

    pub(super) fn get(&self, number: u32) -> Option<&Slot> {
        self.0.get(&number)
    }

    /// The slot that has an address.
    pub(super) fn at(&self, space: u32, guest: u64) -> Option<&Slot> {
        self.iter().find(|slot| slot.region.space() == space && slot.region.contains(guest))
    }

    /// Guest-physical range that has all suspended slots in it.
    pub(super) fn suspended(&self) -> (u64, u64) {
        let suspended = || self.iter().filter(|slot| !slot.is_installed()).map(|slot| slot.region);
        let start = suspended().map(|region| region.guest).min().unwrap_or(u64::MAX);
        (start, suspended().map(|region| region.end()).max().unwrap_or(0))
    }

    /// Whether a deletion is of a suspended slot, which is all that there is to delete.
    pub(super) fn delete_suspended(&mut self, asked: &Region) -> bool {
        let suspended = self.get(asked.slot).is_some_and(|slot| !slot.is_installed());
        suspended && asked.is_plain_deletion() && self.0.remove(&asked.slot).is_some()
    }

    /// The suspended slots on which the kernel's answer to what the VMM asks for depends.
    pub(super) fn in_the_way(&self, asked: &Region) -> Vec<u32> {
        let suspended = self.iter().filter(|slot| !slot.is_installed());
        let depends = |slot: &&Slot| slot.region.slot == asked.slot || slot.region.overlaps(asked);
        suspended.filter(depends).map(|slot| slot.region.slot).collect()
    }

    /// What the kernel has agreed to.
    pub(super) fn note(&mut self, asked: Region) {
        if asked.size == 0 {
            self.0.remove(&asked.slot);
            return;
        }
        // What was lost of a log is of no interest once there is none; otherwise it goes with the slot.
        let lost = self.get(asked.slot).is_some_and(|slot| slot.log_lost);
        let mut slot = Slot { region: asked, place: Place::Installed, log_lost: false };
        slot.log_lost = lost && slot.logs();
        self.0.insert(asked.slot, slot);
    }

    /// Takes a slot from the kernel. Does nothing if it is not there any more.
    pub(super) fn suspend(
        &mut self,
        system: &impl System,
        vm: RawFd,
        region: &Region,
        bar: BarMapping,
    ) -> Answer<bool> {
        let found = self.0.get_mut(&region.slot);
        let Some(slot) = found.filter(|slot| slot.is_installed() && slot.region == *region) else {
            return Ok(false);
        };
        Region { size: 0, flags: 0, ..*region }.set(system, vm)?;
        slot.place = Place::Suspended(bar);
        slot.log_lost |= slot.logs();
        Ok(true)
    }

    /// Gives a slot back to the kernel. Does nothing if it has it.
    pub(super) fn restore(&mut self, system: &impl System, vm: RawFd, number: u32) -> Answer<bool> {
        let found = self.0.get_mut(&number);
        let Some(slot) = found.filter(|slot| !slot.is_installed()) else { return Ok(false) };
        slot.region.set(system, vm)?;
        slot.place = Place::Installed;
        Ok(true)
    }

    /// `KVM_GET_DIRTY_LOG` with the structure at `argument`.
    pub(super) fn dirty_log(
        &mut self,
        system: &impl System,
        vm: RawFd,
        argument: usize,
    ) -> Answer<i32> {
        let answer = system.ioctl(vm, abi::GET_DIRTY_LOG.into(), argument);
        let mut log = [0; size_of::<kvm_dirty_log>()];
        if system.read_memory(argument, &mut log).is_err() {
            return answer;
        }
        let number = u32::from_le_bytes([log[0], log[1], log[2], log[3]]);
        let Some(slot) = self.0.get_mut(&number).filter(|slot| slot.logs()) else { return answer };
        let suspended = !slot.is_installed();
        match answer {
            Ok(_) if slot.log_lost => {}
            // The kernel knows of no log, because it knows of no slot.
            Err(Errno::NOENT) if suspended => {}
            _ => return answer,
        }
        let bitmap: [u8; 8] = std::array::from_fn(|byte| log[8 + byte]);
        let bitmap = usize::try_from(u64::from_le_bytes(bitmap)).map_err(|_| Errno::FAULT)?;
        // Which pages were written before it was suspended is not known any more.
        let fill = if slot.log_lost { u64::MAX } else { 0 };
        write_log(system, bitmap, slot.pages(), fill)?;
        slot.log_lost = false;
        Ok(0)
    }

    /// `KVM_CLEAR_DIRTY_LOG` with the structure at `argument`.
    pub(super) fn clear_dirty_log(
        &self,
        system: &impl System,
        vm: RawFd,
        argument: usize,
    ) -> Answer<i32> {
        let answer = system.ioctl(vm, abi::CLEAR_DIRTY_LOG.into(), argument);
        let mut head = [0; 16];
        if answer != Err(Errno::NOENT) || system.read_memory(argument, &mut head).is_err() {
            return answer;
        }
        let number = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let count = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        let first: [u8; 8] = std::array::from_fn(|byte| head[8 + byte]);
        let first = u64::from_le_bytes(first);
        let suspended = |slot: &&Slot| slot.logs() && !slot.is_installed();
        let Some(slot) = self.get(number).filter(suspended) else { return answer };
        // The log is empty, so that there is nothing to clear but mistakes.
        let Some(left) = slot.pages().checked_sub(first) else { return Err(Errno::INVAL) };
        if count > left || (count < left && !count.is_multiple_of(64)) {
            return Err(Errno::INVAL);
        }
        Ok(0)
    }
}

/// Writes what the kernel copies for `KVM_GET_DIRTY_LOG`: a bit for each page, in words of 64. Behind the
/// last page there is none: a VMM may count on that.
fn write_log(system: &impl System, address: usize, pages: u64, fill: u64) -> Answer<()> {
    let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::FAULT)?;
    let whole = [fill.to_le_bytes(); 512];
    let mut done = 0;
    while done < words {
        let part = (words - done).min(whole.len());
        let at = address.checked_add(done * 8).ok_or(Errno::FAULT)?;
        system.write_memory(at, whole[..part].as_flattened())?;
        done += part;
    }
    let left = pages % 64;
    if left != 0 {
        let at = address.checked_add((words - 1) * 8).ok_or(Errno::FAULT)?;
        system.write_memory(at, &(fill & ((1 << left) - 1)).to_le_bytes())?;
    }
    Ok(())
}

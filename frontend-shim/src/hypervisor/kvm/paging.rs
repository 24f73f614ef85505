//! The guest's page tables as an instruction in 64-bit mode goes through them (AMD64 APM volume 2, 5.3).
//!
//! `KVM_TRANSLATE` tells no permissions, and what is written on the guest's behalf must respect them.

#[cfg(test)]
mod tests;

use kvm_bindings::kvm_sregs;

use crate::hypervisor::slots::SlotTable;
use crate::hypervisor::{GuestAddress, SlotAccess};
use crate::x86::long_mode::{CR0_WP, CR4_LA57, LARGE, PRESENT, WRITABLE};

const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PROTECTION_KEY: u64 = 0xf << 59;
/// Bits 12 to 51.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const RFLAGS_AC: u64 = 1 << 18;

/// How a virtual CPU in 64-bit mode with paging translates.
#[derive(Debug, Clone)]
pub(super) struct Paging {
    root: u64,
    levels: u32,
    /// Privilege level 3.
    user: bool,
    /// Read-only pages bind the kernel too.
    write_protect: bool,
    /// The kernel may not touch user pages now.
    smap: bool,
    protection_keys: bool,
}

impl Paging {
    pub(super) fn new(sregs: &kvm_sregs, rflags: u64) -> Paging {
        Paging {
            root: sregs.cr3 & ADDRESS,
            levels: if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 },
            user: sregs.ss.dpl == 3,
            write_protect: sregs.cr0 & CR0_WP != 0,
            smap: sregs.cr4 & CR4_SMAP != 0 && rflags & RFLAGS_AC == 0,
            protection_keys: sregs.cr4 & CR4_PKE != 0,
        }
    }

    /// Guest-physical address, with Accessed and Dirty bits set as the access does. `None` where the
    /// processor would raise a page fault, or might: for tables outside of RAM and protection keys.
    pub(super) fn walk(&self, slots: &SlotTable, linear: u64, write: bool) -> Option<GuestAddress> {
        let unused = 64 - (12 + 9 * self.levels);
        if (linear << unused).cast_signed() >> unused != linear.cast_signed() {
            return None;
        }
        let (mut table, mut allowed) = (self.root, WRITABLE | USER);
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * level;
            let address = table + (linear >> shift & 0x1ff) * 8;
            let (slot, offset) = slots.locate(address)?;
            if slot.memory.is_of_device() || slot.access == SlotAccess::ReadOnly {
                return None;
            }
            let entry = slot.memory.load_u64(offset).ok()?;
            allowed &= entry;
            let leaf = level == 0 || level <= 2 && entry & LARGE != 0;
            if entry & PRESENT == 0 || leaf && !self.permits(allowed, entry, write) {
                return None;
            }
            let marks = if leaf && write { ACCESSED | DIRTY } else { ACCESSED };
            let marked = entry | marks;
            // Somebody else changed the entry: as if the processor had come a little later.
            if marked != entry
                && slot.memory.compare_exchange(offset, 8, entry, marked).ok()? != entry
            {
                return None;
            }
            if leaf {
                let within = (1 << shift) - 1;
                return Some(GuestAddress(entry & ADDRESS & !within | linear & within));
            }
            table = entry & ADDRESS;
        }
        None
    }

    fn permits(&self, allowed: u64, leaf: u64, write: bool) -> bool {
        let user_page = allowed & USER != 0;
        let may_enter = if self.user { user_page } else { !(user_page && self.smap) };
        let may_write = allowed & WRITABLE != 0 || !self.user && !self.write_protect;
        let keyed = self.protection_keys && user_page && leaf & PROTECTION_KEY != 0;
        may_enter && (may_write || !write) && !keyed
    }
}

//! Identity page tables: 0 to 4 GiB, and a window for 64-bit BARs, in pages of 2 MiB (AMD64 APM volume
//! 2, 5.3.4).
//!
//! All pages are write-back cacheable: whether an address is memory or a register is for the hypervisor
//! to say, and a directly mapped BAR here is memory that the backend shares.

use super::GuestError;
use crate::hypervisor::{GuestAddress, HostMapping};
use crate::x86::long_mode::{LARGE, PRESENT, WRITABLE};

/// Where 64-bit BARs may be.
pub const MMIO_WINDOW: GuestAddress = GuestAddress(64 << 30);
/// Size of the window for 64-bit BARs in bytes.
pub const MMIO_WINDOW_SIZE: u64 = GIB;

const GIB: u64 = 1 << 30;
const LOW_GIBS: u64 = 4;
const LARGE_PAGE: u64 = 2 << 20;
const TABLE_SIZE: u64 = 0x1000;

/// Writes the tables from `root` on: PML4, PDPT, one page directory per mapped GiB.
pub(super) fn install(ram: &HostMapping, root: u64) -> Result<(), GuestError> {
    let pdpt = root + TABLE_SIZE;
    let directories = pdpt + TABLE_SIZE;
    ram.store_u64(root, pdpt | PRESENT | WRITABLE)?;
    let mapped_gibs = (0..LOW_GIBS).chain([MMIO_WINDOW.0 / GIB]);
    for (gib, directory) in mapped_gibs.zip((directories..).step_by(0x1000)) {
        ram.store_u64(pdpt + 8 * gib, directory | PRESENT | WRITABLE)?;
        for page in 0..GIB / LARGE_PAGE {
            let address = gib * GIB + page * LARGE_PAGE;
            ram.store_u64(directory + 8 * page, address | PRESENT | WRITABLE | LARGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does.
    fn translate(ram: &HostMapping, root: u64, address: u64) -> Option<u64> {
        let entry = |table: u64, shift: u32| {
            let entry = ram.load_u64((table & !0xfff) + (address >> shift & 0x1ff) * 8).unwrap();
            (entry & PRESENT != 0).then_some(entry)
        };
        let directory = entry(entry(root, 39)?, 30)?;
        let page = entry(directory, 21)?;
        assert_ne!(page & LARGE, 0, "a 2 MiB page");
        Some((page & !(LARGE_PAGE - 1)) + address % LARGE_PAGE)
    }

    #[test]
    fn exactly_low_memory_and_the_window_are_mapped_one_to_one() {
        let ram = HostMapping::anonymous(0x1_0000).unwrap();
        let root = 0x1000;
        install(&ram, root).unwrap();
        let window = MMIO_WINDOW.0;
        let end = window + MMIO_WINDOW_SIZE;
        for address in
            [0, 0x1234_5678, LARGE_PAGE, 4 * GIB - 1, window, window + 0x20_0003, end - 1]
        {
            assert_eq!(translate(&ram, root, address), Some(address), "{address:#x}");
        }
        for address in [4 * GIB, window - 1, end, 512 * GIB - 1] {
            assert_eq!(translate(&ram, root, address), None, "{address:#x}");
        }
    }
}

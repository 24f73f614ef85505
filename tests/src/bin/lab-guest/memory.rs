//! A page of guest RAM that a device reads and writes.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::mmio::Mapping;
use crate::{Result, ensure};

/// The page size of x86-64.
pub(crate) const PAGE_SIZE: usize = 4096;

/// One locked page.
#[derive(Debug)]
pub(crate) struct DmaPage {
    ram: Mapping,
}

impl DmaPage {
    /// Takes a page of RAM, filled with `filling`.
    ///
    /// # Errors
    /// The kernel gives no locked memory.
    pub(crate) fn filled_with(filling: u8) -> Result<Self> {
        let page = Self { ram: Mapping::of_locked_ram(PAGE_SIZE)? };
        page.store(&[filling; PAGE_SIZE]);
        Ok(page)
    }

    /// Where the page lies in this process, for an IOMMU mapping.
    pub(crate) fn address(&self) -> usize {
        self.ram.address()
    }

    /// The guest-physical address. Locking does not forbid migration, so a caller that hands the
    /// address to a device compares it again afterwards.
    ///
    /// # Errors
    /// `/proc/self/pagemap` hides frame numbers from processes without `CAP_SYS_ADMIN`.
    pub(crate) fn physical_address(&self) -> Result<u64> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let page = u64::try_from(self.address() / PAGE_SIZE)?;
        let mut entry = [0; 8];
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, page * 8)?;
        let entry = u64::from_ne_bytes(entry);
        ensure!(entry & PRESENT != 0, "the locked page is not present: {entry:#x}");
        ensure!(entry & FRAME != 0, "the kernel hides physical addresses");
        Ok((entry & FRAME) * PAGE_SIZE as u64)
    }

    /// Overwrites the start of the page.
    pub(crate) fn store(&self, bytes: &[u8]) {
        for (offset, &byte) in bytes.iter().enumerate() {
            self.ram.write(offset, byte);
        }
    }

    /// What the page holds now.
    pub(crate) fn contents(&self) -> Vec<u8> {
        (0..PAGE_SIZE).map(|offset| self.ram.read(offset)).collect()
    }
}

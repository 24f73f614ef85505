//! Mappings of client memory.
#![expect(unsafe_code, reason = "maps and unmaps files of the client's")]

use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::VolatileSlice;
use vm_memory::mmap::MmapRegion;

/// A shared mapping of a part of a file, unmapped on drop.
///
/// It keeps no descriptor open: a client may announce tens of thousands of windows, far more than a
/// process may have descriptors.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Whole pages of the file.
    pages: MmapRegion,
    /// Where the part starts in them.
    start: usize,
    size: usize,
}

impl Mapping {
    /// Maps `size` bytes from `offset` on, and the rest of their pages: hugetlbfs maps and unmaps
    /// nothing less. `page_size` is the file's, a power of two.
    pub(super) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        size: usize,
        page_size: usize,
        protection: ProtFlags,
    ) -> Result<Self, Errno> {
        let start = usize::try_from(offset).map_err(|_| Errno::OVERFLOW)? & (page_size - 1);
        let offset = offset - start as u64;
        let length =
            start.checked_add(size).and_then(|end| end.checked_next_multiple_of(page_size));
        let length = length.ok_or(Errno::OVERFLOW)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no mapping of ours is replaced.
        let address = unsafe { mmap(ptr::null_mut(), length, protection, flags, file, offset) }?;
        let (raw_protection, raw_flags) = (protection.bits(), flags.bits());
        // SAFETY: the range has just been mapped with these flags, and `drop` alone unmaps it, after
        // which the region is gone too. `build_raw` regions do not unmap themselves.
        let pages = unsafe {
            MmapRegion::build_raw(
                address.cast(),
                length,
                raw_protection.cast_signed(),
                raw_flags.cast_signed(),
            )
        };
        let pages = pages.expect("mmap returns page aligned addresses");
        Ok(Self { pages, start, size })
    }

    /// `len` bytes of the part at `offset`, or `None` if that leaves it. Touching them can raise
    /// SIGBUS, unless every page of the file exists for ever.
    pub(super) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        use vm_memory::VolatileMemory;
        self.pages.get_slice(self.locate(offset, len)?, len).ok()
    }

    /// Their address in this process, under the same condition.
    pub(super) fn address(&self, offset: usize, len: usize) -> Option<usize> {
        Some(self.pages.as_ptr().addr() + self.locate(offset, len)?)
    }

    fn locate(&self, offset: usize, len: usize) -> Option<usize> {
        let end = offset.checked_add(len)?;
        (end <= self.size).then_some(self.start + offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and every slice of it borrowed `self`.
        let result = unsafe { munmap(self.pages.as_ptr().cast(), self.pages.size()) };
        debug_assert_eq!(result, Ok(()), "the range is ours");
    }
}

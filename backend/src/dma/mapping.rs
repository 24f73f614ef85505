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
pub(super) struct Mapping(MmapRegion);

impl Mapping {
    /// Maps `size` bytes from `offset` on; both are page aligned.
    pub(super) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        size: usize,
        protection: ProtFlags,
    ) -> Result<Self, Errno> {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no mapping of ours is replaced.
        let start = unsafe { mmap(ptr::null_mut(), size, protection, flags, file, offset) }?;
        let (raw_protection, raw_flags) = (protection.bits(), flags.bits());
        // SAFETY: the range has just been mapped with these flags, and `drop` alone unmaps it, after
        // which the region is gone too. `build_raw` regions do not unmap themselves.
        let region = unsafe {
            MmapRegion::build_raw(
                start.cast(),
                size,
                raw_protection.cast_signed(),
                raw_flags.cast_signed(),
            )
        };
        Ok(Self(region.expect("mmap returns page aligned addresses")))
    }

    /// The bytes from `start` to `start + len`, or `None` if that leaves the mapping. Touching them
    /// can raise SIGBUS if the file may shrink.
    pub(super) fn slice(&self, start: usize, len: usize) -> Option<VolatileSlice<'_>> {
        use vm_memory::VolatileMemory;
        self.0.get_slice(start, len).ok()
    }

    /// The address of `start` in this process, under the same condition.
    pub(super) fn address(&self, start: usize, len: usize) -> Option<usize> {
        let end = start.checked_add(len)?;
        (end <= self.0.size()).then(|| self.0.as_ptr().addr() + start)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and every slice of it borrowed `self`.
        let result = unsafe { munmap(self.0.as_ptr().cast(), self.0.size()) };
        debug_assert_eq!(result, Ok(()), "the range is ours");
    }
}

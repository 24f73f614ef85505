//! Mappings of client memory.
#![expect(unsafe_code, reason = "maps and unmaps files of the client's")]

use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::MmapRegion;

use super::sigbus::{Guarded, GuardedRange};

/// A shared mapping of a part of a file, unmapped on drop.
///
/// It keeps no descriptor open: a client may announce tens of thousands of windows, far more than a
/// process may have descriptors. Touching it never kills: what the file no longer holds reads as
/// zeros and is [`lost`](Self::lost) from then on.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Dropped before the pages are unmapped: the next mapping at this address is not ours.
    guarded: Guarded,
    /// Whole pages of the file.
    pages: Pages,
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
        let reserved = Guarded::reserve()?;
        let pages = Pages::map(file, offset, length, protection)?;
        let start_address = pages.0.as_ptr().addr();
        let range = GuardedRange { start: start_address, len: length, page_size, protection };
        Ok(Self { guarded: reserved.arm(range), pages, start, size })
    }

    /// `len` bytes of the part at `offset`, or `None` if that leaves it. Writes mark `bitmap`.
    pub(super) fn slice<B: BitmapSlice>(
        &self,
        offset: usize,
        len: usize,
        bitmap: B,
    ) -> Option<VolatileSlice<'_, B>> {
        let offset = self.locate(offset, len)?;
        // SAFETY: `locate` keeps the offset inside of the mapping.
        let address = unsafe { self.pages.0.as_ptr().add(offset) };
        // SAFETY: the range is mapped as long as `self` is borrowed, and this process reaches it
        // through volatile slices only.
        Some(unsafe { VolatileSlice::with_bitmap(address, len, bitmap, None) })
    }

    /// The address of `len` bytes in this process, or `None` if they leave the part.
    pub(super) fn address(&self, offset: usize, len: usize) -> Option<usize> {
        Some(self.pages.0.as_ptr().addr() + self.locate(offset, len)?)
    }

    /// Whether the file did not hold a page of the range when it was touched. That is for ever: what
    /// is at its address since then is no memory of the client's.
    pub(super) fn lost(&self, offset: usize, len: usize) -> bool {
        self.guarded.lost(self.start.saturating_add(offset), len)
    }

    fn locate(&self, offset: usize, len: usize) -> Option<usize> {
        let end = offset.checked_add(len)?;
        (end <= self.size).then_some(self.start + offset)
    }
}

/// Mapped pages of a file.
#[derive(Debug)]
struct Pages(MmapRegion);

impl Pages {
    fn map(
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        protection: ProtFlags,
    ) -> Result<Self, Errno> {
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no mapping of ours is replaced.
        let address = unsafe { mmap(ptr::null_mut(), length, protection, flags, file, offset) }?;
        let (raw_protection, raw_flags) = (protection.bits(), flags.bits());
        // SAFETY: the range has just been mapped with these flags, and `drop` alone unmaps it, after
        // which the region is gone too. `build_raw` regions do not unmap themselves.
        let region = unsafe {
            MmapRegion::build_raw(
                address.cast(),
                length,
                raw_protection.cast_signed(),
                raw_flags.cast_signed(),
            )
        };
        Ok(Self(region.expect("mmap returns page aligned addresses")))
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, and every slice of it borrowed the `Mapping`.
        let result = unsafe { munmap(self.0.as_ptr().cast(), self.0.size()) };
        debug_assert_eq!(result, Ok(()), "the range is ours");
    }
}

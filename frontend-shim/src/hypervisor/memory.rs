//! Host memory that a guest sees: guest RAM and directly mapped BARs.
#![expect(
    unsafe_code,
    reason = "maps memory that a guest and other processes write to, and copies from it"
)]

mod protections;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::{FileType, FsWord, SealFlags, fcntl_get_seals, fstatfs};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

use self::protections::Protections;
use super::PAGE_SIZE;

/// How often a probe that was interrupted is tried again.
const PROBE_ATTEMPTS: u32 = 64;

/// `HUGETLBFS_MAGIC` of `<linux/magic.h>`.
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;
/// [`PAGE_SIZE`] for host addresses.
const PAGE_BYTES: usize = 4096;

/// A shared mapping of host memory, unmapped on drop.
///
/// The guest, other vCPU threads and other processes may change the bytes at any time, so nothing ever
/// borrows them: all access is by copies. A naturally aligned copy of 1, 2, 4 or 8 bytes is a single
/// atomic access; a longer one is made of such accesses and may be torn between them.
///
/// Whoever maps a file vouches that it does not shrink (a memfd sealed with `F_SEAL_SHRINK`): access
/// past a truncated end is a SIGBUS that no check in here can prevent.
#[derive(Debug)]
pub struct HostMapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    of_device: bool,
    /// How the pages may be touched. Held for reading around every access of ours, so that
    /// [`protect`](Self::protect) can't pull the pages away in the middle of one.
    protections: RwLock<Protections>,
}

/// What may be done to pages of a mapping: by the guest that has them in a slot, and by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protection {
    /// Nothing.
    None,
    /// Reading. A write by a guest is a memory fault.
    ReadOnly,
    /// Reading, and writing where the mapping itself is writable.
    ReadWrite,
}

// SAFETY: the mapping belongs to this value alone and may be unmapped by any thread.
unsafe impl Send for HostMapping {}
// SAFETY: all access through `&self` is by atomics, and `protections` orders it against mprotect.
unsafe impl Sync for HostMapping {}

/// Why an access to a [`HostMapping`] did not happen. Nothing was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The range passes the end of the mapping.
    #[error("{len} bytes at offset {offset:#x} pass the end of a mapping of {size:#x} bytes")]
    OutOfBounds {
        /// Offset of the first byte.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// Size of the mapping.
        size: u64,
    },
    /// An atomic access that is not aligned to its size.
    #[error("atomic access of {len} bytes at offset {offset:#x} is not aligned")]
    Misaligned {
        /// Offset of the first byte.
        offset: u64,
        /// Bytes asked for.
        len: usize,
    },
    /// Pages were made inaccessible by [`HostMapping::protect`].
    #[error("the mapping is inaccessible")]
    Inaccessible,
    /// A write to a read-only mapping, or to pages made read-only by [`HostMapping::protect`].
    #[error("the mapping is read-only")]
    ReadOnly,
}

impl HostMapping {
    /// Maps `len` bytes of zeroes, readable and writable.
    ///
    /// # Errors
    /// What mmap says; EINVAL for an empty mapping.
    pub fn anonymous(len: u64) -> io::Result<HostMapping> {
        let len = mapping_len(len)?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: no address is requested, so that no existing mapping can be replaced.
        let base =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, protection(true), flags)? };
        Self::new(base.cast(), len, true)
    }

    /// Maps `len` bytes of `fd` from `offset` on, shared with whoever else maps it.
    ///
    /// # Errors
    /// What fstat and mmap say; EINVAL for an empty mapping or a file that is too short for it.
    pub fn from_fd(
        fd: impl AsFd,
        offset: u64,
        len: u64,
        writable: bool,
    ) -> io::Result<HostMapping> {
        let stat = rustix::fs::fstat(&fd)?;
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        // A device (VFIO region, /dev/mem) has no size of its own; its driver checks the range.
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if is_file && u64::try_from(stat.st_size).is_ok_and(|size| size < end) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "file is shorter than its mapping",
            ));
        }
        let len = mapping_len(len)?;
        // SAFETY: no address is requested, so that no existing mapping can be replaced.
        let base = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                protection(writable),
                MapFlags::SHARED,
                fd,
                offset,
            )?
        };
        Self::new(base.cast(), len, writable)
    }

    fn new(base: *mut u8, len: usize, writable: bool) -> io::Result<HostMapping> {
        let base = NonNull::new(base).ok_or(io::ErrorKind::InvalidData)?;
        let protections = RwLock::new(Protections::whole(Protection::ReadWrite));
        Ok(HostMapping { base, len, writable, of_device: false, protections })
    }

    /// Marks the memory as a device's: reading it may have effects, so that nobody reads it on a guess.
    #[must_use]
    pub fn of_device(mut self) -> HostMapping {
        self.of_device = true;
        self
    }

    /// Whether it is a device's memory: a BAR. Everything else is RAM.
    pub fn is_of_device(&self) -> bool {
        self.of_device
    }

    /// Size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether the mapping was made writable.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Address of the first byte in this process, as hypervisors want it for a slot.
    pub fn host_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Takes all pages away (`PROT_NONE`), or gives them back with all that the mapping allows: what
    /// [`protect`](Self::protect) did to some of them is forgotten.
    ///
    /// # Errors
    /// See [`protect`](Self::protect).
    pub fn set_accessible(&self, accessible: bool) -> io::Result<()> {
        let protection = if accessible { Protection::ReadWrite } else { Protection::None };
        self.protect(0, self.len(), protection)
    }

    /// Changes what may be done to `len` bytes from `offset` on, in whole pages. A mapping whose last page
    /// is not whole ends there all the same.
    ///
    /// Waits for accesses of ours that are under way. Afterwards those that are not allowed fail with
    /// [`AccessError::Inaccessible`] or [`AccessError::ReadOnly`], and a guest that has the memory in a
    /// slot takes a memory fault.
    ///
    /// # Errors
    /// EINVAL for a range that is not whole pages of the mapping, else what mprotect says. After that,
    /// each page allows at least what it allowed both before and after.
    pub fn protect(&self, offset: u64, len: u64, protection: Protection) -> io::Result<()> {
        let range = offset..offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let whole_pages = len.is_multiple_of(PAGE_SIZE) || range.end == self.len();
        let aligned = offset.is_multiple_of(PAGE_SIZE) && whole_pages;
        if !aligned || range.end > self.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let flags = match (protection, self.writable) {
            (Protection::None, _) => MprotectFlags::empty(),
            (Protection::ReadOnly, _) | (Protection::ReadWrite, false) => MprotectFlags::READ,
            (Protection::ReadWrite, true) => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        let mut protections = self.protections.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the range was checked to lie within the mapping.
        let base = unsafe { self.base.add(start) };
        // SAFETY: these pages are our own, and the write lock keeps our accesses out.
        let result = unsafe { rustix::mm::mprotect(base.as_ptr().cast(), len, flags) };
        match result {
            Ok(()) => protections.set(range, protection),
            // It may have changed the first few pages, so that only what both allow is sure.
            Err(_) => protections.lower(range, protection),
        }
        Ok(result?)
    }

    /// What somebody who does not know of our protections does to all pages.
    #[cfg(test)]
    fn protect_unnoticed(&self, flags: MprotectFlags) {
        // SAFETY: the range is exactly our own mapping, and the test accesses it only through the kernel.
        unsafe { rustix::mm::mprotect(self.base.as_ptr().cast(), self.len, flags) }.unwrap();
    }

    /// Whether the memory at `offset` would take an access now, without making one.
    ///
    /// Has the kernel fault the page in as the access would. That changes no byte; it may allocate the
    /// page, read it from its file, or make it dirty. Of a device's memory only what
    /// [`protect`](Self::protect) did to it is known, as a fault could have effects there. Where the
    /// kernel can't be asked (before Linux 5.14) the answer is yes.
    pub fn probe(&self, offset: u64, write: bool) -> bool {
        let direction = if write { Direction::Write } else { Direction::Read };
        // An address within its page, so that whatever the kernel is asked about exists.
        let Ok(pages) = self.access(offset, 1, direction) else {
            return false;
        };
        self.of_device || pages.populate(direction)
    }

    /// Copies from `offset` on.
    ///
    /// # Errors
    /// [`AccessError::OutOfBounds`] and [`AccessError::Inaccessible`].
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let pages = self.access(offset, data.len(), Direction::Read)?;
        let mut at = 0;
        while at < data.len() {
            let width = pages.widest(at, data.len() - at);
            data[at..at + width].copy_from_slice(&pages.load(at, width).to_le_bytes()[..width]);
            at += width;
        }
        Ok(())
    }

    /// Copies to `offset` on.
    ///
    /// # Errors
    /// [`AccessError::OutOfBounds`], [`AccessError::Inaccessible`] and [`AccessError::ReadOnly`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        let pages = self.access(offset, data.len(), Direction::Write)?;
        let mut at = 0;
        while at < data.len() {
            let width = pages.widest(at, data.len() - at);
            let mut value = [0; 8];
            value[..width].copy_from_slice(&data[at..at + width]);
            pages.store(at, width, u64::from_le_bytes(value));
            at += width;
        }
        Ok(())
    }

    /// Loads an aligned u32, with acquire ordering.
    ///
    /// # Errors
    /// All of [`AccessError`] except `ReadOnly`.
    pub fn load_u32(&self, offset: u64) -> Result<u32, AccessError> {
        let value = self.aligned(offset, 4, Direction::Read)?.load(0, 4);
        Ok(u32::try_from(value).expect("a load of 4 bytes fits u32"))
    }

    /// Stores an aligned u32, with release ordering.
    ///
    /// # Errors
    /// All of [`AccessError`].
    pub fn store_u32(&self, offset: u64, value: u32) -> Result<(), AccessError> {
        self.aligned(offset, 4, Direction::Write)?.store(0, 4, value.into());
        Ok(())
    }

    /// Loads an aligned u64, with acquire ordering.
    ///
    /// # Errors
    /// All of [`AccessError`] except `ReadOnly`.
    pub fn load_u64(&self, offset: u64) -> Result<u64, AccessError> {
        Ok(self.aligned(offset, 8, Direction::Read)?.load(0, 8))
    }

    /// Stores an aligned u64, with release ordering.
    ///
    /// # Errors
    /// All of [`AccessError`].
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), AccessError> {
        self.aligned(offset, 8, Direction::Write)?.store(0, 8, value);
        Ok(())
    }

    /// Stores `new` where `current` is found, atomically and sequentially consistent, in an aligned
    /// field of 1, 2, 4 or 8 bytes. Returns what was found.
    ///
    /// # Errors
    /// All of [`AccessError`]; `Misaligned` also for any other width.
    pub fn compare_exchange(
        &self,
        offset: u64,
        width: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, AccessError> {
        Ok(self.aligned(offset, width, Direction::Write)?.compare_exchange(width, current, new))
    }

    fn aligned(
        &self,
        offset: u64,
        width: usize,
        direction: Direction,
    ) -> Result<Pages<'_>, AccessError> {
        let pages = self.access(offset, width, direction)?;
        if pages.widest(0, width) == width {
            Ok(pages)
        } else {
            Err(AccessError::Misaligned { offset, len: width })
        }
    }

    fn access(
        &self,
        offset: u64,
        len: usize,
        direction: Direction,
    ) -> Result<Pages<'_>, AccessError> {
        if matches!(direction, Direction::Write) && !self.writable {
            return Err(AccessError::ReadOnly);
        }
        let start = usize::try_from(offset).ok();
        let start = start
            .filter(|start| start.checked_add(len).is_some_and(|end| end <= self.len))
            .ok_or(AccessError::OutOfBounds { offset, len, size: self.len() })?;
        let protections = self.protections.read().unwrap_or_else(PoisonError::into_inner);
        match (protections.lowest(offset, len as u64), direction) {
            (Protection::None, _) => return Err(AccessError::Inaccessible),
            (Protection::ReadOnly, Direction::Write) => return Err(AccessError::ReadOnly),
            (Protection::ReadOnly, Direction::Read) | (Protection::ReadWrite, _) => {}
        }
        // SAFETY: `start` lies within the mapping or one past its end.
        let base = unsafe { self.base.add(start) };
        Ok(Pages { base, len, _protections: protections })
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly our own mapping, and `&mut self` proves that nobody uses it.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap of a mapping of ours: {result:?}");
    }
}

/// Memory that another process writes and this one only reads, as words that are each looked at once.
#[derive(Debug)]
pub struct ReadOnlyWords {
    memory: HostMapping,
}

impl ReadOnlyWords {
    /// Maps `len` bytes of a memory file from its start, whose length can't shrink any more.
    ///
    /// # Errors
    /// EINVAL if it could shrink, is too short, or is no memory file; else what mmap says.
    pub fn map(file: impl AsFd, len: u64) -> io::Result<ReadOnlyWords> {
        let seals = fcntl_get_seals(&file)?;
        // Pages of hugetlbfs can be punched out all the same, and the pool need not have others then.
        if !seals.contains(SealFlags::SHRINK) || fstatfs(&file)?.f_type == HUGETLBFS_MAGIC {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(ReadOnlyWords { memory: HostMapping::from_fd(file, 0, len, false)? })
    }
}

impl AsRef<[AtomicU64]> for ReadOnlyWords {
    /// For relaxed loads alone: other accesses need not be possible in memory that is mapped so.
    fn as_ref(&self) -> &[AtomicU64] {
        let words = self.memory.len / size_of::<AtomicU64>();
        // SAFETY: the mapping has this length, is aligned to a page and stays until `self` is dropped. It
        // is nobody else's, so that it stays readable, and its file can't shrink. All bit patterns are
        // words, and whoever else accesses them does it in other processes.
        unsafe { slice::from_raw_parts(self.memory.base.as_ptr().cast(), words) }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// A checked range of a mapping whose pages stay accessible while this exists.
struct Pages<'a> {
    base: NonNull<u8>,
    len: usize,
    _protections: RwLockReadGuard<'a, Protections>,
}

impl Pages<'_> {
    /// The widest single access that is aligned at `at` and not longer than `len`.
    fn widest(&self, at: usize, len: usize) -> usize {
        let address = self.base.as_ptr() as usize + at;
        [8, 4, 2]
            .into_iter()
            .find(|width| *width <= len && address.is_multiple_of(*width))
            .unwrap_or(1)
    }

    fn load(&self, at: usize, width: usize) -> u64 {
        let at = self.pointer(at, width);
        match width {
            // SAFETY: `pointer` checked range and alignment; the pages stay mapped and readable.
            1 => unsafe { AtomicU8::from_ptr(at) }.load(Ordering::Acquire).into(),
            // SAFETY: as above.
            2 => unsafe { AtomicU16::from_ptr(at.cast()) }.load(Ordering::Acquire).into(),
            // SAFETY: as above.
            4 => unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Acquire).into(),
            // SAFETY: as above.
            _ => unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Acquire),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "a store of n bytes keeps the low n bytes")]
    fn store(&self, at: usize, width: usize, value: u64) {
        let at = self.pointer(at, width);
        match width {
            // SAFETY: `pointer` checked range and alignment; the pages stay mapped and writable.
            1 => unsafe { AtomicU8::from_ptr(at) }.store(value as u8, Ordering::Release),
            // SAFETY: as above.
            2 => unsafe { AtomicU16::from_ptr(at.cast()) }.store(value as u16, Ordering::Release),
            // SAFETY: as above.
            4 => unsafe { AtomicU32::from_ptr(at.cast()) }.store(value as u32, Ordering::Release),
            // SAFETY: as above.
            _ => unsafe { AtomicU64::from_ptr(at.cast()) }.store(value, Ordering::Release),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "operands of n bytes are their low n bytes"
    )]
    fn compare_exchange(&self, width: usize, current: u64, new: u64) -> u64 {
        const ORDER: Ordering = Ordering::SeqCst;
        let at = self.pointer(0, width);
        match width {
            1 => {
                // SAFETY: `pointer` checked range and alignment; the pages stay mapped and writable.
                let cell = unsafe { AtomicU8::from_ptr(at) };
                cell.compare_exchange(current as u8, new as u8, ORDER, ORDER)
                    .unwrap_or_else(|found| found)
                    .into()
            }
            2 => {
                // SAFETY: as above.
                let cell = unsafe { AtomicU16::from_ptr(at.cast()) };
                cell.compare_exchange(current as u16, new as u16, ORDER, ORDER)
                    .unwrap_or_else(|found| found)
                    .into()
            }
            4 => {
                // SAFETY: as above.
                let cell = unsafe { AtomicU32::from_ptr(at.cast()) };
                cell.compare_exchange(current as u32, new as u32, ORDER, ORDER)
                    .unwrap_or_else(|found| found)
                    .into()
            }
            _ => {
                // SAFETY: as above.
                let cell = unsafe { AtomicU64::from_ptr(at.cast()) };
                cell.compare_exchange(current, new, ORDER, ORDER).unwrap_or_else(|found| found)
            }
        }
    }

    /// Asks the kernel to fault the page of the first byte in; see [`HostMapping::probe`].
    fn populate(&self, direction: Direction) -> bool {
        let advice = match direction {
            Direction::Read => Advice::LinuxPopulateRead,
            Direction::Write => Advice::LinuxPopulateWrite,
        };
        let page = self.base.as_ptr().map_addr(|address| address & !(PAGE_BYTES - 1));
        // A signal or a lack of memory that passes; the bound keeps a storm of them from holding us.
        for _ in 0..PROBE_ATTEMPTS {
            // SAFETY: the page is of our mapping, and populating it changes no byte.
            match unsafe { rustix::mm::madvise(page.cast(), PAGE_BYTES, advice) } {
                Ok(()) => return true,
                Err(Errno::INTR | Errno::AGAIN) => {}
                // Both an advice that the kernel does not know and pages that may not be accessed.
                Err(Errno::INVAL) => {
                    // SAFETY: an empty range asks only whether the advice is known.
                    return unsafe { rustix::mm::madvise(page.cast(), 0, advice) }.is_err();
                }
                // A SIGBUS on access (past the end of its file, say), poisoned, or not to be had.
                Err(_) => return false,
            }
        }
        true
    }

    /// Address of `width` bytes at `at`, for an access of a width that [`widest`](Self::widest) allows.
    fn pointer(&self, at: usize, width: usize) -> *mut u8 {
        assert!(at + width <= self.len, "callers stay within the range that was checked");
        // SAFETY: within the range that was checked against the mapping.
        let pointer = unsafe { self.base.add(at) }.as_ptr();
        assert!((pointer as usize).is_multiple_of(width), "callers take widths from widest()");
        pointer
    }
}

fn protection(writable: bool) -> ProtFlags {
    if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ }
}

fn mapping_len(len: u64) -> io::Result<usize> {
    usize::try_from(len)
        .ok()
        .filter(|len| *len > 0)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

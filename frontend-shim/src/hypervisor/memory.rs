//! Host memory that a guest sees: guest RAM and directly mapped BARs.
#![expect(
    unsafe_code,
    reason = "maps memory that a guest and other processes write to, and copies from it"
)]

use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::FileType;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

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
    /// Whether the pages may be touched. Held for reading around every access of ours, so that
    /// [`set_accessible`](Self::set_accessible) can't pull the pages away in the middle of one.
    accessible: RwLock<bool>,
}

// SAFETY: the mapping belongs to this value alone and may be unmapped by any thread.
unsafe impl Send for HostMapping {}
// SAFETY: all access through `&self` is by atomics, and `accessible` orders it against mprotect.
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
    /// The mapping was made inaccessible by [`HostMapping::set_accessible`].
    #[error("the mapping is inaccessible")]
    Inaccessible,
    /// A write to a read-only mapping.
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
        Ok(HostMapping { base, len, writable, of_device: false, accessible: RwLock::new(true) })
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

    /// Takes the pages away (`PROT_NONE`) or gives them back.
    ///
    /// Waits for accesses of ours that are under way. Afterwards they fail with
    /// [`AccessError::Inaccessible`], and a guest that has the memory in a slot takes a memory fault.
    ///
    /// # Errors
    /// What mprotect says; the state is then unchanged.
    pub fn set_accessible(&self, accessible: bool) -> io::Result<()> {
        let mut state = self.accessible.write().unwrap_or_else(PoisonError::into_inner);
        let flags = match (accessible, self.writable) {
            (false, _) => MprotectFlags::empty(),
            (true, false) => MprotectFlags::READ,
            (true, true) => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: the range is exactly our own mapping, and the write lock keeps our readers out.
        unsafe { rustix::mm::mprotect(self.base.as_ptr().cast(), self.len, flags)? };
        *state = accessible;
        Ok(())
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
        let accessible = self.accessible.read().unwrap_or_else(PoisonError::into_inner);
        if !*accessible {
            return Err(AccessError::Inaccessible);
        }
        // SAFETY: `start` lies within the mapping or one past its end.
        let base = unsafe { self.base.add(start) };
        Ok(Pages { base, len, _accessible: accessible })
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // SAFETY: the range is exactly our own mapping, and `&mut self` proves that nobody uses it.
        let result = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap of a mapping of ours: {result:?}");
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
    _accessible: RwLockReadGuard<'a, bool>,
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use rustix::fs::MemfdFlags;

    use super::*;

    fn memfd(len: u64) -> rustix::fd::OwnedFd {
        let fd = rustix::fs::memfd_create("mapping-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn two_mappings_of_a_file_share_their_bytes() {
        let fd = memfd(0x3000);
        let whole = HostMapping::from_fd(&fd, 0, 0x3000, true).unwrap();
        let tail = HostMapping::from_fd(&fd, 0x1000, 0x2000, false).unwrap();
        whole.write(0x1003, b"seven b").unwrap();
        let mut data = [0; 9];
        tail.read(2, &mut data).unwrap();
        assert_eq!(&data, b"\0seven b\0");
        assert_eq!(tail.write(0, &[1]), Err(AccessError::ReadOnly));
    }

    #[test]
    fn a_file_that_is_too_short_is_not_mapped() {
        let fd = memfd(0x1000);
        for (offset, len) in [(0, 0x2000), (0x1000, 0x1000), (0, 0), (u64::MAX, 2)] {
            assert!(HostMapping::from_fd(&fd, offset, len, true).is_err(), "{offset:#x} {len:#x}");
        }
    }

    #[test]
    fn accesses_past_the_end_copy_nothing() {
        let memory = HostMapping::anonymous(0x1000).unwrap();
        let mut data = [7; 8];
        for offset in [0xff9, 0x1000, u64::MAX, u64::MAX - 7] {
            let expected = Err(AccessError::OutOfBounds { offset, len: 8, size: 0x1000 });
            assert_eq!(memory.read(offset, &mut data), expected);
            assert_eq!(memory.write(offset, &[1; 8]), expected);
            assert_eq!(memory.load_u64(offset).map(|_| ()), expected);
        }
        assert_eq!(data, [7; 8]);
        assert_eq!(memory.load_u64(0xff8), Ok(0));
        assert_eq!(memory.read(0x1000, &mut []), Ok(()));
    }

    #[test]
    fn atomic_accesses_want_alignment() {
        let memory = HostMapping::anonymous(0x1000).unwrap();
        assert_eq!(memory.load_u32(2), Err(AccessError::Misaligned { offset: 2, len: 4 }));
        assert_eq!(memory.store_u64(4, 0), Err(AccessError::Misaligned { offset: 4, len: 8 }));
        memory.store_u32(4, 0xdead_beef).unwrap();
        assert_eq!(memory.compare_exchange(4, 2, 0xbeef, 0x1234), Ok(0xbeef));
        assert_eq!(memory.compare_exchange(4, 4, 0, 1), Ok(0xdead_1234));
        assert_eq!(memory.load_u32(4), Ok(0xdead_1234));
    }

    #[test]
    fn an_inaccessible_mapping_answers_with_an_error_and_keeps_its_bytes() {
        let memory = HostMapping::anonymous(0x1000).unwrap();
        memory.store_u32(0, 42).unwrap();
        memory.set_accessible(false).unwrap();
        assert_eq!(memory.load_u32(0), Err(AccessError::Inaccessible));
        assert_eq!(memory.write(0, &[0]), Err(AccessError::Inaccessible));
        memory.set_accessible(true).unwrap();
        assert_eq!(memory.load_u32(0), Ok(42));
    }

    #[test]
    fn readers_racing_set_accessible_never_fault() {
        let memory = Arc::new(HostMapping::anonymous(0x1000).unwrap());
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (memory, done) = (Arc::clone(&memory), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut data = [0; 256];
                while !done.load(Ordering::Relaxed) {
                    match memory.read(0, &mut data) {
                        Ok(()) | Err(AccessError::Inaccessible) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            })
        };
        for round in 0..2000 {
            memory.set_accessible(round % 2 == 1).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    }
}

//! Memory that somebody else changes: BARs, and RAM that a device reads and writes.
#![expect(unsafe_code, reason = "mapping BARs and volatile access to them have no safe interface")]

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous, munmap};

use crate::Result;

/// A shared mapping, accessed only by volatile loads and stores of the width asked for.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<c_void>,
    len: usize,
}

/// The widths a processor accesses a BAR in. A load or store of one of these is one bus access.
pub(crate) trait Width: Copy {}
impl Width for u8 {}
impl Width for u16 {}
impl Width for u32 {}
impl Width for u64 {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`, readable and writable.
    ///
    /// # Errors
    /// What `mmap` says, for example that the BAR is claimed by a driver.
    pub(crate) fn of_file(file: impl AsFd, offset: u64, len: usize) -> Result<Self> {
        // SAFETY: the kernel chooses the address, so the new mapping overlaps no Rust object.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )?
        };
        Self::new(base, len)
    }

    /// Maps `len` bytes of new RAM and locks them into memory.
    ///
    /// # Errors
    /// What `mmap` and `mlock` say.
    pub(crate) fn of_locked_ram(len: usize) -> Result<Self> {
        // SAFETY: the kernel chooses the address, so the new mapping overlaps no Rust object.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
            )?
        };
        let mapping = Self::new(base, len)?;
        // SAFETY: the range is the mapping just made; locking changes no contents.
        unsafe { mlock(base, len)? };
        Ok(mapping)
    }

    fn new(base: *mut c_void, len: usize) -> Result<Self> {
        let base = NonNull::new(base).ok_or("the kernel mapped at address zero")?;
        Ok(Self { base, len })
    }

    /// The length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where the mapping lies in this process.
    pub(crate) fn address(&self) -> usize {
        self.base.as_ptr().addr()
    }

    /// One load of `T`'s width, `offset` bytes into the mapping.
    ///
    /// # Panics
    /// The access is misaligned or leaves the mapping: a mistake in a check.
    pub(crate) fn read<T: Width>(&self, offset: usize) -> T {
        let place = self.place::<T>(offset);
        // SAFETY: `place` is aligned, inside a live mapping, and any bit pattern is a valid
        // integer (`Width`). Other parties change the memory, hence volatile.
        unsafe { place.read_volatile() }
    }

    /// One store of `T`'s width, `offset` bytes into the mapping.
    ///
    /// # Panics
    /// The access is misaligned or leaves the mapping: a mistake in a check.
    pub(crate) fn write<T: Width>(&self, offset: usize, value: T) {
        let place = self.place::<T>(offset);
        // SAFETY: `place` is aligned and inside a live writable mapping that no Rust reference
        // points into. Other parties read the memory, hence volatile.
        unsafe { place.write_volatile(value) }
    }

    fn place<T: Width>(&self, offset: usize) -> *mut T {
        let end = offset.checked_add(size_of::<T>()).expect("checks use offsets inside a BAR");
        assert!(end <= self.len, "access at {offset:#x} leaves the mapping");
        assert!(offset.is_multiple_of(size_of::<T>()), "access at {offset:#x} is misaligned");
        self.base.as_ptr().wrapping_byte_add(offset).cast()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor and no pointer into it outlives `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr(), self.len) };
        unmapped.expect("the range is a mapping of ours");
    }
}

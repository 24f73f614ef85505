//! The mapping of a state file, and the only stores to it.
#![expect(unsafe_code, reason = "memory that outlives the process is mapped by hand")]

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, munmap};

use super::crash::{crash_point, torn};

/// A state file, mapped whole. What decides is words of 64 bits, which are stored at once; bytes in
/// bulk are stored where nobody reads them until a word says so.
///
/// Whoever is killed has executed all instructions up to some point and none behind it, so the order
/// of stores is the order of the program, as far as the compiler leaves it alone: hence the fences.
#[derive(Debug)]
pub(super) struct Memory {
    address: NonNull<AtomicU64>,
    words: usize,
}

/// Bytes in a word.
pub(super) const WORD: usize = size_of::<AtomicU64>();

// SAFETY: words are accessed by atomics. Bytes are copied by whoever has the journal, which is not
// shared between threads; the mapping is the same for every thread.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps the first bytes of a file that has so many and does not lose them: one that is sealed
    /// against shrinking, or that nobody else has.
    pub(super) fn map(file: impl AsFd, size: usize) -> io::Result<Self> {
        let words = NonZeroUsize::new(size / WORD).ok_or(Errno::INVAL)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so nothing that is mapped already is replaced.
        let address =
            unsafe { mmap(ptr::null_mut(), size, protection, MapFlags::SHARED, file.as_fd(), 0)? };
        let address = NonNull::new(address.cast()).expect("the kernel maps nothing at 0");
        Ok(Self { address, words: words.get() })
    }

    /// All of it.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has this length and stays until `self` is dropped, it is aligned to a
        // page, and other processes access it as memory whose every bit pattern is a word.
        unsafe { slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.words * WORD
    }

    pub(super) fn get(&self, word: usize) -> u64 {
        self.words()[word].load(Ordering::Acquire)
    }

    /// Everything that was stored before is there when this is, and nothing that is stored after it
    /// is there before.
    pub(super) fn set(&self, word: usize, value: u64) {
        crash_point();
        compiler_fence(Ordering::SeqCst);
        self.words()[word].store(value, Ordering::Release);
        compiler_fence(Ordering::SeqCst);
    }

    /// Copies bytes out: of memory that may hold anything, so that what is checked does not change
    /// any more.
    pub(super) fn read(&self, at: usize, bytes: &mut [u8]) {
        let from = self.place(at..at + bytes.len());
        // SAFETY: `place` has checked the range; the destination is ours, so they don't overlap. Nobody
        // writes these bytes: this process has one journal, and its predecessor is dead.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies bytes in, in no particular order: to where nobody looks yet.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        let to = self.place(at..at + bytes.len());
        crash_point();
        compiler_fence(Ordering::SeqCst);
        let first = torn(bytes.len());
        // SAFETY: `place` has checked the range; the source is ours, so they don't overlap. Nobody reads
        // or writes these bytes meanwhile, as in `read`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, first) }
        if first < bytes.len() {
            crash_point();
            let rest = &bytes[first..];
            // SAFETY: `first` is less than the length that `place` has checked.
            let to = unsafe { to.add(first) };
            // SAFETY: as for the first part.
            unsafe { ptr::copy_nonoverlapping(rest.as_ptr(), to, rest.len()) }
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// Where bytes are, for the kernel. Valid as long as this mapping.
    ///
    /// # Panics
    /// If there are no such bytes.
    pub(super) fn place(&self, bytes: Range<usize>) -> *mut u8 {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len(), "{bytes:?} of {}", self.len());
        // SAFETY: the start is inside the mapping, or at its end.
        unsafe { self.address.as_ptr().cast::<u8>().add(bytes.start) }
    }

    /// Keeps bytes in memory, if this process may: a store of the kernel's to a page that is not there
    /// could fail while the process is being killed.
    pub(super) fn pin(&self, bytes: Range<usize>) {
        let length = bytes.len();
        // SAFETY: it changes nothing about what the memory holds, and ends with the mapping.
        let _ = unsafe { mlock(self.place(bytes).cast(), length) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and nobody borrows it any more.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.len()) };
    }
}

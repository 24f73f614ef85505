//! The mapping of a state file, and the only stores to it.
#![expect(unsafe_code, reason = "memory that outlives the process is mapped by hand")]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A state file, mapped whole. It is only ever used as words of 64 bits, which are stored at once.
#[derive(Debug)]
pub(super) struct Memory {
    address: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: all access is through atomics, and the mapping is the same for every thread.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps a file of a fixed length: one that is sealed against shrinking, or that nobody else has.
    pub(super) fn map(file: impl AsFd) -> io::Result<Self> {
        let size = usize::try_from(fstat(&file)?.st_size).map_err(|_| Errno::OVERFLOW)?;
        let words = NonZeroUsize::new(size / size_of::<AtomicU64>()).ok_or(Errno::INVAL)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so nothing that is mapped already is replaced.
        let address =
            unsafe { mmap(ptr::null_mut(), size, protection, MapFlags::SHARED, file.as_fd(), 0)? };
        let address = NonNull::new(address.cast()).expect("the kernel maps nothing at 0");
        Ok(Self { address, words: words.get() })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has this length and stays until `self` is dropped, it is aligned to a
        // page, and other processes access it as memory whose every bit pattern is a word.
        unsafe { slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }

    pub(super) fn get(&self, word: usize) -> u64 {
        self.words()[word].load(Ordering::Acquire)
    }

    /// Everything that was stored before is there when this is.
    pub(super) fn set(&self, word: usize, value: u64) {
        self.words()[word].store(value, Ordering::Release);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let size = self.words * size_of::<AtomicU64>();
        // SAFETY: this is the mapping that `map` made, and nobody borrows it any more.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), size) };
    }
}

#![expect(unsafe_code, reason = "calls the kernel for what the VMM asked for")]

use std::ffi::c_long;
use std::os::fd::RawFd;

use rustix::io::Errno;

use super::{Answer, Mmap, Mremap, System};

/// The kernel itself, for as long as the functions underneath can't be looked up: only what an
/// allocator needs to begin.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel;

impl System for Kernel {
    fn mmap(&self, request: Mmap) -> Answer<usize> {
        let Mmap { address, len, protection, flags, fd, offset } = request;
        // SAFETY: the caller asks for it, and vouches for what it maps over.
        let answer =
            unsafe { libc::syscall(libc::SYS_mmap, address, len, protection, flags, fd, offset) };
        placed(answer)
    }

    fn munmap(&self, address: usize, len: usize) -> Answer<()> {
        // SAFETY: the caller asks for it, and vouches that nothing uses the memory.
        let answer = unsafe { libc::syscall(libc::SYS_munmap, address, len) };
        checked(answer).map(drop)
    }

    fn mremap(&self, request: Mremap) -> Answer<usize> {
        let Mremap { address, len, new_len, flags, new_address } = request;
        // SAFETY: the caller asks for it, and vouches for what it moves and maps over.
        let answer =
            unsafe { libc::syscall(libc::SYS_mremap, address, len, new_len, flags, new_address) };
        placed(answer)
    }

    fn close(&self, fd: RawFd) -> Answer<()> {
        // SAFETY: the caller asks for it, and vouches that nothing of its own uses the descriptor.
        let answer = unsafe { libc::syscall(libc::SYS_close, fd) };
        checked(answer).map(drop)
    }
}

fn placed(answer: c_long) -> Answer<usize> {
    // As wide as an address, and no number.
    checked(answer).map(|address| usize::from_ne_bytes(address.to_ne_bytes()))
}

fn checked(answer: c_long) -> Answer<c_long> {
    if answer != -1 {
        return Ok(answer);
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

//! What lies underneath: the next definition of each function that is interposed.

#[cfg(not(test))]
mod kernel;
#[cfg(not(test))]
mod real;
#[cfg(not(test))]
mod real_sockets;
mod signals;
mod sockets;

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;

use crate::sigbus::{Action, Change};

#[cfg(not(test))]
pub(crate) use kernel::Kernel;
#[cfg(not(test))]
pub(crate) use real::Real;
pub(crate) use signals::SignalFunctions;
pub(crate) use signals::to_set;
#[cfg(not(test))]
pub(crate) use signals::{Start, from_c, from_set, to_c};
pub(crate) use sockets::{Extent, PageWords, SocketMessage, SocketReceived};

/// A result as the C library gives it.
pub(crate) type Answer<T> = Result<T, Errno>;

/// What `mmap` is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mmap {
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) protection: i32,
    pub(crate) flags: i32,
    pub(crate) fd: RawFd,
    pub(crate) offset: i64,
}

/// What `mremap` is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mremap {
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) new_len: usize,
    pub(crate) flags: i32,
    /// Counts only if the flags say so.
    pub(crate) new_address: usize,
}

/// One of the ways to get a descriptor for what another one refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duplicate {
    /// `dup`.
    Lowest,
    /// `dup2` to a number.
    Over(RawFd),
    /// `dup3` to a number, with flags.
    OverWith(RawFd, i32),
    /// `fcntl` with one of the commands `F_DUPFD*`, and its argument.
    Command(i32, usize),
}

/// The functions underneath. Tests implement those that they need.
///
/// Arguments go through as the VMM gave them: addresses are plain numbers, which the kernel checks.
pub(crate) trait System: Send + Sync + 'static {
    fn ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        let _ = (fd, request, argument);
        Err(Errno::NOSYS)
    }

    /// `ioctl` with a structure of ours, as its bytes, which the kernel may change.
    fn ask(&self, fd: RawFd, request: u64, argument: &mut [u8]) -> Answer<i32> {
        let _ = (fd, request, argument);
        Err(Errno::NOSYS)
    }

    /// `pread64`. Safe in a signal handler.
    fn pread(&self, fd: RawFd, data: &mut [u8], offset: u64) -> Answer<usize> {
        let _ = (fd, data, offset);
        Err(Errno::NOSYS)
    }

    fn mmap(&self, request: Mmap) -> Answer<usize> {
        let _ = request;
        Err(Errno::NOSYS)
    }

    fn munmap(&self, address: usize, len: usize) -> Answer<()> {
        let _ = (address, len);
        Err(Errno::NOSYS)
    }

    fn mremap(&self, request: Mremap) -> Answer<usize> {
        let _ = request;
        Err(Errno::NOSYS)
    }

    fn close(&self, fd: RawFd) -> Answer<()> {
        let _ = fd;
        Err(Errno::NOSYS)
    }

    fn close_range(&self, first: u32, last: u32, flags: i32) -> Answer<()> {
        let _ = (first, last, flags);
        Err(Errno::NOSYS)
    }

    fn duplicate(&self, fd: RawFd, how: Duplicate) -> Answer<RawFd> {
        let _ = (fd, how);
        Err(Errno::NOSYS)
    }

    /// This process's id, from the kernel.
    fn process(&self) -> u32 {
        0
    }

    /// Copies from memory of this process, whoever it belongs to. An address that can't be read is an
    /// error and no signal.
    fn read_memory(&self, address: usize, data: &mut [u8]) -> Answer<()> {
        let _ = (address, data);
        Err(Errno::FAULT)
    }

    /// Copies to memory of this process, likewise.
    fn write_memory(&self, address: usize, data: &[u8]) -> Answer<()> {
        let _ = (address, data);
        Err(Errno::FAULT)
    }

    /// What `/proc/self/fd` says a descriptor is, such as `anon_inode:kvm-vm`.
    fn link(&self, fd: RawFd) -> Answer<Vec<u8>> {
        let _ = fd;
        Err(Errno::NOSYS)
    }

    /// Device and inode number of what a descriptor refers to.
    fn identity(&self, fd: RawFd) -> Answer<(u64, u64)> {
        let _ = fd;
        Err(Errno::NOSYS)
    }

    /// `sigaction`. Returns what was before. Safe in a signal handler.
    fn signal_action(&self, signal: i32, new: Option<Action>) -> Answer<Action> {
        let _ = (signal, new);
        Err(Errno::NOSYS)
    }

    /// `pthread_sigmask`. Returns the mask before. Safe in a signal handler.
    fn signal_mask(&self, change: Option<Change>) -> Answer<u64> {
        let _ = change;
        Err(Errno::NOSYS)
    }

    /// `sigpending`. Safe in a signal handler.
    fn signals_pending(&self) -> Answer<u64> {
        Err(Errno::NOSYS)
    }

    /// A descriptor of our own for what a descriptor of the VMM's refers to.
    fn keep(&self, fd: RawFd) -> Answer<OwnedFd> {
        let _ = fd;
        Err(Errno::NOSYS)
    }

    /// Closes a descriptor of our own, in a child of which the threads that used it are not part.
    fn close_own(&self, number: RawFd) {
        let _ = number;
    }

    /// `sendmsg` with the VMM's own data.
    fn sendmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<usize> {
        let _ = (fd, message, flags);
        Err(Errno::NOSYS)
    }

    /// `recvmsg` into the VMM's own memory.
    fn recvmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<SocketReceived> {
        let _ = (fd, message, flags);
        Err(Errno::NOSYS)
    }

    /// A page of memory for the rest of the process's life, at a place of its own or instead of the one
    /// at `over`: a file's first, which can't shrink, or zeros.
    fn page(&self, file: Option<BorrowedFd<'_>>, over: Option<PageWords>) -> Answer<PageWords> {
        let _ = (file, over);
        Err(Errno::NOSYS)
    }
}

//! What lies underneath: the next definition of each function that is interposed.

#[cfg(not(test))]
mod real;

use std::os::fd::RawFd;

use rustix::io::Errno;

#[cfg(not(test))]
pub(crate) use real::Real;

/// A result as the C library gives it.
pub(crate) type Answer<T> = Result<T, Errno>;

/// The functions underneath. Tests implement those that they need.
///
/// Arguments go through as the VMM gave them: addresses are plain numbers, which the kernel checks.
pub(crate) trait System: Send + Sync + 'static {
    fn ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        let _ = (fd, request, argument);
        Err(Errno::NOSYS)
    }

    /// `pread64`. Safe in a signal handler.
    fn pread(&self, fd: RawFd, data: &mut [u8], offset: u64) -> Answer<usize> {
        let _ = (fd, data, offset);
        Err(Errno::NOSYS)
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
}

//! Descriptors that somebody has left open for this process, by their numbers.
#![expect(unsafe_code, reason = "an inherited descriptor is a number, and nobody owns it yet")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

/// The first that can be inherited: standard input and outputs are something else.
const FIRST: RawFd = 3;

/// Takes a descriptor that the environment says is ours. Programs that this process starts won't
/// inherit it.
///
/// # Errors
/// `EBADF` when nothing was left open under this number, or it has been taken before.
pub(super) fn take(number: RawFd) -> Result<OwnedFd, Errno> {
    if number < FIRST {
        return Err(Errno::BADF);
    }
    // SAFETY: it is not -1, it is used for these calls alone, and if it isn't open the kernel says so.
    let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(descriptor)?;
    // All that this program opens is closed in programs that it starts, from the start on. What isn't
    // has come from outside, and so it has no owner in here.
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(Errno::BADF);
    }
    fcntl_setfd(descriptor, flags | FdFlags::CLOEXEC)?;
    // SAFETY: it is open and has no owner, as was just seen. It can't get a second one here, since it
    // is marked as ours now.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Leaves a descriptor open for the program that this process is about to become, or takes that back.
///
/// # Errors
/// The kernel's.
pub(super) fn leave_open(descriptor: BorrowedFd<'_>, open: bool) -> Result<(), Errno> {
    let mut flags = fcntl_getfd(descriptor)?;
    flags.set(FdFlags::CLOEXEC, !open);
    fcntl_setfd(descriptor, flags)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_what_was_left_open_is_taken_and_only_once() {
        let (ours, _other) = UnixStream::pair().unwrap();
        assert_eq!(take(ours.as_raw_fd()).err(), Some(Errno::BADF));
        leave_open(ours.as_fd(), true).unwrap();
        // From here on it belongs to nobody, as after an exec.
        let number = ours.into_raw_fd();
        let taken = take(number).unwrap();
        assert_eq!(take(number).err(), Some(Errno::BADF));
        assert!(fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        for number in [-1, 0, 2, i32::MAX] {
            assert_eq!(take(number).err(), Some(Errno::BADF), "{number}");
        }
    }
}

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat, readlink};

use rustix::io::Errno;

use super::{IrqError, signaller};

/// An eventfd to signal: the client's, or one of our own that a client may get.
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
    /// Never the same twice, unlike the descriptor's number.
    identity: u64,
}

impl EventFd {
    /// Takes the descriptor over.
    ///
    /// # Errors
    /// [`IrqError::NotEventfd`] for any other kind of descriptor.
    pub fn new(fd: OwnedFd) -> Result<Self, IrqError> {
        // Anonymous inodes have no type bits.
        let mode = fstat(&fd).map_err(|_| IrqError::NotEventfd)?.st_mode;
        if mode & 0o170_000 != 0 || !is_called_eventfd(&fd) {
            return Err(IrqError::NotEventfd);
        }
        let flags = fcntl_getfl(&fd).map_err(|_| IrqError::NotEventfd)?;
        if signaller::writes() {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|_| IrqError::NotEventfd)?;
        }
        Ok(Self::of(fd))
    }

    /// A new eventfd of our own.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub fn create() -> Result<Self, Errno> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Self::of)
    }

    fn of(fd: OwnedFd) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { fd, identity: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    /// Adds one to the counter. A full counter is as good as a signalled one, so nothing can fail,
    /// and nothing blocks whatever the client does with its descriptor.
    pub fn signal(&self) {
        signaller::signal(self.fd.as_fd(), self.identity);
    }
}

/// For a kernel that signals it in our place, and for an event loop.
impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What kind of anonymous inode it is, only /proc tells. Without one it is taken as what it was sent
/// for: signalling anything else does nothing.
fn is_called_eventfd(fd: &OwnedFd) -> bool {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    readlink(path, Vec::new()).map_or(true, |name| name.to_bytes() == b"anon_inode:[eventfd]")
}

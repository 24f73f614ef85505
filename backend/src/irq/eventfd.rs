use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat};

use super::{IrqError, signaller};

/// An eventfd that the client gave us to signal.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes the descriptor over.
    ///
    /// # Errors
    /// [`IrqError::NotEventfd`] for any other kind of descriptor.
    pub fn new(fd: OwnedFd) -> Result<Self, IrqError> {
        // Anonymous inodes have no type bits. Of those, the kernel itself signals only eventfds.
        let mode = fstat(&fd).map_err(|_| IrqError::NotEventfd)?.st_mode;
        if mode & 0o170_000 != 0 {
            return Err(IrqError::NotEventfd);
        }
        let flags = fcntl_getfl(&fd).map_err(|_| IrqError::NotEventfd)?;
        if signaller::writes() {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|_| IrqError::NotEventfd)?;
        }
        Ok(Self(fd))
    }

    /// Adds one to the counter. A full counter is as good as a signalled one, so nothing can fail,
    /// and nothing blocks whatever the client does with its descriptor.
    pub fn signal(&self) {
        signaller::signal(self.0.as_fd());
    }
}

/// For a kernel that signals it in our place.
impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat};

use super::IrqError;

/// An eventfd that the client gave us to signal.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes the descriptor over.
    ///
    /// It is made non-blocking: a client could fill the counter and stop this process in the write
    /// otherwise, and with it every other function that it serves.
    ///
    /// # Errors
    /// [`IrqError::NotEventfd`] for any other kind of descriptor. A write to a file of the client's
    /// choosing could block for ever whatever its flags are.
    pub fn new(fd: OwnedFd) -> Result<Self, IrqError> {
        // Anonymous inodes have no type bits. Of those, only an eventfd takes 8 byte writes.
        let mode = fstat(&fd).map_err(|_| IrqError::NotEventfd)?.st_mode;
        if mode & 0o170_000 != 0 {
            return Err(IrqError::NotEventfd);
        }
        let flags = fcntl_getfl(&fd).map_err(|_| IrqError::NotEventfd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|_| IrqError::NotEventfd)?;
        Ok(Self(fd))
    }

    /// Adds one to the counter. A full counter is as good as a signalled one, so nothing can fail.
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::fstat;

use crate::system::Answer;

/// A descriptor of our own for a connection, so that it is this connection whatever the VMM does with its
/// descriptors. A VMM may close numbers that are not its own all the same, and use them for something else.
#[derive(Debug)]
pub(super) struct Socket {
    /// `None` in the drop only.
    file: Option<OwnedFd>,
    /// Device and inode number.
    identity: (u64, u64),
}

impl Socket {
    /// # Errors
    /// Those of `fstat`.
    pub(super) fn new(file: OwnedFd) -> Answer<Self> {
        let stat = fstat(&file)?;
        Ok(Self { file: Some(file), identity: (stat.st_dev, stat.st_ino) })
    }

    /// Whether the VMM has let the descriptor be.
    pub(super) fn is_itself(&self) -> bool {
        fstat(self).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity)
    }

    /// As if the VMM had done it.
    #[cfg(test)]
    pub(super) fn replace(&mut self, other: impl AsFd) {
        let file = self.file.as_mut().unwrap();
        rustix::io::dup3(other, file, rustix::io::DupFlags::CLOEXEC).unwrap();
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_ref().expect("the descriptor is here until the drop").as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.is_itself() {
            // Somebody else's by now, or nobody's.
            std::mem::forget(self.file.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_number_that_somebody_else_uses_is_not_closed() {
        let (ours, _) = UnixStream::pair().unwrap();
        let (theirs, mut other_end) = UnixStream::pair().unwrap();
        other_end.set_nonblocking(true).unwrap();
        let mut socket = Socket::new(ours.into()).unwrap();
        assert!(socket.is_itself());
        socket.replace(&theirs);
        assert!(!socket.is_itself());
        drop(theirs);
        drop(socket);
        assert!(other_end.read(&mut [0]).is_err(), "not its end");
    }

    #[test]
    fn a_number_that_is_ours_is_closed() {
        let (ours, mut other_end) = UnixStream::pair().unwrap();
        other_end.set_nonblocking(true).unwrap();
        drop(Socket::new(ours.into()).unwrap());
        assert_eq!(other_end.read(&mut [0]).unwrap(), 0);
    }
}

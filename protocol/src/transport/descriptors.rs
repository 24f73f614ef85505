use std::os::fd::OwnedFd;

use crate::wire::limits::MAX_MESSAGE_FDS;

/// The file descriptors that have arrived for one message.
///
/// There are never more of them than a message may have: one too many closes them all, and those
/// that follow, so that a peer can't make this side hoard them.
#[derive(Debug, Default)]
pub(super) struct Descriptors {
    held: Vec<OwnedFd>,
    too_many: bool,
}

/// More descriptors than a message may have; they are closed.
#[derive(Debug)]
pub(super) struct TooMany;

impl Descriptors {
    pub(super) fn add(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.held.extend(fds);
        if self.held.len() > MAX_MESSAGE_FDS || self.too_many {
            self.refuse();
        }
    }

    /// The kernel has dropped some on the way.
    pub(super) fn refuse(&mut self) {
        self.held.clear();
        self.too_many = true;
    }

    /// Takes those that turned out to be for the same message.
    pub(super) fn absorb(&mut self, others: &mut Self) {
        if others.too_many {
            self.refuse();
        }
        self.add(others.held.drain(..));
        others.too_many = false;
    }

    /// Gives them out; what arrives from here on is for another message.
    pub(super) fn take(&mut self) -> Result<Vec<OwnedFd>, TooMany> {
        let held = std::mem::take(&mut self.held);
        if std::mem::take(&mut self.too_many) { Err(TooMany) } else { Ok(held) }
    }
}

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use barkeep_protocol::transport::{Flush, Receiver, Sender, TransportError};

use super::event_loop::{Epoll, Interest, Token};

/// Bytes of replies that may wait for a client that does not read; beyond, its requests are not read
/// either.
const MAX_QUEUED: usize = 4 << 20;
/// The same for descriptors, of which a process has far fewer.
const MAX_QUEUED_FDS: usize = 8;

/// One socket of a client, with both directions.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) socket: OwnedFd,
    pub(super) receiver: Receiver,
    pub(super) sender: Sender,
    /// What the event loop watches it for, once it has it.
    watched: Option<Interest>,
}

impl Channel {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, receiver: Receiver::default(), sender: Sender::default(), watched: None }
    }

    /// Tells the event loop what is waited for, if it does not know that.
    pub(super) fn watch(&mut self, epoll: &Epoll, token: Token) -> io::Result<()> {
        let interest = match (self.sender.queued_bytes(), self.holds_too_much()) {
            (0, _) => Interest::Read,
            (_, false) => Interest::ReadWrite,
            (_, true) => Interest::Write,
        };
        match self.watched.replace(interest) {
            None => epoll.add(self.socket.as_fd(), token, interest),
            Some(before) if before == interest => Ok(()),
            Some(_) => epoll.modify(self.socket.as_fd(), token, interest),
        }
    }

    /// Takes it from the event loop, if that has it.
    pub(super) fn forget(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.watched.take().map_or(Ok(()), |_| epoll.remove(self.socket.as_fd()))
    }

    /// Hands over what the socket takes.
    pub(super) fn flush(&mut self) -> Result<Flush, TransportError> {
        self.sender.flush(&self.socket)
    }

    /// Whether the client is to read before it is read from.
    pub(super) fn holds_too_much(&self) -> bool {
        self.sender.queued_bytes() > MAX_QUEUED || self.sender.queued_fds() > MAX_QUEUED_FDS
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use barkeep_protocol::transport::{Flush, Message, Received, Receiver, Sender};
use barkeep_protocol::wire::MessageKind;
use rustix::event::PollFlags;
use rustix::net::{Shutdown, shutdown};

use super::ClientError;
use super::connection::{answer, wait_for};
use super::dma::DmaService;

/// The server's own socket for its commands ("twin_socket").
///
/// Its other end is a stranger's, who may have kept a duplicate of this one: a wait in here ends at
/// the latest when the socket is shut down.
#[derive(Debug)]
pub(super) struct Twin {
    socket: OwnedFd,
}

/// What is under way on it.
#[derive(Debug, Default)]
pub(super) struct TwinStream {
    receiver: Receiver,
    sender: Sender,
    /// The server has closed it: there will be no more commands.
    closed: bool,
}

impl Twin {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(super) fn shut_down(&self) {
        // It may be gone already, which is as good.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Reads once and serves what is complete.
    pub(super) fn serve(
        &self,
        stream: &mut TwinStream,
        service: &DmaService,
        deadline: Duration,
    ) -> Result<(), ClientError> {
        // All that one read brings: nobody would look for what stays in the buffer.
        let TwinStream { receiver, sender, closed } = stream;
        let mut reads = 1;
        loop {
            let (header, body) = match receiver.receive_within(&self.socket, reads)? {
                Received::Message(Message { header, body, .. }) => (header, body),
                Received::Refused(..) => return Err(ClientError::Protocol("oversized command")),
                Received::Pending => return Ok(()),
                Received::Closed => {
                    *closed = true;
                    return Ok(());
                }
            };
            reads = 0;
            let MessageKind::Command { no_reply } = header.kind else {
                return Err(ClientError::Protocol("reply on the socket for commands"));
            };
            let result = service.serve(&header, body);
            if !no_reply {
                answer(sender, &header, result);
                self.flush(sender, deadline)?;
            }
        }
    }

    fn flush(&self, sender: &mut Sender, deadline: Duration) -> Result<(), ClientError> {
        let expires = Instant::now() + deadline;
        while sender.flush(&self.socket)? == Flush::Blocked {
            let left = expires.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Deadline(deadline));
            }
            wait_for(self.socket.as_fd(), PollFlags::OUT, left)?;
        }
        Ok(())
    }
}

impl TwinStream {
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }
}

impl AsFd for Twin {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

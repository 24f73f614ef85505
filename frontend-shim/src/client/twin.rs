use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use barkeep_protocol::transport::{Flush, Message, Received, Receiver, Sender};
use barkeep_protocol::wire::MessageKind;
use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{AddressFamily, Shutdown, SocketType, shutdown};

use super::ClientError;
use super::connection::{answer, poll_all};
use super::dma::DmaService;

/// The server's own socket for its commands ("twin_socket").
///
/// Its other end is a stranger's, who may have kept a duplicate of this one: nothing waits in a read or
/// a write of it, whatever poll said before.
#[derive(Debug)]
pub(super) struct Twin {
    socket: OwnedFd,
}

/// What is under way on it.
#[derive(Debug)]
pub(super) struct TwinStream {
    receiver: Receiver,
    sender: Sender,
    /// The server has closed it: there will be no more commands.
    closed: bool,
}

impl Twin {
    /// `None` for anything else than a UNIX stream socket. Others may not know how to be shut down.
    pub(super) fn new(socket: OwnedFd) -> Option<Self> {
        let is_ours = socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && socket_type(&socket) == Ok(SocketType::STREAM);
        is_ours.then_some(Self { socket })
    }

    pub(super) fn shut_down(&self) {
        // It may be gone already, which is as good.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Reads once and serves what is complete. Waits no longer when one of `ends` is ready.
    pub(super) fn serve(
        &self,
        stream: &mut TwinStream,
        service: &DmaService,
        ends: [PollFd<'_>; 2],
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
                self.flush(sender, &ends, deadline)?;
            }
        }
    }

    fn flush(
        &self,
        sender: &mut Sender,
        ends: &[PollFd<'_>; 2],
        deadline: Duration,
    ) -> Result<(), ClientError> {
        let expires = Instant::now() + deadline;
        while sender.flush(&self.socket)? == Flush::Blocked {
            let left = expires.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Deadline(deadline));
            }
            let [closed, stopped] = ends.clone();
            let ours = PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::OUT);
            let mut polled = [closed, stopped, ours];
            poll_all(&mut polled, Some(left))?;
            if polled[..2].iter().any(|end| !end.revents().is_empty()) {
                return Err(ClientError::Gone);
            }
        }
        Ok(())
    }
}

impl Default for TwinStream {
    fn default() -> Self {
        Self {
            receiver: Receiver::that_never_waits(),
            sender: Sender::that_never_waits(),
            closed: false,
        }
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

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use barkeep_protocol::transport::{Flush, Frame, Received, Receiver, Sender};
use barkeep_protocol::wire::{Command, Errno, MessageId, MessageKind};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::ClientError;

/// A stream with a deadline for each request: send, then wait for the answer.
///
/// The deadline covers the whole exchange. A backend that drips bytes, or sends commands of its own
/// without end, gains no time.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    receiver: Receiver,
    sender: Sender,
    next_id: u16,
    deadline: Duration,
}

impl Connection {
    pub(super) fn open(path: &Path, deadline: Duration) -> Result<Self, ClientError> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(ClientError::Connect)?;
        // Each wait in the kernel ends early enough for the clock to be looked at: a request takes
        // its deadline and one of these at most. A full backlog makes connect wait as well.
        let slice = (deadline / 4).max(Duration::from_millis(1));
        for timeout in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, timeout, Some(slice)).map_err(ClientError::Connect)?;
        }
        let address = SocketAddrUnix::new(path).map_err(ClientError::Connect)?;
        connect(&socket, &address).map_err(ClientError::Connect)?;
        Ok(Self {
            socket,
            receiver: Receiver::default(),
            sender: Sender::default(),
            next_id: 0,
            deadline,
        })
    }

    /// Sends a command and returns its successful reply.
    pub(super) fn call(
        &mut self,
        command: Command,
        body: Vec<u8>,
        fds: Vec<OwnedFd>,
    ) -> Result<Frame, ClientError> {
        let expires = Instant::now() + self.deadline;
        let id = MessageId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.sender.queue(Frame::command(id, command, body).with_fds(fds));
        self.flush(expires)?;
        loop {
            // One read at a time, and then the clock. Waiting in the read itself, and not in a poll
            // before it, saves a system call for each request.
            let frame = match self.receiver.receive_within(&self.socket, 1)? {
                Received::Message(message) => message.into_frame(),
                Received::Refused(..) => return Err(ClientError::Protocol("oversized message")),
                Received::Pending => {
                    self.check(expires)?;
                    continue;
                }
                Received::Closed => return Err(ClientError::Gone),
            };
            let ours = (frame.header.id, frame.header.command) == (id, command.code());
            match frame.header.kind {
                MessageKind::Reply { error: None } if ours => return Ok(frame),
                MessageKind::Reply { error: Some(errno) } if ours => {
                    return Err(ClientError::Refused(errno));
                }
                MessageKind::Reply { .. } => {
                    return Err(ClientError::Protocol("reply to another request"));
                }
                // The server's own commands, which are not served here, may come in between.
                MessageKind::Command { no_reply } => {
                    if !no_reply {
                        let header = frame.header;
                        self.sender.queue(Frame::error(header.id, header.command, Errno::NOTSUP));
                        self.flush(expires)?;
                    }
                    self.check(expires)?;
                }
            }
        }
    }

    fn flush(&mut self, expires: Instant) -> Result<(), ClientError> {
        while self.sender.flush(&self.socket)? == Flush::Blocked {
            self.check(expires)?;
        }
        Ok(())
    }

    fn check(&self, expires: Instant) -> Result<(), ClientError> {
        if Instant::now() < expires { Ok(()) } else { Err(ClientError::Deadline(self.deadline)) }
    }
}

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use barkeep_protocol::transport::{Flush, Frame, Received, Receiver, Sender, TransportError};
use barkeep_protocol::wire::{Command, Errno, MessageId, MessageKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
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
        // A full backlog makes connect wait, and this bounds it.
        set_socket_timeout(&socket, Timeout::Send, Some(deadline)).map_err(ClientError::Connect)?;
        let address = SocketAddrUnix::new(path).map_err(ClientError::Connect)?;
        connect(&socket, &address).map_err(ClientError::Connect)?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(ClientError::Connect)?;
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
            self.wait(PollFlags::IN, expires)?;
            let frame = match self.receiver.receive(&self.socket)? {
                Received::Frame(frame) => frame,
                Received::Refused(..) => return Err(ClientError::Protocol("oversized message")),
                Received::Pending => continue,
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
                }
            }
        }
    }

    fn flush(&mut self, expires: Instant) -> Result<(), ClientError> {
        while self.sender.flush(&self.socket)? == Flush::Blocked {
            self.wait(PollFlags::OUT, expires)?;
        }
        Ok(())
    }

    /// Waits until the socket is ready, or fails when the request's time is up.
    fn wait(&self, want: PollFlags, expires: Instant) -> Result<(), ClientError> {
        loop {
            let rest = expires.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(ClientError::Deadline(self.deadline));
            }
            let timeout = Timespec::try_from(rest).ok();
            match poll(&mut [PollFd::new(&self.socket, want)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(TransportError::Socket(errno).into()),
            }
        }
    }
}

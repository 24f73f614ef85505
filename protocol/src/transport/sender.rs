use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};

use super::{Frame, TransportError};
use crate::wire::limits::{HEADER_SIZE, MAX_MESSAGE_FDS};

/// How far a flush came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything is with the kernel.
    Done,
    /// The socket takes no more for now; the rest stays queued.
    Blocked,
}

/// Queues frames and writes them in order, each with one system call where the socket lets it.
#[derive(Debug, Default)]
pub struct Sender {
    queue: VecDeque<Outgoing>,
    queued_bytes: usize,
    queued_fds: usize,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    sent: usize,
}

impl Sender {
    /// Appends a frame.
    pub fn queue(&mut self, frame: Frame) {
        debug_assert!(frame.fds.len() <= MAX_MESSAGE_FDS, "our own frames keep to the limit");
        let mut bytes = Vec::with_capacity(HEADER_SIZE + frame.body.len());
        bytes.extend_from_slice(&frame.header.to_bytes());
        bytes.extend_from_slice(&frame.body);
        self.queued_bytes += bytes.len();
        self.queued_fds += frame.fds.len();
        self.queue.push_back(Outgoing { bytes, fds: frame.fds, sent: 0 });
    }

    /// Bytes that wait for the peer to read. Back-pressure is decided on these and on
    /// [`queued_fds`](Self::queued_fds).
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// File descriptors that wait with them, open in this process until they are sent.
    #[must_use]
    pub fn queued_fds(&self) -> usize {
        self.queued_fds
    }

    /// Writes as much as the socket takes.
    ///
    /// # Errors
    /// [`TransportError::Socket`] when the peer is gone or the socket failed.
    pub fn flush(&mut self, socket: impl AsFd) -> Result<Flush, TransportError> {
        let socket = socket.as_fd();
        while let Some(front) = self.queue.front_mut() {
            let fds = front.fds.len();
            match front.write(socket) {
                Ok(count) => {
                    self.queued_fds -= fds - front.fds.len();
                    front.sent += count;
                    self.queued_bytes -= count;
                    if front.sent == front.bytes.len() {
                        self.queue.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Flush::Blocked),
                Err(errno) => return Err(TransportError::Socket(errno)),
            }
        }
        Ok(Flush::Done)
    }
}

impl Outgoing {
    fn write(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let rest = &self.bytes[self.sent..];
        // A peer that goes away must cost its session, not a SIGPIPE for the process.
        let flags = SendFlags::NOSIGNAL;
        if self.fds.is_empty() {
            return send(socket, rest, flags);
        }
        let borrowed: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(Errno::TOOMANYREFS);
        }
        let count = sendmsg(socket, &[IoSlice::new(rest)], &mut ancillary, flags)?;
        // The kernel has its own references from here on; a second part must not send them again.
        self.fds.clear();
        Ok(count)
    }
}

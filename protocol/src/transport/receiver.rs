use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::{Frame, TransportError};
use crate::wire::limits::{HEADER_SIZE, HEADER_SIZE_U32, MAX_MESSAGE_FDS, MAX_MESSAGE_SIZE};
use crate::wire::{Header, WireError};

/// What came off the socket.
#[derive(Debug)]
pub enum Received {
    /// A whole message.
    Frame(Frame),
    /// A well-framed message that is refused; its body and file descriptors are gone already.
    Refused(Header, WireError),
    /// No message is complete yet: the socket has no more (non-blocking), its timeout expired
    /// (blocking), or this call has read its share.
    Pending,
    /// The peer closed the connection between two messages.
    Closed,
}

/// Reads in one call: a peer that sends without end gets its share, and then others get theirs.
const READS_PER_CALL: usize = 512;

/// Assembles messages from a stream socket.
///
/// Header and body are read with exact lengths, never past the end of a message: the kernel hands
/// over file descriptors with the bytes they were sent with, and a read that spans two messages
/// would leave open which of them the descriptors belong to. QEMU pipelines DMA_MAPs with and
/// without a descriptor, so this matters (docs/decisions/0003-exact-reads.md).
#[derive(Debug, Default)]
pub struct Receiver {
    state: State,
    fds: Vec<OwnedFd>,
    too_many_fds: bool,
}

#[derive(Debug)]
enum State {
    Header { bytes: [u8; HEADER_SIZE], filled: usize },
    Body { header: Header, bytes: Vec<u8>, filled: usize },
    Drain { header: Header, remaining: usize },
}

impl Default for State {
    fn default() -> Self {
        Self::Header { bytes: [0; HEADER_SIZE], filled: 0 }
    }
}

impl Receiver {
    /// Reads until one message is complete or the socket has no more.
    ///
    /// # Errors
    /// [`TransportError`] when the stream can't go on.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Received, TransportError> {
        self.receive_within(socket, READS_PER_CALL)
    }

    /// As [`receive`](Self::receive), with at most `reads` reads: on a blocking socket, each may take
    /// the socket's timeout.
    ///
    /// # Errors
    /// [`TransportError`] when the stream can't go on.
    pub fn receive_within(
        &mut self,
        socket: impl AsFd,
        reads: usize,
    ) -> Result<Received, TransportError> {
        let socket = socket.as_fd();
        for _ in 0..reads {
            if let Some(done) = self.step()? {
                return Ok(done);
            }
            match self.fill(socket) {
                Ok(0) if self.at_boundary() => return Ok(Received::Closed),
                Ok(0) => return Err(TransportError::Truncated),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Received::Pending),
                Err(Errno::CONNRESET) if self.at_boundary() => return Ok(Received::Closed),
                Err(errno) => return Err(TransportError::Socket(errno)),
            }
        }
        // The last read may have completed a message, and nothing would tell us again.
        Ok(self.step()?.unwrap_or(Received::Pending))
    }

    /// Whether no message has been started.
    fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header { filled: 0, .. })
    }

    /// Moves on as far as the bytes at hand allow.
    fn step(&mut self) -> Result<Option<Received>, TransportError> {
        match &mut self.state {
            State::Header { bytes, filled } if *filled == HEADER_SIZE => {
                let header = Header::parse(bytes).map_err(|(id, error)| {
                    let command = u16::from_ne_bytes([bytes[2], bytes[3]]);
                    TransportError::Framing { id, command, error }
                })?;
                let size = header.body_size as usize;
                // Nothing is reserved for a length that is refused anyway.
                self.state = if size + HEADER_SIZE > MAX_MESSAGE_SIZE as usize {
                    State::Drain { header, remaining: size }
                } else {
                    State::Body { header, bytes: vec![0; size], filled: 0 }
                };
                self.step()
            }
            State::Body { header, bytes, filled } if *filled == bytes.len() => {
                let header = *header;
                let body = std::mem::take(bytes);
                let fds = self.finish();
                Ok(Some(match fds {
                    Some(fds) => Received::Frame(Frame { header, body, fds }),
                    None => Received::Refused(header, WireError::TooManyFds),
                }))
            }
            State::Drain { header, remaining: 0 } => {
                let header = *header;
                self.finish();
                let size = header.body_size.saturating_add(HEADER_SIZE_U32);
                Ok(Some(Received::Refused(header, WireError::TooLong(size))))
            }
            State::Header { .. } | State::Body { .. } | State::Drain { .. } => Ok(None),
        }
    }

    /// Starts the next message; gives out the descriptors of this one unless there were too many.
    fn finish(&mut self) -> Option<Vec<OwnedFd>> {
        self.state = State::default();
        let fds = std::mem::take(&mut self.fds);
        let too_many = std::mem::take(&mut self.too_many_fds);
        (!too_many).then_some(fds)
    }

    fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let mut scratch = [0; 4096];
        let (target, filled) = match &mut self.state {
            State::Header { bytes, filled } => (&mut bytes[*filled..], Some(filled)),
            State::Body { bytes, filled, .. } => (&mut bytes[*filled..], Some(filled)),
            State::Drain { remaining, .. } => {
                let length = scratch.len().min(*remaining);
                let (count, flags) = receive_into(socket, &mut scratch[..length], &mut self.fds)?;
                *remaining -= count;
                self.limit_fds(flags);
                return Ok(count);
            }
        };
        let (count, flags) = receive_into(socket, target, &mut self.fds)?;
        if let Some(filled) = filled {
            *filled += count;
        }
        self.limit_fds(flags);
        Ok(count)
    }

    /// Descriptors beyond the limit are closed at once, so a peer can't make this side hoard them.
    fn limit_fds(&mut self, flags: ReturnFlags) {
        if flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_MESSAGE_FDS {
            self.fds.clear();
            self.too_many_fds = true;
        }
    }
}

fn receive_into(
    socket: BorrowedFd<'_>,
    target: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<(usize, ReturnFlags), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(target)];
    let message = recvmsg(socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for item in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = item {
            fds.extend(received);
        }
    }
    Ok((message.bytes, message.flags))
}

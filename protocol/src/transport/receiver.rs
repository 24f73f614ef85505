use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::descriptors::{Descriptors, TooMany};
use super::{KEPT_BUFFER, Message, TransportError};
use crate::wire::limits::{HEADER_SIZE, HEADER_SIZE_U32, MAX_MESSAGE_FDS, MAX_MESSAGE_SIZE};
use crate::wire::{Header, WireError};

/// What came off the socket.
#[derive(Debug)]
pub enum Received<'a> {
    /// A whole message.
    Message(Message<'a>),
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

/// Room for more than a hundred small requests, which a peer that pipelines gets read at once.
const BUFFER_SIZE: usize = 4096;

/// Assembles messages from a stream socket, in one read where the peer has sent one.
///
/// A read takes what there is, so it may hold several messages, and whole ones may be left in the
/// buffer when a call returns: whoever waits for the socket to become readable must have received
/// until [`Received::Pending`], or they wait for a message that is here already.
///
/// File descriptors belong to the message that the last byte of their read is part of. The kernel
/// ends a read behind the bytes that descriptors were sent with (unix(7)), so this is exact for every
/// peer that does not send bytes of two messages in the call that carries descriptors
/// (docs/decisions/0011-one-read-for-many-messages.md).
#[derive(Debug, Default)]
pub struct Receiver {
    buffer: Vec<u8>,
    /// What of the buffer has been read and not yet been handed out. A message starts at its start.
    held: Range<usize>,
    /// An oversized message whose body is being thrown away.
    drain: Option<Drain>,
    /// Of the message in progress, from earlier reads.
    fds: Descriptors,
    /// Of the message that the last byte of `held` is part of.
    latest_fds: Descriptors,
    emptied: bool,
    /// Reads never wait, whatever the socket says.
    never_waits: bool,
}

#[derive(Debug)]
struct Drain {
    header: Header,
    remaining: usize,
}

/// A message that is complete.
#[derive(Debug)]
enum Complete {
    Message(Header, Range<usize>, Vec<OwnedFd>),
    Refused(Header, WireError),
    End,
}

impl Receiver {
    /// One whose reads never wait, also on a blocking socket: for one that a stranger has made, who may
    /// change what it is.
    #[must_use]
    pub fn that_never_waits() -> Self {
        Self { never_waits: true, ..Self::default() }
    }

    /// Reads until one message is complete or the socket has no more.
    ///
    /// # Errors
    /// [`TransportError`] when the stream can't go on.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<Received<'_>, TransportError> {
        self.receive_within(socket, READS_PER_CALL)
    }

    /// As [`receive`](Self::receive), but a socket that the last read has emptied counts as empty
    /// still. For the second and every further message after a level-triggered wake-up: it saves
    /// the read that would only find nothing, and if there is more by now, another wake-up tells.
    ///
    /// # Errors
    /// [`TransportError`] when the stream can't go on.
    pub fn receive_more(&mut self, socket: impl AsFd) -> Result<Received<'_>, TransportError> {
        let reads = if self.emptied { 0 } else { READS_PER_CALL };
        self.receive_within(socket, reads)
    }

    /// As [`receive`](Self::receive), with at most `reads` reads: on a blocking socket, each may take
    /// the socket's timeout. With none, it hands out what the buffer holds.
    ///
    /// # Errors
    /// [`TransportError`] when the stream can't go on.
    pub fn receive_within(
        &mut self,
        socket: impl AsFd,
        reads: usize,
    ) -> Result<Received<'_>, TransportError> {
        Ok(match self.complete(socket.as_fd(), reads)? {
            Some(Complete::Message(header, body, fds)) => {
                Received::Message(Message { header, body: &self.buffer[body], fds })
            }
            Some(Complete::Refused(header, error)) => Received::Refused(header, error),
            Some(Complete::End) => Received::Closed,
            None => Received::Pending,
        })
    }

    fn complete(
        &mut self,
        socket: BorrowedFd<'_>,
        reads: usize,
    ) -> Result<Option<Complete>, TransportError> {
        self.give_back();
        for _ in 0..reads {
            if let Some(complete) = self.step()? {
                return Ok(Some(complete));
            }
            match self.fill(socket) {
                Ok(0) if self.at_boundary() => return Ok(Some(Complete::End)),
                Ok(0) => return Err(TransportError::Truncated),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) if self.at_boundary() => return Ok(Some(Complete::End)),
                Err(errno) => return Err(TransportError::Socket(errno)),
            }
        }
        // The last read may have completed a message, and nothing would tell us again.
        self.step()
    }

    /// Whether no message has been started.
    fn at_boundary(&self) -> bool {
        self.held.is_empty() && self.drain.is_none()
    }

    /// Takes the next complete message out of the buffer.
    fn step(&mut self) -> Result<Option<Complete>, TransportError> {
        if self.drain.is_some() {
            return Ok(self.drain());
        }
        let Some(header) = self.header()? else { return Ok(None) };
        let size = message_size(&header);
        if size > MAX_MESSAGE_SIZE as usize {
            self.held.start += HEADER_SIZE;
            self.drain = Some(Drain { header, remaining: size - HEADER_SIZE });
            return Ok(self.drain());
        }
        if self.held.len() < size {
            return Ok(None);
        }
        let body = self.held.start + HEADER_SIZE..self.held.start + size;
        self.held.start += size;
        Ok(Some(match self.finish() {
            Ok(fds) => Complete::Message(header, body, fds),
            Err(TooMany) => Complete::Refused(header, WireError::TooManyFds),
        }))
    }

    fn drain(&mut self) -> Option<Complete> {
        let drain = self.drain.as_mut()?;
        let count = drain.remaining.min(self.held.len());
        drain.remaining -= count;
        self.held.start += count;
        if drain.remaining > 0 {
            // All that has been read so far is this message, and so are its descriptors.
            drop(self.finish());
            return None;
        }
        let header = drain.header;
        self.drain = None;
        drop(self.finish());
        let size = header.body_size.saturating_add(HEADER_SIZE_U32);
        Some(Complete::Refused(header, WireError::TooLong(size)))
    }

    /// Gives out the descriptors of the message that has just been taken out of the buffer.
    fn finish(&mut self) -> Result<Vec<OwnedFd>, TooMany> {
        if self.held.is_empty() {
            self.fds.absorb(&mut self.latest_fds);
        }
        self.fds.take()
    }

    /// The header of the message in progress, if it is here.
    fn header(&self) -> Result<Option<Header>, TransportError> {
        let Some(bytes) = self.buffer[self.held.clone()].first_chunk() else { return Ok(None) };
        Header::parse(bytes).map(Some).map_err(|(id, error)| {
            let command = u16::from_ne_bytes([bytes[2], bytes[3]]);
            TransportError::Framing { id, command, error }
        })
    }

    /// Reads once. There is no complete message in the buffer.
    fn fill(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.make_room();
        // The buffer holds one message in progress and nothing else, so these are its descriptors.
        self.fds.absorb(&mut self.latest_fds);

        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let room = &mut self.buffer[self.held.end..];
        let asked = room.len();
        let mut parts = [IoSliceMut::new(room)];
        // A read that fails says nothing about what is there.
        self.emptied = false;
        let mut flags = RecvFlags::CMSG_CLOEXEC;
        flags.set(RecvFlags::DONTWAIT, self.never_waits);
        let read = recvmsg(socket, &mut parts, &mut ancillary, flags)?;
        // A read ends early where the socket does, and where descriptors do.
        self.emptied = read.bytes < asked;
        for item in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = item {
                self.latest_fds.add(received);
                self.emptied = false;
            }
        }
        if read.flags.contains(ReturnFlags::CTRUNC) {
            self.latest_fds.refuse();
            self.emptied = false;
        }
        self.held.end += read.bytes;
        Ok(read.bytes)
    }

    /// Moves the message in progress to the front of a buffer that has room for the rest of it.
    fn make_room(&mut self) {
        let wanted = match (&self.drain, self.header()) {
            (None, Ok(Some(header))) => message_size(&header).max(BUFFER_SIZE),
            _ => BUFFER_SIZE,
        };
        if self.buffer.len() < wanted {
            self.replace_buffer(wanted);
        } else if self.held.start > 0 {
            self.buffer.copy_within(self.held.clone(), 0);
            self.held = 0..self.held.len();
        }
    }

    /// Frees the buffer of a large message that has been handed out.
    fn give_back(&mut self) {
        if self.buffer.len() > KEPT_BUFFER && self.held.is_empty() {
            self.replace_buffer(BUFFER_SIZE);
        }
    }

    #[cfg(test)]
    pub(super) fn buffered_room(&self) -> usize {
        self.buffer.capacity()
    }

    fn replace_buffer(&mut self, size: usize) {
        // Fresh memory of the kernel is zero already: what a peer announces and never sends costs
        // addresses, not pages.
        let mut buffer = vec![0; size];
        let held = &self.buffer[self.held.clone()];
        buffer[..held.len()].copy_from_slice(held);
        self.held = 0..held.len();
        self.buffer = buffer;
    }
}

fn message_size(header: &Header) -> usize {
    header.body_size as usize + HEADER_SIZE
}

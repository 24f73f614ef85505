use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};

use super::{Frame, KEPT_BUFFER, TransportError};
use crate::wire::limits::{HEADER_SIZE, MAX_MESSAGE_FDS};
use crate::wire::{Command, Header, MessageId, MessageKind};

/// How far a flush came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Everything is with the kernel.
    Done,
    /// The socket takes no more for now; the rest stays queued.
    Blocked,
}

/// Queues messages in one buffer and writes them in order, all of them with one system call where
/// the socket lets it and no file descriptors are among them.
///
/// A message with descriptors gets a call of its own: whatever the peer reads with them is then part
/// of that message.
#[derive(Debug, Default)]
pub struct Sender {
    buffer: Vec<u8>,
    /// Bytes of the buffer that the kernel has already.
    sent: usize,
    /// Messages with descriptors that are not sent yet, in order.
    attached: VecDeque<Attached>,
    queued_fds: usize,
    /// Writes never wait, whatever the socket says.
    never_waits: bool,
}

/// Descriptors, and where in the buffer the message is that they belong to.
#[derive(Debug)]
struct Attached {
    start: usize,
    end: usize,
    fds: Vec<OwnedFd>,
}

impl Sender {
    /// One whose writes never wait, also on a blocking socket: for one that a stranger has made, who may
    /// change what it is.
    #[must_use]
    pub fn that_never_waits() -> Self {
        Self { never_waits: true, ..Self::default() }
    }

    /// Appends the successful reply to `command`; `body` appends its payload to what it is given.
    ///
    /// If the kernel refuses the descriptors because too many are on their way already, the reply
    /// that is sent is the error `ETOOMANYREFS`, and the stream goes on.
    pub fn reply(&mut self, command: &Header, fds: Vec<OwnedFd>, body: impl FnOnce(&mut Vec<u8>)) {
        self.append(command.id, command.command, MessageKind::Reply { error: None }, fds, body);
    }

    /// Appends the successful reply to `command` that `build` makes, or nothing if it fails. `build`
    /// appends the payload to the bytes that it is given, and descriptors to the list.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn try_reply<E>(
        &mut self,
        command: &Header,
        build: impl FnOnce(&mut Vec<u8>, &mut Vec<OwnedFd>) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.begin();
        let mut fds = Vec::new();
        if let Err(error) = build(&mut self.buffer, &mut fds) {
            self.buffer.truncate(start);
            return Err(error);
        }
        let kind = MessageKind::Reply { error: None };
        self.finish(start, command.id, command.command, kind, fds);
        Ok(())
    }

    /// Appends the error reply to a command: header only ("Header").
    pub fn error(&mut self, id: MessageId, command: u16, errno: Errno) {
        let kind = MessageKind::Reply { error: Some(errno) };
        self.append(id, command, kind, Vec::new(), |_| {});
    }

    /// Appends a command; `body` appends its payload to what it is given.
    pub fn command(
        &mut self,
        id: MessageId,
        command: Command,
        no_reply: bool,
        fds: Vec<OwnedFd>,
        body: impl FnOnce(&mut Vec<u8>),
    ) {
        self.append(id, command.code(), MessageKind::Command { no_reply }, fds, body);
    }

    /// Appends a message that is whole already.
    pub fn queue(&mut self, frame: Frame) {
        let Header { id, command, kind, .. } = frame.header;
        self.append(id, command, kind, frame.fds, |bytes| bytes.extend_from_slice(&frame.body));
    }

    /// Takes everything away that is queued: bytes, and the descriptors that go with them. For whoever
    /// sends a message by other means.
    pub fn take(&mut self) -> (Vec<u8>, Vec<OwnedFd>) {
        let attached = self.attached.drain(..).flat_map(|attached| attached.fds).collect();
        self.queued_fds = 0;
        let bytes = self.buffer.split_off(self.sent);
        self.buffer.clear();
        self.sent = 0;
        (bytes, attached)
    }

    /// Bytes that wait for the peer to read. Back-pressure is decided on these and on
    /// [`queued_fds`](Self::queued_fds).
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.buffer.len() - self.sent
    }

    /// File descriptors that wait with them, open in this process until they are sent.
    #[must_use]
    pub fn queued_fds(&self) -> usize {
        self.queued_fds
    }

    /// Writes as much as the socket takes.
    ///
    /// # Errors
    /// [`TransportError::Socket`] when the peer is gone or the socket failed. With `ETOOMANYREFS`,
    /// the next message is a command whose descriptors the kernel refuses for now; it is queued
    /// still and may be flushed again.
    pub fn flush(&mut self, socket: impl AsFd) -> Result<Flush, TransportError> {
        let socket = socket.as_fd();
        while self.sent < self.buffer.len() {
            match self.write(socket) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Flush::Blocked),
                Err(Errno::TOOMANYREFS) if self.refuse_next() => {}
                Err(errno) => return Err(TransportError::Socket(errno)),
            }
        }
        self.buffer.clear();
        self.buffer.shrink_to(KEPT_BUFFER);
        self.sent = 0;
        Ok(Flush::Done)
    }

    fn append(
        &mut self,
        id: MessageId,
        command: u16,
        kind: MessageKind,
        fds: Vec<OwnedFd>,
        body: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = self.begin();
        body(&mut self.buffer);
        self.finish(start, id, command, kind, fds);
    }

    /// Makes room for a message's header. Its payload is what is appended then.
    fn begin(&mut self) -> usize {
        self.forget_sent();
        let start = self.buffer.len();
        self.buffer.extend_from_slice(&[0; HEADER_SIZE]);
        start
    }

    fn finish(
        &mut self,
        start: usize,
        id: MessageId,
        command: u16,
        kind: MessageKind,
        fds: Vec<OwnedFd>,
    ) {
        debug_assert!(fds.len() <= MAX_MESSAGE_FDS, "our own messages keep to the limit");
        let end = self.buffer.len();
        let body_size = end.checked_sub(start + HEADER_SIZE).and_then(|size| size.try_into().ok());
        let body_size = body_size.expect("a payload is appended, and bounded by the limits");
        let header = Header { id, command, body_size, kind };
        self.buffer[start..start + HEADER_SIZE].copy_from_slice(&header.to_bytes());
        if !fds.is_empty() {
            self.queued_fds += fds.len();
            self.attached.push_back(Attached { start, end, fds });
        }
    }

    /// Makes room where a slow peer has left more sent bytes than waiting ones, so that moving the
    /// latter costs no more than sending the former did.
    fn forget_sent(&mut self) {
        if self.sent <= self.buffer.len() / 2 {
            return;
        }
        self.buffer.drain(..self.sent);
        for attached in &mut self.attached {
            attached.start -= self.sent;
            attached.end -= self.sent;
        }
        self.sent = 0;
    }

    /// Writes once: up to the next message with descriptors, or that message.
    fn write(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        // A peer that goes away must cost its session, not a SIGPIPE for the process.
        let mut flags = SendFlags::NOSIGNAL;
        flags.set(SendFlags::DONTWAIT, self.never_waits);
        let next = match self.attached.front() {
            None => return send(socket, &self.buffer[self.sent..], flags),
            Some(next) if self.sent < next.start => {
                return send(socket, &self.buffer[self.sent..next.start], flags);
            }
            Some(next) => next,
        };
        let borrowed: Vec<BorrowedFd<'_>> = next.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(Errno::TOOMANYREFS);
        }
        let message = [IoSlice::new(&self.buffer[self.sent..next.end])];
        let count = sendmsg(socket, &message, &mut ancillary, flags)?;
        // The kernel has its own references from here on; a second part must not send them again.
        self.drop_next_fds();
        Ok(count)
    }

    /// The kernel does not take the next message's descriptors: too many of this user are in flight.
    /// Waiting could be for ever, and the socket would look writable all the while. A reply becomes
    /// an error reply; its request has failed, and no other. Tells whether there was one.
    pub(super) fn refuse_next(&mut self) -> bool {
        let Some(next) = self.attached.front() else { return false };
        let (start, end) = (next.start, next.end);
        let header = self.buffer[start..].first_chunk().and_then(|bytes| Header::parse(bytes).ok());
        let Some(Header { id, command, kind: MessageKind::Reply { .. }, .. }) = header else {
            return false;
        };
        self.drop_next_fds();
        let kind = MessageKind::Reply { error: Some(Errno::TOOMANYREFS) };
        let refusal = Header { id, command, body_size: 0, kind }.to_bytes();
        self.buffer.splice(start..end, refusal);
        let shorter = end - start - refusal.len();
        for attached in &mut self.attached {
            attached.start -= shorter;
            attached.end -= shorter;
        }
        true
    }

    #[cfg(test)]
    pub(super) fn buffered_room(&self) -> usize {
        self.buffer.capacity()
    }

    fn drop_next_fds(&mut self) {
        if let Some(next) = self.attached.pop_front() {
            self.queued_fds -= next.fds.len();
        }
    }
}

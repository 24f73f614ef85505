use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use thiserror::Error;

use super::layout::{Area, MAX_FRAME};
use super::memory::{Memory, WORD};
use super::outbox::Outbox;
use super::progress::{Position, Progress};
use super::record::StreamRecord;
use super::socket::{self, Peeked};
use super::{FdKey, Flush, StateError};

/// Descriptors that one message may come with.
pub const MAX_MESSAGE_KEYS: usize = 32;

/// A message has come with more descriptors than [`MAX_MESSAGE_KEYS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("more than {MAX_MESSAGE_KEYS} descriptors in one message")]
pub struct TooManyKeys;

/// One connection: the message that is being received, and the frames that are being sent.
#[derive(Debug)]
pub struct Stream<'a> {
    pub(super) memory: &'a Memory,
    pub(super) inbox: &'a mut Inbox,
    pub(super) outbox: &'a mut Outbox,
}

impl Stream<'_> {
    /// Looks at what the socket would give next: no more than `room` bytes, and the first descriptors,
    /// wherever they are ([`hold`](Self::hold)). Never waits.
    ///
    /// # Errors
    /// `EAGAIN` if there is nothing; whatever else the socket says.
    pub fn peek(&self, socket: impl AsFd, room: usize) -> Result<Peeked, Errno> {
        socket::peek(socket.as_fd(), room)
    }

    /// These are the keys of the first descriptors that the socket would give. They are part of the
    /// message that takes the bytes they come with, this one or a later one. Until then, a peek
    /// finds the same descriptors again.
    ///
    /// # Errors
    /// [`TooManyKeys`]
    pub fn hold(&mut self, keys: &[FdKey]) -> Result<(), TooManyKeys> {
        self.inbox.hold(keys)
    }

    /// The keys that are part of no message yet.
    #[must_use]
    pub fn held(&self) -> &[FdKey] {
        &self.inbox.held
    }

    /// Takes bytes off the socket into the message, no more than `count` and than there is room for,
    /// and none behind those that come with descriptors. Only bytes that were peeked, or their
    /// descriptors are lost. None: the peer has closed its end. Never waits.
    ///
    /// # Errors
    /// `EAGAIN` if there is nothing, `EMSGSIZE` if there is no room; whatever else the socket says.
    /// Nothing was taken then.
    pub fn take(&mut self, socket: impl AsFd, count: usize) -> Result<usize, Errno> {
        self.inbox.take(self.memory, socket.as_fd(), count)
    }

    /// The message so far.
    #[must_use]
    pub fn received(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.copy_received(&mut bytes);
        bytes
    }

    /// As [`received`](Self::received), in place of what is in `bytes`.
    pub fn copy_received(&self, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.resize(self.received_len(), 0);
        self.memory.read(self.inbox.bytes().start, bytes);
    }

    /// Its length in bytes.
    #[must_use]
    pub fn received_len(&self) -> usize {
        self.inbox.length
    }

    /// The descriptors of the message so far.
    #[must_use]
    pub fn received_keys(&self) -> &[FdKey] {
        &self.inbox.keys
    }

    /// The descriptors that the next frame to send wants, in order: none if it is on its way in part.
    #[must_use]
    pub fn pending(&self) -> Option<&[FdKey]> {
        self.outbox.next_keys()
    }

    /// The first bytes of the next frame, as many as there is room for and as there are: none if it is
    /// on its way in part.
    #[must_use]
    pub fn pending_bytes<'b>(&self, room: &'b mut [u8]) -> &'b [u8] {
        self.outbox.next_bytes(self.memory, room)
    }

    /// Sends the next frame, or what is left of it, with its descriptors. Never waits.
    ///
    /// # Errors
    /// `EPIPE` or `ECONNRESET` if the peer has gone. `ETOOMANYREFS` if the kernel takes no more
    /// descriptors of this user for now: the socket looks writable all the while, so whoever does not
    /// want to wait sends something else ([`replace_next`](super::Journal::replace_next)). Whatever
    /// else the socket says. The frame waits still.
    pub fn send(&mut self, socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> Result<Flush, Errno> {
        self.outbox.send(self.memory, socket.as_fd(), fds)
    }

    /// Whether all that was committed is on its way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Bytes that can be committed to be sent, beside those that wait.
    #[must_use]
    pub fn room(&self) -> usize {
        self.outbox.room()
    }
}

/// The message that is being received: a page of keys, and its bytes.
#[derive(Debug)]
pub(super) struct Inbox {
    area: Area,
    progress: Progress,
    position: Position,
    /// Of the message in progress.
    length: usize,
    keys: Vec<FdKey>,
    /// Of a message that takes the bytes they come with.
    held: Vec<FdKey>,
}

const HEADER: usize = 4096;
const _: () = assert!(MAX_MESSAGE_KEYS * WORD <= HEADER);

impl Inbox {
    pub(super) fn new(area: Area, progress: Progress) -> Self {
        let position = Position::default();
        Self { area, progress, position, length: 0, keys: Vec::new(), held: Vec::new() }
    }

    /// Of a file that may hold anything.
    pub(super) fn load(
        memory: &Memory,
        area: Area,
        (progress, position): (Progress, Position),
        record: &StreamRecord,
    ) -> Result<Self, StateError> {
        let mut inbox = Self::new(area, progress);
        let within = |end: u64, start: u64, room: usize| {
            end.checked_sub(start)
                .and_then(|length| usize::try_from(length).ok())
                .filter(|n| *n <= room)
        };
        let damaged = StateError::Damaged("how much was received");
        let length = within(position.bytes, record.taken.bytes, inbox.bytes().length);
        let keys = within(position.keys, record.taken.keys, MAX_MESSAGE_KEYS);
        let (Some(length), Some(keys)) = (length, keys) else { return Err(damaged) };
        inbox.position = position;
        inbox.length = length;
        let first = area.first_word();
        inbox.keys = (first..first + keys).map(|word| FdKey(memory.get(word))).collect();
        Ok(inbox)
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = FdKey> {
        self.keys.iter().chain(&self.held).copied()
    }

    /// The message is done: so says the record.
    pub(super) fn clear(&mut self) {
        self.length = 0;
        self.keys.clear();
    }

    /// Nothing comes from this connection any more.
    pub(super) fn disconnect(&mut self) {
        self.clear();
        self.held.clear();
    }

    fn hold(&mut self, keys: &[FdKey]) -> Result<(), TooManyKeys> {
        if self.keys.len() + self.held.len() + keys.len() > MAX_MESSAGE_KEYS {
            return Err(TooManyKeys);
        }
        self.held.extend(keys);
        Ok(())
    }

    fn take(
        &mut self,
        memory: &Memory,
        socket: BorrowedFd<'_>,
        count: usize,
    ) -> Result<usize, Errno> {
        let area = self.bytes();
        let count = count.min(area.length - self.length);
        if count == 0 {
            return Err(Errno::MSGSIZE);
        }
        let start = area.start + self.length;
        for (index, key) in self.held.iter().enumerate() {
            memory.set(self.area.first_word() + self.keys.len() + index, key.0);
        }
        let mut reset = false;
        loop {
            let held = self.held.len() as u64;
            let header = self.progress.prepare(memory, self.position, held, count);
            match socket::receive(socket, memory, header, start..start + count) {
                Err(Errno::INTR) => {}
                // The peer has gone with replies unread. Unlike recvmsg, recvmmsg says so, once, before
                // it gives what the peer has sent.
                Err(Errno::CONNRESET) if !reset => reset = true,
                Err(errno) => return Err(errno),
                Ok(taken) => {
                    self.position.bytes += u64::from(taken.bytes);
                    self.length += taken.bytes as usize;
                    if taken.fds {
                        self.position.keys += held;
                        self.keys.append(&mut self.held);
                    }
                    return Ok(taken.bytes as usize);
                }
            }
        }
    }

    fn bytes(&self) -> Area {
        let length = (self.area.length - HEADER).min(MAX_FRAME);
        Area { start: self.area.start + HEADER, length }
    }
}

//! What is at the other end of a socket: it sends messages in pieces of its choice, and reads what
//! comes.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::random::{Random, bytes};

/// A message or frame: a word with its length and its operation, a word of no meaning, and bytes. It
/// is known by its descriptors' inodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    pub(super) inodes: Vec<u64>,
}

pub(super) const HEADER: usize = 16;

impl Message {
    pub(super) fn new(operation: u8, seed: u64, length: usize) -> Self {
        let head = (HEADER + length) as u64 | u64::from(operation) << 32;
        let content = bytes(seed, length);
        let bytes = [&head.to_le_bytes(), &seed.to_le_bytes(), content.as_slice()].concat();
        Self { bytes, inodes: Vec::new() }
    }

    /// The length of the message of which this is the beginning.
    pub(super) fn length(bytes: &[u8]) -> Option<usize> {
        let head = bytes.first_chunk::<HEADER>()?;
        Some(u32::from_le_bytes(*head.first_chunk().unwrap()) as usize)
    }

    pub(super) fn operation(bytes: &[u8]) -> u8 {
        bytes[4]
    }
}

#[derive(Debug)]
pub(super) struct Peer {
    socket: Option<UnixStream>,
    random: Random,
    /// What is left to send, with descriptors that go with the first of the bytes.
    pieces: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// What has come and is no whole frame yet.
    partial: Message,
    pub(super) frames: Vec<Message>,
}

impl Peer {
    /// Which will send these messages, for each of which it makes up descriptors, whose inodes are put
    /// down. Returns our end of the socket.
    pub(super) fn new(messages: &mut [(Message, usize)], mut random: Random) -> (Self, UnixStream) {
        let (socket, ours) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        // Room for little, so that frames go in parts.
        set_socket_send_buffer_size(&ours, 1).unwrap();
        let mut pieces = VecDeque::new();
        for (message, fds) in messages {
            let fds: Vec<_> =
                (0..*fds).map(|_| memfd_create("its", MemfdFlags::CLOEXEC).unwrap()).collect();
            message.inodes = fds.iter().map(|fd| fstat(fd).unwrap().st_ino).collect();
            Self::cut(&message.bytes, fds, &mut random, &mut pieces);
        }
        let partial = Message { bytes: Vec::new(), inodes: Vec::new() };
        (Self { socket: Some(socket), random, pieces, partial, frames: Vec::new() }, ours)
    }

    fn cut(
        mut bytes: &[u8],
        mut fds: Vec<OwnedFd>,
        random: &mut Random,
        pieces: &mut VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    ) {
        while !bytes.is_empty() {
            let length =
                if random.one_in(2) { bytes.len() } else { 1 + random.length(bytes.len()) };
            let (piece, rest) = bytes.split_at(length);
            // Behind the bytes of earlier messages, but with none of them.
            let with = if rest.is_empty() || random.one_in(2) { fds.len() } else { 0 };
            match pieces.back_mut() {
                Some((earlier, held)) if fds.is_empty() && held.is_empty() && random.one_in(3) => {
                    earlier.extend_from_slice(piece);
                }
                _ => pieces.push_back((piece.to_vec(), fds.drain(..with).collect())),
            }
            bytes = rest;
        }
    }

    /// Reads what is there, and sends a piece. Tells whether it did anything.
    pub(super) fn act(&mut self) -> bool {
        let read = self.read();
        let Some(socket) = &self.socket else { return read };
        let Some((bytes, fds)) = self.pieces.pop_front() else { return read };
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let parts = [IoSlice::new(&bytes)];
        match sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(count) if count == bytes.len() => true,
            Ok(count) => {
                self.pieces.push_front((bytes[count..].to_vec(), Vec::new()));
                true
            }
            Err(Errno::AGAIN) => {
                self.pieces.push_front((bytes, fds));
                read
            }
            Err(errno) => panic!("{errno}"),
        }
    }

    fn read(&mut self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let room = 1 + self.random.length(4000);
        let mut bytes = vec![0; room];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(16))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let read = match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(read) => read.bytes,
            Err(Errno::AGAIN) => return false,
            Err(errno) => panic!("{errno}"),
        };
        // Descriptors end a read, so they are those of the frame that its last byte is part of.
        let mut inodes = Vec::new();
        for item in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = item {
                inodes.extend(fds.map(|fd| fstat(fd).unwrap().st_ino));
            }
        }
        for (at, byte) in bytes[..read].iter().enumerate() {
            self.partial.bytes.push(*byte);
            let whole = Message::length(&self.partial.bytes) == Some(self.partial.bytes.len());
            if whole || at + 1 == read {
                if at + 1 == read {
                    self.partial.inodes.append(&mut inodes);
                }
                if whole {
                    let frame = Message { bytes: Vec::new(), inodes: Vec::new() };
                    self.frames.push(std::mem::replace(&mut self.partial, frame));
                }
            }
        }
        read > 0
    }

    pub(super) fn has_sent_all(&self) -> bool {
        self.pieces.is_empty()
    }

    /// It goes away, whatever it has not read.
    pub(super) fn close(&mut self) {
        self.socket = None;
    }
}

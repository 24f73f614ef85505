//! Connections over real sockets, with a server and a VMM of the tests.

mod greeting;
mod pieces;
mod property;
mod server;
mod session;
mod trouble;

use std::collections::HashMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use barkeep_protocol::page::decode::LENGTH;
use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind, Version};
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::Shim;
use crate::status::Status;
use crate::system::{Answer, Extent, PageWords, SocketMessage, SocketReceived, System};

/// A process whose memory is a buffer: what the VMM sends begins at 0, what it receives at [`ROOM`].
#[derive(Default)]
pub(super) struct Machine {
    memory: Mutex<Vec<u8>>,
    sockets: Mutex<HashMap<RawFd, Arc<OwnedFd>>>,
    /// What the VMM gets by `SCM_RIGHTS`.
    received: Mutex<Vec<OwnedFd>>,
    /// Our own that were to be closed.
    closed: Mutex<Vec<RawFd>>,
    /// A page that was mapped, with what of it is loaded.
    pages: Mutex<Vec<PageWords>>,
}

const ROOM: usize = 1 << 20;
/// Ancillary data of the VMM's: the kernel has room for descriptors there, or takes one from there.
const CONTROL: usize = 1;

impl Machine {
    fn socket(&self, fd: RawFd) -> Answer<Arc<OwnedFd>> {
        self.sockets.lock().unwrap().get(&fd).cloned().ok_or(Errno::BADF)
    }

    fn place(&self, at: usize, data: &[u8]) {
        let mut memory = self.memory.lock().unwrap();
        if memory.len() < at + data.len() {
            memory.resize(at + data.len(), 0);
        }
        memory[at..at + data.len()].copy_from_slice(data);
    }
}

impl System for Machine {
    fn read_memory(&self, address: usize, data: &mut [u8]) -> Answer<()> {
        let memory = self.memory.lock().unwrap();
        data.copy_from_slice(memory.get(address..address + data.len()).ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn write_memory(&self, address: usize, data: &[u8]) -> Answer<()> {
        self.place(address, data);
        Ok(())
    }

    fn keep(&self, fd: RawFd) -> Answer<OwnedFd> {
        Ok(self.socket(fd)?.try_clone().unwrap())
    }

    fn close_own(&self, number: RawFd) {
        self.closed.lock().unwrap().push(number);
    }

    fn sendmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<usize> {
        let mut data = vec![0; message.len()];
        assert!(super::connection::read(self, message, 0, &mut data));
        let file = rustix::fs::memfd_create("sent", rustix::fs::MemfdFlags::CLOEXEC)?;
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if message.control == CONTROL {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        let flags = SendFlags::from_bits_retain(flags.cast_unsigned());
        rustix::net::sendmsg(self.socket(fd)?, &[IoSlice::new(&data)], &mut control, flags)
    }

    fn recvmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<SocketReceived> {
        let mut data = vec![0; message.len()];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut nothing = RecvAncillaryBuffer::default();
        let control = if message.control == CONTROL { &mut control } else { &mut nothing };
        let flags = RecvFlags::from_bits_retain(flags.cast_unsigned()) | RecvFlags::CMSG_CLOEXEC;
        let room = &mut [IoSliceMut::new(&mut data)];
        let got = rustix::net::recvmsg(self.socket(fd)?, room, control, flags)?;
        let mut fds = self.received.lock().unwrap();
        let before = fds.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let mut left = &data[..got.bytes];
        for extent in &message.part(0, got.bytes).extents {
            let (some, rest) = left.split_at(extent.len);
            self.place(extent.address, some);
            left = rest;
        }
        let control_len = (fds.len() - before) * 24;
        Ok(SocketReceived { count: got.bytes, control_len, ..SocketReceived::default() })
    }

    fn page(&self, file: Option<BorrowedFd<'_>>, over: Option<PageWords>) -> Answer<PageWords> {
        use std::sync::atomic::{AtomicU64, Ordering};
        let words = over.unwrap_or_else(|| {
            let words: Vec<AtomicU64> = (0..LENGTH / 8).map(|_| AtomicU64::new(0)).collect();
            Vec::leak(words)
        });
        let mut bytes = [0; LENGTH];
        if let Some(file) = file {
            rustix::io::pread(file, &mut bytes, 0)?;
        }
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
        self.pages.lock().unwrap().push(words);
        Ok(words)
    }
}

/// A VMM with one connection, of which the tests have the server's end.
pub(super) struct Vmm {
    pub(super) shim: Arc<Shim<Machine>>,
    pub(super) fd: RawFd,
}

impl Vmm {
    pub(super) fn new() -> (Self, UnixStream) {
        let (client, server) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let machine = Machine::default();
        machine.memory.lock().unwrap().resize(2 * ROOM, 0);
        let client = OwnedFd::from(client);
        let fd = client.as_raw_fd();
        machine.sockets.lock().unwrap().insert(fd, Arc::new(client));
        (Self { shim: Arc::new(Shim::new(machine, Status::private(true))), fd }, server)
    }

    /// One `sendmsg`, or `greet` where that is the first.
    pub(super) fn send(&self, data: &[u8]) -> Answer<usize> {
        self.send_message(data, 0)
    }

    pub(super) fn send_message(&self, data: &[u8], control: usize) -> Answer<usize> {
        self.shim.system.place(0, data);
        // In two pieces, as any VMM may.
        let cut = data.len() / 3;
        let extents =
            vec![Extent { address: 0, len: cut }, Extent { address: cut, len: data.len() - cut }];
        let message = SocketMessage {
            extents,
            control,
            control_len: control * 24,
            ..SocketMessage::default()
        };
        self.shim.sendmsg(self.fd, &message, 0)
    }

    /// One `recvmsg` of at most so many bytes.
    pub(super) fn receive(&self, most: usize) -> Answer<Vec<u8>> {
        self.receive_with(most, 0)
    }

    pub(super) fn receive_with(&self, most: usize, flags: i32) -> Answer<Vec<u8>> {
        let cut = most / 2;
        let extents = vec![
            Extent { address: ROOM, len: cut },
            Extent { address: ROOM + cut, len: most - cut },
        ];
        let message = SocketMessage {
            extents,
            control: CONTROL,
            control_len: 100,
            ..SocketMessage::default()
        };
        let got = self.shim.recvmsg(self.fd, &message, flags)?;
        let mut data = vec![0; got.count];
        self.shim.system.read_memory(ROOM, &mut data)?;
        Ok(data)
    }

    /// A whole message, header first, as QEMU reads it.
    pub(super) fn message(&self) -> Vec<u8> {
        let mut message = self.exactly(16);
        let header = Header::parse(message.first_chunk().unwrap()).unwrap();
        message.extend(self.exactly(header.body_size as usize));
        message
    }

    fn exactly(&self, count: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < count {
            match self.receive(count - data.len()) {
                Ok(more) => {
                    assert!(!more.is_empty(), "the stream has ended");
                    data.extend(more);
                }
                Err(Errno::AGAIN) => self.wait(),
                Err(error) => panic!("{error}"),
            }
        }
        data
    }

    fn wait(&self) {
        use rustix::event::{PollFd, PollFlags, poll};
        let socket = self.shim.system.socket(self.fd).unwrap();
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
    }
}

/// Data at a place in memory, in one piece.
pub(super) fn whole(address: usize, len: usize) -> SocketMessage {
    SocketMessage { extents: vec![Extent { address, len }], ..SocketMessage::default() }
}

/// A message as bytes.
pub(super) fn message(id: u16, command: u16, kind: MessageKind, body: &[u8]) -> Vec<u8> {
    let body_size = u32::try_from(body.len()).unwrap();
    let header = Header { id: MessageId(id), command, body_size, kind };
    [&header.to_bytes(), body].concat()
}

pub(super) const ASK: MessageKind = MessageKind::Command { no_reply: false };
pub(super) const YES: MessageKind = MessageKind::Reply { error: None };

/// The VERSION of a VMM that knows nothing of us.
pub(super) fn version(id: u16) -> Vec<u8> {
    let mut version = Version::proposal();
    version.capabilities.barkeep = None;
    message(id, Command::Version.code(), ASK, &version.to_bytes())
}

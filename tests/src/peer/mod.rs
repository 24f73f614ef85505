//! A client that says whatever a test wants said.

pub mod decode_page;
pub mod message;
pub mod requests;

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recv, recvmsg, send, sendmsg,
};

use self::message::{COMMAND, Reply, command, message, u16_at, u32_at};

/// Longer than the handshake deadline of a backend, after which the next client is served.
const DEADLINE: Duration = Duration::from_secs(8);

/// As many descriptors as the kernel lets a hostile client send with one message (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// One connection to a backend.
#[derive(Debug)]
pub struct Peer {
    socket: UnixStream,
    next_id: u16,
}

impl Peer {
    /// Connects, and says nothing yet.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).expect("the backend listens");
        socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        socket.set_write_timeout(Some(DEADLINE)).expect("a deadline");
        // Any number will do that is not the one that a reply of zeros would have.
        Self { socket, next_id: 0x4201 }
    }

    /// Speaks over a socket that somebody else connected.
    #[must_use]
    pub fn over(socket: OwnedFd) -> Self {
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        Self { socket, next_id: 0x4201 }
    }

    /// Waits for answers so much longer than usual: a backend may have to die of them first.
    pub fn wait_for(&mut self, deadline: Duration) {
        self.socket.set_read_timeout(Some(deadline)).expect("a deadline");
    }

    /// Connects and negotiates version 0.2 with every extension.
    #[must_use]
    pub fn greeted(path: &Path) -> Self {
        let mut peer = Self::connect(path);
        peer.greet();
        peer
    }

    /// Sends bytes, in one system call as long as the socket takes them.
    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the backend reads");
    }

    /// Sends bytes as [`send`](Self::send) does to a backend that may hang up meanwhile.
    ///
    /// # Errors
    /// If it has hung up.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends bytes unless the socket is full; tells how many of them.
    pub fn send_without_waiting(&mut self, bytes: &[u8]) -> usize {
        match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => count,
            Err(Errno::AGAIN) => 0,
            Err(errno) => unreachable!("the backend is there: {errno}"),
        }
    }

    /// Sends bytes with file descriptors, in one system call.
    pub fn send_with_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.try_send_with_fds(bytes, fds), Ok(bytes.len()));
    }

    /// Sends them to a backend that may hang up meanwhile; tells how many bytes went.
    ///
    /// # Errors
    /// If it has hung up.
    pub fn try_send_with_fds(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
    }

    /// Reads one message.
    pub fn receive(&mut self) -> Reply {
        let mut fds = Vec::new();
        let mut header = [0; 16];
        self.fill(&mut header, &mut fds);
        let size = u32_at(&header, 4);
        let rest = size.checked_sub(16).expect("a message is as long as its header at least");
        let mut body = vec![0; rest as usize];
        self.fill(&mut body, &mut fds);
        Reply {
            id: u16_at(&header, 0),
            command: u16_at(&header, 2),
            flags: u32_at(&header, 8),
            error: u32_at(&header, 12),
            body,
            fds,
        }
    }

    /// Reads so many bytes of whatever they are.
    pub fn read_bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(&mut bytes, &mut Vec::new());
        bytes
    }

    /// Sends a command and reads its reply.
    pub fn call(&mut self, command: u16, body: &[u8]) -> Reply {
        let id = self.take_id();
        self.send(&message(id, command, COMMAND, body));
        self.reply_to(id, command)
    }

    /// Sends a command with file descriptors and reads its reply.
    pub fn call_with_fds(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Reply {
        let id = self.take_id();
        self.send_with_fds(&message(id, command, COMMAND, body), fds);
        self.reply_to(id, command)
    }

    /// Sends a command that must fail with `errno`.
    pub fn expect_errno(&mut self, command: u16, body: &[u8], errno: Errno) {
        self.call(command, body).failure(errno);
    }

    /// Reads one message that must be the reply to this command.
    pub fn reply_to(&mut self, id: u16, command: u16) -> Reply {
        let reply = self.receive();
        assert_eq!((reply.id, reply.command), (id, command), "a reply to something else");
        reply
    }

    /// A message ID of our choice, another one each time.
    pub fn take_id(&mut self) -> u16 {
        self.next_id = self.next_id.wrapping_add(1);
        self.next_id
    }

    /// Waits for the backend to hang up without another word.
    pub fn expect_closed(&mut self) {
        assert_eq!(self.drain(), 0, "the backend says more before it hangs up");
    }

    /// Reads until the backend hangs up; tells how many bytes there were.
    pub fn drain(&mut self) -> usize {
        let mut bytes = Vec::new();
        match self.socket.read_to_end(&mut bytes) {
            Ok(_) => {}
            // What we sent and it never read turns its close into a reset.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => unreachable!("the backend does not hang up: {error}"),
        }
        bytes.len()
    }

    /// Says that nothing more will come, and still reads.
    pub fn finish_sending(&mut self) {
        // A backend that has hung up already is as good.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    /// Whether nothing has arrived so far.
    #[must_use]
    pub fn hears_nothing(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        recv(&self.socket, &mut [0; 1], flags) == Err(Errno::AGAIN)
    }

    fn fill(&mut self, mut rest: &mut [u8], fds: &mut Vec<OwnedFd>) {
        while !rest.is_empty() {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(rest)];
            let message =
                recvmsg(&self.socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
                    .expect("the backend answers in time");
            assert_ne!(message.bytes, 0, "the backend hung up where a reply was due");
            for item in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = item {
                    fds.extend(received);
                }
            }
            rest = &mut rest[message.bytes..];
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// VERSION data as it goes over the wire: JSON and its terminating NUL behind the two numbers.
#[must_use]
pub fn version_body(major: u16, minor: u16, json: &str) -> Vec<u8> {
    message::Payload::new().u16(major).u16(minor).bytes(json.as_bytes()).bytes(&[0]).done()
}

impl Peer {
    /// Negotiates version 0.2 with every extension.
    pub fn greet(&mut self) {
        let json = r#"{"capabilities":{"max_msg_fds":16,
            "barkeep":{"memory_fault":true,"region_state":true,"decode_page":true}}}"#;
        let _ = self.call(command::VERSION, &version_body(0, 2, json)).success();
    }
}

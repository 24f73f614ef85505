//! The client's end of the connection, in the same thread as the server's.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use barkeep_backend::server::ServedFunction;
use barkeep_backend::server::fuzzing::Connection;
use barkeep_fuzz::script::How;
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
    recvmsg, sendmsg, shutdown, socketpair,
};

use super::expected::{Expected, ServerCommand, Socket};
use super::message::{DMA_READ, ERROR, HEADER, Header, REPLY, VERSION, command};

/// `max_msg_fds` that the server announces.
const MAX_FDS: usize = 16;

pub(crate) struct Client {
    socket: OwnedFd,
    twin: Option<OwnedFd>,
    /// `None` when the session has ended.
    connection: Option<Connection>,
    pub(crate) expected: Expected,
    /// Commands of the server are answered at once.
    answers: bool,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) fn new(function: &ServedFunction, answers: bool) -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .expect("a socket pair");
        Self {
            socket: ours,
            twin: None,
            connection: Some(Connection::new(theirs, function).expect("an epoll instance")),
            expected: Expected::default(),
            answers,
            buffer: vec![0; 1 << 16],
        }
    }

    pub(crate) fn has_twin(&self) -> bool {
        self.twin.is_some()
    }

    /// Sends bytes with descriptors, while the server reads and answers what it can.
    pub(crate) fn send(
        &mut self,
        socket: Socket,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        function: &mut ServedFunction,
    ) {
        let (mut rest, mut fds) = (bytes, fds);
        while !rest.is_empty() && self.connection.is_some() {
            let Some(to) = self.socket(socket) else { return };
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(17))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(to, &[IoSlice::new(rest)], &mut ancillary, flags) {
                Ok(count) => {
                    self.expected.sent(socket, &rest[..count]);
                    (rest, fds) = (&rest[count..], &[]);
                }
                Err(Errno::AGAIN) => self.serve(function),
                Err(errno) => unreachable!("the server's end is open: {errno}"),
            }
        }
    }

    /// Lets the server come to rest, and checks that nothing is owed.
    pub(crate) fn settle(&mut self, function: &mut ServedFunction) -> ControlFlow<()> {
        loop {
            self.serve(function);
            if self.connection.is_none() {
                return ControlFlow::Break(());
            }
            self.expected.nothing_is_owed();
            if !self.answers || self.answer(How::Spec, 0xa5, None, function).is_break() {
                return ControlFlow::Continue(());
            }
        }
    }

    /// Answers the oldest command of the server; tells whether there was one.
    pub(crate) fn answer(
        &mut self,
        how: How,
        byte: u8,
        fd: Option<BorrowedFd<'_>>,
        function: &mut ServedFunction,
    ) -> ControlFlow<()> {
        let commands = &mut self.expected.commands;
        let Some(command) = commands.iter_mut().find(|command| !command.ignored) else {
            return ControlFlow::Break(());
        };
        if how == How::Never {
            command.ignored = true;
            return ControlFlow::Continue(());
        }
        let command = *command;
        // A reply in the middle of another message would be none.
        if !self.expected.is_at_boundary(command.socket) {
            return ControlFlow::Break(());
        }
        if matches!(how, How::Spec | How::Qemu | How::Error) {
            self.expected.answers(&command);
        }
        let fds: Vec<_> = fd.into_iter().filter(|_| how == How::Descriptor).collect();
        self.send(command.socket, &reply(command, how, byte), &fds, function);
        ControlFlow::Continue(())
    }

    /// Sends a command and returns the payload of its reply; `None` if that is an error, or none is
    /// to be had.
    pub(crate) fn ask(
        &mut self,
        code: u16,
        body: &[u8],
        function: &mut ServedFunction,
    ) -> Option<Vec<u8>> {
        /// Not a number that a script would have come to.
        const ID: u16 = 0xfffe;
        if self.connection.is_none()
            || !self.expected.is_greeted()
            || !self.expected.is_at_boundary(Socket::Main)
        {
            return None;
        }
        self.expected.last_reply = None;
        self.send(Socket::Main, &command(ID, code, body), &[], function);
        self.serve(function);
        let reply = self.expected.last_reply.take().filter(|reply| reply.header.id == ID)?;
        (!reply.header.is_error()).then_some(reply.body)
    }

    /// Closes the twin socket, which ends the session.
    pub(crate) fn hang_up(&mut self) {
        if self.twin.take().is_some() {
            self.expected.leaves();
        }
    }

    /// Hangs up, and lets the server see it.
    pub(crate) fn leave(mut self, function: &mut ServedFunction) {
        if self.connection.is_some() {
            shutdown(&self.socket, Shutdown::Write).expect("a connected socket");
            self.expected.leaves();
            self.serve(function);
        }
        assert!(self.connection.is_none(), "the session outlives its client");
    }

    fn socket(&self, socket: Socket) -> Option<BorrowedFd<'_>> {
        match socket {
            Socket::Main => Some(self.socket.as_fd()),
            Socket::Twin => self.twin.as_ref().map(AsFd::as_fd),
        }
    }

    /// Serves and reads until neither side has anything for the other.
    fn serve(&mut self, function: &mut ServedFunction) {
        while let Some(mut connection) = self.connection.take() {
            let goes_on = connection.serve(function).expect("an epoll instance");
            if goes_on {
                self.connection = Some(connection);
                if self.read() == 0 {
                    return;
                }
            } else {
                connection.end(function);
                while self.read() > 0 {}
                self.expected.ended();
            }
        }
    }

    /// Reads what has arrived, and checks it; tells how many bytes it was.
    fn read(&mut self) -> usize {
        self.read_from(Socket::Main) + self.read_from(Socket::Twin)
    }

    fn read_from(&mut self, socket: Socket) -> usize {
        let mut total = 0;
        loop {
            let from = match socket {
                Socket::Main => Some(self.socket.as_fd()),
                Socket::Twin => self.twin.as_ref().map(AsFd::as_fd),
            };
            let Some(from) = from else { return total };
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2 * MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let message = match recvmsg(from, &mut parts, &mut ancillary, flags) {
                Ok(message) => message,
                Err(Errno::AGAIN | Errno::CONNRESET) => return total,
                Err(errno) => unreachable!("our own socket: {errno}"),
            };
            assert!(!message.flags.contains(ReturnFlags::CTRUNC), "too many descriptors");
            let mut fds = Vec::new();
            for item in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = item {
                    fds.extend(received);
                }
            }
            assert!(fds.len() <= MAX_FDS && (fds.is_empty() || socket == Socket::Main));
            if message.bytes == 0 {
                return total;
            }
            total += message.bytes;
            // A message with descriptors is not read together with others.
            if !fds.is_empty() && self.buffer[2..4] == VERSION.to_ne_bytes() {
                assert!(fds.len() == 1 && self.twin.is_none(), "a twin socket");
                self.twin = fds.pop();
                self.expected.has_twin = true;
            }
            self.expected.received(socket, &self.buffer[..message.bytes]);
        }
    }
}

/// The bytes of an answer to a command of the server.
fn reply(command: ServerCommand, how: How, byte: u8) -> Vec<u8> {
    let ServerCommand { mut id, command, mut address, count, .. } = command;
    match how {
        How::OtherId => id = id.wrapping_add(u16::from(byte).max(1)),
        How::OtherAddress => address ^= u64::from(byte).max(1) << 12,
        _ => {}
    }
    let mut body = [address.to_ne_bytes(), count.to_ne_bytes()].concat();
    if command == DMA_READ {
        let start = body.len();
        body.resize(start + usize::try_from(count).expect("at most 1 MiB"), byte);
        if how == How::Qemu {
            body.copy_within(start.., start - 4);
            body[start - 4 + usize::try_from(count).expect("at most 1 MiB")..].fill(0);
        }
    } else if how == How::Qemu {
        body.clear();
    }
    let (mut flags, mut error) = (REPLY, 0);
    match how {
        How::Error => {
            (flags, error) = (REPLY | ERROR, byte.into());
            body.clear();
        }
        How::Short => {
            body.pop();
        }
        _ => {}
    }
    let size = u32::try_from(HEADER + body.len()).expect("at most 1 MiB");
    Header { id, command, size, flags, error }.with(&body)
}

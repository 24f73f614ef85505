//! The client's end of the connection, in the same thread as the server's.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::ControlFlow;
use std::os::fd::{BorrowedFd, OwnedFd};

use barkeep_backend::server::ServedFunction;
use barkeep_backend::server::fuzzing::Connection;
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};

use super::expected::Expected;

/// `max_msg_fds` that the server announces.
const MAX_FDS: usize = 16;

pub(crate) struct Client {
    socket: OwnedFd,
    /// `None` when the session has ended.
    connection: Option<Connection>,
    expected: Expected,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) fn new(socket: OwnedFd, connection: Connection) -> Self {
        Self {
            socket,
            connection: Some(connection),
            expected: Expected::default(),
            buffer: vec![0; 1 << 16],
        }
    }

    /// Sends bytes with descriptors, while the server reads and answers what it can.
    pub(crate) fn send(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        function: &mut ServedFunction,
    ) {
        let (mut rest, mut fds) = (bytes, fds);
        while !rest.is_empty() && self.connection.is_some() {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(17))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
            }
            let parts = [IoSlice::new(rest)];
            match sendmsg(&self.socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.expected.sent(&rest[..count]);
                    (rest, fds) = (&rest[count..], &[]);
                }
                Err(Errno::AGAIN) => self.serve(function),
                Err(errno) => unreachable!("the server's end is open: {errno}"),
            }
        }
    }

    /// Lets the server come to rest, and checks that nothing is owed.
    pub(crate) fn settle(&mut self, function: &mut ServedFunction) -> ControlFlow<()> {
        self.serve(function);
        if self.connection.is_some() {
            self.expected.nothing_is_owed();
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
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

    /// Serves and reads until neither side has anything for the other.
    fn serve(&mut self, function: &mut ServedFunction) {
        while let Some(mut connection) = self.connection.take() {
            let goes_on = connection.serve(function);
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
        let mut total = 0;
        loop {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(2 * MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut self.buffer)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let message = match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Ok(message) => message,
                Err(Errno::AGAIN | Errno::CONNRESET) => return total,
                Err(errno) => unreachable!("our own socket: {errno}"),
            };
            assert!(!message.flags.contains(ReturnFlags::CTRUNC), "too many descriptors");
            for item in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = item {
                    assert!(received.count() <= MAX_FDS);
                }
            }
            if message.bytes == 0 {
                return total;
            }
            total += message.bytes;
            self.expected.received(&self.buffer[..message.bytes]);
        }
    }
}

//! What a daemon asks of us ("Back-end communication").

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use vhost::vhost_user::message::BackendReq;

use super::exchange::{HEADER, NEED_REPLY, REPLY, VERSION};

/// Our end of the socket on which a daemon sends requests. Nothing here waits for the daemon.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    /// The start of a message that has not come as a whole.
    received: Vec<u8>,
    config_changed: bool,
}

/// The daemon broke the channel, or misused it: it is not to be served any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// The longest payload; the requests that are known have 48 bytes and less.
const MAX_SIZE: usize = 4096;
/// What one call reads.
const AT_ONCE: usize = 4096;

impl Channel {
    /// A channel, and the daemon's end of it.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub(super) fn new() -> Result<(Self, OwnedFd), Errno> {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self { socket, received: Vec::new(), config_changed: false }, theirs))
    }

    /// Whether the daemon said since the last call that its configuration changed.
    pub(super) fn take_config_changed(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// Reads what is there, up to a page, and answers. Returns whether there may be more.
    ///
    /// # Errors
    /// [`Broken`].
    pub(super) fn serve(&mut self) -> Result<bool, Broken> {
        let mut data = [0; AT_ONCE];
        // Descriptors that come along have no place to go to, and the kernel closes them.
        match recv(&self.socket, &mut data, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(Broken),
            Ok((count, _)) => self.received.extend_from_slice(&data[..count]),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(_) => return Err(Broken),
        }
        while let Some((request, flags, length)) = self.next_header()? {
            if self.received.len() < length {
                break;
            }
            self.received.drain(..length);
            let known = request == u32::from(BackendReq::CONFIG_CHANGE_MSG);
            self.config_changed |= known;
            if flags & NEED_REPLY != 0 {
                self.answer(request, if known { 0 } else { 1 })?;
            }
        }
        Ok(true)
    }

    /// Request, flags, and length of the message with its header, if as much has come.
    fn next_header(&self) -> Result<Option<(u32, u32, usize)>, Broken> {
        let Some(header) = self.received.get(..HEADER) else { return Ok(None) };
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into().expect("four bytes");
            u32::from_ne_bytes(bytes)
        };
        match usize::try_from(word(8)) {
            Ok(size) if size <= MAX_SIZE => Ok(Some((word(0), word(4), HEADER + size))),
            _ => Err(Broken),
        }
    }

    fn answer(&self, request: u32, result: u64) -> Result<(), Broken> {
        let mut reply = Vec::with_capacity(HEADER + 8);
        for word in [request, VERSION | REPLY, 8] {
            reply.extend_from_slice(&word.to_ne_bytes());
        }
        reply.extend_from_slice(&result.to_ne_bytes());
        // A daemon that does not read its answers has more of them under way than it can ask for.
        match send(&self.socket, &reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) if count == reply.len() => Ok(()),
            _ => Err(Broken),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

//! One end's socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};

use super::{Frame, LinkError};

/// Room for what one end has sent and the other has not read yet: thousands of frames. The kernel
/// takes less if its limit is lower.
const BUFFER: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Channel(OwnedFd);

/// A message as it arrived.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) frame: Frame,
    pub(super) fd: Option<OwnedFd>,
    /// One was sent with it, but this process has no room for more descriptors.
    pub(super) fd_lost: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Wait,
    DontWait,
}

impl Channel {
    /// Both ends.
    pub(super) fn pair() -> Result<(Self, OwnedFd), LinkError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        for end in [&ours, &theirs] {
            set_socket_send_buffer_size(end, BUFFER)?;
        }
        Ok((Self(ours), theirs))
    }

    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a message, at once or not at all.
    pub(super) fn send(
        &self,
        frame: Frame,
        fd: Option<BorrowedFd<'_>>,
        patience: Patience,
    ) -> Result<(), LinkError> {
        let bytes = frame.to_bytes();
        let fds = fd.as_slice();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let mut flags = SendFlags::NOSIGNAL;
        flags.set(SendFlags::DONTWAIT, patience == Patience::DontWait);
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LinkError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes the next message; `None` only if there is none and we don't wait.
    pub(super) fn receive(&self, patience: Patience) -> Result<Option<Message>, LinkError> {
        // One more byte, or a longer message would look like ours.
        let mut bytes = [0; Frame::SIZE + 1];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut flags = RecvFlags::CMSG_CLOEXEC;
        flags.set(RecvFlags::DONTWAIT, patience == Patience::DontWait);
        let read = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
                Ok(read) => break read,
                Err(Errno::INTR) => {}
                // FromWorker once, when the other end closes without having read everything; what it has
                // sent is still here.
                Err(Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut fds = ancillary.drain().filter_map(|item| match item {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fd = fds.next().and_then(|mut fds| fds.next());
        if read.bytes == 0 {
            return Err(LinkError::Closed);
        }
        let frame = Frame::parse(&bytes[..read.bytes])?;
        let fd_lost = fd.is_none() && read.flags.contains(ReturnFlags::CTRUNC);
        Ok(Some(Message { frame, fd, fd_lost }))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

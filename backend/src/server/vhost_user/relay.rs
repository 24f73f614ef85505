//! Passes a session's messages on between the front-end and the crate.
//!
//! The crate refuses SET_VRING_ENABLE until the front-end has set `VHOST_USER_F_PROTOCOL_FEATURES`, and
//! ends the session. QEMU enables the rings of a network card while it makes it, long before that, and
//! may: it has the bit from GET_FEATURES, and has set protocol features. So the bit is set for it.

#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect,
    getsockname, listen, recv, recvmsg, sendmsg, socket_with,
};
use vhost::vhost_user::VhostUserVirtioFeatures;

/// Request, flags, size of the payload, 32 bits each.
const HEADER: usize = 12;
/// Longer payloads are refused by the crate, at the sight of the header.
const MAX_PAYLOAD: u32 = 0x1000;
/// The crate takes no more of them with a message.
const MAX_FILES: usize = 32;
/// What may wait for the crate. The kernel doubles it, a quarter of that is enough for it to say that a
/// socket is full, and half of it must hold a message: the crate reads a payload in one read. Few
/// messages are few descriptors in flight, of which there is a limit for all sessions together.
const SEND_BUFFER: usize = 0x2000;

const SET_FEATURES: u32 = 2;
const RESET_OWNER: u32 = 4;
const SET_VRING_ENABLE: u32 = 18;
const RESET_DEVICE: u32 = 34;

/// A connection to the crate, and what the crate accepts it from. Nobody else can get in between: the
/// listener has room for one connection, which is this one when this succeeds.
///
/// # Errors
/// When the process has no more descriptors, or somebody else connected first.
pub(super) fn connection() -> io::Result<(UnixListener, UnixStream)> {
    let socket = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
    };
    let (listener, stream) = (socket()?, socket()?);
    // The kernel makes a name up.
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    listen(&listener, 0)?;
    connect(&stream, &getsockname(&listener)?)?;
    set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
    Ok((listener.into(), stream.into()))
}

/// The two connections of a session.
pub(super) struct Relay {
    pub(super) front_end: Arc<UnixStream>,
    pub(super) back_end: UnixStream,
}

impl Relay {
    /// Passes messages on until the crate or the front-end has gone. Both are told then.
    pub(super) fn run(&self) {
        let (mut requests, mut replies) = (Flow::default(), Flow::default());
        let mut features = Features::default();
        while !replies.ended() {
            let front = requests.reading() | replies.writing();
            let back = replies.reading() | requests.writing();
            let Ok((front, back)) = self.wait(front, back) else { break };
            if requests.go_on(self.front_end.as_fd(), front, self.back_end.as_fd(), back) {
                features.precede(&mut requests.bytes);
            }
            if requests.ended() {
                let _ = self.back_end.shutdown(Shutdown::Write);
            }
            replies.go_on(self.back_end.as_fd(), back, self.front_end.as_fd(), front);
        }
        let _ = self.front_end.shutdown(Shutdown::Both);
        self.finish();
    }

    /// Nobody is on the other side any more: what the crate has said is passed on, and that is all.
    pub(super) fn finish(&self) {
        let _ = self.back_end.shutdown(Shutdown::Both);
    }

    /// Waits for either. One that nothing is wanted of is left alone: that it was closed would end every
    /// wait at once.
    fn wait(&self, front: PollFlags, back: PollFlags) -> Result<(PollFlags, PollFlags), Errno> {
        let mut watched = Vec::with_capacity(2);
        for (socket, wanted) in [(&*self.front_end, front), (&self.back_end, back)] {
            if !wanted.is_empty() {
                watched.push(PollFd::new(socket, wanted));
            }
        }
        match poll(&mut watched, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let mut news = watched.iter().map(PollFd::revents);
        let mut take = |wanted: PollFlags| match wanted.is_empty() {
            true => PollFlags::empty(),
            false => news.next().unwrap_or(PollFlags::empty()),
        };
        Ok((take(front), take(back)))
    }
}

/// What the crate knows of features.
#[derive(Default)]
struct Features {
    set: bool,
}

impl Features {
    /// Puts a SET_FEATURES before a request that the crate does not take without one. It asks for no
    /// answer, so there is none to hide.
    fn precede(&mut self, request: &mut Vec<u8>) {
        match word(request, 0) {
            Some(SET_FEATURES) => self.set = true,
            Some(RESET_OWNER | RESET_DEVICE) => self.set = false,
            Some(SET_VRING_ENABLE) if !self.set => {
                self.set = true;
                let features = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
                let header = [SET_FEATURES, 1, 8].map(u32::to_ne_bytes).concat();
                request.splice(0..0, header.into_iter().chain(features.to_ne_bytes()));
            }
            _ => {}
        }
    }
}

/// Messages in one direction, one at a time.
#[derive(Default)]
struct Flow {
    phase: Phase,
    bytes: Vec<u8>,
    files: Vec<OwnedFd>,
}

enum Phase {
    /// So many bytes of a message are here.
    Reading {
        held: usize,
    },
    /// So many have been passed on. Behind the last message, nothing is read.
    Writing {
        sent: usize,
        last: bool,
    },
    Ended,
}

impl Default for Phase {
    fn default() -> Self {
        Self::Reading { held: 0 }
    }
}

impl Flow {
    /// What it waits for where messages come from.
    fn reading(&self) -> PollFlags {
        match self.phase {
            Phase::Reading { .. } => PollFlags::IN,
            _ => PollFlags::empty(),
        }
    }

    /// What it waits for where they go.
    fn writing(&self) -> PollFlags {
        match self.phase {
            Phase::Writing { .. } => PollFlags::OUT,
            _ => PollFlags::empty(),
        }
    }

    fn ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// Reads or writes what it can. Returns whether a message has become whole.
    fn go_on(
        &mut self,
        from: BorrowedFd<'_>,
        from_news: PollFlags,
        to: BorrowedFd<'_>,
        to_news: PollFlags,
    ) -> bool {
        let gone = PollFlags::HUP | PollFlags::ERR;
        match self.phase {
            Phase::Reading { held } if from_news.intersects(gone | PollFlags::IN) => {
                self.phase = self.read(from, held);
                matches!(self.phase, Phase::Writing { .. })
            }
            Phase::Writing { sent, last } if to_news.intersects(gone | PollFlags::OUT) => {
                self.phase = self.write(to, sent, last);
                false
            }
            _ => false,
        }
    }

    fn read(&mut self, from: BorrowedFd<'_>, mut held: usize) -> Phase {
        loop {
            let payload = if held < HEADER { 0 } else { word(&self.bytes, 2).unwrap_or(0) };
            let last = payload > MAX_PAYLOAD;
            let size = HEADER + if last { 0 } else { payload as usize };
            if held == size {
                return Phase::Writing { sent: 0, last };
            }
            self.bytes.resize(size, 0);
            let room = &mut self.bytes[held..];
            // Descriptors come with the first byte, for the crate as for anybody.
            let read = match held {
                0 => receive(from, room, &mut self.files),
                _ => recv(from, room, RecvFlags::DONTWAIT).map(|(_, count)| count),
            };
            match read {
                Ok(0) => return Phase::Ended,
                Ok(count) => held += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Phase::Reading { held },
                Err(_) => return Phase::Ended,
            }
        }
    }

    fn write(&mut self, to: BorrowedFd<'_>, sent: usize, last: bool) -> Phase {
        match send(to, &self.bytes[sent..], &self.files) {
            Ok(count) => {
                self.files.clear();
                match sent + count {
                    sent if sent < self.bytes.len() => Phase::Writing { sent, last },
                    _ if last => Phase::Ended,
                    _ => Phase::default(),
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => Phase::Writing { sent, last },
            Err(_) => Phase::Ended,
        }
    }
}

/// The `index`th 32 bits of a message.
fn word(message: &[u8], index: usize) -> Option<u32> {
    message.get(4 * index..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

/// Reads bytes, and the descriptors that came with them. If there are more than a message may have, the
/// kernel has dropped the others.
fn receive(
    socket: BorrowedFd<'_>,
    room: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let read = recvmsg(socket, &mut [IoSliceMut::new(room)], &mut control, flags)?;
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = item {
            files.extend(received);
        }
    }
    Ok(read.bytes)
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], files: &[OwnedFd]) -> Result<usize, Errno> {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(Errno::TOOMANYREFS);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

//! The host's end of a console.

mod pty;
mod socket;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use self::pty::Pty;
use self::socket::Socket;
use super::Options;
use crate::socket_path::SocketError;

/// The host's end of a console, and whoever is there. Nothing here waits.
#[derive(Debug)]
pub(super) struct Port {
    /// Watches all of it, by edges: clients come and go, and the device has one wake.
    epoll: OwnedFd,
    /// Signalled to be woken again.
    again: OwnedFd,
    end: End,
}

#[derive(Debug)]
enum End {
    Socket(Socket),
    Pty(Pty),
}

/// What became of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// So many bytes went out, one at least.
    Sent(usize),
    /// Whoever is there has to read first. The port wakes when they did.
    Blocked,
    /// Nobody is there.
    Nobody,
}

/// What an event is about. Those of the ends are their own.
const AGAIN: u64 = 0;

impl Port {
    pub(super) fn new(options: &Options) -> Result<Self, SocketError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watch(&epoll, &again, AGAIN, EventFlags::IN)?;
        let end = match options {
            Options::Socket(path) => End::Socket(Socket::new(path, &epoll)?),
            Options::Pty(path) => End::Pty(Pty::new(path, &epoll)?),
        };
        Ok(Self { epoll, again, end })
    }

    /// Readable when there may be something to do.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Sees who came and who went.
    pub(super) fn update(&mut self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = [const { MaybeUninit::uninit() }; 4];
        // It can't fail: it waits for nothing.
        let found = epoll::wait(&self.epoll, &mut events, Some(&now));
        for event in found.map(|(events, _)| &*events).unwrap_or_default() {
            let (source, flags) = (event.data.u64(), event.flags);
            match &mut self.end {
                _ if source == AGAIN => {
                    let _ = rustix::io::read(&self.again, &mut [0; 8]);
                }
                End::Socket(socket) => socket.event(source, flags),
                End::Pty(pty) => pty.event(source),
            }
        }
        if let End::Socket(socket) = &mut self.end {
            socket.accept(&self.epoll);
        }
    }

    /// Input that is there now; returns how much. `bytes` may not be empty.
    pub(super) fn read(&mut self, bytes: &mut [u8]) -> usize {
        let read = match &mut self.end {
            End::Socket(socket) => socket.read(bytes),
            End::Pty(pty) => pty.read(bytes),
        };
        self.see_who_left();
        read
    }

    /// Output, which may not be empty.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Output {
        let output = match &mut self.end {
            End::Socket(socket) => socket.write(bytes),
            End::Pty(pty) => pty.write(bytes),
        };
        self.see_who_left();
        output
    }

    /// The next client comes in at the next update, and for that there must be one.
    fn see_who_left(&self) {
        if matches!(&self.end, End::Socket(socket) if socket.is_left()) {
            self.wake_again();
        }
    }

    /// Wakes once more, though nothing happens: a turn ended early.
    pub(super) fn wake_again(&self) {
        // Full, it is as readable as can be.
        let _ = rustix::io::write(&self.again, &1u64.to_ne_bytes());
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, source: u64, interest: EventFlags) -> Result<(), Errno> {
    epoll::add(epoll, fd, EventData::new_u64(source), interest | EventFlags::ET)
}

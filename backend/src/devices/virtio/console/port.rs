//! The host's end of a console.

mod patience;
mod pty;
mod socket;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

use self::patience::Patience;
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
    patience: Patience,
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
    /// Whoever is there has not read for so long that it is not waited for any more. To be
    /// [counted](Port::count_dropped).
    Dropped,
    /// Nobody is there.
    Nobody,
}

/// What an event is about. 1 and 2 are the ends' own.
const AGAIN: u64 = 0;
const PATIENCE: u64 = 3;

/// What goes out in one call, in bytes. The kernel keeps it together, and has room again only when
/// all of it is taken: with more, a reader that is slow would look as one that does not read.
const SLICE: usize = 512;

impl Port {
    /// Output waits for a reader that takes nothing for as long as `patience`.
    pub(super) fn new(options: &Options, patience: Duration) -> Result<Self, SocketError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let again = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watch(&epoll, &again, AGAIN, EventFlags::IN)?;
        let patience = Patience::new(patience, options.path())?;
        watch(&epoll, patience.timer(), PATIENCE, EventFlags::IN)?;
        let end = match options {
            Options::Socket(path) => End::Socket(Socket::new(path, &epoll)?),
            Options::Pty(path) => End::Pty(Pty::new(path, &epoll)?),
        };
        Ok(Self { epoll, again, end, patience })
    }

    /// Readable when there may be something to do.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// What runs while output waits.
    #[cfg(test)]
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.patience.timer()
    }

    /// Sees who came, who went, and who read.
    pub(super) fn update(&mut self) {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = [const { MaybeUninit::uninit() }; 4];
        // It can't fail: it waits for nothing.
        let found = epoll::wait(&self.epoll, &mut events, Some(&now));
        for event in found.map(|(events, _)| &*events).unwrap_or_default() {
            let (source, flags) = (event.data.u64(), event.flags);
            if flags.contains(EventFlags::OUT) {
                self.patience.renew();
            }
            match &mut self.end {
                _ if source == AGAIN => {
                    let _ = rustix::io::read(&self.again, &mut [0; 8]);
                }
                _ if source == PATIENCE => self.patience.expire(),
                End::Socket(socket) => socket.event(source, flags),
                End::Pty(pty) => pty.event(source),
            }
        }
        if !self.end.has_reader() {
            self.patience.renew();
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
        match self.write_now(bytes) {
            Output::Blocked => self.patience.blocked(),
            output => output,
        }
    }

    /// Output, which may not be empty, that does not wait when it is [`Output::Blocked`].
    pub(super) fn write_now(&mut self, bytes: &[u8]) -> Output {
        let exhausted = self.patience.is_exhausted();
        // Without bytes, it is only found whether they are still there.
        let output = self.end.write(if exhausted { &[] } else { bytes });
        self.see_who_left();
        if exhausted {
            return Output::Dropped;
        }
        if let Output::Sent(_) = output {
            self.patience.renew();
        }
        output
    }

    /// So much output was [dropped](Output::Dropped), in bytes.
    pub(super) fn count_dropped(&mut self, bytes: u64) {
        self.patience.count(bytes);
    }

    /// What was [blocked](Output::Blocked) will not be written again.
    pub(super) fn nothing_waits(&mut self) {
        self.patience.nothing_waits();
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

impl End {
    fn has_reader(&self) -> bool {
        match self {
            Self::Socket(socket) => socket.has_client(),
            Self::Pty(pty) => pty.is_open(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Output {
        let mut sent = 0;
        loop {
            let rest = &bytes[sent..];
            let slice = &rest[..rest.len().min(SLICE)];
            let output = match self {
                Self::Socket(socket) => socket.write(slice),
                Self::Pty(pty) => pty.write(slice),
            };
            match output {
                Output::Sent(more) if sent + more < bytes.len() => sent += more,
                Output::Sent(more) => return Output::Sent(sent + more),
                // The next call finds it again.
                _ if sent > 0 => return Output::Sent(sent),
                output => return output,
            }
        }
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd, source: u64, interest: EventFlags) -> Result<(), Errno> {
    epoll::add(epoll, fd, EventData::new_u64(source), interest | EventFlags::ET)
}

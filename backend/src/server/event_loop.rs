//! The `epoll` crate behind owned descriptors.
#![expect(unsafe_code, reason = "the epoll crate hands out its descriptor as a bare number")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Instant;

use epoll::{ControlOptions, Event, Events};

/// A level-triggered epoll instance.
#[derive(Debug)]
pub(super) struct Epoll(OwnedFd);

/// What a descriptor is watched for. Its end is always reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    Read,
    Write,
    ReadWrite,
    /// New data, once each time some arrives. For eventfds that nobody reads: a peer could empty one
    /// between the report and the read, which would then block.
    Edge,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The request to stop.
    Stop,
    /// The request to reload.
    Reload,
    /// What the supervisor has to say.
    Link,
    /// Something of the port with this index.
    Port(usize, Source),
}

/// What of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    /// The client's socket.
    Client,
    /// The socket for the server's own commands.
    Twin,
    /// The eventfd that unmasks INTx.
    Unmask,
    /// The eventfd with this index that wakes the device.
    Wake(u16),
    /// Work that was left; no descriptor stands for it.
    Work,
    /// A look at the client's socket although nothing is known to be there; likewise.
    Look,
    /// The request to reload, which is the same for all ports; likewise.
    Reload,
}

impl Token {
    const STOP: u64 = u64::MAX;
    const RELOAD: u64 = u64::MAX - 1;
    const LINK: u64 = u64::MAX - 2;
    /// Where the port's index starts; the source is below.
    const PORT_SHIFT: u32 = 20;
    const FIRST_WAKE: u64 = 7;

    fn to_raw(self) -> u64 {
        let (port, source) = match self {
            Self::Stop => return Self::STOP,
            Self::Reload => return Self::RELOAD,
            Self::Link => return Self::LINK,
            Self::Port(port, source) => (port, source),
        };
        let source = match source {
            Source::Listener => 0,
            Source::Client => 1,
            Source::Twin => 2,
            Source::Unmask => 3,
            Source::Work => 4,
            Source::Look => 5,
            Source::Reload => 6,
            Source::Wake(index) => Self::FIRST_WAKE + u64::from(index),
        };
        (port as u64) << Self::PORT_SHIFT | source
    }

    fn from_raw(raw: u64) -> Self {
        match raw {
            Self::STOP => return Self::Stop,
            Self::RELOAD => return Self::Reload,
            Self::LINK => return Self::Link,
            _ => {}
        }
        let source = match raw & ((1 << Self::PORT_SHIFT) - 1) {
            0 => Source::Listener,
            1 => Source::Client,
            2 => Source::Twin,
            3 => Source::Unmask,
            4 => Source::Work,
            5 => Source::Look,
            6 => Source::Reload,
            wake => Source::Wake(u16::try_from(wake - Self::FIRST_WAKE).unwrap_or(u16::MAX)),
        };
        Self::Port(usize::try_from(raw >> Self::PORT_SHIFT).unwrap_or(usize::MAX), source)
    }
}

/// How long to wait for events.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wait {
    /// Not at all.
    None,
    /// Until there is one, or it is that late.
    Until(Option<Instant>),
}

/// Room for what one wait reports; the rest is reported by the next.
const EVENTS: usize = 64;

impl Epoll {
    pub(super) fn new() -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: epoll_create1 has just returned this descriptor, so nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn add(&self, fd: BorrowedFd<'_>, token: Token, want: Interest) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, token, want)
    }

    pub(super) fn modify(
        &self,
        fd: BorrowedFd<'_>,
        token: Token,
        want: Interest,
    ) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, token, want)
    }

    pub(super) fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Token::Stop, Interest::Read)
    }

    /// Waits for events and puts them into `tokens` in place of what was there.
    pub(super) fn wait(&self, wait: Wait, tokens: &mut Vec<Token>) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); EVENTS];
        let timeout = match wait {
            Wait::None => 0,
            Wait::Until(None) => -1,
            Wait::Until(Some(at)) => {
                // One more than the rounded-down rest, or the last millisecond would be spun through.
                let rest = at.saturating_duration_since(Instant::now()).as_millis();
                i32::try_from(rest).unwrap_or(i32::MAX - 1) + 1
            }
        };
        tokens.clear();
        match epoll::wait(self.0.as_fd().as_raw_fd(), timeout, &mut events) {
            Ok(count) => {
                tokens.extend(events[..count].iter().map(|event| Token::from_raw(event.data)));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn control(
        &self,
        operation: ControlOptions,
        fd: BorrowedFd<'_>,
        token: Token,
        want: Interest,
    ) -> io::Result<()> {
        let events = match want {
            Interest::Read => Events::EPOLLIN,
            Interest::Write => Events::EPOLLOUT,
            Interest::ReadWrite => Events::EPOLLIN | Events::EPOLLOUT,
            Interest::Edge => Events::EPOLLIN | Events::EPOLLET,
        };
        let event = Event::new(events, token.to_raw());
        epoll::ctl(self.0.as_raw_fd(), operation, fd.as_raw_fd(), event)
    }
}

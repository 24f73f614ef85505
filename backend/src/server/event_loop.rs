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
}

/// What an event is about: the stop request, or a port's listener or session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(u64);

impl Token {
    pub(super) const STOP: Self = Self(u64::MAX);

    pub(super) fn listener(port: usize) -> Self {
        Self(port as u64 * 2)
    }

    pub(super) fn session(port: usize) -> Self {
        Self(port as u64 * 2 + 1)
    }

    pub(super) fn port(self) -> usize {
        usize::try_from(self.0 / 2).unwrap_or(usize::MAX)
    }

    pub(super) fn is_listener(self) -> bool {
        self.0.is_multiple_of(2)
    }
}

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
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, Token(0), Interest::Read)
    }

    /// Waits for events, at most until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> io::Result<Vec<Token>> {
        let mut events = [Event::new(Events::empty(), 0); 32];
        let timeout = deadline.map_or(-1, |at| {
            // One more than the rounded-down rest, or the last millisecond would be spun through.
            let rest = at.saturating_duration_since(Instant::now()).as_millis();
            i32::try_from(rest).unwrap_or(i32::MAX - 1) + 1
        });
        match epoll::wait(self.0.as_fd().as_raw_fd(), timeout, &mut events) {
            Ok(count) => Ok(events[..count].iter().map(|event| Token(event.data)).collect()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
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
        };
        let event = Event::new(events, token.0);
        epoll::ctl(self.0.as_raw_fd(), operation, fd.as_raw_fd(), event)
    }
}

//! What the supervisor waits for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

/// A level-triggered epoll instance.
#[derive(Debug)]
pub(super) struct Epoll(OwnedFd);

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// The request to end.
    Stop,
    /// The request to look at the surroundings anew.
    Reload,
    /// The request to replace all workers.
    Upgrade,
    /// A client for the function with this index.
    Listener(u32),
    /// The worker in this place says something, or can be told more.
    Link(u32),
    /// The worker in this place has ended.
    Ended(u32),
    /// The service manager can be told more.
    Manager,
}

/// Room for what one wait reports; the rest is reported by the next.
const EVENTS: usize = 64;

impl Epoll {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    pub(super) fn add(
        &self,
        fd: BorrowedFd<'_>,
        token: Token,
        flags: EventFlags,
    ) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, token.to_data(), flags)?)
    }

    pub(super) fn modify(
        &self,
        fd: BorrowedFd<'_>,
        token: Token,
        flags: EventFlags,
    ) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, token.to_data(), flags)?)
    }

    pub(super) fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits for events, at most until then.
    pub(super) fn wait(&self, until: Option<Instant>) -> io::Result<Vec<Token>> {
        let timeout = until.map(|at| {
            let rest = at.saturating_duration_since(Instant::now());
            Timespec::try_from(rest).unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 })
        });
        let mut events = [MaybeUninit::<Event>::uninit(); EVENTS];
        match epoll::wait(&self.0, &mut events, timeout.as_ref()) {
            Ok((events, _)) => {
                Ok(events.iter().map(|event| Token::from_data(event.data)).collect())
            }
            Err(Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Token {
    fn to_data(self) -> EventData {
        let (kind, index) = match self {
            Self::Stop => (0, 0),
            Self::Reload => (1, 0),
            Self::Upgrade => (2, 0),
            Self::Listener(function) => (3, function),
            Self::Link(slot) => (4, slot),
            Self::Ended(slot) => (5, slot),
            Self::Manager => (6, 0),
        };
        EventData::new_u64(kind << 32 | u64::from(index))
    }

    fn from_data(data: EventData) -> Self {
        let data = data.u64();
        let index = u32::try_from(data & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        match data >> 32 {
            0 => Self::Stop,
            1 => Self::Reload,
            2 => Self::Upgrade,
            3 => Self::Listener(index),
            4 => Self::Link(index),
            5 => Self::Ended(index),
            _ => Self::Manager,
        }
    }
}

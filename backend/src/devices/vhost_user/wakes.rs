use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use crate::devices::timer::Timer;
use crate::irq::EventFd;

/// Everything that wakes a bridge, behind one descriptor: connections come and go, and a function's
/// wakes stay the same.
#[derive(Debug)]
pub(super) struct Wakes {
    epoll: OwnedFd,
    timer: Timer,
    again: EventFd,
}

/// What woke it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// The connection to the daemon.
    Daemon,
    /// What the daemon asks.
    Channel,
    /// The time that was set.
    Timer,
    /// The daemon says that a ring is broken.
    Broken,
    /// It [asked](Wakes::again) for it.
    Again,
    /// The daemon gave buffers of a queue back.
    Queue(u16),
    /// The driver notified a queue that is relayed.
    Kick(u16),
}

const QUEUES: u64 = 1 << 16;
const KICKS: u64 = 2 << 16;
/// As many as one call reports.
const AT_ONCE: usize = 64;

impl Wake {
    fn to_data(self) -> epoll::EventData {
        epoll::EventData::new_u64(match self {
            Self::Daemon => 0,
            Self::Channel => 1,
            Self::Timer => 2,
            Self::Broken => 3,
            Self::Again => 4,
            Self::Queue(index) => QUEUES + u64::from(index),
            Self::Kick(index) => KICKS + u64::from(index),
        })
    }

    fn from_data(data: epoll::EventData) -> Self {
        let index = u16::try_from(data.u64() & 0xffff).expect("16 bits");
        match data.u64() {
            0 => Self::Daemon,
            1 => Self::Channel,
            2 => Self::Timer,
            3 => Self::Broken,
            KICKS.. => Self::Kick(index),
            QUEUES.. => Self::Queue(index),
            _ => Self::Again,
        }
    }
}

impl Wakes {
    /// # Errors
    /// When the process has no more descriptors.
    pub(super) fn new() -> Result<Self, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wakes = Self { epoll, timer: Timer::new()?, again: EventFd::create()? };
        wakes.watch(wakes.timer.as_fd(), Wake::Timer)?;
        wakes.watch(wakes.again.as_fd(), Wake::Again)?;
        Ok(wakes)
    }

    /// Watches a descriptor for edges of readability: nobody reads the counters of eventfds.
    ///
    /// # Errors
    /// When the kernel has no more room.
    pub(super) fn watch(&self, fd: BorrowedFd<'_>, wake: Wake) -> Result<(), Errno> {
        let events = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, fd, wake.to_data(), events)
    }

    /// Ends the watch of a descriptor that somebody else has too, so that closing it is not enough.
    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// What woke it since the last call.
    pub(super) fn take(&self) -> Vec<Wake> {
        let no_wait = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = Vec::with_capacity(AT_ONCE);
        let spare = rustix::buffer::spare_capacity(&mut events);
        let count = epoll::wait(&self.epoll, spare, Some(&no_wait)).unwrap_or(0);
        if count == AT_ONCE {
            self.again();
        }
        events.iter().map(|event: &epoll::Event| Wake::from_data(event.data)).collect()
    }

    /// Wakes itself.
    pub(super) fn again(&self) {
        self.again.signal();
    }

    /// Wakes once, that much later. An earlier time that was set is forgotten.
    pub(super) fn set_timer(&self, after: Duration) {
        self.timer.set(after);
    }
}

impl AsFd for Wakes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

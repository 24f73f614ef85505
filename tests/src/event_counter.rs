//! The client's end of an interrupt.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// An eventfd that is read without waiting, as long as nobody makes it blocking.
///
/// A backend signals before it answers the request that caused the interrupt, so after a reply the
/// counter is final: a zero proves that nothing was sent.
#[derive(Debug)]
pub struct EventCounter(OwnedFd);

impl EventCounter {
    /// A counter at zero.
    #[must_use]
    pub fn new() -> Self {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Self(eventfd(0, flags).expect("an eventfd"))
    }

    /// The signals since the last call.
    #[must_use]
    pub fn take(&self) -> u64 {
        let mut bytes = [0; 8];
        match rustix::io::read(&self.0, &mut bytes) {
            Ok(8) => u64::from_ne_bytes(bytes),
            Err(Errno::AGAIN) => 0,
            other => unreachable!("an eventfd is read whole or not at all: {other:?}"),
        }
    }

    /// Whether there is a signal within a long time, which is taken then.
    #[must_use]
    pub fn wait(&self) -> bool {
        let deadline = Timespec { tv_sec: 20, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&deadline));
        ready == Ok(1) && self.take() > 0
    }

    /// Brings a counter that is at zero to its maximum: the next signal would have to wait.
    pub fn fill(&self) {
        let count = rustix::io::write(&self.0, &(u64::MAX - 1).to_ne_bytes());
        assert_eq!(count, Ok(8), "an empty counter takes its maximum");
    }
}

impl Default for EventCounter {
    fn default() -> Self {
        Self::new()
    }
}

impl AsFd for EventCounter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

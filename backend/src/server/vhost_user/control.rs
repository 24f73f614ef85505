use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::irq::EventFd;

/// What the main thread and those of the devices tell each other.
#[derive(Debug)]
pub(super) struct Control {
    stopping: AtomicBool,
    /// Readable for ever from the beginning of the stop.
    stop: EventFd,
    /// Signalled for the main thread when there is a deadline that it does not know.
    deadline: EventFd,
}

impl Control {
    pub(super) fn new() -> Result<Self, Errno> {
        let (stop, deadline) = (EventFd::create()?, EventFd::create()?);
        Ok(Self { stopping: AtomicBool::new(false), stop, deadline })
    }

    pub(super) fn begin_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.stop.signal();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// For a poll that ends with the stop.
    pub(super) fn stop_request(&self) -> PollFd<'_> {
        PollFd::new(&self.stop, PollFlags::IN)
    }

    /// Waits for a while, or for the stop.
    pub(super) fn pause(&self, time: &Timespec) {
        let _ = poll(&mut [self.stop_request()], Some(time));
    }

    pub(super) fn new_deadline(&self) {
        self.deadline.signal();
    }

    /// For a poll that ends with a new deadline.
    pub(super) fn deadline_news(&self) -> PollFd<'_> {
        PollFd::new(&self.deadline, PollFlags::IN)
    }

    pub(super) fn take_deadline_news(&self) {
        // Ours alone, and it does not block.
        let _ = rustix::io::read(&self.deadline, &mut [0; 8]);
    }
}

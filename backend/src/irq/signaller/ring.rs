//! Signals by io_uring: each request that is done signals the eventfd that the ring is registered
//! with. The request here does nothing and is done when `io_uring_enter` returns.
#![expect(unsafe_code, reason = "requests of an io_uring are raw")]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, Probe, opcode};

/// A ring, and the eventfd that it signals.
pub(super) struct Ring {
    ring: IoUring,
    /// By identity. Traffic is mostly about one eventfd for a while.
    registered: Option<u64>,
}

/// One request is under way at a time.
const ENTRIES: u32 = 2;

impl Ring {
    /// # Errors
    /// When the kernel has no io_uring, denies it, or is so old that registering an eventfd waits for
    /// the rest of the kernel.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        // Linux 6.0. Registering is quick since 5.19, which nothing tells by itself.
        if !probe.is_supported(opcode::SendZc::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, registered: None })
    }

    /// What can't be registered is no eventfd, and is left alone.
    pub(super) fn signal(&mut self, eventfd: BorrowedFd<'_>, identity: u64) {
        if self.registered != Some(identity) {
            if self.registered.take().is_some() {
                let _ = self.ring.submitter().unregister_eventfd();
            }
            if self.ring.submitter().register_eventfd(eventfd.as_raw_fd()).is_err() {
                return;
            }
            self.registered = Some(identity);
        }
        let nothing = opcode::Nop::new().build();
        // SAFETY: a request that does nothing refers to nothing. The queue has room, as each request
        // is submitted at once.
        let _ = unsafe { self.ring.submission().push(&nothing) };
        let _ = self.ring.submit();
        // Room for the next: what they say is known.
        self.ring.completion().for_each(drop);
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("registered", &self.registered).finish_non_exhaustive()
    }
}

//! Signals eventfds without ever blocking.
//!
//! A write to an eventfd blocks while its counter is full, unless `O_NONBLOCK` is set; but that flag
//! belongs to the open file, which the client shares and can clear again at any moment. A hostile
//! client could stop this process in the write, and with it every function that it serves. Inside
//! the kernel a signal never blocks, and two interfaces give access to that: an io_uring signals its
//! eventfd when a request completes, and so does Linux AIO. The latter is second choice: a process
//! with an AIO context takes tens of milliseconds to die, and its successor waits for that.

mod aio;
mod ring;

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use self::aio::Aio;
use self::ring::Ring;

/// The process's way to signal.
#[derive(Debug)]
enum Signaller {
    Ring(Box<Mutex<Ring>>),
    Aio(Aio),
}

/// Adds one to the counter of an eventfd. A full counter stays full; anything that is no eventfd is
/// left alone. `identity` is the same only for the same descriptor.
pub(super) fn signal(eventfd: BorrowedFd<'_>, identity: u64) {
    match signaller() {
        Some(Signaller::Ring(ring)) => {
            ring.lock().unwrap_or_else(PoisonError::into_inner).signal(eventfd, identity);
        }
        Some(Signaller::Aio(aio)) => aio.signal(eventfd),
        None => {
            let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
    }
}

/// Whether a signal is a write after all: the kernel has neither, or denies both.
pub(super) fn writes() -> bool {
    signaller().is_none()
}

fn signaller() -> Option<&'static Signaller> {
    static SIGNALLER: OnceLock<Option<Signaller>> = OnceLock::new();
    let ring = || Ring::new().ok().map(|ring| Signaller::Ring(Box::new(Mutex::new(ring))));
    SIGNALLER.get_or_init(|| ring().or_else(|| Aio::new().map(Signaller::Aio))).as_ref()
}

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::skip::skip;

fn take(eventfd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(eventfd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

fn counter() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK).unwrap()
}

/// Fills the counter, and has writes wait as a hostile owner would.
fn full_and_blocking() -> OwnedFd {
    let full = eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    full
}

fn signals_whoever_is_named_and_never_waits(mut signal: impl FnMut(BorrowedFd<'_>, u64)) {
    let (first, second) = (counter(), counter());
    for round in 1..200 {
        signal(first.as_fd(), 1);
        signal(first.as_fd(), 1);
        signal(second.as_fd(), 2);
        assert_eq!((take(&first), take(&second)), (2, 1), "round {round}");
    }
    let file = memfd_create("no eventfd", MemfdFlags::empty()).unwrap();
    signal(file.as_fd(), 3);
    signal(full_and_blocking().as_fd(), 4);
    signal(first.as_fd(), 1);
    assert_eq!((take(&first), take(&second)), (1, 0));
}

#[test]
fn a_ring_signals_whoever_is_named_and_never_waits() {
    let Ok(mut ring) = Ring::new() else { return skip("the kernel has no io_uring for us") };
    signals_whoever_is_named_and_never_waits(|eventfd, identity| ring.signal(eventfd, identity));
}

#[test]
fn aio_signals_whoever_is_named_and_never_waits() {
    let Some(aio) = Aio::new() else { return skip("the kernel has no AIO for us") };
    signals_whoever_is_named_and_never_waits(|eventfd, _| aio.signal(eventfd));
}

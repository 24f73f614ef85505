use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

struct Counter(OwnedFd);

impl Counter {
    fn new() -> (Self, EventFd) {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let ours = EventFd::new(fd.try_clone().unwrap()).unwrap();
        (Self(fd), ours)
    }

    /// Signals since the last call. The descriptor is non-blocking.
    fn take(&self) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(&self.0, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }
}

#[test]
fn intx_signals_once_and_again_after_unmask_while_the_level_stays() {
    let (counter, eventfd) = Counter::new();
    let mut intx = Intx::default();
    intx.set_eventfd(Some(eventfd));
    intx.set_level(true);
    assert_eq!(counter.take(), 1);
    intx.set_level(true);
    assert_eq!(counter.take(), 0, "masked by its own signal");
    intx.unmask();
    assert_eq!(counter.take(), 1, "still asserted");
    intx.set_level(false);
    intx.unmask();
    assert_eq!(counter.take(), 0, "serviced");
}

#[test]
fn intx_tells_a_new_eventfd_about_a_pending_level() {
    let (counter, eventfd) = Counter::new();
    let mut intx = Intx::default();
    intx.set_level(true);
    intx.set_eventfd(Some(eventfd));
    assert_eq!(counter.take(), 1);
}

#[test]
fn a_masked_pin_is_silent_until_unmasked() {
    let (counter, eventfd) = Counter::new();
    let mut intx = Intx::default();
    intx.set_eventfd(Some(eventfd));
    intx.mask();
    intx.set_level(true);
    assert_eq!(counter.take(), 0);
    intx.unmask();
    assert_eq!(counter.take(), 1);
}

#[test]
fn vectors_are_independent_and_bounded() {
    let (counter, eventfd) = Counter::new();
    let mut vectors = Vectors::new(2);
    vectors.set_eventfd(1, Some(eventfd)).unwrap();
    vectors.signal(0);
    assert_eq!(counter.take(), 0);
    vectors.signal(1);
    vectors.signal(7);
    assert_eq!(counter.take(), 1);
    assert!(vectors.set_eventfd(2, None).is_err());
    assert!(vectors.range(1, 2).is_err());
    assert!(vectors.range(u32::MAX, u32::MAX).is_err());
    assert_eq!(vectors.range(0, 2), Ok(0..2));
    vectors.clear();
    vectors.signal(1);
    assert_eq!(counter.take(), 0);
}

#[test]
fn a_full_counter_does_not_block_even_where_a_write_would() {
    let fd = eventfd(0, EventfdFlags::empty()).unwrap();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let ours = EventFd::new(fd.try_clone().unwrap()).unwrap();
    rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::empty()).unwrap();
    ours.signal();
}

#[test]
fn more_signals_arrive_than_completions_fit() {
    let (counter, eventfd) = Counter::new();
    for _ in 0..10_000 {
        eventfd.signal();
    }
    assert_eq!(counter.take(), 10_000);
}

#[test]
fn other_kinds_of_descriptors_are_refused() {
    let memfd = memfd_create("no", MemfdFlags::empty()).unwrap();
    assert_eq!(EventFd::new(memfd).unwrap_err(), IrqError::NotEventfd);
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    assert_eq!(EventFd::new(reader).unwrap_err(), IrqError::NotEventfd);
}

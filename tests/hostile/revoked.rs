//! What a peer gave and then spoils: memory that vanishes, eventfds that block.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, shrinkable};
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::dma_unmap;
use barkeep_tests::peer::requests::irq::{INTX, MSI};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

#[test]
fn memory_that_was_truncated_moves_nothing_and_kills_nobody() {
    let backend = Backend::serve(&["edu"]);
    let on_disk = tempfile::tempfile().expect("a temporary file");
    on_disk.set_len(0x2000).expect("room");
    for victim in [shrinkable(0x2000), on_disk] {
        let mut peer = backend.client();
        edu::enable(&mut peer);
        let steady = shrinkable(0x1000);
        steady.write_all_at(b"steady", 0).expect("room");
        victim.write_all_at(b"victim", 0).expect("room");
        peer.map(0b11, 0x1000, 0x1000, steady.as_fd());
        peer.map(0b11, 0x8000, 0x2000, victim.as_fd());
        edu::load(&mut peer, 0x8000, 6);
        edu::store(&mut peer, 0x1100, 6);
        assert_eq!(bytes_at(&steady, 0x100, 6), b"victim", "it works while it is there");

        victim.set_len(0).expect("its owner may");
        for offset in [0, 0xfff, 0x1000, 0x1ff0] {
            edu::load(&mut peer, 0x8000 + offset, 16);
            edu::store(&mut peer, 0x8000 + offset, 16);
        }
        edu::store(&mut peer, 0x1200, 6);
        assert_eq!(bytes_at(&steady, 0x200, 6), b"victim", "the buffer is as it was");
        assert_eq!(victim.metadata().expect("a file").len(), 0);

        victim.set_len(0x2000).expect("room");
        edu::copy(&mut peer, 0x1000, 0x8000, 6);
        assert_eq!(bytes_at(&victim, 0, 6), [0; 6], "what was lost is not reached by itself");
        let _ = peer.call(command::DMA_UNMAP, &dma_unmap(0, 0x8000, 0x2000)).success();
        peer.map(0b11, 0x8000, 0x2000, victim.as_fd());
        edu::copy(&mut peer, 0x1000, 0x8000, 6);
        assert_eq!(bytes_at(&victim, 0, 6), b"steady", "mapped again, it is reached again");
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

/// Signals an interrupt whose eventfd can take no more, in both ways, and checks that the backend
/// answers.
fn signal_a_full_counter(after_it_was_given: fn(&EventCounter)) {
    let backend = Backend::serve(&["edu", "edu"]);
    for index in [INTX, MSI] {
        let counter = Full(EventCounter::new());
        counter.0.fill();
        set_blocking(&counter.0, true);
        let mut peer = backend.client();
        edu::enable(&mut peer);
        peer.enable_msi(index == MSI);
        peer.set_eventfd(index, 0, counter.0.as_fd());
        after_it_was_given(&counter.0);
        edu::raise(&mut peer);
        assert_eq!(peer.read_u32(0, at::INTERRUPT_STATUS), 1);
        drop(peer);
        edu::assert_served(backend.socket());
        edu::assert_served(backend.socket_of(1));
    }
}

/// Empties the counter in the end, so that a backend that does wait for it can stop and the test
/// fails instead of hanging.
struct Full(EventCounter);

impl Drop for Full {
    fn drop(&mut self) {
        set_blocking(&self.0, false);
        let _ = self.0.take();
    }
}

fn set_blocking(counter: &EventCounter, blocking: bool) {
    let mut flags = fcntl_getfl(counter).expect("flags");
    flags.set(OFlags::NONBLOCK, !blocking);
    fcntl_setfl(counter, flags).expect("flags");
}

#[test]
fn a_full_eventfd_does_not_stop_the_backend() {
    signal_a_full_counter(|_| {});
}

/// O_NONBLOCK belongs to the open file, which the peer shares: setting it once when the descriptor
/// arrives proves nothing about later.
#[test]
fn a_full_eventfd_that_was_made_blocking_does_not_stop_the_backend() {
    signal_a_full_counter(|counter| set_blocking(counter, true));
}

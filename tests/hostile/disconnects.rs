//! Peers that hang up in the middle of everything.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, command, header, message};
use barkeep_tests::peer::requests::{access, dma_map, info, irq::INTX};
use barkeep_tests::peer::version_body;

#[test]
fn a_peer_may_leave_at_any_byte_of_a_message() {
    let backend = Backend::serve(&["edu"]);
    let version = message(1, command::VERSION, COMMAND, &version_body(0, 2, "{}"));
    let map = message(2, command::DMA_MAP, COMMAND, &dma_map(0b11, 0, 0, 4096));
    for length in 0..=version.len() {
        Peer::connect(backend.socket()).send(&version[..length]);
    }
    edu::assert_served(backend.socket());
    let memory = shrinkable(4096);
    for length in 0..=map.len() {
        let mut peer = backend.client();
        if length > 0 && length % 2 == 0 {
            peer.send_with_fds(&map[..length], &[memory.as_fd()]);
        } else {
            peer.send(&map[..length]);
        }
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

#[test]
fn a_peer_may_leave_without_its_replies() {
    let backend = Backend::serve(&["edu"]);
    let read = message(3, command::REGION_READ, COMMAND, &access(0, 0, 1 << 20));
    for count in [1, 2, 64, 100] {
        let mut peer = backend.client();
        for _ in 0..count {
            peer.send(&read);
        }
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

#[test]
fn a_peer_may_leave_with_everything_set_up() {
    let backend = Backend::serve(&["edu"]);
    for _ in 0..8 {
        let mut peer = backend.client();
        edu::enable(&mut peer);
        let memory = shrinkable(0x2000);
        peer.map(0b11, 0, 0x2000, memory.as_fd());
        let pin = EventCounter::new();
        peer.set_eventfd(INTX, 0, pin.as_fd());
        edu::copy(&mut peer, 0, 0x1000, 16);
        edu::raise(&mut peer);
        assert_eq!(pin.take(), 1);
        peer.send(&header(9, command::REGION_WRITE, 1 << 20, COMMAND));
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

#[test]
fn a_peer_that_only_stops_sending_still_gets_its_replies() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    peer.send(&message(3, command::GET_INFO, COMMAND, &info(16, 0)));
    peer.finish_sending();
    let _ = peer.reply_to(3, command::GET_INFO).success();
    peer.expect_closed();
    drop(peer);
    edu::assert_served(backend.socket());
}

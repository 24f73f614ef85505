//! Peers that hang up in the middle of everything.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use barkeep_backend::devices::{Context, Device};
use barkeep_backend::pci::{BarIndex, ClassCode, FunctionSpec, Ids};
use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, REPLY, command, header, message};
use barkeep_tests::peer::requests::{access, dma_map, info, irq::INTX};
use barkeep_tests::peer::version_body;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

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

/// A device that looks at its client's end of the connection when it has to let go of memory.
struct Witness {
    client: Arc<Mutex<Option<OwnedFd>>>,
    saw: Arc<Mutex<Vec<PollFlags>>>,
}

impl Device for Witness {
    fn spec(&self) -> FunctionSpec {
        let class = ClassCode { base: 0xff, sub: 0, interface: 0 };
        FunctionSpec::new(Ids {
            vendor: 0x1234,
            device: 1,
            subsystem_vendor: 0,
            subsystem: 0,
            revision: 0,
            class,
        })
    }

    fn bar_read(&mut self, _: BarIndex, _: u64, _: &mut [u8], _: &mut Context<'_>) {}

    fn bar_write(&mut self, _: BarIndex, _: u64, _: &[u8], _: &mut Context<'_>) {}

    fn quiesce(&mut self) {
        if let Some(client) = &*self.client.lock().expect("no panic") {
            let mut events = [PollFd::new(client, PollFlags::RDHUP)];
            poll(&mut events, Some(&Timespec::default())).expect("a socket");
            self.saw.lock().expect("no panic").push(events[0].revents());
        }
    }

    fn reset(&mut self) {}
}

/// So a client that waits for the end of the connection may use its memory for something else.
#[test]
fn memory_is_given_back_before_the_connection_ends() {
    let (client, saw) = (Arc::default(), Arc::default());
    let witness = Witness { client: Arc::clone(&client), saw: Arc::clone(&saw) };
    let backend = Backend::host(vec![Box::new(witness)]);
    let mut peer = backend.client();
    let end = peer.as_fd().try_clone_to_owned().expect("a descriptor");
    *client.lock().expect("no panic") = Some(end);
    // A reply to nothing, which ends the session.
    peer.send(&header(1, command::GET_INFO, 16, REPLY));
    peer.drain();
    let saw = saw.lock().expect("no panic");
    assert!(!saw.is_empty() && saw.iter().all(|events| events.is_empty()), "{saw:?}");
}

//! "Socket Disconnection Behavior": one client at a time, and nothing of it stays.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, shrinkable};
use barkeep_tests::peer::message::{COMMAND, command, message};
use barkeep_tests::peer::requests::{CONFIG, dma_map, irq::*, pci};
use barkeep_tests::peer::{Peer, version_body};

#[test]
fn the_second_client_waits_for_the_first_to_leave() {
    let backend = Backend::serve(&["edu"]);
    let mut first = backend.client();
    edu::enable(&mut first);
    let mut second = Peer::connect(backend.socket());
    second.send(&message(1, command::VERSION, COMMAND, &version_body(0, 2, "{}")));
    for _ in 0..8 {
        // Each answer means that the server has been through its event loop.
        assert_eq!(first.read_u32(0, at::IDENTIFICATION), edu::IDENTIFICATION);
    }
    assert!(second.hears_nothing());
    drop(first);
    let _ = second.reply_to(1, command::VERSION).success();
    assert_eq!(second.config_u16(pci::COMMAND), 0);
}

#[test]
fn a_waiting_client_that_gives_up_is_no_trouble() {
    let backend = Backend::serve(&["edu"]);
    let mut first = backend.client();
    for _ in 0..4 {
        drop(Peer::connect(backend.socket()));
    }
    assert_eq!(first.config_u16(0), 0x1234);
    drop(first);
    edu::assert_served(backend.socket());
}

#[test]
fn the_next_client_finds_a_function_at_power_on_and_nothing_of_the_last() {
    let backend = Backend::serve(&["edu"]);
    let mut first = backend.client();
    edu::enable(&mut first);
    let memory = shrinkable(0x2000);
    memory.write_all_at(b"secret", 0).expect("room");
    first.map(0b11, 0, 0x2000, memory.as_fd());
    let (pin, vector) = (EventCounter::new(), EventCounter::new());
    first.set_eventfd(INTX, 0, pin.as_fd());
    first.set_eventfd(MSI, 0, vector.as_fd());
    first.write_u32(CONFIG, pci::BAR0, 0xe000_0000);
    first.write_u32(0, at::LIVENESS, 5);
    edu::load(&mut first, 0, 6);
    edu::raise(&mut first);
    assert_eq!(pin.take(), 1);
    drop(first);

    let mut second = backend.client();
    assert_eq!(second.config_u16(pci::COMMAND), 0);
    assert_eq!(second.config_u16(pci::STATUS) & pci::INTERRUPT_STATUS, 0);
    assert_eq!(second.read_u32(CONFIG, pci::BAR0), 0);
    edu::enable(&mut second);
    assert_eq!(second.read_u32(0, at::LIVENESS), 0);
    edu::store(&mut second, 0x1000, 6);
    assert_eq!(bytes_at(&memory, 0x1000, 6), [0; 6], "the window is gone");

    let own = shrinkable(0x2000);
    let body = dma_map(0b11, 0, 0, 0x2000);
    let _ = second.call_with_fds(command::DMA_MAP, &body, &[own.as_fd()]).success();
    edu::store(&mut second, 0x1000, 6);
    assert_eq!(bytes_at(&own, 0x1000, 6), [0; 6], "and so is what the device had read");

    edu::raise(&mut second);
    second.enable_msi(true);
    edu::raise(&mut second);
    assert_eq!((pin.take(), vector.take()), (0, 0), "the eventfds are forgotten");
}

#[test]
fn functions_of_one_process_have_their_own_clients_and_state() {
    let backend = Backend::serve(&["edu", "ivshmem,size=4K", "edu"]);
    let mut peers: Vec<Peer> =
        (0..3).map(|index| Peer::greeted(backend.socket_of(index))).collect();
    let ids: Vec<u16> = peers.iter_mut().map(|peer| peer.config_u16(2)).collect();
    assert_eq!(ids, [0x11e8, 0x1110, 0x11e8]);
    edu::enable(&mut peers[0]);
    assert_eq!(peers[2].config_u16(pci::COMMAND), 0);
    let same_window = dma_map(0b11, 0, 0, 4096);
    for peer in &mut peers {
        let _ = peer.call(command::DMA_MAP, &same_window).success();
    }
    drop(peers.remove(0));
    assert_eq!(peers[0].config_u16(2), 0x1110, "the others stay");
    edu::assert_served(backend.socket_of(0));
}

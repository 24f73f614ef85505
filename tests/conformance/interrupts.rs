//! "VFIO_USER_DEVICE_SET_IRQS": what the requests do, and when the function signals.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::{irq::*, pci, set_irqs};

fn intx(peer: &mut Peer) -> EventCounter {
    let counter = EventCounter::new();
    peer.set_eventfd(INTX, 0, counter.as_fd());
    counter
}

fn action(peer: &mut Peer, flags: u32, index: u32, count: u32, data: &[u8]) {
    let reply = peer.call(command::SET_IRQS, &set_irqs(flags, index, 0, count, data));
    assert!(reply.success().is_empty(), "\"there is no payload in the reply\"");
}

#[test]
fn intx_masks_itself_and_is_signalled_again_while_the_level_stays() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let counter = intx(&mut peer);
    assert_eq!(counter.take(), 0);
    edu::raise(&mut peer);
    assert_eq!(counter.take(), 1);

    edu::raise(&mut peer);
    assert_eq!(counter.take(), 0, "masked by its own signal");
    action(&mut peer, DATA_NONE | ACTION_UNMASK, INTX, 1, &[]);
    assert_eq!(counter.take(), 1, "the level is still there");

    edu::acknowledge(&mut peer);
    edu::raise(&mut peer);
    edu::acknowledge(&mut peer);
    action(&mut peer, DATA_NONE | ACTION_UNMASK, INTX, 1, &[]);
    assert_eq!(counter.take(), 0, "a level that is gone is no interrupt");
    edu::raise(&mut peer);
    assert_eq!(counter.take(), 1);
}

#[test]
fn a_client_masks_and_unmasks_intx() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let counter = intx(&mut peer);
    action(&mut peer, DATA_BOOL | ACTION_MASK, INTX, 1, &[0]);
    edu::raise(&mut peer);
    assert_eq!(counter.take(), 1, "a false bool masks nothing");
    edu::acknowledge(&mut peer);
    action(&mut peer, DATA_BOOL | ACTION_UNMASK, INTX, 1, &[1]);

    for (mask, unmask, data) in [
        (DATA_NONE | ACTION_MASK, DATA_NONE | ACTION_UNMASK, &[][..]),
        (DATA_BOOL | ACTION_MASK, DATA_BOOL | ACTION_UNMASK, &[1]),
    ] {
        action(&mut peer, mask, INTX, 1, data);
        edu::raise(&mut peer);
        assert_eq!(counter.take(), 0);
        action(&mut peer, unmask, INTX, 1, data);
        assert_eq!(counter.take(), 1);
        edu::acknowledge(&mut peer);
        action(&mut peer, unmask, INTX, 1, data);
        assert_eq!(counter.take(), 0);
    }
}

#[test]
fn an_eventfd_that_comes_late_learns_a_pending_level() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    edu::raise(&mut peer);
    assert_eq!(intx(&mut peer).take(), 1);
}

#[test]
fn a_client_triggers_interrupts_itself() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for index in [INTX, MSI] {
        let counter = EventCounter::new();
        peer.set_eventfd(index, 0, counter.as_fd());
        action(&mut peer, DATA_BOOL | ACTION_TRIGGER, index, 1, &[0]);
        assert_eq!(counter.take(), 0);
        action(&mut peer, DATA_BOOL | ACTION_TRIGGER, index, 1, &[1]);
        assert_eq!(counter.take(), 1);
        if index == INTX {
            action(&mut peer, DATA_NONE | ACTION_UNMASK, INTX, 1, &[]);
        }
        action(&mut peer, DATA_NONE | ACTION_TRIGGER, index, 1, &[]);
        assert_eq!(counter.take(), 1);
    }
}

#[test]
fn an_eventfd_that_was_taken_away_hears_nothing_more() {
    let none = [(DATA_NONE | ACTION_TRIGGER, 0), (DATA_EVENTFD | ACTION_TRIGGER, 1)];
    for (flags, count) in none {
        let backend = Backend::serve(&["edu"]);
        let mut peer = backend.client();
        edu::enable(&mut peer);
        let pin = intx(&mut peer);
        let vector = EventCounter::new();
        peer.set_eventfd(MSI, 0, vector.as_fd());

        action(&mut peer, flags, INTX, count, &[]);
        edu::raise(&mut peer);
        assert_eq!(pin.take(), 0);
        edu::acknowledge(&mut peer);
        peer.enable_msi(true);
        edu::raise(&mut peer);
        assert_eq!(vector.take(), 1, "the other index is not meant");

        action(&mut peer, flags, MSI, count, &[]);
        edu::raise(&mut peer);
        assert_eq!(vector.take(), 0);

        peer.set_eventfd(MSI, 0, vector.as_fd());
        edu::raise(&mut peer);
        assert_eq!(vector.take(), 1, "it can be given back");
    }
}

#[test]
fn a_new_eventfd_takes_the_place_of_the_old_one() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let old = intx(&mut peer);
    let new = intx(&mut peer);
    edu::raise(&mut peer);
    assert_eq!((old.take(), new.take()), (0, 1));
}

#[test]
fn msi_is_sent_with_both_msi_and_bus_mastering_enabled_and_never_otherwise() {
    let backend = Backend::serve(&["edu"]);
    for (msi, bus_master, messages, levels) in
        [(false, false, 0, 1), (false, true, 0, 1), (true, false, 0, 0), (true, true, 1, 0)]
    {
        let mut peer = backend.client();
        let pin = intx(&mut peer);
        let vector = EventCounter::new();
        peer.set_eventfd(MSI, 0, vector.as_fd());
        let bus_master_enable = if bus_master { pci::BUS_MASTER } else { 0 };
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | bus_master_enable);
        peer.enable_msi(msi);
        edu::raise(&mut peer);
        assert_eq!(
            (vector.take(), pin.take()),
            (messages, levels),
            "MSI {msi}, bus mastering {bus_master}"
        );
    }
}

#[test]
fn a_message_that_could_not_be_sent_is_not_sent_later() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let vector = EventCounter::new();
    peer.set_eventfd(MSI, 0, vector.as_fd());
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    peer.enable_msi(true);
    edu::raise(&mut peer);
    edu::enable(&mut peer);
    assert_eq!(vector.take(), 0);
    edu::raise(&mut peer);
    assert_eq!(vector.take(), 1);
}

#[test]
fn interrupt_disable_holds_the_pin_back() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::INTERRUPT_DISABLE);
    let counter = intx(&mut peer);
    edu::raise(&mut peer);
    assert_eq!(counter.take(), 0);
    assert_ne!(peer.config_u16(pci::STATUS) & pci::INTERRUPT_STATUS, 0, "it is pending");
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert_eq!(counter.take(), 1);
}

#[test]
fn a_level_moves_to_the_pin_when_msi_is_disabled() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let pin = intx(&mut peer);
    peer.enable_msi(true);
    edu::raise(&mut peer);
    assert_eq!(pin.take(), 0, "a function with MSI enabled must not use its pin");
    peer.enable_msi(false);
    assert_eq!(pin.take(), 1);
}

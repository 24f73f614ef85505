//! "VFIO_USER_DEVICE_RESET", and Function Level Reset (PCIe 6.6.2)

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, shrinkable};
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::{CONFIG, irq::*, pci};
use rustix::io::Errno;
use std::os::unix::fs::FileExt;

fn device_reset(peer: &mut Peer) {
    let reply = peer.call(command::RESET, &[]).success();
    assert!(reply.is_empty());
}

/// Sets Initiate Function Level Reset, in one request with the rest of Device Control or alone.
fn function_level_reset(peer: &mut Peer, upper_byte_alone: bool) {
    let device_control = peer.capability(pci::EXPRESS) + 8;
    if upper_byte_alone {
        peer.write(CONFIG, device_control + 1, &[0x80]);
    } else {
        peer.set_config_u16(device_control, 0x8000);
    }
    assert_eq!(peer.config_u16(device_control) & 0x8000, 0, "the bit reads 0");
}

#[test]
fn a_reset_clears_the_function_and_keeps_what_the_client_gave() {
    let resets: [fn(&mut Peer); 3] = [
        device_reset,
        |peer| function_level_reset(peer, false),
        |peer| function_level_reset(peer, true),
    ];
    for reset in resets {
        let backend = Backend::serve(&["edu"]);
        let mut peer = backend.client();
        edu::enable(&mut peer);
        let memory = shrinkable(0x2000);
        memory.write_all_at(b"source", 0).expect("room");
        peer.map(0b11, 0, 0x2000, memory.as_fd());
        let pin = EventCounter::new();
        peer.set_eventfd(INTX, 0, pin.as_fd());
        peer.write_u32(CONFIG, pci::BAR0, 0xe000_0000);
        peer.write_u32(0, at::LIVENESS, 5);
        edu::raise(&mut peer);
        assert_eq!(pin.take(), 1);

        reset(&mut peer);
        assert_eq!(peer.config_u16(pci::COMMAND), 0);
        assert_eq!(peer.config_u16(pci::STATUS) & pci::INTERRUPT_STATUS, 0);
        assert_eq!(peer.read_u32(CONFIG, pci::BAR0), 0);
        assert_eq!(peer.read_u32(0, at::LIVENESS), u32::MAX, "it does not decode");
        edu::enable(&mut peer);
        assert_eq!(peer.read_u32(0, at::LIVENESS), 0);
        assert_eq!(peer.read_u32(0, at::INTERRUPT_STATUS), 0);
        assert_eq!(pin.take(), 0);

        edu::copy(&mut peer, 0, 0x1000, 6);
        assert_eq!(bytes_at(&memory, 0x1000, 6), b"source", "the window is still there");
        let _ = peer.set_irqs(DATA_NONE | ACTION_UNMASK, INTX, 0, 1).success();
        assert_eq!(pin.take(), 0, "the level went away with the reset");
        edu::raise(&mut peer);
        assert_eq!(pin.take(), 1, "the eventfd is still there");
    }
}

#[test]
fn a_reset_has_no_payload() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    peer.expect_errno(command::RESET, &[0; 4], Errno::INVAL);
    assert_eq!(peer.config_u16(pci::COMMAND), 0b110, "nothing was reset");
}

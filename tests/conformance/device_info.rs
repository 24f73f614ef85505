//! "VFIO_USER_DEVICE_GET_INFO" and "VFIO_USER_DEVICE_GET_IRQ_INFO"

use barkeep_tests::backend::Backend;
use barkeep_tests::peer::message::{Payload, command};
use barkeep_tests::peer::requests::{info, region_info};
use rustix::io::Errno;

const EVENTFD: u32 = 1 << 0;
const MASKABLE: u32 = 1 << 1;
const AUTOMASKED: u32 = 1 << 2;
const NORESIZE: u32 = 1 << 3;

#[test]
fn a_function_is_a_pci_device_that_can_be_reset() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for argsz in [16, 17, 4096, u32::MAX] {
        let reply = peer.call(command::GET_INFO, &info(argsz, 0)).success();
        // argsz, flags RESET | PCI, num_regions, num_irqs
        assert_eq!(reply, Payload::new().u32(16).u32(0b11).u32(9).u32(5).done());
    }
}

#[test]
fn each_interrupt_index_tells_what_it_can_do() {
    let one = (1, EVENTFD | NORESIZE);
    let edu = [(1, EVENTFD | MASKABLE | AUTOMASKED), one, (0, 0), one, one];
    let ivshmem = [(0, 0), (0, 0), (0, 0), one, one];
    for (spec, indices) in [("edu", edu), ("ivshmem,size=4K", ivshmem)] {
        let backend = Backend::serve(&[spec]);
        let mut peer = backend.client();
        for (index, (count, flags)) in (0..).zip(indices) {
            let reply = peer.call(command::GET_IRQ_INFO, &info(16, index)).success();
            let expected = Payload::new().u32(16).u32(flags).u32(index).u32(count).done();
            assert_eq!(reply, expected, "{spec}, interrupt index {index}");
        }
    }
}

#[test]
fn what_does_not_exist_or_has_no_room_for_its_answer_is_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for (name, command, body) in [
        ("no room for the info", command::GET_INFO, info(15, 0)),
        ("no argsz", command::GET_INFO, info(0, 0)),
        ("empty info request", command::GET_INFO, vec![]),
        ("short info request", command::GET_INFO, info(16, 0)[..15].to_vec()),
        ("no room for the irq info", command::GET_IRQ_INFO, info(15, 0)),
        ("irq index 5", command::GET_IRQ_INFO, info(16, 5)),
        ("irq index 2^32 - 1", command::GET_IRQ_INFO, info(16, u32::MAX)),
        ("short irq request", command::GET_IRQ_INFO, info(16, 0)[..12].to_vec()),
    ] {
        println!("{name}");
        peer.expect_errno(command, &body, Errno::INVAL);
    }
}

/// SPDK's client sends as many bytes as it has room for in the answer.
#[test]
fn queries_may_be_padded() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for (command, query) in [
        (command::GET_INFO, info(48, 0)),
        (command::GET_IRQ_INFO, info(48, 1)),
        (command::GET_REGION_INFO, region_info(4096, 0)),
    ] {
        let expected = peer.call(command, &query).success();
        for padding in [1, 16, 4096] {
            let padded = [query.clone(), vec![0; padding]].concat();
            assert_eq!(peer.call(command, &padded).success(), expected, "{command}, {padding}");
        }
    }
}

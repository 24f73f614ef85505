//! An access that the function does not claim completes as an Unsupported Request (PCIe 2.3.1):
//! reads return all ones, writes are dropped, and the function's registers tell.

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{command, u32_at, u64_at};
use barkeep_tests::peer::requests::{CONFIG, pci, region_state};

/// Reads and writes that reached the device, reads and writes that did not.
fn counters(peer: &mut Peer, region: u32) -> [u64; 4] {
    let state = peer.call(command::REGION_STATE, &region_state(56, 0, region)).success();
    [16, 24, 32, 40].map(|offset| u64_at(&state, offset))
}

fn claimed(peer: &mut Peer, region: u32) -> bool {
    let state = peer.call(command::REGION_STATE, &region_state(56, 0, region)).success();
    u32_at(&state, 4) == 1
}

/// Device Status, which is cleared by writing what was read.
fn take_device_status(peer: &mut Peer) -> u16 {
    let device_status = peer.capability(pci::EXPRESS) + 0x0a;
    let value = peer.config_u16(device_status);
    peer.set_config_u16(device_status, value);
    assert_eq!(peer.config_u16(device_status), 0);
    value
}

const CORRECTABLE: u16 = 1 << 0;
const NON_FATAL: u16 = 1 << 1;
const UNSUPPORTED_REQUEST: u16 = 1 << 3;

/// Checks reads of every width and a write, none of which may reach the device.
fn assert_not_claimed(peer: &mut Peer, region: u32) {
    assert!(!claimed(peer, region));
    let [reads, writes, reads_before, writes_before] = counters(peer, region);
    let widths = [1, 2, 4, 8, 3, 64, 200];
    for count in widths {
        assert_eq!(peer.read(region, 0, count), vec![0xff; count as usize]);
    }
    assert_eq!(take_device_status(peer), UNSUPPORTED_REQUEST | CORRECTABLE);
    for count in widths {
        peer.write(region, 4, &vec![0x5a; count as usize - 1]);
    }
    assert_eq!(take_device_status(peer), UNSUPPORTED_REQUEST | NON_FATAL);
    // The narrowest write has no bytes: no bus has such an access.
    let expected = [reads, writes, reads_before + 7, writes_before + 6];
    assert_eq!(counters(peer, region), expected);
}

#[test]
fn memory_space_enable_decides_whether_a_bar_answers() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    assert_not_claimed(&mut peer, 0);

    edu::enable(&mut peer);
    assert!(claimed(&mut peer, 0));
    assert_eq!(peer.read_u32(0, at::IDENTIFICATION), edu::IDENTIFICATION);
    assert_eq!(peer.read_u32(0, at::LIVENESS), 0, "what was written before was dropped");
    peer.write_u32(0, at::LIVENESS, 1);
    assert_eq!(take_device_status(&mut peer), 0, "an access that is claimed is no error");
    let [reads, writes, ..] = counters(&mut peer, 0);
    assert_eq!((reads, writes), (2, 1));

    peer.set_config_u16(pci::COMMAND, pci::BUS_MASTER);
    assert_not_claimed(&mut peer, 0);
    edu::enable(&mut peer);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !1, "the device kept its state");
}

#[test]
fn memory_of_a_bar_is_out_of_reach_while_it_does_not_decode() {
    let backend = Backend::serve(&["ivshmem,size=4K"]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    peer.write(2, 0, &[7; 64]);
    peer.set_config_u16(pci::COMMAND, 0);
    assert_not_claimed(&mut peer, 0);
    assert_not_claimed(&mut peer, 2);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert_eq!(peer.read(2, 0, 64), [7; 64]);
}

#[test]
fn a_function_in_d3hot_claims_nothing_but_configuration_space() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    peer.write_u32(0, at::LIVENESS, 0x77);
    let pmcsr = peer.capability(pci::POWER_MANAGEMENT) + 4;
    let d0 = peer.config_u16(pmcsr);
    peer.set_config_u16(pmcsr, d0 | 0b11);

    assert_not_claimed(&mut peer, 0);
    assert_eq!(peer.read(CONFIG, 0, 2), [0x34, 0x12]);
    let command = pci::MEMORY_SPACE | pci::BUS_MASTER;
    assert_eq!(peer.config_u16(pci::COMMAND), command, "the enables stay as they were");

    peer.set_config_u16(pmcsr, d0);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !0x77, "No_Soft_Reset: the context is kept");
}

#[test]
fn a_command_write_of_one_byte_counts() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for (byte, answers) in [(0x02, true), (0x00, false), (0x42, true), (0x04, false)] {
        peer.write(CONFIG, pci::COMMAND, &[byte]);
        assert_eq!(peer.read_u32(0, at::IDENTIFICATION) == edu::IDENTIFICATION, answers);
        // The other byte of the register has nothing to say about decode.
        peer.write(CONFIG, pci::COMMAND + 1, &[0x04]);
        assert_eq!(claimed(&mut peer, 0), answers);
    }
}

//! A driver for QEMU's educational device (`docs/specs/edu.rst` in QEMU), over a raw peer.

use std::path::Path;

use crate::peer::Peer;
use crate::peer::requests::{CONFIG, pci};

/// Offsets in BAR0, by the names of the device's specification.
pub mod at {
    #![expect(missing_docs, reason = "the specification's names")]
    pub const IDENTIFICATION: u64 = 0x00;
    pub const LIVENESS: u64 = 0x04;
    pub const FACTORIAL: u64 = 0x08;
    pub const INTERRUPT_STATUS: u64 = 0x24;
    pub const INTERRUPT_RAISE: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const DMA_SOURCE: u64 = 0x80;
    pub const DMA_DESTINATION: u64 = 0x88;
    pub const DMA_COUNT: u64 = 0x90;
    pub const DMA_COMMAND: u64 = 0x98;
}

/// What the identification register reads.
pub const IDENTIFICATION: u32 = 0x0100_00ed;
const BUFFER: u64 = 0x40000;
const START: u64 = 1;
const TO_RAM: u64 = 2;

/// Lets the function decode its memory and master the bus.
pub fn enable(peer: &mut Peer) {
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE | pci::BUS_MASTER);
}

/// Raises the interrupt.
pub fn raise(peer: &mut Peer) {
    peer.write_u32(0, at::INTERRUPT_RAISE, 1);
}

/// Acknowledges the interrupt: the level goes away.
pub fn acknowledge(peer: &mut Peer) {
    peer.write_u32(0, at::INTERRUPT_ACKNOWLEDGE, 1);
}

/// Has the device copy `count` bytes of guest memory through its own buffer.
pub fn copy(peer: &mut Peer, from: u64, to: u64, count: u64) {
    load(peer, from, count);
    store(peer, to, count);
}

/// Has the device read guest memory into its buffer.
pub fn load(peer: &mut Peer, from: u64, count: u64) {
    transfer(peer, from, BUFFER, count, START);
}

/// Has the device write its buffer to guest memory.
pub fn store(peer: &mut Peer, to: u64, count: u64) {
    transfer(peer, BUFFER, to, count, START | TO_RAM);
}

fn transfer(peer: &mut Peer, source: u64, destination: u64, count: u64, command: u64) {
    for (offset, value) in [
        (at::DMA_SOURCE, source),
        (at::DMA_DESTINATION, destination),
        (at::DMA_COUNT, count),
        (at::DMA_COMMAND, command),
    ] {
        peer.write(0, offset, &value.to_le_bytes());
    }
}

/// Checks that a client is served as if it were the first one: the function is there, as it is at
/// power-on, and works.
pub fn assert_served(path: &Path) {
    let mut peer = Peer::greeted(path);
    assert_eq!(peer.read(CONFIG, 0, 6), [0x34, 0x12, 0xe8, 0x11, 0, 0], "an edu, disabled");
    enable(&mut peer);
    assert_eq!(peer.read_u32(0, at::LIVENESS), 0, "a leftover of another client");
    peer.write_u32(0, at::LIVENESS, 0x1234_5678);
    assert_eq!(peer.read_u32(0, at::LIVENESS), !0x1234_5678);
}

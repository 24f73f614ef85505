//! A BAR that holds an MSI-X table, its pending bits and memory: what can be mapped of it, and
//! accesses that straddle all of them. And BARs that no page fits into.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use barkeep_backend::devices::{BarMapping, Context, Device};
use barkeep_backend::pci::{
    BarIndex, BarKind, BarOffset, BarSpec, ClassCode, FunctionSpec, Ids, MsixSpec, MsixVectors,
};
use barkeep_tests::backend::Backend;
use barkeep_tests::memory::sealed;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{command, u32_at, u64_at};
use barkeep_tests::peer::requests::{CONFIG, memory_fault, pci, region_info};

const SIZE: u64 = 0x10000;
const TABLE: u64 = 0x2ff0;
const PENDING: u64 = 0x3010;

/// BAR0 is memory with an MSI-X table of two vectors in the middle; BAR2 has 16 bytes, BAR3 is 4
/// I/O ports.
struct Crowded {
    memory: File,
    small: [u8; 16],
    ports: [u8; 4],
}

impl Device for Crowded {
    fn spec(&self) -> FunctionSpec {
        let memory = BarKind::Memory32 { prefetchable: false };
        let bar = |index, kind, size| BarSpec { index, kind, size };
        let at = |offset| BarOffset { bar: BarIndex::BAR0, offset };
        FunctionSpec {
            bars: vec![
                bar(BarIndex::BAR0, memory, SIZE),
                bar(BarIndex::BAR2, memory, 16),
                bar(BarIndex::BAR3, BarKind::Io, 4),
            ],
            msix: Some(MsixSpec {
                vectors: MsixVectors::new(2).unwrap(),
                table: at(TABLE),
                pending: at(PENDING),
            }),
            ..FunctionSpec::new(Ids {
                vendor: 0x1234,
                device: 0xc0de,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 0,
                class: ClassCode { base: 0xff, sub: 0, interface: 0 },
            })
        }
    }

    fn mapping(&self, bar: BarIndex) -> Option<BarMapping<'_>> {
        (bar == BarIndex::BAR0).then(|| BarMapping { file: self.memory.as_fd(), offset: 0 })
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8], _: &mut Context<'_>) {
        let start = usize::try_from(offset).unwrap();
        let range = start..start + data.len();
        match bar {
            BarIndex::BAR0 => self.memory.read_exact_at(data, offset).unwrap(),
            BarIndex::BAR2 => data.copy_from_slice(&self.small[range]),
            _ => data.copy_from_slice(&self.ports[range]),
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8], _: &mut Context<'_>) {
        let start = usize::try_from(offset).unwrap();
        let range = start..start + data.len();
        match bar {
            BarIndex::BAR0 => self.memory.write_all_at(data, offset).unwrap(),
            BarIndex::BAR2 => self.small[range].copy_from_slice(data),
            _ => self.ports[range].copy_from_slice(data),
        }
    }

    fn reset(&mut self) {}
}

fn crowded() -> (Backend, Peer) {
    let device = Crowded { memory: sealed(SIZE), small: [0; 16], ports: [0; 4] };
    let backend = Backend::host(vec![Box::new(device)]);
    let peer = backend.client();
    (backend, peer)
}

#[test]
fn what_is_not_the_msix_structures_may_be_mapped() {
    let (_backend, mut peer) = crowded();
    let reply = peer.call(command::GET_REGION_INFO, &region_info(4096, 0));
    assert_eq!((u32_at(&reply.body, 4), reply.fds.len()), (0b1111, 1), "READ WRITE MMAP CAPS");
    let areas: Vec<_> = (0..u32_at(&reply.body, 40))
        .map(|i| 48 + 16 * i as usize)
        .map(|at| (u64_at(&reply.body, at), u64_at(&reply.body, at + 8)))
        .collect();
    assert_eq!(areas, [(0, 0x2000), (0x4000, 0xc000)]);
    // A fault is judged the same way.
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    for (offset, verdict) in
        [(0, 2), (0x1fff, 2), (0x2000, 3), (TABLE, 3), (0x3fff, 3), (0x4000, 2)]
    {
        let body = memory_fault(1, 0, offset, 4096);
        let reply = peer.call(command::MEMORY_FAULT, &body).success();
        assert_eq!(u32_at(&reply, 0), verdict, "{offset:#x}");
    }
}

#[test]
fn an_access_goes_to_all_whom_it_touches() {
    let (_backend, mut peer) = crowded();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    // Memory, both entries, pending bits, memory again: one write of ones, and what became of it.
    let start = TABLE - 4;
    let count = PENDING + 8 + 4 - start;
    peer.write(0, start, &vec![0xff; count.try_into().unwrap()]);
    let mut expected = vec![0xff; 4];
    for _ in 0..2 {
        // The address is a doubleword's; of Vector Control, the mask bit alone is there.
        expected.extend([0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        expected.extend([0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    expected.extend([0; 8]);
    expected.extend([0xff; 4]);
    let count = u32::try_from(count).unwrap();
    assert_eq!(peer.read(0, start, count), expected);
    // In any pieces.
    for width in [1, 2, 3, 5, 8] {
        let mut pieces = Vec::new();
        for offset in (0..count).step_by(width) {
            let width = u32::try_from(width).unwrap().min(count - offset);
            pieces.extend(peer.read(0, start + u64::from(offset), width));
        }
        assert_eq!(pieces, expected, "width {width}");
    }
}

#[test]
fn bars_below_a_page_and_in_io_space_are_served_while_they_decode() {
    let (_backend, mut peer) = crowded();
    for (region, size) in [(2, 16), (3, 4)] {
        let info = peer.call(command::GET_REGION_INFO, &region_info(4096, region)).success();
        assert_eq!((u32_at(&info, 4), u64_at(&info, 16)), (0b11, size));
    }
    peer.write_u32(CONFIG, 0x1c, 0xffff_ffff);
    assert_eq!(peer.read_u32(CONFIG, 0x1c), 0xffff_fffd, "4 ports");
    peer.write_u32(CONFIG, 0x18, 0xffff_ffff);
    assert_eq!(peer.read_u32(CONFIG, 0x18), 0xffff_fff0, "16 bytes");
    let io_space = 1;
    for (region, enable, other) in
        [(2, pci::MEMORY_SPACE, io_space), (3, io_space, pci::MEMORY_SPACE)]
    {
        peer.set_config_u16(pci::COMMAND, other);
        peer.write(region, 0, &[1, 2]);
        assert_eq!(peer.read(region, 0, 4), [0xff; 4], "BAR{region} is in the other space");
        peer.set_config_u16(pci::COMMAND, enable);
        peer.write(region, 1, &[7]);
        assert_eq!(peer.read(region, 0, 4), [0, 7, 0, 0]);
    }
}

//! The daemon's share of guest memory.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost::vhost_user::message::FrontendReq;

use super::bench::{MEMORY, SIZE, disk};
use super::fake::{Fake, Traits};
use crate::devices::vhost_user::memory::Wanted;
use crate::dma::{DmaAccess, DmaTable, Iova};

/// What a daemon has: address, size, offset.
fn regions(fake: &Fake) -> Vec<(u64, u64, u64)> {
    let state = fake.state();
    let mut regions: Vec<_> =
        state.memory.iter().map(|region| (region.guest, region.size, region.offset)).collect();
    regions.sort_unstable();
    regions
}

fn tables() -> [Traits; 2] {
    [Traits::disk(), Traits::disk().without(Protocol::CONFIGURE_MEM_SLOTS)]
}

#[test]
fn the_clients_files_are_handed_on_under_the_addresses_of_their_windows() {
    for traits in tables() {
        let (bench, fake, _place) = disk(traits);
        assert_eq!(regions(&fake), [(MEMORY, SIZE, 0)]);
        let state = fake.state();
        assert_eq!(state.memory[0].user, MEMORY);
        let inode = bench.memory.metadata().unwrap().ino();
        assert_eq!(state.memory[0].file.metadata().unwrap().ino(), inode);
    }
}

#[test]
fn windows_that_come_and_go_reach_the_daemon() {
    for traits in tables() {
        let slots = traits.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS);
        let (mut bench, fake, _place) = disk(traits);
        bench.send(0, b"one");
        assert_eq!(fake.take(0), Some(0));
        fake.give_back(0, 0);
        fake.listen();

        bench.map(0x8000_0000, 0x1000, 0x2000);
        assert_eq!(regions(&fake), [(MEMORY, SIZE, 0), (0x8000_0000, 0x2000, 0x1000)]);
        let stopped = fake.heard(FrontendReq::GET_VRING_BASE);
        assert_eq!(stopped, if slots { 0 } else { 2 }, "a region more disturbs nobody");
        assert_eq!(fake.state().running(), [0, 1]);

        bench.unmap(0x8000_0000, 0x2000);
        assert_eq!(regions(&fake), [(MEMORY, SIZE, 0)]);
        assert_eq!(fake.state().running(), [0, 1]);
        assert_eq!(fake.state().vrings[&0].base, 1);
    }
}

#[test]
fn rings_wait_for_their_memory_to_come_back() {
    for traits in tables() {
        let (mut bench, fake, _place) = disk(traits);
        bench.send(0, b"one");
        assert_eq!(fake.take(0), Some(0));
        fake.give_back(0, 0);
        bench.unmap(MEMORY, SIZE);
        assert_eq!(fake.state().running(), [] as [u32; 0]);
        bench.send(0, b"two");
        bench.notify(0);
        bench.serve();
        assert!(!bench.needs_reset());

        bench.map(MEMORY, 0, SIZE / 4);
        assert_eq!(fake.state().running(), [0, 1]);
        assert_eq!(fake.take(0), Some(1));
    }
}

#[test]
fn a_function_that_may_not_master_the_bus_gives_its_memory_up_as_well() {
    for traits in tables() {
        let (mut bench, fake, _place) = disk(traits);
        bench.map(0x8000_0000, 0x1000, 0x2000);
        bench.command(false);
        bench.unmap(0x8000_0000, 0x2000);
        assert_eq!(regions(&fake), [(MEMORY, SIZE, 0)]);
    }
}

#[test]
fn a_driver_that_is_reset_leaves_the_daemon_without_memory_of_the_guests() {
    for traits in tables() {
        let slots = traits.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS);
        let (mut bench, fake, _place) = disk(traits);
        bench.set_status(0);
        let inode = bench.memory.metadata().unwrap().ino();
        let state = fake.state();
        assert!(state.memory.iter().all(|region| region.file.metadata().unwrap().ino() != inode));
        assert_eq!(state.memory.len(), usize::from(!slots), "a table is never empty");
    }
}

fn table(windows: &[(u64, u64, u64, DmaAccess)], files: usize) -> DmaTable {
    let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
    let mut table = DmaTable::new(16);
    table.keep_files(files);
    for (iova, offset, size, access) in windows {
        let file: OwnedFd = memory.as_fd().try_clone_to_owned().unwrap();
        table.map(Iova(*iova), *size, *access, Some((file, *offset))).unwrap();
    }
    table
}

fn wanted(table: &DmaTable, most: usize) -> (Vec<(u64, u64, u64)>, usize) {
    let wanted = Wanted::new(table.windows(), most);
    let regions = wanted.regions().map(|(region, _)| (region.iova, region.size, region.offset));
    (regions.collect(), wanted.left_out)
}

const ALL: DmaAccess = DmaAccess::all();

#[test]
fn windows_that_continue_each_other_are_one_region() {
    let both = table(&[(0x1000, 0x5000, 0x1000, ALL), (0x2000, 0x6000, 0x3000, ALL)], 16);
    assert_eq!(wanted(&both, 8), (vec![(0x1000, 0x4000, 0x5000)], 0));
    let apart = table(&[(0x1000, 0x5000, 0x1000, ALL), (0x3000, 0x6000, 0x1000, ALL)], 16);
    assert_eq!(wanted(&apart, 8).0.len(), 2, "not in the address space");
    let elsewhere = table(&[(0x1000, 0x5000, 0x1000, ALL), (0x2000, 0x7000, 0x1000, ALL)], 16);
    assert_eq!(wanted(&elsewhere, 8).0.len(), 2, "not in the file");
}

#[test]
fn windows_of_different_files_are_two_regions() {
    let mut both = table(&[(0x1000, 0x5000, 0x1000, ALL)], 16);
    let other = rustix::fs::memfd_create("other", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&other, 1 << 20).unwrap();
    both.map(Iova(0x2000), 0x1000, ALL, Some((other, 0x6000))).unwrap();
    assert_eq!(wanted(&both, 8).0.len(), 2);
}

#[test]
fn the_daemon_gets_nothing_that_the_function_may_not_write() {
    let read_only =
        table(&[(0x1000, 0, 0x1000, DmaAccess::READ), (0x2000, 0x1000, 0x1000, ALL)], 16);
    assert_eq!(wanted(&read_only, 8).0, [(0x2000, 0x1000, 0x1000)]);
}

#[test]
fn memory_without_a_file_and_at_the_very_end_is_none_of_the_daemons() {
    let mut table = table(&[(u64::MAX - 0xfff, 0, 0x1000, ALL)], 16);
    table.map(Iova(0x1000), 0x1000, ALL, None).unwrap();
    assert_eq!(wanted(&table, 8), (Vec::new(), 0));
}

#[test]
fn when_there_is_too_much_the_largest_regions_are_chosen() {
    let many = table(
        &[(0x1000, 0, 0x1000, ALL), (0x10000, 0, 0x3000, ALL), (0x20000, 0, 0x2000, ALL)],
        16,
    );
    assert_eq!(wanted(&many, 2), (vec![(0x10000, 0x3000, 0), (0x20000, 0x2000, 0)], 1));
}

#[test]
fn a_region_covers_what_lies_in_it_as_a_whole() {
    let table = table(&[(0x1000, 0, 0x1000, ALL), (0x2000, 0x8000, 0x1000, ALL)], 16);
    let wanted = Wanted::new(table.windows(), 8);
    for (address, size, covered) in [
        (0x1000, 0x1000, true),
        (0x1fff, 1, true),
        (0x1fff, 2, false),
        (0xfff, 1, false),
        (0x2000, 0x1001, false),
        (0x1000, u64::MAX, false),
    ] {
        assert_eq!(wanted.covers(address, size), covered, "{address:#x} {size:#x}");
    }
}

#[test]
fn a_daemon_with_no_room_for_the_rings_is_no_use() {
    let traits = Traits { slots: 1, ..Traits::disk() };
    let (mut bench, fake, _place) = disk(traits);
    assert_eq!(fake.state().running(), [0, 1]);
    let file = std::fs::File::from(
        rustix::fs::memfd_create("more", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
    );
    file.set_len(2 * SIZE).unwrap();
    bench.dma.map(Iova(0x9000_0000), 2 * SIZE, ALL, Some((file.into(), 0))).unwrap();
    bench.rewired();
    assert_eq!(fake.state().running(), [] as [u32; 0]);
    bench.dma.unmap(Iova(0x9000_0000), 2 * SIZE).unwrap();
    bench.rewired();
    assert_eq!(fake.state().running(), [0, 1]);
}

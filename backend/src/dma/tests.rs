mod extent;
mod files;
mod lost;
mod model;
mod threads;
mod view;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::ProtFlags;
use vm_memory::Bytes;

use super::mapping::Mapping;
use super::*;

const READ_WRITE: DmaAccess = DmaAccess::all();

fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("dma", MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn shared(size: u64) -> Option<(OwnedFd, u64)> {
    Some((memfd(size, SealFlags::SHRINK | SealFlags::GROW), 0))
}

/// Of the memory that [`named`] makes, in the memory map.
const NAME: &str = "memory-of-a-window";

/// Memory that can shrink: what the table gets, and what its client keeps.
fn named(size: u64) -> (OwnedFd, File) {
    let ours = memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ours, size).unwrap();
    let theirs = File::from(ours.try_clone().unwrap());
    (ours, theirs)
}

fn bytes_at(file: &File, offset: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn windows_are_refused_with_the_errno_of_the_protocol() {
    let rows: &[(&str, u64, u64, Errno)] = &[
        ("empty", 0x10000, 0, Errno::INVAL),
        ("unaligned address", 0x10001, 0x1000, Errno::INVAL),
        ("unaligned size", 0x10000, 0x1001, Errno::INVAL),
        ("wraps", 0xffff_ffff_ffff_f000, 0x2000, Errno::INVAL),
        ("same window again", 0x4000, 0x2000, Errno::EXIST),
        ("overlaps the start", 0x3000, 0x2000, Errno::EXIST),
        ("overlaps the end", 0x5000, 0x2000, Errno::EXIST),
        ("inside", 0x5000, 0x1000, Errno::EXIST),
        ("around", 0x1000, 0x10000, Errno::EXIST),
        ("file too short", 0x8000, 0x200_0000, Errno::INVAL),
    ];
    let mut table = DmaTable::new(10);
    table.map(Iova(0x4000), 0x2000, READ_WRITE, shared(0x2000)).unwrap();
    for (what, address, size, errno) in rows {
        let error = table.map(Iova(*address), *size, READ_WRITE, shared(0x2000)).unwrap_err();
        assert_eq!(error.errno(), *errno, "{what}: {error}");
    }
    table.map(Iova(0xffff_ffff_ffff_f000), 0x1000, READ_WRITE, None).expect("ends at 2^64");
    table.map(Iova(0x6000), 0x1000, READ_WRITE, None).expect("touches the end");
}

#[test]
fn the_number_of_windows_is_bounded() {
    let mut table = DmaTable::new(2);
    table.map(Iova(0), 0x1000, READ_WRITE, None).unwrap();
    table.map(Iova(0x1000), 0x1000, READ_WRITE, None).unwrap();
    let error = table.map(Iova(0x2000), 0x1000, READ_WRITE, None).unwrap_err();
    assert_eq!(error.errno(), Errno::NOSPC);
}

/// A name, a range to unmap, and which windows are left or why it is refused.
type UnmapRow = (&'static str, u64, u64, Result<&'static [u64], DmaError>);

#[test]
fn unmap_takes_whole_windows_and_never_a_part_of_one() {
    const LAST_PAGE: u64 = 0xffff_ffff_ffff_f000;
    let all = [0x4000, 0x6000, 0x9000, LAST_PAGE];
    let rows: &[UnmapRow] = &[
        ("one of them", 0x4000, 0x2000, Ok(&[0x6000, 0x9000, LAST_PAGE])),
        ("two neighbours", 0x4000, 0x3000, Ok(&[0x9000, LAST_PAGE])),
        ("more than there is", 0x1000, 0x7000, Ok(&[0x9000, LAST_PAGE])),
        ("with a hole", 0x6000, 0x4000, Ok(&[0x4000, LAST_PAGE])),
        ("all but the last byte of it", 0, LAST_PAGE, Ok(&[LAST_PAGE])),
        ("the end of the address space", LAST_PAGE, 0x1000, Ok(&[0x4000, 0x6000, 0x9000])),
        ("from one on", 0x1000, 0xffff_ffff_ffff_f000, Ok(&[])),
        ("its first page", 0x4000, 0x1000, Err(DmaError::Bisected)),
        ("its last page", 0x5000, 0x1000, Err(DmaError::Bisected)),
        ("from its middle on", 0x5000, 0x2000, Err(DmaError::Bisected)),
        ("up to its middle", 0x1000, 0x4000, Err(DmaError::Bisected)),
        ("one and half of the next", 0x3000, 0x3fff, Err(DmaError::Bisected)),
        ("a hole", 0x7000, 0x2000, Err(DmaError::NoSuchWindow)),
        ("nothing", 0x4000, 0, Err(DmaError::NoSuchWindow)),
        ("past the end", LAST_PAGE, 0x2000, Err(DmaError::Overflow)),
    ];
    for (what, address, size, expected) in rows {
        let mut table = DmaTable::new(10);
        for (start, size) in all.into_iter().zip([0x2000, 0x1000, 0x1000, 0x1000]) {
            table.map(Iova(start), size, READ_WRITE, shared(size)).unwrap();
        }
        let result = table.unmap(Iova(*address), *size);
        let there = |start: &u64| table.read(Iova(*start), &mut [0]).is_ok();
        let left: Vec<u64> = all.into_iter().filter(there).collect();
        match expected {
            Ok(remaining) => assert_eq!((result, &left[..]), (Ok(()), *remaining), "{what}"),
            Err(error) => assert_eq!((result, &left[..]), (Err(error.clone()), &all[..]), "{what}"),
        }
    }
}

/// Lines of this process's memory map that name a file.
fn mappings_of(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

#[test]
fn a_part_of_a_huge_page_is_mapped_with_the_rest_of_it_and_unmapped_as_a_whole() {
    const HUGE: usize = 2 << 20;
    // Plain memory that is treated as if it had huge pages: those of this machine may be none.
    let file = memfd_create("part-of-a-huge-page", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 3 * HUGE as u64).unwrap();
    for (offset, size) in [(0xc0000, 0x1000), (0x1f_f000, 0x2000), (0, HUGE), (0x20_0000, 0x1000)] {
        let page = rustix::io::pwrite(&file, b"here", offset);
        assert_eq!(page, Ok(4));
        let mapping = Mapping::new(file.as_fd(), offset, size, HUGE, ProtFlags::READ).unwrap();
        let mut text = [0; 4];
        mapping.slice(0, 4, ()).unwrap().read_slice(&mut text, 0).unwrap();
        assert_eq!(&text, b"here", "offset {offset:#x}");
        let (first, slice) = (mapping.address(0, 4).unwrap(), mapping.slice(0, 4, ()).unwrap());
        assert_eq!(first, slice.ptr_guard().as_ptr().addr());
        assert!(mapping.slice(size - 3, 4, ()).is_none() && mapping.address(size - 3, 4).is_none());
        assert!(mapping.slice(usize::MAX, 4, ()).is_none(), "wraps");
        assert_eq!(mappings_of("part-of-a-huge-page"), 1);
        drop(mapping);
        assert_eq!(mappings_of("part-of-a-huge-page"), 0);
    }
}

/// A hugetlbfs file reserves no page for a window, and touching one that the pool does not have
/// raises SIGBUS, sealed or not.
#[test]
fn huge_pages_that_the_pool_does_not_have_are_errors_and_nobody_dies() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    // A kernel without hugetlbfs has nothing to die of.
    let Ok(file) = memfd_create("huge-dma", flags) else { return };
    ftruncate(&file, 4 << 20).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    let mut table = DmaTable::new(10);
    // Where QEMU's second window of RAM starts, in the middle of a huge page.
    table.map(Iova(0xc0000), 0x1000, READ_WRITE, Some((file, 0xc0000))).unwrap();
    assert_eq!(mappings_of("huge-dma"), 1);
    // Pages that the pool does have are as good.
    let mut back = [0; 4];
    match table.write(Iova(0xc0800), b"huge") {
        Ok(()) => {
            table.read(Iova(0xc0800), &mut back).unwrap();
            assert_eq!(&back, b"huge");
        }
        Err(error) => {
            assert_eq!(error, DmaError::Vanished(0xc0800));
            assert_eq!(table.read(Iova(0xc0800), &mut back), Err(DmaError::Vanished(0xc0800)));
        }
    }
    table.unmap(Iova(0xc0000), 0x1000).unwrap();
    assert_eq!(mappings_of("huge-dma"), 0);
}

#[test]
fn a_transfer_spans_adjacent_windows_and_stops_at_a_hole() {
    let mut table = DmaTable::new(10);
    table.map(Iova(0x1000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    table.map(Iova(0x2000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    table.write(Iova(0x1ffe), b"span").unwrap();
    let mut back = [0; 4];
    table.read(Iova(0x1ffe), &mut back).unwrap();
    assert_eq!(&back, b"span");
    assert_eq!(table.write(Iova(0x2ffe), b"hole"), Err(DmaError::Unmapped(0x3000)));
    assert_eq!(table.read(Iova(u64::MAX), &mut back), Err(DmaError::Unmapped(u64::MAX)));
}

#[test]
fn a_read_only_window_is_never_written() {
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x1000, DmaAccess::READ, shared(0x1000)).unwrap();
    assert_eq!(table.write(Iova(8), b"no"), Err(DmaError::Denied(8)));
    let mut back = [7; 2];
    table.read(Iova(8), &mut back).unwrap();
    assert_eq!(back, [0, 0]);
}

#[test]
fn a_window_without_a_descriptor_exists_but_is_not_shared() {
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x1000, READ_WRITE, None).unwrap();
    assert_eq!(table.read(Iova(8), &mut [0]), Err(DmaError::NotShared(8)));
}

#[test]
fn an_unmap_reports_the_last_writes_or_changes_nothing() {
    let mut table = DmaTable::new(10);
    let map = |table: &mut DmaTable| table.map(Iova(0x4000), 0x4000, READ_WRITE, shared(0x4000));
    map(&mut table).unwrap();
    let mut bitmap = [0xff; 8];
    let unmap = |table: &mut DmaTable, size, page_size, bitmap: &mut [u8]| {
        table.unmap_reporting(Iova(0x4000), size, page_size, bitmap).map_err(|error| error.errno())
    };
    assert_eq!(unmap(&mut table, 0x4000, 4096, &mut bitmap), Err(Errno::INVAL), "no log");
    table.start_logging(&[], 4096).unwrap();
    table.write(Iova(0x5ffe), b"span").unwrap();
    table.mark_dirty(Iova(0x7000), 1);
    assert_eq!(unmap(&mut table, 0x4000, 4096, &mut bitmap[..7]), Err(Errno::INVAL), "no room");
    assert_eq!(unmap(&mut table, 0x4000, 4095, &mut bitmap), Err(Errno::INVAL), "no page size");
    assert_eq!(unmap(&mut table, 0x2000, 4096, &mut bitmap), Err(Errno::INVAL), "half of it");
    assert_eq!(unmap(&mut table, 0x4000, 4096, &mut bitmap), Ok(()));
    assert_eq!(bitmap, [0b1110, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(unmap(&mut table, 0x4000, 4096, &mut bitmap), Err(Errno::NOENT));
    map(&mut table).expect("it has gone");
    table.report(Iova(0x4000), 0x4000, 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0; 8], "it was reported already");
}

#[test]
fn windows_of_a_real_device_need_a_file_and_its_writes_are_not_logged() {
    #[derive(Debug)]
    struct Accepting;
    impl Iommu for Accepting {
        fn map(&self, _: Iova, _: HostMemory, _: DmaAccess) -> Result<(), Errno> {
            Ok(())
        }
        fn unmap(&self, _: Iova, _: u64) -> Result<(), Errno> {
            Ok(())
        }
    }
    let mut table = DmaTable::behind(Box::new(Accepting), 10);
    assert_eq!(table.map(Iova(0), 0x1000, READ_WRITE, None), Err(DmaError::Unreachable));
    table.map(Iova(0), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    let error = table.start_logging(&[], 4096).unwrap_err();
    assert_eq!((error.errno(), error), (Errno::NOTSUP, LoggingError::RealDevice.into()));
}

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

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

#[test]
fn unmap_takes_exactly_a_window() {
    let mut table = DmaTable::new(10);
    table.map(Iova(0x4000), 0x2000, READ_WRITE, shared(0x2000)).unwrap();
    for (address, size) in [(0x4000, 0x1000), (0x5000, 0x1000), (0x3000, 0x2000), (0, 0)] {
        assert_eq!(table.unmap(Iova(address), size), Err(DmaError::NoSuchWindow));
    }
    table.unmap(Iova(0x4000), 0x2000).unwrap();
    assert_eq!(table.read(Iova(0x4000), &mut [0]), Err(DmaError::Unmapped(0x4000)));
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
fn a_client_that_truncates_its_memory_gets_errors_and_nobody_dies() {
    let fd = memfd(0x2000, SealFlags::empty());
    let theirs = fd.try_clone().unwrap();
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x2000, READ_WRITE, Some((fd, 0))).unwrap();
    table.write(Iova(0x1800), b"there").unwrap();
    ftruncate(&theirs, 0x1000).unwrap();
    assert_eq!(table.write(Iova(0x1800), b"gone"), Err(DmaError::Vanished(0x1800)));
    assert_eq!(table.read(Iova(0x1800), &mut [0; 4]), Err(DmaError::Vanished(0x1800)));
    table.write(Iova(0x800), b"still").unwrap();
}

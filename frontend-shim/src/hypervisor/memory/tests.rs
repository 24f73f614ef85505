use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::*;

fn memfd(len: u64) -> rustix::fd::OwnedFd {
    let fd = rustix::fs::memfd_create("mapping-test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

#[test]
fn two_mappings_of_a_file_share_their_bytes() {
    let fd = memfd(0x3000);
    let whole = HostMapping::from_fd(&fd, 0, 0x3000, true).unwrap();
    let tail = HostMapping::from_fd(&fd, 0x1000, 0x2000, false).unwrap();
    whole.write(0x1003, b"seven b").unwrap();
    let mut data = [0; 9];
    tail.read(2, &mut data).unwrap();
    assert_eq!(&data, b"\0seven b\0");
    assert_eq!(tail.write(0, &[1]), Err(AccessError::ReadOnly));
}

#[test]
fn a_file_that_is_too_short_is_not_mapped() {
    let fd = memfd(0x1000);
    for (offset, len) in [(0, 0x2000), (0x1000, 0x1000), (0, 0), (u64::MAX, 2)] {
        assert!(HostMapping::from_fd(&fd, offset, len, true).is_err(), "{offset:#x} {len:#x}");
    }
}

#[test]
fn accesses_past_the_end_copy_nothing() {
    let memory = HostMapping::anonymous(0x1000).unwrap();
    let mut data = [7; 8];
    for offset in [0xff9, 0x1000, u64::MAX, u64::MAX - 7] {
        let expected = Err(AccessError::OutOfBounds { offset, len: 8, size: 0x1000 });
        assert_eq!(memory.read(offset, &mut data), expected);
        assert_eq!(memory.write(offset, &[1; 8]), expected);
        assert_eq!(memory.load_u64(offset).map(|_| ()), expected);
    }
    assert_eq!(data, [7; 8]);
    assert_eq!(memory.load_u64(0xff8), Ok(0));
    assert_eq!(memory.read(0x1000, &mut []), Ok(()));
}

#[test]
fn atomic_accesses_want_alignment() {
    let memory = HostMapping::anonymous(0x1000).unwrap();
    assert_eq!(memory.load_u32(2), Err(AccessError::Misaligned { offset: 2, len: 4 }));
    assert_eq!(memory.store_u64(4, 0), Err(AccessError::Misaligned { offset: 4, len: 8 }));
    memory.store_u32(4, 0xdead_beef).unwrap();
    assert_eq!(memory.compare_exchange(4, 2, 0xbeef, 0x1234), Ok(0xbeef));
    assert_eq!(memory.compare_exchange(4, 4, 0, 1), Ok(0xdead_1234));
    assert_eq!(memory.load_u32(4), Ok(0xdead_1234));
}

#[test]
fn an_inaccessible_mapping_answers_with_an_error_and_keeps_its_bytes() {
    let memory = HostMapping::anonymous(0x1000).unwrap();
    memory.store_u32(0, 42).unwrap();
    memory.set_accessible(false).unwrap();
    assert_eq!(memory.load_u32(0), Err(AccessError::Inaccessible));
    assert_eq!(memory.write(0, &[0]), Err(AccessError::Inaccessible));
    memory.set_accessible(true).unwrap();
    assert_eq!(memory.load_u32(0), Ok(42));
}

#[test]
fn readers_racing_set_accessible_never_fault() {
    let memory = Arc::new(HostMapping::anonymous(0x1000).unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let reader = {
        let (memory, done) = (Arc::clone(&memory), Arc::clone(&done));
        std::thread::spawn(move || {
            let mut data = [0; 256];
            while !done.load(Ordering::Relaxed) {
                match memory.read(0, &mut data) {
                    Ok(()) | Err(AccessError::Inaccessible) => {}
                    Err(other) => panic!("{other}"),
                }
            }
        })
    };
    for round in 0..2000 {
        memory.set_accessible(round % 2 == 1).unwrap();
    }
    done.store(true, Ordering::Relaxed);
    reader.join().unwrap();
}

#[test]
fn pages_are_protected_one_by_one_and_all_given_back_at_once() {
    use Protection::{None, ReadOnly, ReadWrite};
    let memory = HostMapping::anonymous(0x4000).unwrap();
    memory.protect(0x1000, 0x2000, ReadOnly).unwrap();
    memory.protect(0x2000, 0x1000, None).unwrap();
    let read = |at| memory.read(at, &mut [0; 8]);
    let write = |at| memory.write(at, &[1; 8]);
    for (at, readable, writable) in [
        (0, Ok(()), Ok(())),
        (0xff8, Ok(()), Ok(())),
        (0xff9, Ok(()), Err(AccessError::ReadOnly)),
        (0x1000, Ok(()), Err(AccessError::ReadOnly)),
        (0x1ffc, Err(AccessError::Inaccessible), Err(AccessError::Inaccessible)),
        (0x2ff8, Err(AccessError::Inaccessible), Err(AccessError::Inaccessible)),
        (0x3000, Ok(()), Ok(())),
    ] {
        assert_eq!((read(at), write(at)), (readable, writable), "{at:#x}");
    }
    assert_eq!(memory.compare_exchange(0x1000, 8, 0, 1), Err(AccessError::ReadOnly));
    assert_eq!(memory.store_u32(0x1004, 0), Err(AccessError::ReadOnly));

    memory.protect(0x1000, 0x1000, ReadWrite).unwrap();
    assert_eq!((write(0x1000), write(0x2000)), (Ok(()), Err(AccessError::Inaccessible)));
    memory.set_accessible(true).unwrap();
    assert_eq!((write(0x1ffc), write(0x2ffc)), (Ok(()), Ok(())));
    memory.protect(0, 0x1000, ReadOnly).unwrap();
    memory.set_accessible(false).unwrap();
    memory.set_accessible(true).unwrap();
    assert_eq!(write(0), Ok(()));
}

#[test]
fn protection_never_gives_more_than_the_mapping_has() {
    let fd = memfd(0x1000);
    let memory = HostMapping::from_fd(&fd, 0, 0x1000, false).unwrap();
    memory.protect(0, 0x1000, Protection::ReadWrite).unwrap();
    assert_eq!(memory.read(0, &mut [0]), Ok(()));
    assert_eq!(memory.write(0, &[0]), Err(AccessError::ReadOnly));
}

#[test]
fn a_mapping_that_ends_inside_a_page_is_taken_away_whole() {
    let fd = memfd(0x2000);
    let memory = HostMapping::from_fd(&fd, 0, 0x1008, true).unwrap();
    memory.set_accessible(false).unwrap();
    assert_eq!(memory.write(0x1000, &[1; 8]), Err(AccessError::Inaccessible));
    memory.set_accessible(true).unwrap();
    assert_eq!(memory.write(0x1000, &[1; 8]), Ok(()));
}

#[test]
fn only_whole_pages_of_the_mapping_are_protected() {
    let memory = HostMapping::anonymous(0x2000).unwrap();
    for (offset, len) in
        [(1, 0x1000), (0, 0xfff), (0x1000, 0x2000), (0x3000, 0x1000), (0x1000, u64::MAX - 0xfff)]
    {
        let error = memory.protect(offset, len, Protection::None).expect_err("a bad range");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{offset:#x} {len:#x}");
    }
    assert_eq!(memory.write(0, &[1; 0x2000]), Ok(()));
    memory.protect(0x2000, 0, Protection::None).unwrap();
    assert_eq!(memory.write(0, &[1; 0x2000]), Ok(()));
}

#[test]
fn a_probe_tells_what_an_access_would_meet_and_changes_nothing() {
    let fd = memfd(0x3000);
    let file = HostMapping::from_fd(&fd, 0, 0x3000, true).unwrap();
    file.write(8, &[7]).unwrap();
    rustix::fs::ftruncate(&fd, 0x2000).unwrap();
    file.protect(0x1000, 0x1000, Protection::ReadOnly).unwrap();
    for (offset, readable, writable) in [
        (0xfff, true, true),
        (0x1000, true, false),
        // Past the end of its file: a SIGBUS.
        (0x2000, false, false),
        // Past the end of the mapping.
        (0x3000, false, false),
    ] {
        let found = (file.probe(offset, false), file.probe(offset, true));
        assert_eq!(found, (readable, writable), "{offset:#x}");
    }
    file.set_accessible(false).unwrap();
    assert!(!file.probe(0, false));
    file.set_accessible(true).unwrap();
    let mut data = [0; 9];
    file.read(0, &mut data).unwrap();
    assert_eq!(data, [0, 0, 0, 0, 0, 0, 0, 0, 7]);

    let read_only = HostMapping::from_fd(&fd, 0, 0x1000, false).unwrap();
    assert!(read_only.probe(0, false));
    assert!(!read_only.probe(0, true));
}

#[test]
fn pages_that_somebody_else_protected_are_found_by_the_probe() {
    let memory = HostMapping::anonymous(0x1000).unwrap();
    memory.protect_unnoticed(MprotectFlags::READ);
    assert!(memory.probe(0, false));
    assert!(!memory.probe(0, true));
    memory.protect_unnoticed(MprotectFlags::empty());
    assert!(!memory.probe(0, false));
}

#[test]
fn of_a_device_only_our_own_protection_is_known() {
    let fd = memfd(0x1000);
    let device = HostMapping::from_fd(&fd, 0, 0x1000, true).unwrap().of_device();
    rustix::fs::ftruncate(&fd, 0).unwrap();
    assert!(device.probe(0, true));
    device.protect(0, 0x1000, Protection::ReadOnly).unwrap();
    assert!(device.probe(0, false));
    assert!(!device.probe(0, true));
}

#[test]
fn words_of_another_process_are_read_where_its_file_cant_shrink() {
    let file = memfd_create("words", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, PAGE_SIZE).unwrap();
    let refused = |file: &OwnedFd, len| ReadOnlyWords::map(file, len).is_err();
    assert!(refused(&file, PAGE_SIZE), "it could shrink");
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    assert!(refused(&file, 0) && refused(&file, 2 * PAGE_SIZE), "it is not so long");
    let words = ReadOnlyWords::map(&file, PAGE_SIZE).unwrap();
    assert_eq!(words.as_ref().len() as u64 * 8, PAGE_SIZE);
    rustix::io::pwrite(&file, &7u64.to_ne_bytes(), 16).unwrap();
    assert_eq!(words.as_ref()[2].load(Ordering::Relaxed), 7);
    let mut device = std::fs::File::open("/dev/zero").map(OwnedFd::from).unwrap();
    assert!(refused(&device, PAGE_SIZE), "not a memory file");
    device = std::fs::File::open("/proc/self/exe").map(OwnedFd::from).unwrap();
    assert!(refused(&device, PAGE_SIZE), "not a memory file");
}

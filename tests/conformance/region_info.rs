//! "VFIO_USER_DEVICE_GET_REGION_INFO"

use std::fs::File;
use std::os::unix::fs::FileExt;

use barkeep_tests::backend::Backend;
use barkeep_tests::memory::bytes_at;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{Payload, command};
use barkeep_tests::peer::requests::{pci, region_info};
use rustix::fs::{SealFlags, fcntl_get_seals, ftruncate};
use rustix::io::Errno;

const READ_WRITE: u32 = 0b11;
const MMAP: u32 = 1 << 2;

#[test]
fn every_region_of_a_function_is_described() {
    let config = (READ_WRITE, 4096);
    let bar = |size| (READ_WRITE, size);
    let none = (0, 0);
    let edu = [bar(1 << 20), none, none, none, none, none, none, config, none];
    // BAR2 is 64 bits wide, so there is no BAR3.
    let ivshmem =
        [bar(256), none, (READ_WRITE | MMAP, 1 << 16), none, none, none, none, config, none];
    for (spec, regions) in [("edu", edu), ("ivshmem,size=64K", ivshmem)] {
        let backend = Backend::serve(&[spec]);
        let mut peer = backend.client();
        for (index, (flags, size)) in (0..).zip(regions) {
            for argsz in [32, 4096] {
                let reply = peer.call(command::GET_REGION_INFO, &region_info(argsz, index));
                assert_eq!(reply.fds.len(), usize::from(flags & MMAP != 0), "{spec} {index}");
                let expected =
                    Payload::new().u32(32).u32(flags).u32(index).u32(0).u64(size).u64(0).done();
                assert_eq!(reply.success(), expected, "{spec}, region {index}, argsz {argsz}");
            }
        }
    }
}

#[test]
fn what_does_not_exist_or_has_no_room_for_its_answer_is_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for (name, body) in [
        ("argsz below the fixed part", region_info(31, 0)),
        ("argsz 0", region_info(0, 0)),
        ("index 9", region_info(32, 9)),
        ("index 2^32 - 1", region_info(32, u32::MAX)),
        ("short", region_info(32, 0)[..31].to_vec()),
    ] {
        println!("{name}");
        peer.expect_errno(command::GET_REGION_INFO, &body, Errno::INVAL);
    }
}

/// The file behind BAR2.
fn bar2(peer: &mut Peer) -> File {
    let reply = peer.call(command::GET_REGION_INFO, &region_info(32, 2));
    let [file] = <[_; 1]>::try_from(reply.fds).expect("one descriptor");
    File::from(file)
}

#[test]
fn the_file_of_a_mapped_bar_is_what_region_accesses_reach() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let file = bar2(&mut peer);
    file.write_all_at(b"from the client", 0x123).expect("a writable file");
    assert_eq!(peer.read(2, 0x123, 15), b"from the client");
    peer.write(2, 0xfff0, b"from the server.");
    assert_eq!(bytes_at(&file, 0xfff0, 16), b"from the server.");
}

#[test]
fn a_client_can_map_the_file_without_fearing_that_it_shrinks() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let file = bar2(&mut backend.client());
    let seals = fcntl_get_seals(&file).expect("a memfd");
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    assert_eq!(ftruncate(&file, 0), Err(Errno::PERM));
    assert_eq!(file.metadata().expect("a file").len(), 1 << 16);
}

#[test]
fn the_memory_outlives_the_client_and_a_file_of_the_operator_is_used_in_place() {
    let shared = tempfile::NamedTempFile::new().expect("a temporary file");
    shared.as_file().set_len(8192).expect("room");
    shared.as_file().write_all_at(b"operator", 0).expect("room");
    let path = shared.path().display();
    let backend = Backend::serve(&[&format!("ivshmem,size=8K,path={path}")]);
    for round in [&b"operator"[..], b"client 1"] {
        let mut peer = backend.client();
        peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
        assert_eq!(peer.read(2, 0, 8), round);
        peer.write(2, 0, b"client 1");
        assert_eq!(bytes_at(shared.as_file(), 0, 8), b"client 1");
    }
}

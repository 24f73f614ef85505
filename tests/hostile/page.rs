//! A client with bad intentions for its decode page.

use std::fs::{File, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};

use barkeep_shim::hypervisor::HostMapping;
use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::peer::decode_page::LENGTH;
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, command, message};
use barkeep_tests::peer::requests::{decode_page, pci};
use rustix::fs::{FallocateFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate};

fn open_anew(file: &OwnedFd) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // Of the same user as the server, as the worst of clients.
    std::fs::set_permissions(&path, Permissions::from_mode(0o777))?;
    File::options().read(true).write(true).open(&path)
}

/// Where no other process goes on with the page, its file can't be written to at all.
#[test]
fn nothing_can_be_written_to_a_page_by_whatever_way() {
    if std::env::var_os("BARKEEP_TEST_RECORDED").is_some() {
        return barkeep_tests::skip(&"a recorded page is written by the next process, too");
    }
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    edu::enable(&mut peer);
    let before = page.shown();
    let file = open_anew(&page.file).unwrap();
    assert!(file.write_all_at(&[0xff; 4096], 0).is_err());
    assert!(HostMapping::from_fd(&file, 0, LENGTH, true).is_err());
    assert!(ftruncate(&file, 0).is_err() && ftruncate(&file, 2 * LENGTH).is_err());
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert!(fallocate(&file, hole, 0, LENGTH).is_err());
    assert!(fallocate(&file, FallocateFlags::ZERO_RANGE, 0, LENGTH).is_err());
    assert!(fcntl_add_seals(&file, SealFlags::WRITE).is_err(), "or the server could not write");
    assert_eq!(page.shown(), before);
    peer.set_config_u16(pci::COMMAND, 0);
    assert!(!page.bar(0).decodes);
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn a_client_that_asks_for_its_page_for_ever_costs_one_page() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    drop(peer.decode_page());
    let before = count();
    for round in 0..2000 {
        drop(peer.decode_page());
        peer.send(&message(round, command::DECODE_PAGE, COMMAND | NO_REPLY, &decode_page(16, 0)));
    }
    let _ = peer.config_u16(0);
    // Those of the last few may still be on their way through somebody's hands.
    assert!(count() <= before + 20, "{before} descriptors, then {}", count());
    drop(peer);
    edu::assert_served(backend.socket());
}

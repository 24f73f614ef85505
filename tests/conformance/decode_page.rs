//! barkeep's command 0x8003 decode_page: a page that shows what the function decodes.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use barkeep_protocol::page::decode::DecodeReader;
use barkeep_shim::client::Client;
use barkeep_shim::hypervisor::{HostMapping, ReadOnlyWords};
use barkeep_tests::backend::Backend;
use barkeep_tests::peer::decode_page::{Bar, DecodePage, LENGTH};
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, Payload, command, message, u64_at};
use barkeep_tests::peer::requests::{
    CONFIG, access, decode_page, feature, memory_fault, migration, pci, region_info, region_state,
    write,
};
use barkeep_tests::peer::{Peer, version_body};
use rustix::fs::{FallocateFlags, OFlags, SealFlags, fallocate, fcntl_get_seals, fcntl_getfl};
use rustix::io::Errno;

const ADDRESS: u32 = 0xfea0_0000;

fn place(peer: &mut Peer, address: u32) {
    peer.write_u32(CONFIG, pci::BAR0, address);
}

#[test]
fn the_page_is_a_file_that_can_only_be_read_and_keeps_its_length() {
    let backend = Backend::serve(&["edu"]);
    let page = backend.client().decode_page();
    let seals = fcntl_get_seals(&page.file).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), "{seals:?}");
    assert_eq!(fcntl_getfl(&page.file).unwrap() & OFlags::ACCMODE, OFlags::RDONLY);
    assert!(HostMapping::from_fd(&page.file, 0, LENGTH, true).is_err());
    assert_eq!(rustix::io::pwrite(&page.file, &[0], 0), Err(Errno::BADF));
    assert_eq!(rustix::fs::ftruncate(&page.file, 0), Err(Errno::INVAL));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(&page.file, punch, 0, LENGTH), Err(Errno::BADF));
    assert!((32..LENGTH / 8).all(|word| page.word(word) == 0), "what is not used yet");
    let mode = rustix::fs::fstat(&page.file).unwrap().st_mode & 0o777;
    assert_eq!(mode, 0o400, "nobody else can open it anew");
}

#[test]
fn the_page_is_there_for_whoever_negotiated_it() {
    let backend = Backend::serve(&["edu"]);
    let others = r#"{"capabilities":{"barkeep":{"memory_fault":true,"region_state":true}}}"#;
    for json in ["{}", others] {
        let mut peer = Peer::connect(backend.socket());
        let answer = peer.call(command::VERSION, &version_body(0, 2, json)).success();
        assert!(!String::from_utf8_lossy(&answer).contains("\"decode_page\":true"));
        peer.expect_errno(command::DECODE_PAGE, &decode_page(16, 0), Errno::NOTSUP);
    }
    let mut peer = Peer::connect(backend.socket());
    let only = r#"{"capabilities":{"barkeep":{"decode_page":true}}}"#;
    let answer = peer.call(command::VERSION, &version_body(0, 2, only)).success();
    assert!(String::from_utf8_lossy(&answer).contains("\"decode_page\":true"));
    assert!(!peer.decode_page().bar(0).decodes);
    peer.expect_errno(command::REGION_STATE, &region_state(56, 0, 0), Errno::NOTSUP);
    // A reply longer than asked for is no mistake of the client's.
    let _ = peer.call(command::DECODE_PAGE, &decode_page(u32::MAX, 0)).success();
}

/// With each reply, the page shows what the request has changed.
#[test]
fn the_page_follows_configuration_space() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    let size = 1 << 20;
    let bar = |decodes, address, decoded_at| Bar { decodes, io: false, address, size, decoded_at };
    let at = u64::from(ADDRESS);
    assert_eq!(page.bar(0), bar(false, 0, 0));
    assert_eq!(page.shown().unwrap().bars[1..], [None; 5]);
    place(&mut peer, ADDRESS);
    assert_eq!(page.bar(0), bar(false, at, 0));
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert_eq!(page.bar(0), bar(true, at, at));
    peer.set_config_u16(pci::COMMAND, 0);
    assert_eq!(page.bar(0), bar(false, at, at));
    place(&mut peer, u32::MAX);
    assert_eq!(page.bar(0), bar(false, 0xfff0_0000, at), "while a driver asks for the size");
    place(&mut peer, ADDRESS + (1 << 20));
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let at = at + (1 << 20);
    assert_eq!(page.bar(0), bar(true, at, at));
    // In D3hot nothing decodes, and from there a function like this comes back with its context.
    let pmcsr = peer.capability(pci::POWER_MANAGEMENT) + 4;
    peer.set_config_u16(pmcsr, 0b11);
    assert_eq!(page.bar(0), bar(false, at, at));
    peer.set_config_u16(pmcsr, 0);
    assert_eq!(page.bar(0), bar(true, at, at));
    // Function Level Reset, and that of the whole device.
    let control = peer.capability(pci::EXPRESS) + 8;
    peer.set_config_u16(control, 1 << 15);
    assert_eq!(page.bar(0), bar(false, 0, at));
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    place(&mut peer, ADDRESS);
    assert_eq!(page.bar(0), bar(true, ADDRESS.into(), ADDRESS.into()));
    let _ = peer.call(command::RESET, &[]).success();
    assert_eq!(page.bar(0), bar(false, 0, ADDRESS.into()));
}

#[test]
fn a_request_that_wants_no_reply_shows_before_the_next_one_is_answered() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    for value in [pci::MEMORY_SPACE, 0, pci::MEMORY_SPACE] {
        let body = write(CONFIG, pci::COMMAND, &value.to_le_bytes());
        peer.send(&message(77, command::REGION_WRITE, COMMAND | NO_REPLY, &body));
        assert_eq!(peer.config_u16(pci::COMMAND), value);
        assert_eq!(page.bar(0).decodes, value != 0);
    }
}

/// A reply may be on its way while requests behind it are served.
#[test]
fn a_change_shows_with_its_reply_and_not_with_the_last_one_of_many() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    for round in 0..100 {
        let on = round % 2 == 0;
        let value = if on { pci::MEMORY_SPACE } else { 0 };
        let change = write(CONFIG, pci::COMMAND, &value.to_le_bytes());
        let mut bytes = message(1, command::REGION_WRITE, COMMAND, &change);
        // With its descriptor, what was answered so far is sent.
        bytes.extend(message(2, command::GET_REGION_INFO, COMMAND, &region_info(32, 2)));
        for id in 3..20 {
            bytes.extend(message(id, command::REGION_READ, COMMAND, &access(2, 0, 0x1_0000)));
        }
        peer.send(&bytes);
        let _ = peer.reply_to(1, command::REGION_WRITE).success();
        assert_eq!(page.bar(2).decodes, on);
        let _ = peer.reply_to(2, command::GET_REGION_INFO).success();
        for id in 3..20 {
            let _ = peer.reply_to(id, command::REGION_READ).success();
        }
    }
}

#[test]
fn epoch_and_counters_are_those_of_region_state() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    let epoch = |peer: &mut Peer| {
        u64_at(&peer.call(command::REGION_STATE, &region_state(56, 0, 2)).success(), 8)
    };
    for region in [0, 2, 2] {
        let _ = peer.read(region, 0, 4);
        peer.write(region, 0, &[0; 4]);
        peer.write(region, 4, &[0; 4]);
    }
    let _ = peer.call(command::MEMORY_FAULT, &memory_fault(1, 2, 0, 4096)).success();
    assert_eq!(page.counters(), [3, 6, 1]);
    for value in [pci::MEMORY_SPACE, 0] {
        peer.set_config_u16(pci::COMMAND, value);
        assert_eq!(page.shown().unwrap().epoch, epoch(&mut peer));
    }
}

/// A 64-bit BAR is one BAR, with an address that no register alone holds.
#[test]
fn a_bar_above_4_gib_has_its_whole_address() {
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    peer.write_u32(CONFIG, pci::BAR0 + 8, 0x4000_0000);
    peer.write_u32(CONFIG, pci::BAR0 + 12, 0x12);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let bar = page.bar(2);
    assert_eq!((bar.address, bar.size, bar.decodes), (0x12_4000_0000, 0x1_0000, true));
    assert_eq!(bar.decoded_at, 0x12_4000_0000);
    assert_eq!(page.shown().unwrap().bars[3], None);
}

#[test]
fn a_function_that_decodes_always_shows_that() {
    let backend = Backend::serve(&["edu,decode=always"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    assert!(page.bar(0).decodes);
    peer.set_config_u16(pci::COMMAND, 0);
    assert!(page.bar(0).decodes);
}

#[test]
fn a_function_that_is_stopped_decodes_nothing() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    place(&mut peer, ADDRESS);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    for (state, decodes) in [(migration::STOP, false), (migration::RUNNING, true)] {
        let set = feature::SET | feature::STATE;
        let body = Payload::new().u32(16).u32(set).u32(state).u32(0).done();
        let _ = peer.call(command::DEVICE_FEATURE, &body).success();
        assert_eq!(page.bar(0).decodes, decodes);
        assert_eq!(page.bar(0).address, u64::from(ADDRESS));
    }
}

#[test]
fn virtio_functions_have_a_page() {
    let backend = Backend::serve(&["virtio-rng"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    let decoding = |page: &DecodePage| {
        page.shown().unwrap().bars.into_iter().flatten().map(|bar| bar.decodes).collect::<Vec<_>>()
    };
    assert!(!decoding(&page).is_empty() && !decoding(&page).contains(&true));
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert!(!decoding(&page).contains(&false));
}

/// However often it is asked for, and whoever has it open.
#[test]
fn all_pages_of_a_session_are_one_and_the_next_session_has_another() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let (first, second) = (peer.decode_page(), peer.decode_page());
    place(&mut peer, ADDRESS);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert_eq!(first.shown(), second.shown());
    assert!(first.bar(0).decodes);
    drop(peer);
    let mut next = backend.client();
    // The next client is served when all is done for the last one.
    let page = next.decode_page();
    assert_eq!((first.bar(0).decodes, first.bar(0).decoded_at), (false, ADDRESS.into()));
    next.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    assert!(page.bar(0).decodes && !first.bar(0).decodes);
    assert_eq!((page.bar(0).decoded_at, page.counters()), (0, [0; 3]));
}

#[test]
fn whoever_reads_at_any_moment_finds_a_state_that_was() {
    const MOVES: u32 = 400;
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let page = peer.decode_page();
    place(&mut peer, 0);
    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    let last = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut shown = 0;
            while shown < u64::from(MOVES) {
                let floor = last.load(Ordering::Acquire);
                let Some(bar) = page.shown().map(|shown| shown.bars[0].unwrap()) else { continue };
                // It decodes all the while, wherever it is.
                assert_eq!(bar.address, bar.decoded_at, "torn");
                assert!(bar.decodes);
                let number = bar.address >> 20;
                assert!(number >= floor && number >= shown, "what was answered is shown");
                shown = number;
            }
        });
        for number in 1..=MOVES {
            place(&mut peer, number << 20);
            last.store(number.into(), Ordering::Release);
        }
    });
}

/// The shim and its codec see the same.
#[test]
fn the_shims_client_maps_it() {
    let backend = Backend::serve(&["edu"]);
    let client = Client::connect(backend.socket(), std::time::Duration::from_secs(5)).unwrap();
    let (info, file) = client.decode_page().unwrap();
    let reader = DecodeReader::new(ReadOnlyWords::map(file.as_fd(), info.length).unwrap()).unwrap();
    client.region_write(CONFIG, pci::BAR0, &ADDRESS.to_le_bytes()).unwrap();
    assert_eq!(reader.bar(0).unwrap().unwrap().decoded_at, None);
    client.region_write(CONFIG, pci::COMMAND, &pci::MEMORY_SPACE.to_le_bytes()).unwrap();
    let shown = reader.bar(0).unwrap().unwrap();
    assert_eq!((shown.bar.decodes, shown.decoded_at), (true, Some(ADDRESS.into())));
    let mut data = [0; 4];
    client.region_write(CONFIG, pci::COMMAND, &[0, 0]).unwrap();
    client.region_read(0, 0, &mut data).unwrap();
    assert_eq!((data, reader.counters().reads_ur), ([0xff; 4], 1));
    assert!(!reader.read().unwrap().bars[0].unwrap().bar.decodes);
}

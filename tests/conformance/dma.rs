//! "VFIO_USER_DMA_MAP" and "VFIO_USER_DMA_UNMAP"

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::{bytes_at, sealed, shrinkable};
use barkeep_tests::peer::message::{COMMAND, Payload, REPLY, command, message, u64_at};
use barkeep_tests::peer::requests::{dma_map, dma_unmap, pci};
use rustix::io::Errno;

const READ: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const BOTH: u32 = READ | WRITE;
const UNMAP_ALL: u32 = 1 << 1;

/// A page of guest memory that says who it is.
fn page(file: File, text: &[u8]) -> File {
    file.write_all_at(text, 0).expect("a page");
    file
}

#[test]
fn a_window_that_cant_exist_is_refused_with_its_reason() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    peer.map(BOTH, 0x10000, 0x4000, shrinkable(0x4000).as_fd());
    for (name, errno, body) in [
        ("the same again", Errno::EXIST, dma_map(BOTH, 0, 0x10000, 0x4000)),
        ("its first page", Errno::EXIST, dma_map(BOTH, 0, 0x10000, 0x1000)),
        ("its last page", Errno::EXIST, dma_map(BOTH, 0, 0x13000, 0x1000)),
        ("over its start", Errno::EXIST, dma_map(BOTH, 0, 0xf000, 0x2000)),
        ("over its end", Errno::EXIST, dma_map(BOTH, 0, 0x13000, 0x2000)),
        ("around it", Errno::EXIST, dma_map(BOTH, 0, 0, 0x10_0000)),
        ("no length", Errno::INVAL, dma_map(BOTH, 0, 0x20000, 0)),
        ("half a page", Errno::INVAL, dma_map(BOTH, 0, 0x20000, 0x800)),
        ("at half a page", Errno::INVAL, dma_map(BOTH, 0, 0x20800, 0x1000)),
        ("past 2^64", Errno::INVAL, dma_map(BOTH, 0, u64::MAX - 0xfff, 0x2000)),
        ("all of 2^64 and one page", Errno::INVAL, dma_map(BOTH, 0, 0x2000, u64::MAX - 0xfff)),
        ("an unknown flag", Errno::INVAL, dma_map(BOTH | 4, 0, 0x20000, 0x1000)),
        ("argsz too small", Errno::INVAL, {
            let mut body = dma_map(BOTH, 0, 0x20000, 0x1000);
            body[..4].copy_from_slice(&31u32.to_ne_bytes());
            body
        }),
        ("short", Errno::INVAL, dma_map(BOTH, 0, 0x20000, 0x1000)[..24].to_vec()),
        ("long", Errno::INVAL, [dma_map(BOTH, 0, 0x20000, 0x1000), vec![0; 8]].concat()),
    ] {
        println!("{name}");
        peer.expect_errno(command::DMA_MAP, &body, errno);
    }
}

#[test]
fn a_file_that_cant_back_its_window_is_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = shrinkable(0x4000);
    let read_only = {
        let path = directory.path().join("ro");
        std::fs::write(&path, [0; 0x1000]).expect("a file");
        File::open(&path).expect("a file")
    };
    let counter = EventCounter::new();
    let (pipe, _other_end) = rustix::pipe::pipe().expect("a pipe");
    let one = dma_map(BOTH, 0, 0x20000, 0x1000);
    for (name, errno, body, fd) in [
        ("longer than its file", Errno::INVAL, dma_map(BOTH, 0, 0x20000, 0x5000), file.as_fd()),
        ("behind the file", Errno::INVAL, dma_map(BOTH, 0x4000, 0x20000, 0x1000), file.as_fd()),
        ("half behind it", Errno::INVAL, dma_map(BOTH, 0x3000, 0x20000, 0x2000), file.as_fd()),
        ("offset in a page", Errno::INVAL, dma_map(BOTH, 0x800, 0x20000, 0x1000), file.as_fd()),
        (
            "offset past 2^64",
            Errno::INVAL,
            dma_map(BOTH, u64::MAX - 0xfff, 0, 0x2000),
            file.as_fd(),
        ),
        ("may not be written", Errno::ACCESS, one.clone(), read_only.as_fd()),
        ("an eventfd", Errno::INVAL, one.clone(), counter.as_fd()),
        ("a pipe", Errno::INVAL, one.clone(), pipe.as_fd()),
    ] {
        println!("{name}");
        peer.call_with_fds(command::DMA_MAP, &body, &[fd]).failure(errno);
    }
    let two = [file.as_fd(), file.as_fd()];
    peer.call_with_fds(command::DMA_MAP, &one, &two).failure(Errno::INVAL);

    // None of them has left a window behind, and what each of them lacked is enough.
    peer.map(READ, 0x20000, 0x1000, read_only.as_fd());
    let body = dma_map(BOTH, 0x3000, 0x21000, 0x1000);
    let _ = peer.call_with_fds(command::DMA_MAP, &body, &[file.as_fd()]).success();
}

#[test]
fn a_window_may_end_where_addresses_do() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let last_page = dma_map(BOTH, 0, u64::MAX - 0xfff, 0x1000);
    assert!(peer.call(command::DMA_MAP, &last_page).success().is_empty());
    peer.expect_errno(command::DMA_MAP, &last_page, Errno::EXIST);
    let below = dma_map(BOTH, 0, 0, u64::MAX - 0xfff);
    assert!(peer.call(command::DMA_MAP, &below).success().is_empty(), "all but the last page");
}

#[test]
fn unmapping_takes_no_part_of_a_window_and_repeats_the_request() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    peer.map(BOTH, 0x10000, 0x4000, shrinkable(0x4000).as_fd());
    for (name, errno, body) in [
        ("only its start", Errno::INVAL, dma_unmap(0, 0x10000, 0x1000)),
        ("only its end", Errno::INVAL, dma_unmap(0, 0x13000, 0x1000)),
        ("its middle", Errno::INVAL, dma_unmap(0, 0x11000, 0x2000)),
        ("all but its first byte", Errno::INVAL, dma_unmap(0, 0x10001, 0x8000)),
        ("never mapped", Errno::NOENT, dma_unmap(0, 0x4000_0000, 0x1000)),
        ("nothing", Errno::NOENT, dma_unmap(0, 0x10000, 0)),
        ("past 2^64", Errno::INVAL, dma_unmap(0, 0x10000, u64::MAX)),
        ("ALL of a range", Errno::INVAL, dma_unmap(UNMAP_ALL, 0x10000, 0x4000)),
        ("a dirty bitmap", Errno::INVAL, dma_unmap(1, 0x10000, 0x4000)),
        ("an unknown flag", Errno::INVAL, dma_unmap(4, 0x10000, 0x4000)),
        ("short", Errno::INVAL, dma_unmap(0, 0x10000, 0x4000)[..16].to_vec()),
        ("long", Errno::INVAL, [dma_unmap(0, 0x10000, 0x4000), vec![0; 8]].concat()),
    ] {
        println!("{name}");
        peer.expect_errno(command::DMA_UNMAP, &body, errno);
    }
    let request = dma_unmap(0, 0x10000, 0x4000);
    let reply = peer.call(command::DMA_UNMAP, &request).success();
    assert_eq!(reply, Payload::new().u32(24).u32(0).u64(0x10000).u64(0x4000).done());
    peer.expect_errno(command::DMA_UNMAP, &request, Errno::NOENT);
}

/// QEMU's vIOMMU withdraws what a guest invalidates, as one range: larger than what was mapped, and
/// with holes. A window that stayed would be memory that the guest has taken back.
#[test]
fn unmapping_a_range_withdraws_every_window_in_it() {
    for (address, size) in [(0x2000, 0x8000), (0, 1 << 48), (0, u64::MAX)] {
        let backend = Backend::serve(&["edu"]);
        let mut peer = backend.client();
        edu::enable(&mut peer);
        let source = page(shrinkable(0x1000), b"source");
        let target = page(shrinkable(0x2000), b"target");
        peer.map(BOTH, 0x1000, 0x1000, source.as_fd());
        edu::load(&mut peer, 0x1000, 6);
        let _ = peer.call(command::DMA_UNMAP, &dma_unmap(0, 0x1000, 0x1000)).success();
        for at in [0x2000, 0x8000] {
            peer.map(BOTH, at, 0x1000, target.as_fd());
        }
        let request = dma_unmap(0, address, size);
        assert_eq!(peer.call(command::DMA_UNMAP, &request).success(), request);
        for at in [0x2000, 0x8000] {
            edu::store(&mut peer, at, 6);
            assert_eq!(bytes_at(&target, 0, 6), b"target", "window {at:#x} of {size:#x}");
            peer.map(BOTH, at, 0x1000, target.as_fd());
        }
    }
}

/// SPDK's client sends the descriptor of the memory with both.
#[test]
fn unmapping_may_bring_the_descriptor_of_the_window() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let file = shrinkable(0x1000);
    for _ in 0..3 {
        peer.map(BOTH, 0x1000, 0x1000, file.as_fd());
        let request = dma_unmap(0, 0x1000, 0x1000);
        let reply = peer.call_with_fds(command::DMA_UNMAP, &request, &[file.as_fd()]);
        assert_eq!(reply.success(), request);
    }
}

#[test]
fn unmapping_all_forgets_every_window() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let windows = [0, 0x10000, 0x4000_0000].map(|at| dma_map(BOTH, 0, at, 0x1000));
    for window in &windows {
        let _ = peer.call(command::DMA_MAP, window).success();
    }
    let reply = peer.call(command::DMA_UNMAP, &dma_unmap(UNMAP_ALL, 0, 0)).success();
    assert_eq!(reply, Payload::new().u32(24).u32(UNMAP_ALL).u64(0).u64(0).done());
    for window in &windows {
        let _ = peer.call(command::DMA_MAP, window).success();
    }
}

#[test]
fn the_device_reaches_windows_as_their_flags_allow() {
    // Sealed files and others are accessed in different ways.
    for file in [sealed, shrinkable] {
        for (flags, readable, writable) in
            [(0, false, false), (READ, true, false), (WRITE, false, true), (BOTH, true, true)]
        {
            let backend = Backend::serve(&["edu"]);
            let mut peer = backend.client();
            edu::enable(&mut peer);
            let source = page(file(0x1000), b"source");
            let target = page(file(0x1000), b"target");
            let tested = page(file(0x1000), b"tested");
            peer.map(BOTH, 0x1000, 0x1000, source.as_fd());
            peer.map(BOTH, 0x2000, 0x1000, target.as_fd());
            peer.map(flags, 0x8000, 0x1000, tested.as_fd());

            edu::copy(&mut peer, 0x8000, 0x2000, 6);
            let read: &[u8] = if readable { b"tested" } else { &[0; 6] };
            assert_eq!(bytes_at(&target, 0, 6), read, "flags {flags}");

            edu::copy(&mut peer, 0x1000, 0x8000, 6);
            let left = if writable { b"source" } else { b"tested" };
            assert_eq!(bytes_at(&tested, 0, 6), left, "flags {flags}");
        }
    }
}

#[test]
fn a_window_starts_at_its_offset_and_transfers_may_span_windows() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let file = shrinkable(0x3000);
    file.write_all_at(b"second page", 0x1000).expect("room");
    for (offset, address) in [(0x1000, 0x5000), (0, 0x7000), (0x2000, 0x8000)] {
        let body = dma_map(BOTH, offset, address, 0x1000);
        let _ = peer.call_with_fds(command::DMA_MAP, &body, &[file.as_fd()]).success();
    }
    edu::copy(&mut peer, 0x5000, 0x7ffa, 11);
    assert_eq!(bytes_at(&file, 0xffa, 6), b"second");
    assert_eq!(bytes_at(&file, 0x2000, 5), b" page");
}

#[test]
fn nothing_is_transferred_without_bus_mastering_or_after_an_unmap() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let source = page(shrinkable(0x1000), b"source");
    let target = page(shrinkable(0x1000), b"target");
    peer.map(BOTH, 0x1000, 0x1000, source.as_fd());
    peer.map(BOTH, 0x2000, 0x1000, target.as_fd());
    edu::enable(&mut peer);
    edu::load(&mut peer, 0x1000, 6);

    peer.set_config_u16(pci::COMMAND, pci::MEMORY_SPACE);
    edu::store(&mut peer, 0x2000, 6);
    assert_eq!(bytes_at(&target, 0, 6), b"target", "bus mastering is off");

    edu::enable(&mut peer);
    let _ = peer.call(command::DMA_UNMAP, &dma_unmap(0, 0x2000, 0x1000)).success();
    edu::store(&mut peer, 0x2000, 6);
    assert_eq!(bytes_at(&target, 0, 6), b"target", "the window is gone");

    peer.map(BOTH, 0x2000, 0x1000, target.as_fd());
    edu::store(&mut peer, 0x2000, 6);
    assert_eq!(bytes_at(&target, 0, 6), b"source");
}

/// QEMU sends the next DMA_MAP before it has the reply to the last; a descriptor must end up with
/// the message that it was sent with.
#[test]
fn pipelined_maps_keep_their_own_descriptors() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let files: Vec<File> =
        [b"one", b"two", b"six"].map(|text| page(shrinkable(0x1000), text)).into();
    let target = shrinkable(0x1000);
    peer.map(BOTH, 0x10_0000, 0x1000, target.as_fd());

    let map =
        |id, address| message(id, command::DMA_MAP, COMMAND, &dma_map(READ, 0, address, 0x1000));
    peer.send_with_fds(&map(1, 0x1000), &[files[0].as_fd()]);
    peer.send(&map(2, 0x2000));
    peer.send_with_fds(&map(3, 0x3000), &[files[1].as_fd()]);
    peer.send(&map(4, 0x4000));
    peer.send_with_fds(&map(5, 0x5000), &[files[2].as_fd()]);
    peer.send(&map(6, 0x6000));
    for id in 1..=6 {
        assert!(peer.reply_to(id, command::DMA_MAP).success().is_empty());
    }

    let contents: [(u64, &[u8]); 6] = [
        (0x1000, b"one"),
        (0x2000, &[0; 3]),
        (0x3000, b"two"),
        (0x4000, &[0; 3]),
        (0x5000, b"six"),
        (0x6000, &[0; 3]),
    ];
    for (address, expected) in contents {
        // A fresh buffer, so that a read that fails shows.
        let _ = peer.call(command::RESET, &[]).success();
        edu::enable(&mut peer);
        edu::load(&mut peer, address, 3);
        if expected == [0; 3] {
            // Without a descriptor, we are asked for it.
            let asked = peer.receive();
            assert_eq!((asked.command, u64_at(&asked.body, 0)), (command::DMA_READ, address));
            let _ = peer.call(command::RESET, &[]).success();
            peer.send(&message(
                asked.id,
                asked.command,
                REPLY,
                &[&asked.body[..], &[0; 3]].concat(),
            ));
            continue;
        }
        edu::store(&mut peer, 0x10_0000, 3);
        assert_eq!(bytes_at(&target, 0, 3), expected, "window {address:#x}");
    }
}

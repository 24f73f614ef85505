//! "VFIO_USER_DEVICE_FEATURE" with DMA logging, and "VFIO_USER_DMA_UNMAP" with a bitmap: which pages
//! a device has written.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::memory::sealed;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{Payload, REPLY, command, message, u64_at};
use barkeep_tests::peer::requests::feature::{
    GET, LOGGING_REPORT as REPORT, LOGGING_START as START, LOGGING_STOP as STOP, SET,
};
use barkeep_tests::peer::requests::{dma_map, dma_unmap};
use rustix::io::Errno;

const PAGE: u64 = 4096;
const WINDOW: u64 = 0x10_0000;
const PAGES: u64 = 100;

fn start(page_size: u64, ranges: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(ranges.len()).expect("a few ranges");
    let head =
        Payload::new().u32(24 + 16 * count).u32(SET | START).u64(page_size).u32(count).u32(0);
    ranges.iter().fold(head, |body, (address, size)| body.u64(*address).u64(*size)).done()
}

fn stop() -> Vec<u8> {
    Payload::new().u32(8).u32(SET | STOP).done()
}

fn report(address: u64, size: u64, page_size: u64) -> Vec<u8> {
    Payload::new().u32(4096).u32(GET | REPORT).u64(address).u64(size).u64(page_size).done()
}

/// The words of the bitmap that a report brings.
fn dirty(peer: &mut Peer, address: u64, size: u64, page_size: u64) -> Vec<u64> {
    let reply = peer.call(command::DEVICE_FEATURE, &report(address, size, page_size)).success();
    let echoed = [u64_at(&reply, 8), u64_at(&reply, 16), u64_at(&reply, 24)];
    assert_eq!(echoed, [address, size, page_size]);
    reply[32..].chunks_exact(8).map(|word| u64_at(word, 0)).collect()
}

fn logging(backend: &Backend) -> Peer {
    let mut peer = backend.client();
    peer.map(3, WINDOW, PAGES * PAGE, sealed(PAGES * PAGE).as_fd());
    edu::enable(&mut peer);
    let reply = peer.call(command::DEVICE_FEATURE, &start(PAGE, &[])).success();
    assert_eq!(u64_at(&reply, 8), PAGE, "the page size that was taken");
    peer
}

#[test]
fn the_log_tells_what_the_device_wrote_since_the_last_report() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = logging(&backend);
    let all = PAGES * PAGE;
    assert_eq!(dirty(&mut peer, WINDOW, all, PAGE), [0, 0]);
    edu::store(&mut peer, WINDOW + 2 * PAGE - 1, 2);
    edu::store(&mut peer, WINDOW + 70 * PAGE, 1);
    edu::load(&mut peer, WINDOW + 5 * PAGE, 8);
    assert_eq!(dirty(&mut peer, WINDOW, all, PAGE), [0b110, 1 << 6], "reads leave pages clean");
    assert_eq!(dirty(&mut peer, WINDOW, all, PAGE), [0, 0]);

    // In other units, and counted from the address that is asked for.
    edu::store(&mut peer, WINDOW + 9 * PAGE, 1);
    assert_eq!(dirty(&mut peer, WINDOW + 8 * PAGE, 8 * PAGE, 2 * PAGE), [1]);

    let _ = peer.call(command::DEVICE_FEATURE, &stop()).success();
    edu::store(&mut peer, WINDOW, 1);
    peer.expect_errno(command::DEVICE_FEATURE, &report(WINDOW, PAGE, PAGE), Errno::INVAL);
    let _ = peer.call(command::DEVICE_FEATURE, &start(PAGE, &[(WINDOW, PAGE)])).success();
    assert_eq!(dirty(&mut peer, WINDOW, PAGE, PAGE), [0], "a new log is empty");
    edu::store(&mut peer, WINDOW + PAGE, 1);
    edu::store(&mut peer, WINDOW, 1);
    assert_eq!(dirty(&mut peer, WINDOW, 2 * PAGE, PAGE), [1], "only what was asked for is logged");
}

#[test]
fn logs_that_cant_be_are_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for body in [report(0, PAGE, PAGE), start(3000, &[]), start(PAGE, &[(0, 0)])] {
        peer.expect_errno(command::DEVICE_FEATURE, &body, Errno::INVAL);
    }
    let overlapping = [(0, 2 * PAGE), (PAGE, PAGE)];
    peer.expect_errno(command::DEVICE_FEATURE, &start(PAGE, &overlapping), Errno::INVAL);
    let many: Vec<_> = (0..257).map(|n| (2 * n * PAGE, PAGE)).collect();
    peer.expect_errno(command::DEVICE_FEATURE, &start(PAGE, &many), Errno::TOOBIG);
    let _ = peer.call(command::DEVICE_FEATURE, &start(PAGE, &many[1..])).success();
    peer.expect_errno(command::DEVICE_FEATURE, &start(PAGE, &[]), Errno::INVAL);
    // The next client begins without one.
    drop(peer);
    let mut peer = backend.client();
    peer.expect_errno(command::DEVICE_FEATURE, &report(0, PAGE, PAGE), Errno::INVAL);
}

#[test]
fn a_window_goes_with_the_bitmap_of_what_was_written_to_it() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = logging(&backend);
    edu::store(&mut peer, WINDOW + 65 * PAGE, 1);
    let unmap = Payload::new()
        .u32(24 + 16 + 16)
        .u32(1)
        .u64(WINDOW)
        .u64(PAGES * PAGE)
        .u64(PAGE)
        .u64(16)
        .done();
    let reply = peer.call(command::DMA_UNMAP, &unmap).success();
    assert_eq!(reply[..40], unmap, "it repeats the request");
    assert_eq!([u64_at(&reply, 40), u64_at(&reply, 48)], [0, 2]);
    peer.expect_errno(command::DMA_UNMAP, &dma_unmap(0, WINDOW, PAGES * PAGE), Errno::NOENT);
}

/// What the client writes for the device is its own doing, but the log tells it where.
#[test]
fn pages_that_were_written_by_messages_are_in_the_log() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let _ = peer.call(command::DMA_MAP, &dma_map(3, 0, WINDOW, 4 * PAGE)).success();
    edu::enable(&mut peer);
    let _ = peer.call(command::DEVICE_FEATURE, &start(PAGE, &[])).success();
    edu::store(&mut peer, WINDOW + PAGE, 4);
    let asked = peer.receive();
    assert_eq!((asked.command, u64_at(&asked.body, 8)), (command::DMA_WRITE, 4));
    peer.send(&message(asked.id, asked.command, REPLY, &asked.body[..16]));
    assert_eq!(dirty(&mut peer, WINDOW, 4 * PAGE, PAGE), [0b10]);
}

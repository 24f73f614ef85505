//! Front-ends and drivers that mean harm: they cost themselves their session or their device.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};

use barkeep_tests::virtio::{DATA, Memory, Part, RINGS, feature, raw_descriptor};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::ftruncate;
use rustix::process::Signal;

use crate::front_end::{
    Driver, FrontEnd, NEED_REPLY, PROTOCOL_FEATURES, addresses, new_eventfd, pair, request, signal,
    u64_of, wait,
};
use crate::rng::random;
use crate::sidecar::Sidecar;

const FEATURES: u64 = feature::VERSION_1 | PROTOCOL_FEATURES;

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].map(u32::to_le_bytes).concat()
}

/// The next front-end is served, and so is the other device.
fn assert_unharmed(sidecar: &Sidecar) {
    random(&mut Driver::start(&sidecar.socket(0), 1, 8));
    random(&mut Driver::start(&sidecar.socket(1), 1, 8));
}

fn sidecar() -> Sidecar {
    Sidecar::start(&["virtio-rng", "virtio-rng"])
}

#[test]
fn bytes_that_are_no_message_end_the_session() {
    let sidecar = sidecar();
    let garbage = [
        vec![0xff; 12],
        vec![0; 12],
        header(request::GET_FEATURES, 1, u32::MAX),
        header(request::SET_FEATURES, 1, 0x1001),
        // Another version; an answer; reserved flags.
        header(request::GET_FEATURES, 2, 0),
        header(request::GET_FEATURES, 1 | 4, 0),
        header(request::GET_FEATURES, 1 | 0x100, 0),
        // No such request, and one that the crate does not have.
        header(1000, 1, 0),
        header(39, 1, 0),
        // A size that is not the request's.
        [header(request::SET_FEATURES, 1, 4), vec![0; 4]].concat(),
        [header(request::SET_MEM_TABLE, 1, 8), vec![0xff; 8]].concat(),
        vec![0x5a; 4096],
    ];
    for bytes in garbage {
        let front_end = FrontEnd::connect(&sidecar.socket(0));
        front_end.send_bytes(&bytes, &[]);
        front_end.expect_closed();
    }
    assert_unharmed(&sidecar);
}

#[test]
fn half_a_message_ends_with_its_connection() {
    let sidecar = sidecar();
    for length in [1, 11, 13] {
        let front_end = FrontEnd::connect(&sidecar.socket(0));
        let bytes = [header(request::SET_FEATURES, 1, 8), vec![0; 8]].concat();
        front_end.send_bytes(&bytes[..length], &[]);
    }
    assert_unharmed(&sidecar);
}

#[test]
fn memory_that_is_none_is_refused() {
    let sidecar = sidecar();
    let memory = Memory::new(1 << 20);
    let file = memory.data.file().as_fd();
    let table = |regions: &[[u64; 4]]| {
        let count = u32::try_from(regions.len()).unwrap();
        let regions: Vec<u8> = regions.concat().into_iter().flat_map(u64::to_le_bytes).collect();
        [pair(count, 0), regions].concat()
    };
    let whole = [0, 1 << 20, 0, 0];
    let eventfd = new_eventfd();
    let cases: [(Vec<u8>, &[BorrowedFd<'_>]); 9] = [
        // Without descriptors; too few; too many.
        (table(&[whole]), &[]),
        (table(&[whole, whole]), &[file]),
        (table(&[whole]), &[file, file]),
        // One over the other; nothing; around the end of the address space.
        (table(&[whole, whole]), &[file, file]),
        (table(&[]), &[]),
        (table(&[[u64::MAX - 4095, 8192, 0, 0]]), &[file]),
        (table(&[[0, 8192, u64::MAX, 0]]), &[file]),
        // More than any process can map; and what is no file.
        (table(&[[0, 1 << 62, 0, 0]]), &[file]),
        (table(&[whole]), &[eventfd.as_fd()]),
    ];
    for (payload, files) in cases {
        let front_end = FrontEnd::negotiated(&sidecar.socket(0), FEATURES);
        front_end.send(request::SET_MEM_TABLE, 0, &payload, files);
        front_end.expect_closed();
    }
    assert_unharmed(&sidecar);
}

#[test]
fn a_ring_that_is_not_there_ends_the_session() {
    let sidecar = sidecar();
    let eventfd = new_eventfd();
    let outside = addresses(0, [RINGS - (1 << 20), RINGS, RINGS]);
    let cases: [(u32, Vec<u8>, &[BorrowedFd<'_>]); 11] = [
        (request::SET_VRING_NUM, pair(1, 8), &[]),
        (request::SET_VRING_NUM, pair(0, 16), &[]),
        (request::SET_VRING_NUM, pair(0, 0), &[]),
        (request::SET_VRING_BASE, pair(1, 0), &[]),
        (request::GET_VRING_BASE, pair(u32::MAX, 0), &[]),
        (request::SET_VRING_ENABLE, pair(1, 1), &[]),
        (request::SET_VRING_ENABLE, pair(0, 2), &[]),
        (request::SET_VRING_KICK, 1_u64.to_le_bytes().to_vec(), &[eventfd.as_fd()]),
        (request::SET_VRING_CALL, 255_u64.to_le_bytes().to_vec(), &[eventfd.as_fd()]),
        (request::SET_VRING_KICK, 0_u64.to_le_bytes().to_vec(), &[]),
        (request::SET_VRING_ADDR, outside, &[]),
    ];
    for (code, payload, fds) in cases {
        let front_end = FrontEnd::negotiated(&sidecar.socket(0), FEATURES);
        front_end.set_memory(&Memory::new(1 << 20));
        front_end.send(code, 0, &payload, fds);
        front_end.expect_closed();
    }
    assert_unharmed(&sidecar);
}

#[test]
fn a_kick_before_there_is_memory_is_nothing() {
    let sidecar = sidecar();
    let front_end = FrontEnd::negotiated(&sidecar.socket(0), FEATURES);
    let kick = new_eventfd();
    signal(&kick);
    front_end.set_eventfd(request::SET_VRING_KICK, 0, kick.as_fd());
    front_end.set_ring(request::SET_VRING_ENABLE, 0, 1);
    signal(&kick);
    let addresses = addresses(0, [RINGS; 3]);
    front_end.send(request::SET_VRING_ADDR, 0, &addresses, &[]);
    front_end.expect_closed();
    assert_unharmed(&sidecar);
}

#[test]
fn descriptors_that_are_no_eventfds_do_nothing() {
    let sidecar = sidecar();
    let (reader, writer) = std::io::pipe().unwrap();
    let file = tempfile::tempfile().unwrap();
    for fd in [reader.as_fd(), writer.as_fd(), file.as_fd()] {
        let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
        random(&mut driver);
        for code in [request::SET_VRING_CALL, request::SET_VRING_ERR, request::SET_VRING_KICK] {
            driver.front_end.set_eventfd(code, 0, fd);
        }
        driver.front_end.ask(request::GET_VRING_BASE, &pair(0, 0));
    }
    assert_unharmed(&sidecar);
}

#[test]
fn eventfds_that_block_stop_nothing() {
    let sidecar = sidecar();
    let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
    // Full: the next write would wait for ever.
    let full = (u64::MAX - 1).to_ne_bytes();
    rustix::io::write(&driver.rings[0].call, &full).unwrap();
    rustix::io::write(&driver.rings[0].error, &full).unwrap();
    driver.rings[0].queue.add(&[Part::Write(DATA, 8)]).unwrap();
    signal(&driver.rings[0].kick);
    while driver.rings[0].queue.used().is_none() {
        std::thread::yield_now();
    }
    driver.rings[0].queue.overstate(100);
    signal(&driver.rings[0].kick);
    driver.front_end.ask(request::GET_VRING_BASE, &pair(0, 0));
    drop(driver);
    assert_unharmed(&sidecar);
}

#[test]
fn a_malformed_ring_stops_its_device_until_a_reset() {
    let mut sidecar = sidecar();
    let malformed: [fn(&mut Driver); 4] = [
        |driver| driver.rings[0].queue.overstate(100),
        |driver| driver.rings[0].queue.make_available(8),
        |driver| {
            let loops = raw_descriptor(DATA, 8, 1, 0);
            driver.rings[0].queue.describe(0, loops);
            driver.rings[0].queue.make_available(0);
        },
        |driver| {
            let nowhere = raw_descriptor(0x10, 8, 2, 0);
            driver.rings[0].queue.describe(0, nowhere);
            driver.rings[0].queue.make_available(0);
        },
    ];
    for break_ring in malformed {
        let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
        random(&mut driver);
        break_ring(&mut driver);
        signal(&driver.rings[0].kick);
        wait(&driver.rings[0].error);
        sidecar.expect_log("stopped until it is reset: queue 0: ");
        driver.front_end.command(request::RESET_DEVICE, &[], &[]);
        assert_unharmed_again(driver);
    }
    assert_unharmed(&sidecar);
}

/// The device serves its front-end as if it were new.
fn assert_unharmed_again(driver: Driver) {
    let Driver { front_end, memory, mut rings } = driver;
    let features = FEATURES.to_le_bytes();
    front_end.command(request::SET_FEATURES, &features, &[]);
    front_end.ask(request::GET_VRING_BASE, &pair(0, 0));
    rings[0].queue = barkeep_tests::virtio::Queue::new(&memory, 0, 8, false, false);
    let mut driver = Driver { front_end, memory, rings };
    driver.start_ring(0, 8, 0);
    random(&mut driver);
}

#[test]
fn a_driver_of_the_time_before_virtio_1_is_not_served() {
    let mut sidecar = sidecar();
    let driver = Driver::start_with(&sidecar.socket(0), 1, 8, 0);
    wait(&driver.rings[0].error);
    sidecar.expect_log("the driver is not one of virtio 1");
    drop(driver);
    assert_unharmed(&sidecar);
}

#[test]
fn memory_that_is_taken_away_stops_the_device_alone() {
    let mut sidecar = sidecar();
    let file = tempfile::tempfile().unwrap();
    ftruncate(&file, 1 << 20).unwrap();
    let driver = Driver::start(&sidecar.socket(0), 1, 8);
    let window = [4 << 40, 1 << 20, 4 << 40, 0_u64].map(u64::to_le_bytes).concat();
    let slot = [vec![0; 8], window].concat();
    driver.front_end.command(request::ADD_MEM_REG, &slot, &[file.as_fd()]);
    ftruncate(&file, 0).unwrap();
    driver.rings[0].queue.describe(0, raw_descriptor(4 << 40, 64, 2, 0));
    let mut driver = driver;
    driver.rings[0].queue.make_available(0);
    signal(&driver.rings[0].kick);
    wait(&driver.rings[0].error);
    sidecar.expect_log("guest memory is gone");
    drop(driver);
    assert_unharmed(&sidecar);
}

#[test]
fn sessions_by_the_hundred_leave_nothing_behind() {
    let sidecar = sidecar();
    // In a session: all before it are over then, to the last descriptor.
    let descriptors = || {
        let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
        random(&mut driver);
        std::fs::read_dir(format!("/proc/{}/fd", sidecar.id())).unwrap().count()
    };
    descriptors();
    let before = descriptors();
    (0..100).for_each(|_| {
        descriptors();
    });
    assert_eq!(descriptors(), before);
}

#[test]
fn rings_that_are_enabled_out_of_order_harm_nobody() {
    let sidecar = sidecar();
    let eventfd = new_eventfd();
    let fds = [eventfd.as_fd(); 32];
    let enable =
        |index, value| [header(request::SET_VRING_ENABLE, 1, 8), pair(index, value)].concat();
    // A ring that is not there; no such state; another size; descriptors, of which there are none.
    let cases: [(Vec<u8>, &[BorrowedFd<'_>]); 7] = [
        (enable(1, 1), &[]),
        (enable(u32::MAX, 1), &[]),
        (enable(0, 2), &[]),
        (header(request::SET_VRING_ENABLE, 1, 0), &[]),
        (header(request::SET_VRING_ENABLE, 1, 0x1001), &[]),
        (enable(0, 1), &fds[..1]),
        (enable(0, 1), &fds),
    ];
    for (bytes, fds) in cases {
        let front_end = FrontEnd::connect(&sidecar.socket(0));
        front_end.send_bytes(&bytes, fds);
        front_end.expect_closed();
    }
    // Without the bit that it takes, there is no such request.
    let front_end = FrontEnd::connect(&sidecar.socket(0));
    front_end.send(request::SET_FEATURES, 0, &feature::VERSION_1.to_le_bytes(), &[]);
    front_end.send_bytes(&enable(0, 1), &[]);
    front_end.expect_closed();
    // Half of it.
    FrontEnd::connect(&sidecar.socket(0)).send_bytes(&enable(0, 1)[..15], &[]);
    assert_unharmed(&sidecar);
}

/// Sends requests until nobody takes more of them, and reads none of the answers.
fn flood(front_end: &FrontEnd, request: &[u8]) {
    front_end.socket.set_nonblocking(true).unwrap();
    let briefly = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let mut watched = [PollFd::new(&front_end.socket, PollFlags::OUT)];
    while poll(&mut watched, Some(&briefly)) == Ok(1) {
        let _ = (&front_end.socket).write(request);
    }
    front_end.socket.set_nonblocking(false).unwrap();
}

#[test]
fn answers_that_nobody_reads_hold_nobody_up() {
    let sidecar = sidecar();
    let enable = [header(request::SET_VRING_ENABLE, 1 | 8, 8), pair(0, 1)].concat();
    for request in [header(request::GET_FEATURES, 1, 0), enable] {
        let front_end = FrontEnd::negotiated(&sidecar.socket(0), FEATURES);
        flood(&front_end, &request);
        random(&mut Driver::start(&sidecar.socket(1), 1, 8));
        drop(front_end);
        assert_unharmed(&sidecar);
    }
    let front_end = FrontEnd::negotiated(&sidecar.socket(0), FEATURES);
    flood(&front_end, &header(request::GET_FEATURES, 1, 0));
    sidecar.stop(Signal::TERM);
}

#[test]
fn every_request_of_a_flood_is_answered_once() {
    let sidecar = sidecar();
    let front_end = FrontEnd::connect(&sidecar.socket(0));
    let protocol = front_end.ask(request::GET_PROTOCOL_FEATURES, &[]);
    front_end.ask(request::GET_FEATURES, &[]);
    front_end.send(request::SET_PROTOCOL_FEATURES, 0, &protocol, &[]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2000 {
                front_end.send(request::SET_VRING_ENABLE, NEED_REPLY, &pair(0, 1), &[]);
                front_end.send(request::GET_QUEUE_NUM, 0, &[], &[]);
            }
        });
        for _ in 0..2000 {
            let answer = front_end.receive(request::SET_VRING_ENABLE).unwrap();
            assert_eq!(u64_of(&answer), 0);
            assert_eq!(u64_of(&front_end.receive(request::GET_QUEUE_NUM).unwrap()), 1);
        }
    });
}

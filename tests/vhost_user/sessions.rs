//! Front-ends that come and go.

use std::os::fd::AsFd;

use barkeep_tests::virtio::{DATA, Memory, Part, feature};
use rustix::process::Signal;

use crate::front_end::{Driver, FrontEnd, new_eventfd, request, u64_of};
use crate::rng::random;
use crate::sidecar::Sidecar;

#[test]
fn one_front_end_after_another_is_served() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    for _ in 0..5 {
        random(&mut Driver::start(&sidecar.socket(0), 1, 8));
    }
}

#[test]
fn a_front_end_waits_until_the_one_before_it_has_left() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let mut first = Driver::start(&sidecar.socket(0), 1, 8);
    let second = FrontEnd::connect(&sidecar.socket(0));
    second.send(request::GET_FEATURES, 0, &[], &[]);
    random(&mut first);
    drop(first);
    assert!(second.receive(request::GET_FEATURES).is_some());
}

#[test]
fn two_devices_of_a_process_are_served_at_a_time() {
    let sidecar = Sidecar::start(&["virtio-rng", "virtio-rng,max-bytes=1M,period=10"]);
    let mut drivers = [0, 1].map(|index| Driver::start(&sidecar.socket(index), 1, 8));
    for _ in 0..3 {
        let [first, second] = drivers.each_mut().map(random);
        assert_ne!(first, second);
    }
}

#[test]
fn a_front_end_that_says_nothing_makes_room_for_the_next() {
    let mut sidecar = Sidecar::start(&["virtio-rng"]);
    let silent = FrontEnd::connect(&sidecar.socket(0));
    random(&mut Driver::start(&sidecar.socket(0), 1, 8));
    sidecar.expect_log("client gone: did not say anything in time");
    silent.expect_closed();
}

#[test]
fn a_ring_that_is_stopped_goes_on_where_it_was() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
    for round in 1..=3 {
        random(&mut driver);
        assert_eq!(driver.stop_ring(0), 2 * round - 1);
        // Not while it is stopped; and the ring that starts again looks by itself.
        let head = driver.send(0, &[Part::Write(DATA, 8)]);
        driver.start_ring(0, 8, 2 * round - 1);
        assert_eq!(driver.next_used(0).head, head);
    }
}

#[test]
fn a_kick_eventfd_can_be_replaced_by_another() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
    random(&mut driver);
    let old = std::mem::replace(&mut driver.rings[0].kick, new_eventfd());
    let kick = driver.rings[0].kick.as_fd();
    driver.front_end.set_eventfd(request::SET_VRING_KICK, 0, kick);
    random(&mut driver);
    random(&mut driver);
    drop(old);
}

#[test]
fn memory_can_be_replaced_while_a_ring_is_served() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
    random(&mut driver);
    let before = driver.memory.data.bytes(DATA, 64);
    let other = Memory::new(16 << 20);
    let memory = Memory { rings: other.rings, data: other.data };
    // The queue stays where it is; the data goes elsewhere.
    let table = [2_u32.to_le_bytes(), [0; 4]].concat();
    let windows = [&driver.memory.rings, &memory.data];
    let regions = windows.map(crate::front_end::region).concat();
    let fds = windows.map(|window| window.file().as_fd());
    driver.front_end.command(request::SET_MEM_TABLE, &[table, regions].concat(), &fds);
    driver.send(0, &[Part::Write(DATA, 64)]);
    driver.next_used(0);
    assert_eq!(driver.memory.data.bytes(DATA, 64), before);
    assert_ne!(memory.data.bytes(DATA, 64), [0; 64]);
}

#[test]
fn what_the_crate_can_is_offered_and_nothing_else() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let front_end = FrontEnd::connect(&sidecar.socket(0));
    let features = u64_of(&front_end.ask(request::GET_FEATURES, &[]));
    let transport = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
    assert_eq!(features, transport | crate::front_end::PROTOCOL_FEATURES);
    // MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS
    let protocol = u64_of(&front_end.ask(request::GET_PROTOCOL_FEATURES, &[]));
    assert_eq!(protocol, 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15);
    front_end.send(request::SET_PROTOCOL_FEATURES, 0, &protocol.to_le_bytes(), &[]);
    assert_eq!(u64_of(&front_end.ask(request::GET_QUEUE_NUM, &[])), 1);
}

#[test]
fn a_stop_ends_sessions_and_leaves_no_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let sidecar = Sidecar::start(&["virtio-rng", "virtio-rng"]);
        let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
        random(&mut driver);
        let silent = FrontEnd::connect(&sidecar.socket(1));
        sidecar.stop(signal);
        driver.front_end.expect_closed();
        silent.expect_closed();
    }
}

#[test]
fn a_reload_disturbs_nobody() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let mut driver = Driver::start(&sidecar.socket(0), 1, 8);
    for _ in 0..3 {
        sidecar.signal(Signal::HUP);
        random(&mut driver);
    }
    sidecar.stop(Signal::TERM);
}

#[test]
fn what_vhost_user_has_no_use_for_is_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("0.sock");
    for (device, reason) in [
        ("edu", "not a device for --transport vhost-user"),
        ("ivshmem,size=4K", "not a device for --transport vhost-user"),
        ("nothing", "not a device for --transport vhost-user"),
        ("virtio-rng,decode=always", "parameter 'decode': not with --transport vhost-user"),
        ("virtio-rng,romfile=/dev/null", "parameter 'romfile': not with --transport vhost-user"),
        ("virtio-rng,colour=red", "unknown parameter 'colour'"),
        ("virtio-rng,id=a/b", "can't name a socket"),
        ("", "name is missing"),
    ] {
        let error = Sidecar::refused(&socket, device);
        assert!(error.starts_with(&format!("barkeep: --device {device}: ")), "{error}");
        assert!(error.contains(reason) && !socket.exists(), "{error}");
    }
}

#[test]
fn a_socket_that_is_served_is_not_taken_and_one_that_is_not_is() {
    let sidecar = Sidecar::start(&["virtio-rng"]);
    let error = Sidecar::refused(&sidecar.socket(0), "virtio-rng");
    assert!(error.contains("in use by another process"), "{error}");
    random(&mut Driver::start(&sidecar.socket(0), 1, 8));
    let directory = sidecar.kill();
    assert!(directory.path().join("0.sock").exists(), "killed, it leaves its socket");
    let sidecar = Sidecar::start_in(directory, &["virtio-rng"]);
    random(&mut Driver::start(&sidecar.socket(0), 1, 8));
}

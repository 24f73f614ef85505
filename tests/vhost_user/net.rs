//! The network device, with a peer on a UNIX datagram socket.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

use barkeep_tests::virtio::requests::net;
use barkeep_tests::virtio::{DATA, Part, feature};

use crate::front_end::{
    Driver, FrontEnd, NEED_REPLY, PROTOCOL_FEATURES, new_eventfd, pair, request, u64_of,
};
use crate::sidecar::Sidecar;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const INPUT: u64 = DATA + (1 << 20);

/// A sidecar with a network, and what is at the other end of it.
struct Served {
    sidecar: Sidecar,
    peer: UnixDatagram,
    path: PathBuf,
}

impl Served {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [path, peer] = ["net.sock", "peer.sock"].map(|name| directory.path().join(name));
        let device = format!("virtio-net,socket={},peer={}", path.display(), peer.display());
        let peer = UnixDatagram::bind(&peer).unwrap();
        Self { sidecar: Sidecar::start_in(directory, &[&device]), peer, path }
    }

    /// Ten frames to the peer, and as many back.
    fn exchange(&self, driver: &mut Driver, session: u8) {
        for number in 0..10_u8 {
            let frame = [vec![0xff; 6], vec![2, 0, 0, 0, session, number], vec![number; 80]];
            let frame = frame.concat();
            let sent = [vec![0; net::HEADER], frame.clone()].concat();
            driver.memory.data.write(DATA, &sent);
            driver.send(TRANSMIT, &[Part::Read(DATA, u32::try_from(sent.len()).unwrap())]);
            driver.next_used(TRANSMIT);
            let mut heard = [0; 2048];
            let length = self.peer.recv(&mut heard).unwrap();
            assert_eq!(heard[..length], frame);

            driver.send(RECEIVE, &[Part::Write(INPUT, 2048)]);
            self.peer.send_to(&frame, &self.path).unwrap();
            let length = driver.next_used(RECEIVE).len as usize;
            let received = driver.memory.data.bytes(INPUT, length);
            assert_eq!(received[net::HEADER..], frame);
        }
    }
}

#[test]
fn frames_go_both_ways() {
    let served = Served::start();
    for session in 0..2 {
        let mut driver = Driver::start(&served.sidecar.socket(0), 2, 128);
        served.exchange(&mut driver, session);
    }
}

/// What QEMU says until it has made its network card: rings are enabled before features are set.
fn begin_as_qemu(front_end: &FrontEnd, flags: u32) {
    let offered = u64_of(&front_end.ask(request::GET_FEATURES, &[]));
    assert_ne!(offered & PROTOCOL_FEATURES, 0);
    let protocol = front_end.ask(request::GET_PROTOCOL_FEATURES, &[]);
    front_end.send(request::SET_PROTOCOL_FEATURES, 0, &protocol, &[]);
    assert_eq!(u64_of(&front_end.ask(request::GET_QUEUE_NUM, &[])), 3);
    front_end.ask(request::GET_MAX_MEM_SLOTS, &[]);
    front_end.send(request::SET_OWNER, 0, &[], &[]);
    assert_eq!(u64_of(&front_end.ask(request::GET_FEATURES, &[])), offered);
    for ring in 0..2_u64 {
        let call = new_eventfd();
        front_end.send(request::SET_VRING_CALL, 0, &ring.to_le_bytes(), &[call.as_fd()]);
    }
    enable_rings(front_end, flags);
}

fn enable_rings(front_end: &FrontEnd, flags: u32) {
    for ring in 0..2 {
        front_end.send(request::SET_VRING_ENABLE, flags, &pair(ring, 1), &[]);
        if flags == NEED_REPLY {
            let answer = front_end.receive(request::SET_VRING_ENABLE).expect("an acknowledgement");
            assert_eq!(u64_of(&answer), 0);
        }
    }
}

/// Sets features and starts the rings, which are enabled already.
fn go_on_as_qemu(front_end: FrontEnd) -> Driver {
    let features = (feature::VERSION_1 | PROTOCOL_FEATURES).to_le_bytes();
    front_end.send(request::SET_FEATURES, 0, &features, &[]);
    let driver = Driver::prepare(front_end, 2, 128, feature::VERSION_1);
    for ring in [RECEIVE, TRANSMIT] {
        driver.place_ring(ring, 128, 0);
    }
    driver
}

#[test]
fn rings_can_be_enabled_before_features_are_set() {
    let served = Served::start();
    for (session, flags) in [(0, 0), (1, NEED_REPLY), (2, 0)] {
        let front_end = FrontEnd::connect(&served.sidecar.socket(0));
        begin_as_qemu(&front_end, flags);
        served.exchange(&mut go_on_as_qemu(front_end), session);
    }
}

#[test]
fn rings_can_be_enabled_between_a_reset_and_features() {
    let served = Served::start();
    let front_end = FrontEnd::connect(&served.sidecar.socket(0));
    begin_as_qemu(&front_end, 0);
    let mut driver = go_on_as_qemu(front_end);
    served.exchange(&mut driver, 0);
    for (session, flags) in [(1, NEED_REPLY), (2, 0)] {
        for ring in [RECEIVE, TRANSMIT] {
            driver.stop_ring(ring);
        }
        driver.front_end.send(request::RESET_DEVICE, 0, &[], &[]);
        enable_rings(&driver.front_end, flags);
        driver = go_on_as_qemu(driver.front_end);
        served.exchange(&mut driver, session);
    }
}

//! virtio-net (5.1) with a peer on a UNIX datagram socket.

use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

use barkeep_tests::virtio::requests::net;
use barkeep_tests::virtio::{DATA, Driver, Event, Part, Setup, Used};

use crate::sidecar::{Sidecar, drive};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Buffers for frames that come in, behind what is sent.
const INPUT: u64 = DATA + (1 << 20);
const BUFFER: u64 = 2048;

struct Net {
    driver: Driver,
    peer: UnixDatagram,
    path: PathBuf,
    /// The next buffer, by its head.
    buffers: Vec<(u16, u64)>,
    _sidecar: Sidecar,
}

impl Net {
    fn start(features: u64, options: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [path, peer] = ["net.sock", "peer.sock"].map(|name| directory.path().join(name));
        let socket = UnixDatagram::bind(&peer).unwrap();
        // A frame that takes so long is lost.
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let device =
            format!("virtio-net,socket={},peer={}{options}", path.display(), peer.display());
        let sidecar = Sidecar::start_in(directory, &device);
        let plain = Setup::default();
        let setup = Setup { features: plain.features | features, queues: 2, ..plain };
        let driver = drive(&sidecar, setup);
        Self { driver, peer: socket, path, buffers: Vec::new(), _sidecar: sidecar }
    }

    /// Gives the device a buffer for what comes in.
    fn offer(&mut self, number: u64, length: u64) {
        let at = INPUT + number * BUFFER;
        let length = u32::try_from(length).unwrap();
        let head = self.driver.send(RECEIVE, &[Part::Write(at, length)]);
        self.buffers.push((head, at));
    }

    /// What the device put into a buffer.
    fn taken(&mut self, used: Used) -> Vec<u8> {
        let position = self.buffers.iter().position(|(head, _)| *head == used.head).unwrap();
        let (_, at) = self.buffers.remove(position);
        self.driver.memory.data.bytes(at, used.len as usize)
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.driver.transmit(TRANSMIT, &[&[0; net::HEADER], frame]);
    }

    fn heard(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let length = self.peer.recv(&mut frame).unwrap();
        frame.truncate(length);
        frame
    }
}

/// A frame of so many bytes that is like no other.
fn frame(number: u16, length: usize) -> Vec<u8> {
    let mut bytes = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.extend(
        (0..)
            .map(|at: u16| at.wrapping_mul(7).wrapping_add(number).to_le_bytes()[0])
            .take(length - 14),
    );
    bytes
}

#[test]
fn frames_go_both_ways_whole_and_in_order() {
    for features in [0, net::MRG_RXBUF] {
        let mut net = Net::start(features, "");
        for (number, length) in (0..).zip([14, 60, 61, 100, 1000, 1514]) {
            net.transmit(&frame(number, length));
            assert_eq!(net.heard(), frame(number, length));
            net.offer(number.into(), BUFFER);
            net.peer.send_to(&frame(number, length), &net.path).unwrap();
            let used = net.driver.next_used(RECEIVE);
            let found = net.taken(used);
            let (header, found) = found.split_at(net::HEADER);
            assert_eq!(found, frame(number, length));
            assert_eq!(header[..10], [0; 10], "nothing was left to be done");
            assert_eq!(header[10..], [1, 0], "one buffer");
        }
    }
}

#[test]
fn a_frame_is_spread_over_small_buffers_if_that_was_agreed_to() {
    let mut net = Net::start(net::MRG_RXBUF, "");
    assert_ne!(net.driver.features & net::MRG_RXBUF, 0);
    for number in 0..12 {
        net.offer(number, 200);
    }
    net.peer.send_to(&frame(1, 1514), &net.path).unwrap();
    net.peer.send_to(&frame(2, 60), &net.path).unwrap();
    let mut parts = Vec::new();
    for _ in 0..(1514 + net::HEADER).div_ceil(200) {
        let used = net.driver.next_used(RECEIVE);
        parts.push(net.taken(used));
    }
    let count = u16::try_from(parts.len()).unwrap();
    let whole = parts.concat();
    assert_eq!(whole[10..12], count.to_le_bytes());
    assert_eq!(whole[12..], frame(1, 1514));
    let used = net.driver.next_used(RECEIVE);
    let second = net.taken(used);
    assert_eq!((&second[10..12], &second[12..]), (&[1, 0][..], &frame(2, 60)[..]));
}

/// The peer's frames wait for buffers, as far as its socket holds them.
#[test]
fn frames_wait_for_buffers() {
    let mut net = Net::start(0, "");
    for number in 0..5 {
        net.peer.send_to(&frame(number, 300), &net.path).unwrap();
    }
    for number in 0..5 {
        net.offer(number.into(), BUFFER);
        let used = net.driver.next_used(RECEIVE);
        assert_eq!(net.taken(used)[net::HEADER..], frame(number, 300));
    }
}

#[test]
fn many_frames_in_both_directions_at_a_time_arrive_in_order() {
    const FRAMES: u16 = 5000;
    // A datagram socket holds ten; what is above that may be lost, as on any network.
    const AT_A_TIME: u16 = 8;
    let mut net = Net::start(net::MRG_RXBUF, "");
    let peer = net.peer.try_clone().unwrap();
    let path = net.path.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // What comes is sent back.
            for number in 0..FRAMES {
                let mut bytes = [0; 2048];
                let length = peer.recv(&mut bytes).unwrap();
                assert_eq!(bytes[..length], frame(number, 64 + usize::from(number % 1000)));
                peer.send_to(&bytes[..length], &path).unwrap();
            }
        });
        for number in 0..64 {
            net.offer(number, BUFFER);
        }
        let (mut sent, mut echoed) = (0, 0);
        while echoed < FRAMES {
            while sent - echoed < AT_A_TIME && sent < FRAMES {
                let bytes =
                    [&[0; net::HEADER][..], &frame(sent, 64 + usize::from(sent % 1000))].concat();
                // A frame that is under way keeps its memory.
                let at = DATA + u64::from(sent % 32) * BUFFER;
                net.driver.memory.data.write(at, &bytes);
                let length = u32::try_from(bytes.len()).unwrap();
                net.driver.send(TRANSMIT, &[Part::Read(at, length)]);
                sent += 1;
            }
            match net.driver.wait() {
                Event::Used(TRANSMIT, _) => {}
                Event::Used(_, used) => {
                    let at = net.buffers.iter().find(|(head, _)| *head == used.head).unwrap().1;
                    let found = net.taken(used);
                    let expected = frame(echoed, 64 + usize::from(echoed % 1000));
                    assert!(found[net::HEADER..] == expected, "frame {echoed}");
                    echoed += 1;
                    net.offer((at - INPUT) / BUFFER, BUFFER);
                }
                Event::Config => unreachable!("status {:#x}", net.driver.function.status()),
            }
        }
    });
}

#[test]
fn the_address_is_the_operators() {
    let net = Net::start(net::MAC, ",mac=52:54:00:12:34:56");
    let function = &net.driver.function;
    assert_ne!(net.driver.features & net::MAC, 0);
    assert_eq!(function.read::<6>(function.device, 0), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
}

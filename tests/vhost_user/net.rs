//! The network device, with a peer on a UNIX datagram socket.

use std::os::unix::net::UnixDatagram;

use barkeep_tests::virtio::requests::net;
use barkeep_tests::virtio::{DATA, Part};

use crate::front_end::Driver;
use crate::sidecar::Sidecar;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const INPUT: u64 = DATA + (1 << 20);

#[test]
fn frames_go_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let [path, peer] = ["net.sock", "peer.sock"].map(|name| directory.path().join(name));
    let socket = UnixDatagram::bind(&peer).unwrap();
    let device = format!("virtio-net,socket={},peer={}", path.display(), peer.display());
    let sidecar = Sidecar::start_in(directory, &[&device]);
    for session in 0..2_u8 {
        let mut driver = Driver::start(&sidecar.socket(0), 2, 128);
        for number in 0..10_u8 {
            let frame = [vec![0xff; 6], vec![2, 0, 0, 0, session, number], vec![number; 80]];
            let frame = frame.concat();
            let sent = [vec![0; net::HEADER], frame.clone()].concat();
            driver.memory.data.write(DATA, &sent);
            driver.send(TRANSMIT, &[Part::Read(DATA, u32::try_from(sent.len()).unwrap())]);
            driver.next_used(TRANSMIT);
            let mut heard = [0; 2048];
            let length = socket.recv(&mut heard).unwrap();
            assert_eq!(heard[..length], frame);

            driver.send(RECEIVE, &[Part::Write(INPUT, 2048)]);
            socket.send_to(&frame, &path).unwrap();
            let length = driver.next_used(RECEIVE).len as usize;
            let received = driver.memory.data.bytes(INPUT, length);
            assert_eq!(received[net::HEADER..], frame);
        }
    }
}

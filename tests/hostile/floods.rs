//! What no row can say: much of it, slowly, or broken off.

use std::os::fd::{AsFd, BorrowedFd};

use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, command, header, message};
use barkeep_tests::peer::requests::{
    access, dma_map, dma_unmap, info, irq, region_info, set_irqs, write,
};
use barkeep_tests::peer::{MAX_FDS, Peer, version_body};

use crate::table::process::Sidecar;
use crate::table::{Fd, Function};

/// A flood and its name.
type Flood = (&'static str, fn(&Sidecar));

pub(crate) const ALL: [Flood; 9] = [
    ("hangs up at any byte of any message", hang_up_everywhere),
    ("253 descriptors with each of many bytes", descriptors_with_every_byte),
    ("a hundred messages with 253 descriptors, and none is read", descriptors_in_the_queue),
    ("asks for megabytes and reads nothing", ask_and_never_read),
    ("asks for descriptors and reads nothing", ask_for_descriptors_and_never_read),
    ("asks for megabytes and reads a byte at a time", read_slowly),
    ("says that it has finished, everywhere", finish_everywhere),
    ("a thousand short sessions", thousand_sessions),
    ("connections that are never used", connection_storm),
];

/// Far more than sockets and queues hold.
const MANY: u16 = 2000;
const MEGABYTE: u32 = 1 << 20;

fn edu(sidecar: &Sidecar) -> Peer {
    Peer::greeted(&sidecar.socket_of(Function::Edu))
}

/// Messages with everything that a message can have, each with a descriptor for it.
fn messages() -> Vec<(Vec<u8>, Fd)> {
    let eventfd = set_irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, irq::MSI, 0, 1, &[]);
    let whole = |command, body: &[u8]| message(1, command, COMMAND, body);
    vec![
        (whole(command::DMA_MAP, &dma_map(0b11, 0, 0, 4096)), Fd::Memory(4096)),
        (whole(command::SET_IRQS, &eventfd), Fd::Eventfd),
        (whole(command::REGION_WRITE, &write(7, 4, &[6, 0])), Fd::Socket),
        (whole(command::GET_REGION_INFO, &region_info(32, 0)), Fd::Pipe),
        (whole(command::VERSION, &version_body(0, 2, "{}")), Fd::Memory(0)),
    ]
}

fn hang_up_everywhere(sidecar: &Sidecar) {
    for (bytes, fd) in messages() {
        let fd = fd.open();
        for greeted in [false, true] {
            for length in 0..=bytes.len() {
                let mut peer = Peer::connect(&sidecar.socket_of(Function::Edu));
                if greeted {
                    peer.greet();
                }
                if length > 0 && length % 2 == 0 {
                    peer.send_with_fds(&bytes[..length], &[fd.as_fd()]);
                } else {
                    peer.send(&bytes[..length]);
                }
            }
        }
    }
}

fn descriptors_with_every_byte(sidecar: &Sidecar) {
    let memory = shrinkable(4096);
    let many: Vec<BorrowedFd<'_>> = vec![memory.as_fd(); MAX_FDS];
    let mut peer = edu(sidecar);
    for _ in 0..4 {
        for byte in message(7, command::DMA_MAP, COMMAND, &dma_map(0b11, 0, 0, 4096)) {
            peer.send_with_fds(&[byte], &many);
        }
        peer.reply_to(7, command::DMA_MAP).failure(rustix::io::Errno::INVAL);
    }
    // A body that is drained.
    peer.send(&header(8, command::DMA_MAP, 4 << 20, COMMAND));
    for _ in 0..64 {
        peer.send_with_fds(&[0; 64], &many);
    }
}

fn descriptors_in_the_queue(sidecar: &Sidecar) {
    let counter = Fd::Eventfd.open();
    let many: Vec<BorrowedFd<'_>> = vec![counter.as_fd(); MAX_FDS];
    let mut peer = edu(sidecar);
    let body = set_irqs(irq::DATA_EVENTFD | irq::ACTION_TRIGGER, irq::MSI, 0, 253, &[]);
    for id in 0..100 {
        peer.send_with_fds(&message(id, command::SET_IRQS, COMMAND | NO_REPLY, &body), &many);
    }
    assert_eq!(peer.config_u16(0), 0x1234);
}

/// Sends a request until the server takes no more; tells how many it took.
fn flood(peer: &mut Peer, neighbour: &mut Peer, command: u16, body: &[u8]) -> u16 {
    for asked in 0..MANY {
        let request = message(asked, command, COMMAND, body);
        let mut sent = peer.send_without_waiting(&request);
        for _ in 0..8 {
            if sent > 0 {
                break;
            }
            // Served in turn: when others are answered, the server has taken what it wants to.
            assert_eq!(neighbour.config_u16(0), 0x1234);
            sent = peer.send_without_waiting(&request);
        }
        if sent == 0 {
            return asked;
        }
        assert_eq!(sent, request.len(), "a request this small goes whole or not at all");
    }
    unreachable!("the server takes {MANY} requests without a reply being read")
}

fn ask_and_never_read(sidecar: &Sidecar) {
    let mut neighbour = sidecar.neighbour();
    for _ in 0..3 {
        flood(&mut edu(sidecar), &mut neighbour, command::REGION_READ, &access(0, 0, MEGABYTE));
    }
}

fn ask_for_descriptors_and_never_read(sidecar: &Sidecar) {
    let mut neighbour = sidecar.neighbour();
    for _ in 0..3 {
        let mut peer = Peer::greeted(&sidecar.socket_of(Function::Ivshmem));
        flood(&mut peer, &mut neighbour, command::GET_REGION_INFO, &region_info(32, 2));
    }
}

fn read_slowly(sidecar: &Sidecar) {
    let mut peer = edu(sidecar);
    let mut neighbour = sidecar.neighbour();
    let asked = flood(&mut peer, &mut neighbour, command::REGION_READ, &access(0, 0, MEGABYTE));
    for id in 0..asked {
        for _ in 0..512 {
            peer.read_bytes(1);
        }
        peer.read_bytes(MEGABYTE as usize + 32 - 512);
        assert_eq!(neighbour.config_u16(0), 0x1234, "after {id} replies");
    }
    assert_eq!(peer.config_u16(0), 0x1234, "and the session goes on");
}

/// `max_dma_maps`
const WINDOWS: u64 = 65535;

pub(crate) fn too_many_windows(sidecar: &Sidecar) {
    let mut peer = edu(sidecar);
    let map = |flags, window: u64| {
        message(5, command::DMA_MAP, COMMAND | flags, &dma_map(0b11, 0, window << 13, 4096))
    };
    for windows in (0..WINDOWS).collect::<Vec<_>>().chunks(64) {
        let bytes: Vec<u8> = windows.iter().flat_map(|window| map(NO_REPLY, *window)).collect();
        peer.send(&bytes);
    }
    peer.send(&map(0, WINDOWS));
    peer.reply_to(5, command::DMA_MAP).failure(rustix::io::Errno::NOSPC);
    let all = dma_unmap(0b10, 0, 0);
    let _ = peer.call(command::DMA_UNMAP, &all).success();
    peer.send(&map(0, WINDOWS));
    let _ = peer.reply_to(5, command::DMA_MAP).success();
}

fn finish_everywhere(sidecar: &Sidecar) {
    let bytes = message(1, command::GET_INFO, COMMAND, &info(16, 0));
    for length in 0..=bytes.len() {
        let mut peer = edu(sidecar);
        peer.send(&bytes[..length]);
        peer.finish_sending();
        let replied = peer.drain();
        assert_eq!(replied, if length == bytes.len() { 32 } else { 0 }, "of {length} bytes");
    }
    let mut peer = edu(sidecar);
    for _ in 0..64 {
        peer.send(&bytes);
    }
    peer.finish_sending();
    assert_eq!(peer.drain(), 64 * 32);
}

fn thousand_sessions(sidecar: &Sidecar) {
    let memory = shrinkable(4096);
    for session in 0..1000_u16 {
        let mut peer = edu(sidecar);
        if session % 2 == 0 {
            peer.map(0b11, 0, 4096, memory.as_fd());
        }
        assert_eq!(peer.config_u16(4), 0, "as at power-on");
        peer.set_config_u16(4, 6);
    }
}

/// One after the other; and then together, as many as wait in the backlog: a further one would wait
/// for the handshake deadlines of those before it.
fn connection_storm(sidecar: &Sidecar) {
    let path = sidecar.socket_of(Function::Edu);
    for _ in 0..1000 {
        drop(Peer::connect(&path));
    }
    let waiting: Vec<Peer> = (0..BACKLOG).map(|_| Peer::connect(&path)).collect();
    drop(waiting);
}

const BACKLOG: usize = 16;

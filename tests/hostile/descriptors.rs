//! No descriptor of a peer stays behind.
//!
//! A process of its own, with one test: it counts the descriptors of the process.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, command, header, message};
use barkeep_tests::peer::requests::{dma_map, info, irq::*, set_irqs};
use barkeep_tests::peer::version_body;

const SESSIONS: u16 = 300;

/// Descriptors of this process while exactly one session is served.
///
/// The server takes the next client when it is done with the last one, so what a client's first
/// answer finds open is all that earlier ones have left.
fn open_descriptors(backend: &Backend) -> usize {
    let _session = backend.client();
    std::fs::read_dir("/proc/self/fd").expect("procfs").count()
}

#[test]
fn hostile_sessions_leave_no_descriptors_behind() {
    let backend = Backend::serve(&["edu", "ivshmem,size=64K"]);
    let memory = shrinkable(4096);
    // What the process opens once, for all eventfds that it will ever signal, is not a peer's.
    backend.client().set_eventfd(MSI, 0, EventCounter::new().as_fd());
    let before = open_descriptors(&backend);
    for session in 0..SESSIONS {
        hostile_session(&backend, session, &memory);
    }
    assert_eq!(open_descriptors(&backend), before, "after {SESSIONS} sessions");
}

fn hostile_session(backend: &Backend, session: u16, memory: &std::fs::File) {
    let mut peer = Peer::connect(backend.socket());
    let counter = EventCounter::new();
    let (one, many) = ([memory.as_fd()], [memory.as_fd(); 20]);
    let map = |id: u16| {
        let at = u64::from(id) << 12;
        message(id, command::DMA_MAP, COMMAND, &dma_map(0b11, 0, at, 4096))
    };
    let version = message(1, command::VERSION, COMMAND, &version_body(0, 2, "{}"));
    match session % 10 {
        // Before a version is spoken.
        0 => peer.send_with_fds(&version[..3], &many),
        1 => peer.send_with_fds(&version, &one),
        2 => peer.send_with_fds(&map(1), &one),
        3 => peer.send_with_fds(&header(1, command::DMA_MAP, 3, COMMAND), &many[..16]),
        4 => peer.send_with_fds(&header(1, command::DMA_MAP, u32::MAX, COMMAND), &one),
        rest => {
            peer.greet();
            match rest {
                // Half a message, after whole ones that were taken.
                5 => {
                    for id in 0..8 {
                        peer.send_with_fds(&map(id), &one);
                    }
                    peer.send_with_fds(&map(9)[..40], &one);
                }
                // Refused: too many, overlapping, not for this command.
                6 => {
                    peer.send_with_fds(&map(1), &many);
                    peer.send_with_fds(&map(1), &many[..2]);
                    peer.send_with_fds(&map(1), &one);
                    peer.send_with_fds(&map(1), &one);
                    let body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 1, &[]);
                    let bytes = message(1, command::SET_IRQS, COMMAND, &body);
                    peer.send_with_fds(&bytes, &[counter.as_fd(), counter.as_fd()]);
                    peer.send_with_fds(&message(1, command::GET_INFO, 0, &info(16, 0)), &one);
                }
                // Without waiting for any reply.
                7 => {
                    let body = set_irqs(DATA_EVENTFD | ACTION_TRIGGER, MSI, 0, 1, &[]);
                    let bytes = message(1, command::SET_IRQS, COMMAND | NO_REPLY, &body);
                    for _ in 0..4 {
                        peer.send_with_fds(&bytes, &[counter.as_fd()]);
                        peer.send_with_fds(&bytes, &one);
                    }
                }
                // A body that is drained.
                8 => {
                    peer.send_with_fds(&header(1, command::DMA_MAP, 8 << 20, COMMAND), &one);
                    for _ in 0..3 {
                        peer.send_with_fds(&[0; 100], &many);
                    }
                }
                // Descriptors that the server sends, to a client that never reads them.
                _ => {
                    let mut other = Peer::greeted(backend.socket_of(1));
                    let body = barkeep_tests::peer::requests::region_info(32, 2);
                    for _ in 0..5 {
                        other.send(&message(1, command::GET_REGION_INFO, COMMAND, &body));
                    }
                }
            }
        }
    }
    // A server whose reply finds nobody stops reading, so half of the peers stay for the replies.
    if (session / 10).is_multiple_of(2) {
        peer.finish_sending();
        peer.drain();
    }
}

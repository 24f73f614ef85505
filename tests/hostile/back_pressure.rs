//! Peers that ask and do not listen.

use std::fs::{DirEntry, read_link};
use std::path::Path;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, command, message};
use barkeep_tests::peer::requests::{access, region_info};

const READ_SIZE: u32 = 1 << 20;
/// Far more than what fits into a socket buffer and what the server may queue, and a load of
/// replies that would be noticed.
const TOO_MANY: u16 = 2000;

/// Asks for megabytes until the server takes no more requests; tells how many it took whole.
fn ask_until_refused(peer: &mut Peer, neighbour: &mut Peer) -> u16 {
    repeat_until_refused(peer, neighbour, command::REGION_READ, &access(0, 0, READ_SIZE))
}

/// Sends a request again and again until the server takes no more of them.
fn repeat_until_refused(peer: &mut Peer, neighbour: &mut Peer, command: u16, body: &[u8]) -> u16 {
    for asked in 0..TOO_MANY {
        let request = message(asked, command, COMMAND, body);
        let mut sent = peer.send_without_waiting(&request);
        let mut patience = 8;
        while sent == 0 && patience > 0 {
            // The server serves both in turn: after some answers for the neighbour it has also
            // taken what it is willing to take here.
            assert_eq!(neighbour.config_u16(0), 0x1234);
            patience -= 1;
            sent = peer.send_without_waiting(&request);
        }
        if sent == 0 {
            return asked;
        }
        assert_eq!(sent, request.len(), "a request this small goes whole or not at all");
    }
    unreachable!("the server takes {TOO_MANY} requests without a reply being read")
}

#[test]
fn a_peer_that_does_not_read_is_not_served_further_and_loses_nothing() {
    let backend = Backend::serve(&["edu", "edu"]);
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    let mut peer = backend.client();
    let asked = ask_until_refused(&mut peer, &mut neighbour);

    edu::enable(&mut neighbour);
    for _ in 0..32 {
        assert_eq!(neighbour.read_u32(0, 0), edu::IDENTIFICATION, "others are served");
    }
    for id in 0..asked {
        let reply = peer.reply_to(id, command::REGION_READ).success();
        assert_eq!(reply.len(), 16 + READ_SIZE as usize);
    }
    assert_eq!(peer.config_u16(0), 0x1234, "and the session goes on");
    drop(peer);
    edu::assert_served(backend.socket());
}

/// Descriptors of this process that are open on a file.
fn descriptors_of(path: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").expect("procfs");
    let target = |entry: std::io::Result<DirEntry>| read_link(entry.expect("procfs").path());
    open.map(target).filter(|target| target.as_ref().is_ok_and(|target| target == path)).count()
}

/// A reply of 48 bytes can hold a descriptor, of which a process has a thousand.
#[test]
fn replies_that_nobody_reads_hold_few_descriptors() {
    let shared = tempfile::NamedTempFile::new().expect("a temporary file");
    shared.as_file().set_len(4096).expect("room");
    let shared = shared.into_temp_path();
    let backend = Backend::serve(&[&format!("ivshmem,size=4K,path={}", shared.display()), "edu"]);
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    let mut peer = backend.client();
    let held = descriptors_of(&shared);
    assert!(held > 0, "the device has its file open");
    let query = region_info(32, 2);
    let asked = repeat_until_refused(&mut peer, &mut neighbour, command::GET_REGION_INFO, &query);
    let more = descriptors_of(&shared) - held;
    assert!(more <= 16, "{more} descriptors wait with {asked} replies");
    for id in 0..asked {
        let reply = peer.reply_to(id, command::GET_REGION_INFO);
        assert_eq!((reply.error, reply.fds.len()), (0, 1), "reply {id}");
    }
    // The server closes what it has sent before it serves the next request.
    assert_eq!(peer.config_u16(0), 0x1af4);
    assert_eq!(descriptors_of(&shared), held, "and none stays behind");
}

#[test]
fn a_peer_that_does_not_read_may_leave() {
    let backend = Backend::serve(&["edu", "edu"]);
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    for _ in 0..3 {
        let mut peer = backend.client();
        let _ = ask_until_refused(&mut peer, &mut neighbour);
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

#[test]
fn a_server_stops_with_replies_that_nobody_reads() {
    let backend = Backend::serve(&["edu", "edu"]);
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    let mut peer = backend.client();
    let _ = ask_until_refused(&mut peer, &mut neighbour);
    drop(backend);
}

//! Peers that take their time.

use std::os::fd::AsFd;

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::message::{COMMAND, command, header, message};
use barkeep_tests::peer::requests::{access, info};
use barkeep_tests::peer::{Peer, version_body};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;

#[test]
fn a_message_may_come_byte_by_byte() {
    let backend = Backend::serve(&["edu", "edu"]);
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    let mut peer = Peer::connect(backend.socket());
    let version = message(1, command::VERSION, COMMAND, &version_body(0, 2, "{}"));
    let read = message(2, command::REGION_READ, COMMAND, &access(7, 0, 4));
    for byte in version.iter().chain(&read).chain(&read) {
        peer.send(&[*byte]);
        // An answer to somebody else means that the server has seen this byte alone.
        assert_eq!(neighbour.config_u16(0), 0x1234);
    }
    let _ = peer.reply_to(1, command::VERSION).success();
    for _ in 0..2 {
        let reply = peer.reply_to(2, command::REGION_READ).success();
        assert_eq!(reply[16..], [0x34, 0x12, 0xe8, 0x11]);
    }
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn messages_may_come_in_one_piece_or_in_any_others() {
    let backend = Backend::serve(&["edu"]);
    let mut stream = message(0, command::VERSION, COMMAND, &version_body(0, 2, "{}"));
    for id in 1..40 {
        stream.extend(message(id, command::GET_INFO, COMMAND, &info(16, 0)));
    }
    for length in [1, 7, 15, 16, 17, 31, 33, 1000, stream.len()] {
        let mut peer = Peer::connect(backend.socket());
        for piece in stream.chunks(length) {
            peer.send(piece);
        }
        let _ = peer.reply_to(0, command::VERSION).success();
        for id in 1..40 {
            let _ = peer.reply_to(id, command::GET_INFO).success();
        }
    }
    edu::assert_served(backend.socket());
}

/// A server reads a share at a time, so that others get theirs. A message that ends exactly with a
/// share must not wait for bytes that never come: no event tells of a message that has been read.
#[test]
fn a_message_that_ends_with_the_servers_share_of_reads_is_answered() {
    let backend = Backend::serve(&["edu"]);
    let memory = shrinkable(4096);
    for length in 508..=514 {
        let first = backend.client();
        let mut peer = Peer::connect(backend.socket());
        // Room for all of it: nothing is read before the first client leaves.
        set_socket_send_buffer_size(&peer, 212_992).expect("the usual limit");
        peer.send(&header(1, command::GET_INFO, 16 + length, COMMAND));
        for _ in 0..length {
            // The kernel ends each read behind the bytes that a descriptor came with.
            peer.send_with_fds(&[0], &[memory.as_fd()]);
        }
        drop(first);
        println!("{length} reads and one for the header");
        peer.reply_to(1, command::GET_INFO).failure(Errno::INVAL);
    }
    edu::assert_served(backend.socket());
}

/// Waits for the handshake deadline, which is the time to tell: there is no other way to see it from
/// outside.
#[test]
fn a_silent_peer_does_not_keep_the_next_one_out() {
    let backend = Backend::serve(&["edu", "edu"]);
    let mut silent = Peer::connect(backend.socket());
    let mut dribbling = Peer::connect(backend.socket_of(1));
    dribbling.send(&[1, 0, 1]);
    edu::assert_served(backend.socket());
    edu::assert_served(backend.socket_of(1));
    silent.expect_closed();
    dribbling.expect_closed();
}

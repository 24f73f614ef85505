//! "Header" and "Command Concurrency"

use barkeep_tests::backend::Backend;
use barkeep_tests::edu::{self, at};
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, NO_REPLY, command, message};
use barkeep_tests::peer::requests::{access, dma_map, info, memory_fault, write};
use barkeep_tests::peer::version_body;
use rustix::io::Errno;

#[test]
fn the_senders_ids_come_back_whatever_they_are() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for id in [0, 1, 7, 7, 7, 0x8000, u16::MAX] {
        peer.send(&message(id, command::GET_INFO, COMMAND, &info(16, 0)));
        let _ = peer.reply_to(id, command::GET_INFO).success();
        peer.send(&message(id, command::GET_INFO, COMMAND, &[]));
        peer.reply_to(id, command::GET_INFO).failure(Errno::INVAL);
    }
}

/// "It is reserved in a command message."
#[test]
fn the_error_field_of_a_command_is_ignored() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let mut bytes = message(9, command::GET_INFO, COMMAND, &info(16, 0));
    bytes[12..16].copy_from_slice(&22u32.to_ne_bytes());
    peer.send(&bytes);
    let _ = peer.reply_to(9, command::GET_INFO).success();
}

#[test]
fn commands_that_are_not_served_are_refused_by_kind() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for body in [vec![], vec![0; 16], vec![0xff; 333]] {
        for command in [command::DMA_READ, command::DMA_WRITE] {
            peer.expect_errno(command, &body, Errno::NOTSUP);
        }
        for command in [0, 14, 19, 0x7fff, 0x8000, 0x8003, u16::MAX] {
            peer.expect_errno(command, &body, Errno::INVAL);
        }
    }
}

#[test]
fn no_reply_means_no_reply_not_even_an_error() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    for (name, command, body) in [
        ("a write", command::REGION_WRITE, write(0, at::LIVENESS, &5u32.to_le_bytes())),
        ("a read", command::REGION_READ, access(0, 0, 4)),
        ("info", command::GET_INFO, info(16, 0)),
        ("a map", command::DMA_MAP, dma_map(3, 0, 0, 4096)),
        ("a map that fails", command::DMA_MAP, dma_map(3, 0, 0, 4096)),
        ("a write that fails", command::REGION_WRITE, write(1, 0, &[0; 4])),
        ("a malformed message", command::GET_IRQ_INFO, vec![1, 2, 3]),
        ("an unknown command", 999, vec![0; 40]),
        ("a second VERSION", command::VERSION, version_body(0, 2, "{}")),
        ("a fault on no BAR", command::MEMORY_FAULT, memory_fault(1, 9, 0, 1)),
    ] {
        peer.send(&message(0x1111, command, COMMAND | NO_REPLY, &body));
        let reply = peer.call(command::REGION_READ, &access(0, at::LIVENESS, 4));
        println!("{name}: the next reply belongs to the next command");
        let _ = reply.success();
    }
    assert_eq!(peer.read_u32(0, at::LIVENESS), !5, "they were done all the same");
    peer.expect_errno(command::DMA_MAP, &dma_map(3, 0, 0, 4096), Errno::EXIST);
}

#[test]
fn version_without_a_reply_is_still_a_version() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    peer.send(&message(1, command::VERSION, COMMAND | NO_REPLY, &version_body(0, 2, "{}")));
    let _ = peer.call(command::GET_INFO, &info(16, 0)).success();
}

/// "The server will process commands in the order they are received."
#[test]
fn pipelined_commands_are_answered_in_order() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let mut bytes = Vec::new();
    for round in 0..300u16 {
        let body = write(0, at::LIVENESS, &u32::from(round).to_le_bytes());
        bytes.extend(message(2 * round, command::REGION_WRITE, COMMAND, &body));
        bytes.extend(message(2 * round + 1, command::REGION_READ, COMMAND, &access(0, 4, 4)));
    }
    peer.send(&bytes);
    for round in 0..300u16 {
        let _ = peer.reply_to(2 * round, command::REGION_WRITE).success();
        let reply = peer.reply_to(2 * round + 1, command::REGION_READ).success();
        assert_eq!(reply[16..], (!u32::from(round)).to_le_bytes());
    }
}

//! Lengths that lie.

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, command, header, message};
use barkeep_tests::peer::requests::info;
use rustix::io::Errno;

/// The largest transfer with its header and fixed part fits below; this does not.
const TOO_LONG: u32 = (1 << 20) + 4096 + 1;

/// Address space of this process in KiB: what a reservation shows up in, used or not.
fn address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:")).expect("VmSize");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn a_size_below_the_header_is_answered_and_ends_the_session() {
    let backend = Backend::serve(&["edu"]);
    for greeted in [false, true] {
        for size in [0, 1, 15] {
            let mut peer = Peer::connect(backend.socket());
            if greeted {
                peer.greet();
            }
            peer.send(&header(0x77, command::GET_INFO, size, COMMAND));
            peer.reply_to(0x77, command::GET_INFO).failure(Errno::INVAL);
            peer.expect_closed();
            drop(peer);
            edu::assert_served(backend.socket());
        }
    }
}

#[test]
fn a_claim_of_4_gib_costs_no_memory() {
    let backend = Backend::serve(&["edu", "edu"]);
    let mut neighbour = Peer::greeted(backend.socket_of(1));
    for greeted in [false, true] {
        let before = address_space();
        let mut peer = Peer::connect(backend.socket());
        if greeted {
            peer.greet();
        }
        peer.send(&header(1, command::REGION_WRITE, u32::MAX, COMMAND));
        peer.send(&[0xaa; 4096]);
        for _ in 0..4 {
            assert_eq!(neighbour.config_u16(0), 0x1234);
        }
        let reserved = address_space().saturating_sub(before);
        assert!(reserved < 1 << 20, "{reserved} KiB for a message that is refused anyway");
        assert!(peer.hears_nothing(), "it is refused when it has been read");
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

#[test]
fn an_oversized_message_is_drained_and_the_session_goes_on() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    for size in [TOO_LONG, TOO_LONG + 77_777, 4 << 20] {
        // Commands in the body, which must not be taken for some.
        let inner = message(0xdead, command::GET_INFO, COMMAND, &info(16, 0));
        let mut bytes = header(0x33, command::REGION_WRITE, size, COMMAND);
        bytes.extend(inner.iter().cycle().take(size as usize - 16));
        peer.send(&bytes);
        peer.reply_to(0x33, command::REGION_WRITE).failure(Errno::INVAL);
        assert_eq!(peer.config_u16(0), 0x1234);
    }
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn an_oversized_version_is_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    let mut bytes = header(1, command::VERSION, TOO_LONG, COMMAND);
    bytes.resize(TOO_LONG as usize, b' ');
    peer.send(&bytes);
    peer.reply_to(1, command::VERSION).failure(Errno::INVAL);
    peer.expect_closed();
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn the_largest_message_that_is_taken_is_judged_by_its_content() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let body = vec![0; TOO_LONG as usize - 1 - 16];
    peer.expect_errno(command::GET_INFO, &body, Errno::INVAL);
    peer.expect_errno(command::REGION_READ, &body, Errno::INVAL);
    peer.expect_errno(0x7777, &body, Errno::INVAL);
    drop(peer);
    edu::assert_served(backend.socket());
}

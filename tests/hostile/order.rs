//! Messages that are not due.

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::peer::message::{COMMAND, ERROR, NO_REPLY, REPLY, command, message};
use barkeep_tests::peer::requests::{access, info};
use barkeep_tests::peer::{Peer, version_body};
use rustix::io::Errno;

#[test]
fn anything_before_version_ends_the_session() {
    let backend = Backend::serve(&["edu"]);
    let get_state = [16u32, 1 << 16 | 2].map(u32::to_ne_bytes);
    for (command, body) in [
        (command::GET_INFO, info(16, 0)),
        (command::REGION_READ, access(7, 0, 4)),
        (command::RESET, vec![]),
        (command::REGION_STATE, info(56, 0)),
        (command::DECODE_PAGE, barkeep_tests::peer::requests::decode_page(16, 0)),
        (command::DEVICE_FEATURE, get_state.concat()),
        (0, vec![]),
        (u16::MAX, vec![0; 100]),
    ] {
        let mut peer = Peer::connect(backend.socket());
        peer.expect_errno(command, &body, Errno::INVAL);
        peer.expect_closed();
        drop(peer);

        let mut peer = Peer::connect(backend.socket());
        peer.send(&message(1, command, COMMAND | NO_REPLY, &body));
        peer.expect_closed();
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

#[test]
fn a_second_version_is_refused_and_changes_nothing() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = Peer::connect(backend.socket());
    let _ = peer.call(command::VERSION, &version_body(0, 2, "{}")).success();
    let other = r#"{"capabilities":{"barkeep":{"region_state":true}}}"#;
    peer.expect_errno(command::VERSION, &version_body(0, 2, other), Errno::INVAL);
    peer.expect_errno(command::VERSION, &version_body(1, 0, "{}"), Errno::INVAL);
    peer.expect_errno(command::VERSION, b"junk", Errno::INVAL);
    let state = barkeep_tests::peer::requests::region_state(56, 0, 0);
    peer.expect_errno(command::REGION_STATE, &state, Errno::NOTSUP);
    assert_eq!(peer.config_u16(0), 0x1234);
    drop(peer);
    edu::assert_served(backend.socket());
}

#[test]
fn a_reply_to_nothing_ends_the_session() {
    let backend = Backend::serve(&["edu"]);
    for greeted in [false, true] {
        for flags in [REPLY, REPLY | ERROR, REPLY | NO_REPLY] {
            for body in [vec![], info(16, 0)] {
                let mut peer = Peer::connect(backend.socket());
                if greeted {
                    peer.greet();
                }
                peer.send(&message(5, command::GET_INFO, flags, &body));
                peer.reply_to(5, command::GET_INFO).failure(Errno::INVAL);
                peer.expect_closed();
                drop(peer);
                edu::assert_served(backend.socket());
            }
        }
    }
}

#[test]
fn a_type_that_is_neither_command_nor_reply_ends_the_session() {
    let backend = Backend::serve(&["edu"]);
    for kind in 2..16 {
        let mut peer = backend.client();
        peer.send(&message(5, command::GET_INFO, kind, &info(16, 0)));
        peer.reply_to(5, command::GET_INFO).failure(Errno::INVAL);
        peer.expect_closed();
        drop(peer);
        edu::assert_served(backend.socket());
    }
}

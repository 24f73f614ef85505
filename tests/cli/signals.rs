//! How it ends.

use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::{COMMAND, command, header};
use rustix::process::Signal;

use crate::process::{Sidecar, socket};

#[test]
fn a_stop_signal_removes_the_socket_and_is_a_success() {
    for signal in [Signal::TERM, Signal::INT] {
        let (_directory, path) = socket();
        let sidecar = Sidecar::start(&[(&path, "edu")]);
        sidecar.signal(signal);
        assert_eq!(sidecar.wait(), Some(0), "{signal:?}");
        assert!(!path.exists(), "{signal:?}");
    }
}

#[test]
fn a_client_sees_the_end_of_the_connection() {
    let (_directory, path) = socket();
    let sidecar = Sidecar::start(&[(&path, "edu")]);
    let mut client = Peer::greeted(&path);
    let mut waiting = Peer::connect(&path);
    sidecar.signal(Signal::TERM);
    client.expect_closed();
    waiting.expect_closed();
    assert_eq!(sidecar.wait(), Some(0));
    assert!(!path.exists());
}

#[test]
fn a_client_in_the_middle_of_a_message_does_not_delay_the_end() {
    let (_directory, path) = socket();
    let sidecar = Sidecar::start(&[(&path, "edu")]);
    let mut client = Peer::greeted(&path);
    client.send(&header(1, command::REGION_WRITE, 4096, COMMAND));
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
    client.expect_closed();
}

#[test]
fn a_second_stop_signal_changes_nothing() {
    let (_directory, path) = socket();
    let sidecar = Sidecar::start(&[(&path, "edu")]);
    for signal in [Signal::TERM, Signal::INT, Signal::TERM] {
        sidecar.signal(signal);
    }
    assert_eq!(sidecar.wait(), Some(0));
    assert!(!path.exists());
}

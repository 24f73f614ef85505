//! Standard error that takes nothing: full, closed, or not read. No reason to stop serving.

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::info;
use rustix::io::Errno;
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::Signal;

use crate::process::{Sidecar, socket};

/// Has it log as many lines as clients can cause, many kilobytes.
fn make_noise(path: &std::path::Path) {
    for _ in 0..50 {
        let mut client = Peer::greeted(path);
        for _ in 0..20 {
            client.expect_errno(command::GET_INFO, &info(0, 0), Errno::INVAL);
            assert_eq!(client.read_u32(0, 0), u32::MAX, "an Unsupported Request");
        }
    }
}

#[test]
fn logs_that_go_nowhere_stop_nothing() {
    let full = File::options().write(true).open("/dev/full").expect("a device of every kernel");
    let (unread, smallest) = std::io::pipe().expect("a pipe");
    fcntl_setpipe_size(&smallest, 4096).expect("a pipe may be small");
    let (closed, broken) = std::io::pipe().expect("a pipe");
    drop(closed);
    for (name, stderr) in
        [("full", Stdio::from(full)), ("not read", smallest.into()), ("closed", broken.into())]
    {
        println!("{name}");
        let (_directory, path) = socket();
        let sidecar = Sidecar::start_with(&[(&path, "edu")], &["--log", "debug"], stderr);
        make_noise(&path);
        edu::assert_served(&path);
        sidecar.signal(Signal::TERM);
        assert_eq!(sidecar.wait(), Some(0), "{name}");
        assert!(!path.exists(), "{name}");
    }
    drop(unread);
}

#[test]
fn the_last_lines_are_written_before_the_end() {
    let (_directory, path) = socket();
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let sidecar = Sidecar::start_with(&[(&path, "edu")], &[], writer);
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
    let mut log = String::new();
    reader.read_to_string(&mut log).expect("UTF-8");
    assert!(log.ends_with("stopped\n"), "{log}");
}

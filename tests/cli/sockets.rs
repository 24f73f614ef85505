//! Whose socket it is.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::requests::pci;
use rustix::process::Signal;

use crate::process::{Sidecar, arguments, assert_refused, socket};

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let (_directory, path) = socket();
    drop(UnixListener::bind(&path).expect("a socket"));
    assert!(path.exists(), "it is stale");
    let sidecar = Sidecar::start(&[(&path, "edu")]);
    edu::assert_served(&path);
    drop(sidecar);
}

#[test]
fn a_socket_that_is_served_is_left_alone() {
    let (_directory, path) = socket();
    let sidecar = Sidecar::start(&[(&path, "edu")]);
    let second = arguments(&[(&path, "edu")]);
    let words = ["--socket", "in use by another process"];
    assert_refused(&second, &words);
    edu::assert_served(&path);

    let mut client = Peer::greeted(&path);
    edu::enable(&mut client);
    for _ in 0..4 {
        assert_refused(&second, &words);
    }
    assert_eq!(client.config_u16(pci::COMMAND), 0b110, "its client has not noticed");
    drop(client);
    edu::assert_served(&path);
    drop(sidecar);
}

#[test]
fn a_killed_sidecar_leaves_a_socket_that_the_next_one_replaces() {
    let (_directory, path) = socket();
    for _ in 0..3 {
        let sidecar = Sidecar::start(&[(&path, "edu")]);
        let mut client = Peer::greeted(&path);
        edu::enable(&mut client);
        sidecar.signal(Signal::KILL);
        assert_eq!(sidecar.wait(), None);
        client.expect_closed();
        assert!(path.exists(), "nobody could remove it");
    }
    let _sidecar = Sidecar::start(&[(&path, "edu")]);
    edu::assert_served(&path);
}

#[test]
fn two_functions_are_served_by_one_process() {
    let (directory, edu) = socket();
    let shared = directory.path().join("shared.sock");
    let sidecar = Sidecar::start(&[(&edu, "edu"), (&shared, "ivshmem,size=4M")]);
    let mut one = Peer::greeted(&edu);
    let mut other = Peer::greeted(&shared);
    assert_eq!((one.config_u16(2), other.config_u16(2)), (0x11e8, 0x1110));
    drop(one);
    assert_eq!(other.config_u16(0), 0x1af4);
    edu::assert_served(&edu);
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
    assert!(!edu.exists() && !shared.exists());
}

#[test]
fn a_socket_of_somebody_else_is_not_removed_at_the_end() {
    let (_directory, path) = socket();
    let sidecar = Sidecar::start(&[(&path, "edu")]);
    std::fs::remove_file(&path).expect("the socket");
    let _other = UnixListener::bind(&path).expect("a socket");
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
    assert!(path.exists());
}

/// `--socket-dir DIRECTORY --device SPEC` for each.
fn in_directory(directory: &Path, specs: &[&str]) -> Vec<String> {
    let mut arguments = vec!["--socket-dir".into(), directory.display().to_string()];
    arguments.extend(specs.iter().flat_map(|spec| ["--device".into(), (*spec).to_owned()]));
    arguments
}

#[test]
fn a_directory_gets_a_socket_for_each_device_by_its_id_or_its_place() {
    let (directory, _) = socket();
    let directory = directory.path();
    let specs = ["edu", "ivshmem,size=4K,id=shared", "edu"];
    let paths = ["edu0.sock", "shared.sock", "edu2.sock"].map(|name| directory.join(name));
    let functions: Vec<(&Path, &str)> = paths.iter().map(PathBuf::as_path).zip(specs).collect();
    let arguments = in_directory(directory, &specs);
    let sidecar = Sidecar::start_as("serve", &arguments, &functions, std::process::Stdio::piped());
    edu::assert_served(&paths[0]);
    assert_eq!(Peer::greeted(&paths[1]).config_u16(2), 0x1110);
    edu::assert_served(&paths[2]);
    sidecar.signal(Signal::TERM);
    assert_eq!(sidecar.wait(), Some(0));
    assert!(paths.iter().all(|path| !path.exists()));
}

#[test]
fn ids_that_cant_name_a_socket_or_name_two_are_refused() {
    let (directory, _) = socket();
    let directory = directory.path();
    for (specs, reason) in [
        (&["edu,id=a", "edu,id=a"][..], "two devices are called 'a'"),
        (&["edu,id=edu1", "edu"], "two devices are called 'edu1'"),
        (&["edu,id="], "'id': '' can't name a socket"),
        (&["edu,id=../up"], "'id': '../up' can't name a socket"),
        (&["edu,id=.hidden"], "can't name a socket"),
    ] {
        assert_refused(&in_directory(directory, specs), &[reason]);
    }
    assert_eq!(std::fs::read_dir(directory).expect("the directory").count(), 0);
}

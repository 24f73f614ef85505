use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::*;

fn directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f.sock");
    (directory, path)
}

#[test]
fn a_socket_is_removed_when_it_is_no_longer_served() {
    let (_directory, path) = directory();
    let socket = SocketPath::claim(&path).unwrap();
    assert!(path.exists());
    drop(socket);
    assert!(!path.exists());
}

#[test]
fn a_live_socket_is_not_stolen_and_a_stale_one_is_replaced() {
    let (_directory, path) = directory();
    let live = SocketPath::claim(&path).unwrap();
    assert_eq!(SocketPath::claim(&path).unwrap_err(), SocketError::InUse);
    UnixStream::connect(&path).expect("still there");
    // As after SIGKILL: the listener is gone, the name is not.
    let kept = path.with_extension("kept");
    std::fs::hard_link(&path, &kept).unwrap();
    drop(live);
    std::fs::rename(&kept, &path).unwrap();
    let _fresh = SocketPath::claim(&path).unwrap();
    UnixStream::connect(&path).expect("served again");
}

#[test]
fn a_directory_that_somebody_keeps_locked_is_not_waited_for_for_ever() {
    let (directory, path) = directory();
    let holder = std::fs::File::open(directory.path()).unwrap();
    holder.lock().unwrap();
    assert_eq!(SocketPath::claim(&path).unwrap_err(), SocketError::Locked);
    assert!(!path.exists());
    holder.unlock().unwrap();
    let _socket = SocketPath::claim(&path).unwrap();
}

#[test]
fn a_socket_that_somebody_replaced_is_left_to_them() {
    let (_directory, path) = directory();
    let first = SocketPath::claim(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _second = SocketPath::claim(&path).unwrap();
    drop(first);
    assert!(path.exists());
}

#[test]
fn what_is_not_a_socket_is_never_removed() {
    let (directory, path) = directory();
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(SocketPath::claim(&path).unwrap_err(), SocketError::NotASocket);
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert_eq!(SocketPath::claim(&link).unwrap_err(), SocketError::NotASocket);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn unusable_paths_are_refused_with_the_reason() {
    let (directory, _) = directory();
    let missing = directory.path().join("no/such/f.sock");
    assert_eq!(SocketPath::claim(&missing).unwrap_err(), SocketError::System(Errno::NOENT));
    let long = directory.path().join("x".repeat(120));
    assert_eq!(SocketPath::claim(&long).unwrap_err(), SocketError::System(Errno::NAMETOOLONG));
}

#[test]
fn the_listener_does_not_block() {
    let (_directory, path) = directory();
    let socket = SocketPath::claim(&path).unwrap();
    let result = accept_with(socket.listener().as_fd(), SocketFlags::empty());
    assert_eq!(result.unwrap_err(), Errno::AGAIN);
}

/// The same socket, as another process finds it.
fn inherited(socket: &SocketPath) -> OwnedFd {
    socket.listener().try_clone_to_owned().unwrap()
}

#[test]
fn a_socket_is_gone_on_with_by_another_process_that_removes_it_in_the_end() {
    let (_directory, path) = directory();
    let mut first = SocketPath::claim(&path).unwrap();
    let second = SocketPath::adopt(inherited(&first)).unwrap();
    assert_eq!(second.path(), path);
    first.leave();
    drop(first);
    UnixStream::connect(&path).expect("still listening");
    drop(second);
    assert!(!path.exists());
}

#[test]
fn an_inherited_socket_never_makes_the_event_loop_wait() {
    let (_directory, path) = directory();
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let socket = SocketPath::adopt(listener.into()).unwrap();
    let accepted = accept_with(socket.listener(), SocketFlags::empty());
    assert_eq!(accepted.err(), Some(Errno::AGAIN));
}

#[test]
fn what_does_not_listen_or_cannot_be_found_is_not_gone_on_with() {
    let (_directory, path) = directory();
    let refused = |fd: OwnedFd| SocketPath::adopt(fd).unwrap_err() == SocketError::NotListening;
    let (stream, _other) = UnixStream::pair().unwrap();
    assert!(refused(stream.into()));
    assert!(refused(std::fs::File::open("/dev/null").unwrap().into()));
    assert!(refused(std::os::unix::net::UnixDatagram::bind(&path).unwrap().into()));
    std::fs::remove_file(&path).unwrap();
    let socket = SocketPath::claim(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(refused(inherited(&socket)));
    let address = std::os::unix::net::SocketAddr::from_pathname("").unwrap();
    assert!(refused(std::os::unix::net::UnixListener::bind_addr(&address).unwrap().into()));
}

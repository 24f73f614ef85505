use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};

use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::*;
use crate::state::FdKey;

/// As a service manager listens.
struct Manager {
    socket: UnixDatagram,
    _directory: tempfile::TempDir,
}

impl Manager {
    fn listen() -> (Self, ServiceManager) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let path = path.to_str().unwrap().to_owned();
        let client =
            ServiceManager::find(|variable| (variable == "NOTIFY_SOCKET").then(|| path.clone()));
        (Self { socket, _directory: directory }, client)
    }

    fn next(&self) -> Option<(String, Vec<OwnedFd>)> {
        receive(&self.socket)
    }

    /// All that is there, without descriptors.
    fn texts(&self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).map(|(text, _)| text).collect()
    }
}

fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [IoSliceMut::new(&mut bytes)];
    let count = recvmsg(socket, &mut buffer, &mut ancillary, RecvFlags::DONTWAIT).ok()?.bytes;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    Some((String::from_utf8(bytes[..count].to_vec()).unwrap(), fds))
}

#[test]
fn without_a_service_manager_nothing_happens() {
    let mut nobody = ServiceManager::find(|_| None);
    let (fd, _) = UnixStream::pair().unwrap();
    nobody.ready();
    nobody.store("edu0", What::State, fd.as_fd());
    assert!(!nobody.is_there() && nobody.flush() && nobody.as_fd().is_none());
}

#[test]
fn a_descriptor_is_handed_over_with_its_name_and_never_given_up_by_itself() {
    let (manager, mut client) = Manager::listen();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.store("disk", What::Fd(FdKey(7)), theirs.as_fd());
    drop(theirs);
    let (text, mut fds) = manager.next().unwrap();
    assert_eq!(text, "FDSTORE=1\nFDNAME=disk/7\nFDPOLL=0\n");
    let held = UnixStream::from(fds.pop().unwrap());
    ours.write_all(b"x").unwrap();
    assert_eq!(std::io::Read::read(&mut &held, &mut [0; 4]).unwrap(), 1);
    assert!(fds.is_empty());
    client.forget("disk", What::Fd(FdKey(7)));
    assert_eq!(manager.texts(), ["FDSTOREREMOVE=1\nFDNAME=disk/7\n"]);
}

#[test]
fn what_an_operator_reads_stays_one_line() {
    let (manager, mut client) = Manager::listen();
    client.status("serving\nREADY=1");
    assert_eq!(manager.texts(), ["STATUS=serving?READY=1\n"]);
}

#[test]
fn a_reload_has_its_time() {
    let (manager, mut client) = Manager::listen();
    client.reloading();
    client.ready();
    let texts = manager.texts();
    let time = texts[0].strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    assert!(time.trim_end().parse::<u64>().unwrap() > 0);
    assert_eq!(texts[1..], ["READY=1\n"]);
}

/// Fills the manager's queue: it has not read for a while.
fn fill(client: &mut ServiceManager) {
    let notifier = client.notifier.as_mut().unwrap();
    let mut sent = 0;
    while notifier.flush() {
        notifier.send(Message::Say(format!("X{sent}=1\n")));
        sent += 1;
        assert!(sent < 100_000, "a queue has an end");
    }
}

#[test]
fn a_manager_that_does_not_read_holds_nobody_up_and_hears_it_later_in_order() {
    let (manager, mut client) = Manager::listen();
    let (fd, _other) = UnixStream::pair().unwrap();
    fill(&mut client);
    client.store("disk", What::State, fd.as_fd());
    client.status("one");
    client.forget("disk", What::Client);
    client.store("disk", What::Client, fd.as_fd());
    client.status("two");
    assert!(!client.flush());
    let mut texts = Vec::new();
    let mut descriptors = 0;
    while !client.flush() || texts.last().is_none_or(|last| last != "STATUS=two\n") {
        while let Some((text, fds)) = manager.next() {
            texts.push(text);
            descriptors += fds.len();
        }
    }
    texts.retain(|text| !text.starts_with('X'));
    let stored = |what| format!("FDSTORE=1\nFDNAME=disk/{what}\nFDPOLL=0\n");
    let expected = [
        stored("state"),
        "FDSTOREREMOVE=1\nFDNAME=disk/client\n".into(),
        stored("client"),
        "STATUS=two\n".into(),
    ];
    assert_eq!((texts, descriptors), (expected.to_vec(), 2));
}

#[test]
fn what_comes_and_goes_while_the_manager_does_not_read_leaves_nothing_waiting() {
    let (_manager, mut client) = Manager::listen();
    let (fd, _other) = UnixStream::pair().unwrap();
    fill(&mut client);
    let before = client.notifier.as_ref().unwrap().waiting();
    // That was stored earlier.
    client.forget("disk", What::Client);
    for key in 0..100 {
        client.store("disk", What::Client, fd.as_fd());
        client.forget("disk", What::Client);
        client.store("disk", What::Fd(FdKey(key)), fd.as_fd());
        client.forget("disk", What::Fd(FdKey(key)));
        client.alive();
    }
    let after = client.notifier.as_ref().unwrap().waiting();
    assert_eq!(after, before + 2, "one to forget what was stored earlier, and one sign of life");
}

#[test]
fn a_manager_that_was_started_anew_is_found_again() {
    let (manager, mut client) = Manager::listen();
    let path = manager.socket.local_addr().unwrap().as_pathname().unwrap().to_owned();
    drop(manager.socket);
    client.ready();
    std::fs::remove_file(&path).unwrap();
    client.ready();
    let again = UnixDatagram::bind(&path).unwrap();
    client.alive();
    assert_eq!(receive(&again).unwrap().0, "WATCHDOG=1\n");
}

#[test]
fn a_socket_without_a_place_in_the_file_system_is_found() {
    let name = format!("barkeep-test-{}", process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let mut client =
        ServiceManager::find(|variable| (variable == "NOTIFY_SOCKET").then(|| format!("@{name}")));
    client.stopping();
    assert_eq!(receive(&socket).unwrap().0, "STOPPING=1\n");
}

#[test]
fn the_watchdog_is_fed_twice_as_often_as_it_looks_and_only_by_the_process_that_it_means() {
    let (manager, _) = Manager::listen();
    let path = manager.socket.local_addr().unwrap().as_pathname().unwrap().to_owned();
    let find = |time: &str, pid: Option<String>| {
        ServiceManager::find(|variable| match variable {
            "NOTIFY_SOCKET" => path.to_str().map(str::to_owned),
            "WATCHDOG_USEC" => Some(time.to_owned()),
            "WATCHDOG_PID" => pid.clone(),
            _ => None,
        })
        .watchdog_interval()
    };
    let half = Some(Duration::from_millis(1500));
    assert_eq!(find("3000000", None), half);
    assert_eq!(find("3000000", Some(process::id().to_string())), half);
    assert_eq!(find("3000000", Some("1".into())), None);
    for time in ["0", "", "soon", "-1"] {
        assert_eq!(find(time, None), None, "{time:?}");
    }
}

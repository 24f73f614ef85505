//! Full sockets, servers that mean harm, and descriptors that others close.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use barkeep_protocol::wire::{Command, Header};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::property::{BARKEEP, greeted};
use super::{ASK, Vmm, YES, message, version};
use crate::device::Decode;
use crate::status::Count;
use crate::stream::connection::{Connection, Posted};
use crate::stream::hello::Hello;

const READ: u16 = Command::RegionRead as u16;

/// Leaves the VMM's socket no room. Returns how many bytes that took.
fn fill(vmm: &Vmm) -> usize {
    let socket = vmm.shim.system.socket(vmm.fd).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4608).unwrap();
    let mut filled = 0;
    while let Ok(sent) = send(&socket, &[0; 100], SendFlags::DONTWAIT) {
        filled += sent;
    }
    filled
}

#[test]
fn who_asks_has_no_turn_while_there_is_no_room() {
    let (vmm, mut server, connection) = greeted(BARKEEP);
    let filled = fill(&vmm);
    let other = connection.pending().ask(Command::RegionRead).unwrap();
    let asker = thread::spawn({
        let connection = Arc::clone(&connection);
        let deadline = Instant::now() + Duration::from_secs(5);
        move || connection.ask(Command::RegionRead, &[0; 16], deadline)
    });
    // It reads meanwhile, which shows that it waits.
    server.write_all(&message(other.0, READ, YES, &[])).unwrap();
    while connection.pending().take(other).is_none() && !asker.is_finished() {
        thread::yield_now();
    }
    drop(connection.writer());
    server.read_exact(&mut vec![0; filled]).unwrap();
    let mut asked = [0; 32];
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    server.read_exact(&mut asked).unwrap();
    let asked = Header::parse(asked.first_chunk().unwrap()).unwrap();
    server.write_all(&message(asked.id.0, READ, YES, &[7])).unwrap();
    let reply = asker.join().unwrap().expect("an answer");
    assert_eq!(reply.body(), Some(&[7][..]));
}

#[test]
fn the_rest_of_a_question_goes_out_while_who_asked_waits() {
    let (vmm, mut server, connection) = greeted(BARKEEP);
    let socket = vmm.shim.system.socket(vmm.fd).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4608).unwrap();
    let long = vec![3; 40_000];
    let asker = thread::spawn({
        let (connection, long) = (Arc::clone(&connection), long.clone());
        let deadline = Instant::now() + Duration::from_secs(5);
        move || connection.ask(Command::RegionWrite, &long, deadline)
    });
    let mut asked = vec![0; 16 + long.len()];
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    server.read_exact(&mut asked).unwrap();
    assert!(asked[16..] == long);
    let header = Header::parse(asked.first_chunk().unwrap()).unwrap();
    server.write_all(&message(header.id.0, header.command, YES, &[7])).unwrap();
    assert_eq!(asker.join().unwrap().expect("an answer").body(), Some(&[7][..]));
}

/// The VMM uses the number of our descriptor for the first of these.
fn replaced(vmm: &Vmm, connection: Arc<Connection>) -> (UnixStream, UnixStream) {
    drop(connection);
    let (other, other_end) = UnixStream::pair().unwrap();
    other_end.set_nonblocking(true).unwrap();
    let mut place = vmm.shim.streams.place(0).unwrap().connection();
    Arc::get_mut(place.as_mut().unwrap()).unwrap().replace(&other);
    (other, other_end)
}

#[test]
fn what_the_vmm_uses_our_number_for_is_not_touched() {
    for ask_first in [true, false] {
        let (vmm, mut server, connection) = greeted(BARKEEP);
        let ours = connection.pending().ask(Command::RegionRead).unwrap();
        let (mut other, mut other_end) = replaced(&vmm, connection);
        let foreign = message(ours.0, READ, YES, &[]);
        other_end.write_all(&foreign).unwrap();
        let told = message(9, READ, YES, &[1, 2, 3]);
        server.write_all(&told).unwrap();
        let ask = || {
            let connection = vmm.shim.connection_of(vmm.fd).unwrap().1;
            connection.look();
            let deadline = Instant::now() + Duration::from_secs(5);
            assert!(connection.ask(Command::RegionRead, &[0; 16], deadline).is_none());
        };
        if ask_first {
            ask();
        }
        assert_eq!(vmm.message(), told);
        assert_eq!(vmm.send(&message(10, READ, ASK, &[0; 16])), Ok(32));
        ask();
        assert_eq!(vmm.shim.status.get(Count::FailOpens), 1);
        drop(vmm);
        let mut left = vec![0; foreign.len()];
        other.read_exact(&mut left).unwrap();
        assert_eq!(left, foreign);
        assert!(other_end.read(&mut [0]).is_err(), "nothing was sent there");
        server.read_exact(&mut [0; 32]).unwrap();
    }
}

#[test]
fn a_half_sent_question_is_finished_through_the_vmms_own_descriptor() {
    let (vmm, mut server, connection) = greeted(BARKEEP);
    let socket = vmm.shim.system.socket(vmm.fd).unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4608).unwrap();
    let long = vec![3; 40_000];
    let mut writer = connection.writer();
    let Posted::Sent(id) = connection.post(&mut writer, Command::RegionWrite, &long) else {
        panic!("there is room for some of it");
    };
    drop(writer);
    let (_other, mut other_end) = replaced(&vmm, connection);
    server.set_nonblocking(true).unwrap();
    let asked = message(10, READ, ASK, &[0; 16]);
    let mut got = Vec::new();
    while vmm.send(&asked) == Err(Errno::AGAIN) {
        let _ = server.read_to_end(&mut got);
    }
    let _ = server.read_to_end(&mut got);
    let ours = message(id.0, Command::RegionWrite.code(), ASK, &long);
    assert!(got == [ours, asked].concat());
    assert!(other_end.read(&mut [0]).is_err(), "nothing was sent there");
}

#[test]
fn what_is_owed_stays_owed_when_it_can_not_be_sent() {
    let (vmm, mut server, _) = greeted(BARKEEP);
    // No socket, which is an error as good as any.
    let file = rustix::fs::memfd_create("none", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let hello = Hello::with_ours(&version(7)).unwrap();
    let connection = Connection::new(file, &hello).unwrap();
    let mut writer = connection.writer();
    writer.owed = vec![1, 2, 3];
    let asked = message(10, READ, ASK, &[0; 16]);
    vmm.shim.system.place(0, &asked);
    for _ in 0..2 {
        let whole = super::whole(0, asked.len());
        let decode = || Decode::Unknown;
        let sent = connection.send(&vmm.shim.system, &mut writer, vmm.fd, &whole, 0, decode);
        assert_eq!(sent, (Err(Errno::NOTSOCK), None));
    }
    assert_eq!(writer.owed, [1, 2, 3]);
    assert!(!connection.was_lost());
    server.set_nonblocking(true).unwrap();
    assert!(server.read(&mut [0]).is_err(), "nothing of the VMM's has gone before it");
}

#[test]
fn a_server_that_says_no_more_is_not_waited_for() {
    let (vmm, server, connection) = greeted(BARKEEP);
    server.shutdown(std::net::Shutdown::Write).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    assert!(connection.ask(Command::RegionRead, &[0; 16], deadline).is_none());
    assert!(connection.pending().closed, "it was seen to end");
    assert_eq!(vmm.receive(16), Ok(Vec::new()));
}

/// Two commands of the server, one of which comes with a descriptor.
fn told_twice(server: &mut UnixStream, with_fd: usize) -> [Vec<u8>; 2] {
    let told = [40, 41].map(|id| message(id, Command::DmaRead.code(), ASK, &[5; 16]));
    for (at, bytes) in told.iter().enumerate() {
        let file = rustix::fs::memfd_create("fd", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        super::server::send(server, bytes, (at == with_fd).then_some(file));
    }
    told
}

#[test]
fn a_descriptor_reaches_a_vmm_that_reads_on_behind_the_end_of_a_message() {
    let (vmm, mut server, _) = greeted(BARKEEP);
    let told = told_twice(&mut server, 1);
    assert_eq!(vmm.receive_with(100, libc::MSG_WAITALL), Ok(told.concat()));
    assert_eq!(vmm.shim.system.received.lock().unwrap().len(), 1);
}

#[test]
fn a_vmm_that_waits_for_all_gets_no_more_than_up_to_a_descriptor() {
    let (vmm, mut server, _) = greeted(BARKEEP);
    let told = told_twice(&mut server, 0);
    assert_eq!(vmm.receive_with(100, libc::MSG_WAITALL).as_ref(), Ok(&told[0]));
    assert_eq!(vmm.receive_with(100, libc::MSG_WAITALL).as_ref(), Ok(&told[1]));
    // In the middle of a message, and without room for it.
    let file = rustix::fs::memfd_create("fd", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    super::server::send(&mut server, &told[0][..20], Some(file));
    super::server::send(&mut server, &told[0][20..], None);
    let room = super::whole(super::ROOM, 100);
    let got = vmm.shim.recvmsg(vmm.fd, &room, libc::MSG_WAITALL).unwrap();
    assert_eq!(got.count, 20);
}

#[test]
fn a_child_closes_the_descriptor_that_a_thread_of_its_parent_uses() {
    let (vmm, _server, connection) = greeted(BARKEEP);
    // Which the child has a reference of, for ever.
    let used = Arc::clone(&connection);
    vmm.shim.streams.forked(&vmm.shim.system);
    assert_eq!(*vmm.shim.system.closed.lock().unwrap(), [connection.number()]);
    assert_eq!(Arc::strong_count(&used), 3, "not to be closed once more");
}

#[test]
fn a_child_closes_nothing_that_is_not_ours_any_more() {
    let (vmm, _server, connection) = greeted(BARKEEP);
    let _others = replaced(&vmm, connection);
    vmm.shim.streams.forked(&vmm.shim.system);
    assert!(vmm.shim.system.closed.lock().unwrap().is_empty());
}

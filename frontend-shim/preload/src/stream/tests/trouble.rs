//! Full sockets, servers that mean harm, and descriptors that others close.

use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use barkeep_protocol::wire::{Command, Header};
use rustix::net::{SendFlags, send};

use super::property::{BARKEEP, greeted};
use super::{Vmm, YES, message};

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

//! Any streams, in any pieces: each side has what the other one meant for it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind};
use proptest::prelude::*;
use proptest::sample::Index;
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::Arc;

use super::{ASK, Vmm, YES, message, version};
use crate::stream::connection::Connection;

/// A VMM after its handshake with a server that says this. Its device has not been asked anything.
pub(super) fn greeted(json: &str) -> (Vmm, UnixStream, Arc<Connection>) {
    let (vmm, mut server) = Vmm::new();
    let hello = version(0);
    vmm.shim.system.place(0, &hello);
    let sent = vmm.shim.sendmsg(vmm.fd, &super::whole(0, hello.len()), 0);
    assert_eq!(sent, Ok(hello.len()));
    let mut got = vec![0; 16];
    server.read_exact(&mut got).unwrap();
    let size = Header::parse(got.first_chunk().unwrap()).unwrap().body_size as usize;
    server.read_exact(&mut vec![0; size]).unwrap();
    let body = [&[0, 0, 0, 0], json.as_bytes(), b"\0"].concat();
    server.write_all(&message(0, 1, YES, &body)).unwrap();
    vmm.message();
    let (_, connection) = vmm.shim.connection_of(vmm.fd).unwrap();
    connection.writer().introduced = true;
    (vmm, server, connection)
}

pub(super) const BARKEEP: &str = r#"{"capabilities":{"barkeep":{"memory_fault":true}}}"#;

#[derive(Clone, Debug)]
enum FromServer {
    Reply { len: usize, with_fd: bool },
    Command { len: usize },
    Ours { len: usize },
}

fn from_server() -> impl Strategy<Value = FromServer> {
    prop_oneof![
        (0_usize..300, any::<bool>()).prop_map(|(len, with_fd)| FromServer::Reply { len, with_fd }),
        (0_usize..300).prop_map(|len| FromServer::Command { len }),
        (0_usize..300).prop_map(|len| FromServer::Ours { len }),
        Just(FromServer::Ours { len: 65_000 }),
    ]
}

fn filled(len: usize, seed: usize) -> Vec<u8> {
    (0..=250).cycle().skip(seed * 31 % 251).take(len).collect()
}

fn send_with_fd(server: &UnixStream, data: &[u8]) {
    let file = rustix::fs::memfd_create("fd", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent =
        rustix::net::sendmsg(server, &[IoSlice::new(data)], &mut control, SendFlags::empty());
    assert_eq!(sent, Ok(data.len()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn the_vmm_reads_exactly_its_own_stream(
        messages in prop::collection::vec(from_server(), 1..12),
        cuts in prop::collection::vec(any::<Index>(), 0..12),
        reads in prop::collection::vec(prop_oneof![1_usize..40, 1_usize..2000], 1..40),
        peeks in prop::collection::vec(any::<bool>(), 1..10),
        pumps in prop::collection::vec(any::<bool>(), 1..10),
    ) {
        let (vmm, server, connection) = greeted(BARKEEP);
        server.set_nonblocking(true).unwrap();
        let mut expected = Vec::new();
        let mut expected_fds = 0;
        let mut asked = Vec::new();
        // Runs of bytes; a descriptor goes with the whole of its message.
        let mut runs: Vec<(Vec<u8>, bool)> = vec![(Vec::new(), false)];
        for (n, kind) in messages.iter().enumerate() {
            let id = u16::try_from(n).unwrap() + 1;
            let plain = |runs: &mut Vec<(Vec<u8>, bool)>, bytes: &[u8]| {
                match runs.last_mut() {
                    Some((run, false)) => run.extend_from_slice(bytes),
                    _ => runs.push((bytes.to_vec(), false)),
                }
            };
            match *kind {
                FromServer::Reply { len, with_fd } => {
                    connection.pending().begins(super::super::outgoing::Begun::Asked(MessageId(id), 9));
                    let bytes = message(id, 9, YES, &filled(len, n));
                    expected.extend_from_slice(&bytes);
                    if with_fd {
                        expected_fds += 1;
                        runs.push((bytes, true));
                    } else {
                        plain(&mut runs, &bytes);
                    }
                }
                FromServer::Command { len } => {
                    let bytes = message(id, 11, ASK, &filled(len, n));
                    expected.extend_from_slice(&bytes);
                    plain(&mut runs, &bytes);
                }
                FromServer::Ours { len } => {
                    let ours = connection.pending().ask(Command::RegionRead).unwrap();
                    asked.push((ours, filled(len, n)));
                    plain(&mut runs, &message(ours.0, 9, YES, &filled(len, n)));
                }
            }
        }
        let mut seen = Vec::new();
        let mut step = 0;
        let mut read = |all: bool| {
            loop {
                step += 1;
                if pumps[step % pumps.len()] {
                    connection.look();
                }
                let most = reads[step % reads.len()];
                if peeks[step % peeks.len()]
                    && let Ok(peeked) = vmm.receive_with(most, libc::MSG_PEEK)
                {
                    assert!(expected[seen.len()..].starts_with(&peeked));
                    vmm.shim.system.received.lock().unwrap().clear();
                }
                match vmm.receive(most) {
                    Ok(data) => {
                        assert!(!data.is_empty(), "an end that is none");
                        seen.extend_from_slice(&data);
                        assert!(expected.starts_with(&seen));
                    }
                    Err(Errno::AGAIN) => {
                        if all {
                            assert_eq!(seen.len(), expected.len(), "kept from the VMM");
                        }
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        };
        let peeking = peeks.iter().any(|peek| *peek);
        let mut fds = 0;
        for (run, with_fd) in &runs {
            if *with_fd {
                send_with_fd(&server, run);
                read(false);
                continue;
            }
            let mut places: Vec<usize> =
                cuts.iter().map(|cut| cut.index(run.len() + 1)).chain([0, run.len()]).collect();
            places.sort_unstable();
            for piece in places.windows(2) {
                let mut piece = &run[piece[0]..piece[1]];
                while !piece.is_empty() {
                    // An error: there is no room until something is read.
                    let sent = (&server).write(piece).unwrap_or(0);
                    piece = &piece[sent..];
                    read(false);
                }
            }
        }
        read(true);
        fds += vmm.shim.system.received.lock().unwrap().len();
        // What was peeked at came twice.
        prop_assert!(peeking || fds == expected_fds);
        for (id, body) in asked {
            let reply = connection.pending().take(id).expect("an answer to us");
            prop_assert_eq!(reply.body(), Some(&body[..]));
        }
        drop(server);
        prop_assert_eq!(vmm.receive(100), Ok(Vec::new()));
    }

    #[test]
    fn the_server_reads_exactly_the_vmms_stream_with_ours_between_messages(
        lens in prop::collection::vec((0_usize..6000, any::<bool>()), 1..20),
        pieces in prop::collection::vec(prop_oneof![1_usize..40, 1_usize..9000], 1..20),
        asks in prop::collection::vec(any::<bool>(), 1..10),
        drains in prop::collection::vec(any::<bool>(), 1..10),
    ) {
        let (vmm, mut server, connection) = greeted(BARKEEP);
        server.set_nonblocking(true).unwrap();
        let socket = vmm.shim.system.socket(vmm.fd).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, 4608).unwrap();
        let mut stream = Vec::new();
        for (n, (len, reply)) in lens.iter().enumerate() {
            let kind = if *reply { YES } else { ASK };
            stream.extend(message(u16::try_from(n).unwrap() + 1, 10, kind, &filled(*len, n)));
        }
        let mut got = Vec::new();
        let mut drain = |server: &mut UnixStream| {
            let mut buffer = [0; 65536];
            while let Ok(count) = server.read(&mut buffer) {
                got.extend_from_slice(&buffer[..count]);
            }
        };
        let mut sent = 0;
        let mut step = 0;
        while sent < stream.len() {
            step += 1;
            if asks[step % asks.len()] {
                let mut writer = connection.writer();
                connection.post(&mut writer, Command::RegionRead, &filled(40, step));
            }
            let piece = pieces[step % pieces.len()].min(stream.len() - sent);
            match vmm.send(&stream[sent..sent + piece]) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => drain(&mut server),
                Err(error) => panic!("{error}"),
            }
            if drains[step % drains.len()] {
                drain(&mut server);
            }
        }
        drain(&mut server);
        // An owed rest of ours, if there is one.
        while vmm.send(&[]).is_err() {
            drain(&mut server);
        }
        drain(&mut server);
        let mut theirs = Vec::new();
        let mut left = &got[..];
        while !left.is_empty() {
            let header = Header::parse(left.first_chunk().unwrap()).unwrap();
            let (whole, rest) = left.split_at(16 + header.body_size as usize);
            let ours = header.id.0 >= 0x8000
                && header.kind == (MessageKind::Command { no_reply: false });
            if ours {
                prop_assert_eq!(header.command, 9);
            } else {
                theirs.extend_from_slice(whole);
            }
            left = rest;
        }
        prop_assert!(theirs == stream);
    }

    #[test]
    fn a_stream_that_is_no_vfio_user_reaches_the_vmm_all_the_same(
        data in prop::collection::vec(any::<u8>(), 1..400),
        reads in prop::collection::vec(1_usize..64, 1..10),
    ) {
        let (vmm, mut server, _) = greeted(BARKEEP);
        server.write_all(&data).unwrap();
        drop(server);
        let mut seen = Vec::new();
        for most in reads.iter().cycle() {
            let got = vmm.receive(*most);
            match got {
                Ok(got) if got.is_empty() => break,
                Ok(got) => seen.extend(got),
                Err(error) => panic!("{error}"),
            }
        }
        prop_assert_eq!(seen, data);
    }
}

//! Sockets that are no vfio-user client's, whatever goes over them.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

use crate::raw;
use crate::{Outcome, say};

/// A header, and a payload.
fn message(id: u16, command: u16, size: usize, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut message = [id.to_le_bytes(), command.to_le_bytes()].concat();
    for word in [u32::try_from(size).unwrap_or(u32::MAX), flags, 0] {
        message.extend_from_slice(&word.to_le_bytes());
    }
    message.extend_from_slice(body);
    message
}

/// Nearly a VERSION, each in its own way.
fn messages() -> Vec<(&'static str, Vec<u8>)> {
    let json = b"\0\0\0\0{\"capabilities\":{}}\0".to_vec();
    let of = |body: &[u8]| message(0, 1, 16 + body.len(), 0, body);
    vec![
        ("nothing", Vec::new()),
        ("a byte", vec![1]),
        ("text", b"{\"execute\": \"qmp_capabilities\"}\r\n".to_vec()),
        ("zeros", vec![0; 64]),
        ("ones", vec![0xff; 64]),
        ("another command", message(0, 4, 16 + json.len(), 0, &json)),
        ("a reply", message(0, 1, 16 + json.len(), 1, &json)),
        ("one that wants no reply", message(0, 1, 16 + json.len(), 0x10, &json)),
        ("too short", message(0, 1, 15 + json.len(), 0, &json)),
        ("too long", message(0, 1, 17 + json.len(), 0, &json)),
        ("two", [of(&json), of(&json)].concat()),
        ("another major", of(b"\x01\0\0\0{\"capabilities\":{}}\0")),
        ("no JSON", of(b"\0\0\0\0capabilities\0")),
        ("no end", of(b"\0\0\0\0{\"capabilities\":{}}")),
        ("an end too early", of(b"\0\0\0\0{\"capabilities\"\0:{}}\0")),
        ("a list", of(b"\0\0\0\0[]\0")),
        ("capabilities that are none", of(b"\0\0\0\0{\"capabilities\":7}\0")),
        (
            "capabilities of a wrong type",
            of(b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"x\"}}\0"),
        ),
        ("one that speaks barkeep", of(b"\0\0\0\0{\"capabilities\":{\"barkeep\":{}}}\0")),
        ("numbers alone", of(&[0; 3])),
    ]
}

pub(crate) fn strangers() -> Outcome {
    for (what, message) in messages() {
        let (near, mut far) = UnixStream::pair().map_err(|_| 0)?;
        let fd = near.as_raw_fd();
        say(what, raw::sendmsg(fd, &[&message], &[]));
        let mut seen = vec![0; message.len()];
        far.read_exact(&mut seen).map_err(|_| 0)?;
        say("arrives", seen == message);
        // Back, with a descriptor.
        say("answered", raw::sendmsg(far.as_raw_fd(), &[b"head", b"tail"], &[fd]));
        let mut data = [0; 6];
        let got = raw::recvmsg(fd, &mut data, libc::MSG_PEEK);
        say("looked at", got.map(|(count, fds)| (count, fds.len())));
        let got = raw::recvmsg(fd, &mut data, 0);
        say("taken", (got.map(|(count, fds)| (count, fds.len())), data));
        drop(far);
        let got = raw::recvmsg(fd, &mut data, 0);
        say("the rest", got.map(|(count, _)| data[..count].to_vec()));
        say("the end", raw::recvmsg(fd, &mut data, 0));
        say("sent into nothing", raw::sendmsg(fd, &[&message], &[]));
    }
    Ok(())
}

/// What is a VERSION, on sockets of other kinds, or with what QEMU's has not.
pub(crate) fn other_kinds() -> Outcome {
    let version = message(0, 1, 16 + 24, 0, b"\0\0\0\0{\"capabilities\":{}}\0");
    let (near, far) = UnixDatagram::pair().map_err(|_| 0)?;
    say("a datagram", raw::sendmsg(near.as_raw_fd(), &[&version], &[]));
    let mut data = [0; 100];
    say("arrives", far.recv(&mut data).map(|count| data[..count] == version).map_err(|_| ()));
    let (near, mut far) = UnixStream::pair().map_err(|_| 0)?;
    say("with a descriptor", raw::sendmsg(near.as_raw_fd(), &[&version], &[0]));
    say("arrives", far.read(&mut data).map(|count| data[..count] == version).map_err(|_| ()));
    let (near, mut far) = UnixStream::pair().map_err(|_| 0)?;
    let pieces: Vec<&[u8]> = version.chunks(1).collect();
    say("a piece each", raw::sendmsg(near.as_raw_fd(), &pieces, &[]));
    say("arrives", far.read(&mut data).map(|count| data[..count] == version).map_err(|_| ()));
    let (near, mut far) = UnixStream::pair().map_err(|_| 0)?;
    for byte in &version {
        raw::sendmsg(near.as_raw_fd(), &[&[*byte]], &[])?;
    }
    say("a byte each", far.read(&mut data).map(|count| data[..count] == version).map_err(|_| ()));
    say("no socket", raw::sendmsg(0, &[&version], &[]));
    say("no descriptor", raw::sendmsg(-1, &[&version], &[]));
    say("nothing to read from", raw::recvmsg(-1, &mut data, 0));
    Ok(())
}

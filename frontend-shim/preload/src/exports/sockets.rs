#![expect(unsafe_code, reason = "symbols that take the place of the C library's")]

//! Messages on sockets.

use std::ffi::{c_int, c_void};

use super::{keeping_errno, real, set_errno, shim, uncancelled};
use crate::Shim;
use crate::descriptors::Descriptor;
use crate::stream::{may_begin, may_begin_length};
use crate::system::{Answer, Extent, Real, SocketMessage, System};

/// More pieces than a VERSION comes in.
const PIECES: usize = 8;
/// More are an error (`UIO_MAXIOV`).
const MOST_PIECES: usize = 1024;

#[unsafe(no_mangle)]
extern "C-unwind" fn sendmsg(fd: c_int, message: *const libc::msghdr, flags: c_int) -> isize {
    let answer = match shim() {
        Some(shim) => match shim.descriptors.get(fd) {
            Some(Descriptor::Stream(_)) => shielded(shim, || {
                let (message, _) = read(shim, message, MOST_PIECES)?;
                Some(shim.sendmsg(fd, &message, flags))
            }),
            // It may be the first of a connection.
            None if fd >= 0 => shielded(shim, || {
                if !may_be_first(shim, message) {
                    return None;
                }
                let (message, _) = read(shim, message, PIECES)?;
                shim.greet(fd, &message, flags)
            }),
            _ => None,
        },
        None => None,
    };
    match answer {
        Some(answer) => length(answer),
        // SAFETY: the caller's own arguments, to the function that it meant.
        None => unsafe { (real().sendmsg)(fd, message, flags) },
    }
}

#[unsafe(no_mangle)]
extern "C-unwind" fn recvmsg(fd: c_int, message: *mut libc::msghdr, flags: c_int) -> isize {
    let answer = stream(fd).and_then(|shim| {
        shielded(shim, || {
            let (mut header, room) = read(shim, message, MOST_PIECES).map(|(m, h)| (h, m))?;
            Some(shim.recvmsg(fd, &room, flags).map(|got| {
                header.msg_namelen = got.name_len;
                header.msg_controllen = got.control_len;
                header.msg_flags = got.flags;
                // SAFETY: the caller's own, which the function writes to.
                unsafe { message.write(header) };
                got.count
            }))
        })
    });
    match answer {
        Some(answer) => length(answer),
        // SAFETY: the caller's own arguments, to the function that it meant.
        None => unsafe { (real().recvmsg)(fd, message, flags) },
    }
}

#[unsafe(no_mangle)]
extern "C-unwind" fn send(fd: c_int, data: *const c_void, len: usize, flags: c_int) -> isize {
    let answer = stream(fd)
        .and_then(|shim| shielded(shim, || Some(shim.sendmsg(fd, &plain(data, len), flags))));
    match answer {
        Some(answer) => length(answer),
        // SAFETY: the caller's own arguments, to the function that it meant.
        None => unsafe { (real().send)(fd, data, len, flags) },
    }
}

#[unsafe(no_mangle)]
extern "C-unwind" fn recv(fd: c_int, data: *mut c_void, len: usize, flags: c_int) -> isize {
    let answer = stream(fd).and_then(|shim| {
        shielded(shim, || Some(shim.recvmsg(fd, &plain(data, len), flags).map(|got| got.count)))
    });
    match answer {
        Some(answer) => length(answer),
        // SAFETY: the caller's own arguments, to the function that it meant.
        None => unsafe { (real().recv)(fd, data, len, flags) },
    }
}

/// The shim, if a descriptor is a connection.
fn stream(fd: c_int) -> Option<&'static Shim<Real>> {
    shim().filter(|shim| matches!(shim.descriptors.get(fd), Some(Descriptor::Stream(_))))
}

/// The answer to the VMM's call, or `None` if it is to go where it was meant to.
fn shielded(
    shim: &'static Shim<Real>,
    call: impl FnOnce() -> Option<Answer<usize>>,
) -> Option<Answer<usize>> {
    let answer = || keeping_errno(|| Ok(uncancelled(|| shim.shielded(call)).flatten()));
    answer().ok().flatten()
}

fn length(answer: Answer<usize>) -> isize {
    answer.map_or_else(
        |error| {
            set_errno(error.raw_os_error());
            -1
        },
        usize::cast_signed,
    )
}

fn plain(data: *const c_void, len: usize) -> SocketMessage {
    SocketMessage {
        extents: vec![Extent { address: data.addr(), len }],
        ..SocketMessage::default()
    }
}

/// Whether a message can be the first of a connection, by its first bytes. Any socket's messages are looked
/// at, and a handler of signals may send one: nothing is allocated.
fn may_be_first(shim: &Shim<Real>, message: *const libc::msghdr) -> bool {
    let Some(header) = header(shim, message) else { return false };
    let pieces = 1..=PIECES;
    if header.msg_controllen != 0
        || !header.msg_name.is_null()
        || !pieces.contains(&header.msg_iovlen)
    {
        return false;
    }
    let mut list = [[0; size_of::<usize>()]; 2 * PIECES];
    let list = &mut list[..2 * header.msg_iovlen];
    let read = shim.system.read_memory(header.msg_iov.addr(), list.as_flattened_mut());
    if read.is_err() {
        return false;
    }
    let number = |word: &[u8; size_of::<usize>()]| usize::from_ne_bytes(*word);
    let lens = || list.iter().skip(1).step_by(2).map(number);
    let len = lens().fold(0, usize::saturating_add);
    let mut start = [0; 8];
    let (first, _) = start.split_at_mut(lens().next().map_or(0, |len| len.min(8)));
    may_begin_length(len)
        && shim.system.read_memory(number(&list[0]), first).is_ok()
        && (first.len() < 8 || may_begin(start, len))
}

/// A message's header, and what it says, with at most so many pieces of data. `None` if it can't be
/// read, which the kernel then says as well.
fn read(
    shim: &Shim<Real>,
    message: *const libc::msghdr,
    pieces: usize,
) -> Option<(SocketMessage, libc::msghdr)> {
    let header = header(shim, message)?;
    if header.msg_iovlen > pieces {
        return None;
    }
    let mut list = vec![0; header.msg_iovlen * size_of::<Extent>()];
    shim.system.read_memory(header.msg_iov.addr(), &mut list).ok()?;
    let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |word| usize::from_ne_bytes(*word));
    let extents = list.chunks_exact(size_of::<Extent>()).map(|extent| {
        let (address, len) = extent.split_at(size_of::<usize>());
        Extent { address: word(address), len: word(len) }
    });
    let message = SocketMessage {
        name: header.msg_name.addr(),
        name_len: header.msg_namelen,
        extents: extents.collect(),
        control: header.msg_control.addr(),
        control_len: header.msg_controllen,
    };
    Some((message, header))
}

fn header(shim: &Shim<Real>, message: *const libc::msghdr) -> Option<libc::msghdr> {
    let mut header = [0; size_of::<libc::msghdr>()];
    shim.system.read_memory(message.addr(), &mut header).ok()?;
    // SAFETY: any bytes are a header: it has numbers and pointers alone, and padding.
    Some(unsafe { std::mem::transmute::<[u8; size_of::<libc::msghdr>()], libc::msghdr>(header) })
}

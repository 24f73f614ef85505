//! Receives and sends such that the kernel itself records how much.
//!
//! `recvmmsg` and `sendmmsg` write the number of bytes into the `mmsghdr` that they are given, within
//! the system call. That header lies in the state's memory, so no signal comes between the bytes' being
//! taken and their being counted.
#![expect(unsafe_code, reason = "recvmmsg and sendmmsg have no safe interface")]

use std::io::IoSliceMut;
use std::mem::{MaybeUninit, offset_of};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::crash::crash_point;
use super::memory::{Memory, WORD};

/// `struct mmsghdr` in words.
pub(super) const HEADER_WORDS: usize = size_of::<libc::mmsghdr>() / WORD;

/// What no call writes: there is no message of this length.
const NOTHING: u32 = u32::MAX;

/// `SCM_MAX_FD`: the kernel takes no more at once.
const MAX_FDS: usize = 253;

const LENGTH: usize = offset_of!(libc::mmsghdr, msg_len);
const LENGTH_WORD: usize = LENGTH / WORD;
const FLAGS: usize = offset_of!(libc::mmsghdr, msg_hdr) + offset_of!(libc::msghdr, msg_flags);
const FLAGS_WORD: usize = FLAGS / WORD;

const _: () =
    assert!(align_of::<libc::mmsghdr>() == WORD && size_of::<libc::mmsghdr>().is_multiple_of(WORD));
const _: () = assert!(LENGTH.is_multiple_of(WORD) && FLAGS.is_multiple_of(WORD));

/// What the socket would give next. It stays there.
#[derive(Debug)]
pub struct Peeked {
    /// As much as is here, up to the room for it. None: the peer has closed its end.
    pub bytes: Vec<u8>,
    /// Duplicates of the first descriptors that are here, close-on-exec. They come with these bytes, or
    /// with later ones: the kernel looks for them behind the room as well.
    pub fds: Vec<OwnedFd>,
    /// There are more descriptors than this process may have.
    pub fds_missing: bool,
}

/// Looks at the next bytes, up to those that come with descriptors, and at the first of these.
pub(super) fn peek(socket: BorrowedFd<'_>, room: usize) -> Result<Peeked, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
    let mut bytes = vec![0; room];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let read = match recvmsg(socket, &mut parts, &mut ancillary, flags) {
            Err(Errno::INTR) => continue,
            read => read?,
        };
        let mut fds = Vec::new();
        for item in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = item {
                fds.extend(received);
            }
        }
        let count = read.bytes.min(room);
        bytes.truncate(count);
        return Ok(Peeked { bytes, fds, fds_missing: read.flags.contains(ReturnFlags::CTRUNC) });
    }
}

/// What the kernel has written to a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Transferred {
    pub(super) bytes: u32,
    /// The bytes came with descriptors, which were dropped: there was no room for any.
    pub(super) fds: bool,
}

/// Prepares a header for a call. It is not the one that counts yet.
pub(super) fn prepare(memory: &Memory, header: usize) {
    memory.set(header + LENGTH_WORD, u64::MAX);
}

/// What the kernel has written to a header since it was prepared.
pub(super) fn recorded(memory: &Memory, header: usize) -> Option<Transferred> {
    let bytes = low_half(memory.get(header + LENGTH_WORD));
    let flags = low_half(memory.get(header + FLAGS_WORD)).cast_signed();
    let fds = flags & libc::MSG_CTRUNC != 0;
    (bytes != NOTHING).then_some(Transferred { bytes, fds })
}

/// The member at the lower address.
fn low_half(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// Takes bytes off the socket into `to`, with the header at word `header`, and none behind those that
/// come with descriptors. These are dropped: they have been seen before.
pub(super) fn receive(
    socket: BorrowedFd<'_>,
    memory: &Memory,
    header: usize,
    to: Range<usize>,
) -> Result<Transferred, Errno> {
    let mut part = libc::iovec { iov_len: to.len(), iov_base: memory.place(to).cast() };
    let place = set_parts(memory, header, &mut part, &mut []);
    let flags = libc::MSG_DONTWAIT;
    crash_point();
    // SAFETY: `place` is a header inside the mapping that describes one part inside the mapping and no
    // control data; the kernel writes to both, and nobody has a reference to either.
    let result = unsafe {
        libc::recvmmsg(socket.as_raw_fd(), place, 1, flags.cast_unsigned() as _, ptr::null_mut())
    };
    finish(memory, header, result)
}

/// Sends bytes with descriptors, with the header at word `header`.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    memory: &Memory,
    header: usize,
    from: Range<usize>,
    fds: &[BorrowedFd<'_>],
) -> Result<Transferred, Errno> {
    let mut part = libc::iovec { iov_len: from.len(), iov_base: memory.place(from).cast() };
    let mut control = rights(fds);
    let place = set_parts(memory, header, &mut part, &mut control);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    crash_point();
    // SAFETY: `place` is a header inside the mapping that describes one part inside the mapping and
    // control data of our own, which outlive the call; the kernel writes to the header alone.
    let result =
        unsafe { libc::sendmmsg(socket.as_raw_fd(), place, 1, flags.cast_unsigned() as _) };
    finish(memory, header, result)
}

fn finish(memory: &Memory, header: usize, result: libc::c_int) -> Result<Transferred, Errno> {
    let result = if result < 0 { Err(last_error()) } else { Ok(()) };
    crash_point();
    result?;
    recorded(memory, header).ok_or(Errno::AGAIN)
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Writes the kernel's part of the header, but for the length. What it points to is only of use within
/// this process and call.
fn set_parts(
    memory: &Memory,
    header: usize,
    part: &mut libc::iovec,
    control: &mut [u64],
) -> *mut libc::mmsghdr {
    let at = header * WORD;
    let place = memory.place(at..at + size_of::<libc::mmsghdr>()).cast::<libc::mmsghdr>();
    // SAFETY: all zeros is a valid `msghdr`: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    if !control.is_empty() {
        message.msg_controllen = size_of_val(control) as _;
        message.msg_control = control.as_mut_ptr().cast();
    }
    crash_point();
    // SAFETY: the header is inside the mapping and aligned to a word, and nobody has a reference to it.
    let hdr = unsafe { &raw mut (*place).msg_hdr };
    // SAFETY: as above.
    unsafe { hdr.write_volatile(message) };
    place
}

/// `SCM_RIGHTS` control data: a `cmsghdr` and the descriptors (cmsg(3)), or nothing.
fn rights(fds: &[BorrowedFd<'_>]) -> Vec<u64> {
    if fds.is_empty() {
        return Vec::new();
    }
    let mut bytes = Vec::new();
    let length = size_of::<libc::cmsghdr>() + size_of_val(fds);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&libc::SOL_SOCKET.to_ne_bytes());
    bytes.extend_from_slice(&libc::SCM_RIGHTS.to_ne_bytes());
    for fd in fds {
        bytes.extend_from_slice(&fd.as_raw_fd().to_ne_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(WORD), 0);
    bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect()
}

#![expect(unsafe_code, reason = "calls the C functions that this library stands in front of")]

use std::ffi::{c_int, c_void};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicU64;

use barkeep_protocol::page::decode::LENGTH;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

use super::Answer;
use super::real::last_errno;
use super::sockets::{Extent, PageWords, SocketMessage, SocketReceived, duplicate};

pub(crate) type Sendmsg = unsafe extern "C-unwind" fn(c_int, *const libc::msghdr, c_int) -> isize;
pub(crate) type Recvmsg = unsafe extern "C-unwind" fn(c_int, *mut libc::msghdr, c_int) -> isize;
pub(crate) type Send = unsafe extern "C-unwind" fn(c_int, *const c_void, usize, c_int) -> isize;
pub(crate) type Recv = unsafe extern "C-unwind" fn(c_int, *mut c_void, usize, c_int) -> isize;

const _: () = assert!(size_of::<Extent>() == size_of::<libc::iovec>());

pub(super) fn keep(fd: RawFd) -> Answer<OwnedFd> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the number may be a descriptor's, and is the VMM's in a call of its own; what it is not, the
    // kernel refuses.
    let theirs = unsafe { BorrowedFd::borrow_raw(fd) };
    duplicate(theirs)
}

pub(super) fn close_own(number: RawFd) {
    // SAFETY: the number is our own descriptor's, which its owner here never closes nor uses again; the other
    // threads that borrow it are the parent's.
    unsafe { rustix::io::close(number) };
}

/// By the kernel itself, as [`recvmsg`]: a thread may be cancelled in the C library's, and must not be in
/// what is ours.
pub(super) fn sendmsg(fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<usize> {
    let header = header_of(message);
    // SAFETY: the header lives, and all that it points to is the VMM's own or the kernel's to check.
    let sent = unsafe { libc::syscall(libc::SYS_sendmsg, fd, &raw const header, flags) };
    usize::try_from(sent).map_err(|_| last_errno())
}

pub(super) fn recvmsg(fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<SocketReceived> {
    let mut header = header_of(message);
    // SAFETY: the header lives, and all that it points to is the VMM's own or the kernel's to check.
    let got = unsafe { libc::syscall(libc::SYS_recvmsg, fd, &raw mut header, flags) };
    Ok(SocketReceived {
        count: usize::try_from(got).map_err(|_| last_errno())?,
        name_len: header.msg_namelen,
        control_len: header.msg_controllen,
        flags: header.msg_flags,
    })
}

pub(super) fn page(file: Option<BorrowedFd<'_>>, over: Option<PageWords>) -> Answer<PageWords> {
    let at = over.map_or(std::ptr::null_mut(), |page| page.as_ptr().cast_mut().cast());
    let fixed = if over.is_some() { MapFlags::FIXED } else { MapFlags::empty() };
    let place = match file {
        // SAFETY: at a place of the kernel's choice, or over a page that was mapped here and stays one.
        Some(file) => unsafe {
            mmap(at, LENGTH, ProtFlags::READ, MapFlags::SHARED | fixed, file, 0)
        },
        // SAFETY: likewise.
        None => unsafe { mmap_anonymous(at, LENGTH, ProtFlags::READ, MapFlags::PRIVATE | fixed) },
    }?;
    // SAFETY: whole words that are mapped for the rest of the process's life, and only loaded from.
    // Whoever else writes there does it as to atomics, or is another process.
    Ok(unsafe { std::slice::from_raw_parts(place.cast::<AtomicU64>(), LENGTH / 8) })
}

fn header_of(message: &SocketMessage) -> libc::msghdr {
    // SAFETY: all zeros are a header: nothing anywhere.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = message.name as *mut c_void;
    header.msg_namelen = message.name_len;
    header.msg_iov = message.extents.as_ptr().cast_mut().cast();
    header.msg_iovlen = message.extents.len();
    header.msg_control = message.control as *mut c_void;
    header.msg_controllen = message.control_len;
    header
}

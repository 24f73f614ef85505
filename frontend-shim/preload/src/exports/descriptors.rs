#![expect(unsafe_code, reason = "symbols that take the place of the C library's")]

//! Descriptors that come and go.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::RawFd;

use super::{guarded, keeping_errno, nothing, number, real, real_for_allocator, shim, uncancelled};
use crate::Shim;
use crate::system::{Answer, Duplicate, Kernel, Real, System};

#[unsafe(no_mangle)]
extern "C-unwind" fn close(fd: c_int) -> c_int {
    match ours(fd) {
        Some(shim) => nothing(keeping_errno(|| uncancelled(|| shim.close(fd)))),
        None => match real_for_allocator() {
            // SAFETY: the caller's own argument, to the function that it meant.
            Some(real) => unsafe { (real.close)(fd) },
            None => nothing(Kernel.close(fd)),
        },
    }
}

#[unsafe(no_mangle)]
extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    nothing(match shim() {
        Some(shim) => keeping_errno(|| uncancelled(|| shim.close_range(first, last, flags))),
        None => real().close_range(first, last, flags),
    })
}

#[unsafe(no_mangle)]
extern "C" fn closefrom(first: c_int) {
    guarded(|shim| shim.forget_range(first.max(0).unsigned_abs(), u32::MAX));
    if let Some(closefrom) = real().closefrom {
        // SAFETY: the caller's own argument, to the function that it meant.
        unsafe { closefrom(first) }
    }
}

#[unsafe(no_mangle)]
extern "C" fn dup(fd: c_int) -> c_int {
    number(duplicate(fd, Duplicate::Lowest))
}

#[unsafe(no_mangle)]
extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    number(duplicate(fd, Duplicate::Over(to)))
}

#[unsafe(no_mangle)]
extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    number(duplicate(fd, Duplicate::OverWith(to, flags)))
}

#[unsafe(no_mangle)]
extern "C-unwind" fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
    if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
        return number(duplicate(fd, Duplicate::Command(command, argument.addr())));
    }
    // SAFETY: the caller's own arguments, to the function that it meant.
    unsafe { (real().fcntl)(fd, command, argument) }
}

#[unsafe(no_mangle)]
extern "C-unwind" fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
    fcntl(fd, command, argument)
}

fn duplicate(fd: RawFd, how: Duplicate) -> Answer<RawFd> {
    match shim() {
        Some(shim) => keeping_errno(|| uncancelled(|| shim.duplicate(fd, how))),
        None => real().duplicate(fd, how),
    }
}

/// The shim, if a descriptor is anything to it.
fn ours(fd: RawFd) -> Option<&'static Shim<Real>> {
    shim().filter(|shim| shim.descriptors.get(fd).is_some())
}

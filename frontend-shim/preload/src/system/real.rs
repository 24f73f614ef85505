#![expect(unsafe_code, reason = "calls the C functions that this library stands in front of")]

use std::ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void};
use std::os::fd::RawFd;

use rustix::io::Errno;

use super::{Answer, System};

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

/// The next definition of each function, as the dynamic loader would have bound it without us.
#[derive(Debug)]
pub(crate) struct Real {
    ioctl: Ioctl,
}

impl Real {
    /// Looks the functions up. `None` if the C library lacks one, which no C library does.
    pub(crate) fn find() -> Option<Self> {
        // SAFETY: the types are those of the C library's declarations; ioctl's variable argument is passed
        // as any third argument is on x86-64.
        let ioctl = unsafe { std::mem::transmute::<*mut c_void, Ioctl>(next(c"ioctl")?) };
        Some(Self { ioctl })
    }
}

fn next(name: &CStr) -> Option<*mut c_void> {
    let name: *const c_char = name.as_ptr();
    // SAFETY: the name is a C string; the answer is an address or null.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name) };
    (!found.is_null()).then_some(found)
}

impl System for Real {
    fn ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        // SAFETY: the arguments are the VMM's own, or those of a structure that the caller holds.
        let answer = unsafe { (self.ioctl)(fd, request, argument as *mut c_void) };
        checked(answer.into()).map(|_| answer)
    }
}

fn checked(answer: c_long) -> Answer<()> {
    if answer == -1 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

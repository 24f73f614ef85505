#![expect(unsafe_code, reason = "a symbol of the C library")]
//! `ioctl`.

use std::ffi::{c_int, c_ulong};

use super::{keeping_errno, number, real, shim};
use crate::system::System as _;

/// `ioctl(2)`. Its variable argument is passed as any third argument is on x86-64. A thread may end in the
/// handler of a signal that interrupts it, which unwinds through here.
#[unsafe(no_mangle)]
pub(crate) extern "C-unwind" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    number(match shim() {
        // What we have asked besides may have failed.
        Some(shim) => keeping_errno(|| shim.ioctl(fd, request, argument)),
        None => real().ioctl(fd, request, argument),
    })
}

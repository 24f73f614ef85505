#![expect(unsafe_code, reason = "a symbol of the C library")]
//! `ioctl`.

use std::ffi::{c_int, c_ulong};

use super::{errno, number, real, set_errno, shim};
use crate::system::System as _;

/// `ioctl(2)`. Its variable argument is passed as any third argument is on x86-64.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    let before = errno();
    let answer = match shim() {
        Some(shim) => shim.ioctl(fd, request, argument),
        None => real().ioctl(fd, request, argument),
    };
    if answer.is_ok() {
        // What we have asked besides may have failed.
        set_errno(before);
    }
    number(answer)
}

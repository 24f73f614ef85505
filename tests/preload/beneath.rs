//! A library that stands for the C library beneath the preloaded one: its `KVM_RUN` does nothing, and at
//! once, so that what the wrapper costs can be measured alone. All other requests are real.
#![expect(
    unsafe_code,
    reason = "takes the place of a C function, and makes the system call itself"
)]

use std::ffi::{c_int, c_ulong};

const KVM_RUN: c_ulong = 0xae80;

/// `ioctl`.
// SAFETY: it is what the C library declares, with the variable argument that every caller passes.
#[unsafe(no_mangle)]
pub extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: usize) -> c_int {
    if request == KVM_RUN {
        return 0;
    }
    // SAFETY: the caller's own call.
    let answer = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    answer.try_into().unwrap_or(-1)
}

#![expect(unsafe_code, reason = "calls the C functions that this library stands in front of")]

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;

use rustix::io::Errno;

use super::{Answer, SignalFunctions, System};
use crate::sigbus::{Action, Change};

type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;
type Pread = unsafe extern "C-unwind" fn(c_int, *mut c_void, usize, i64) -> isize;
type Pwrite = unsafe extern "C-unwind" fn(c_int, *const c_void, usize, i64) -> isize;
type MmapCall = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;
type Munmap = unsafe extern "C" fn(*mut c_void, usize) -> c_int;
type MremapCall =
    unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;
type Close = unsafe extern "C-unwind" fn(c_int) -> c_int;
type CloseRange = unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int;
type Dup = unsafe extern "C" fn(c_int) -> c_int;
type Dup2 = unsafe extern "C" fn(c_int, c_int) -> c_int;
type Dup3 = unsafe extern "C" fn(c_int, c_int, c_int) -> c_int;
type Fcntl = unsafe extern "C-unwind" fn(c_int, c_int, *mut c_void) -> c_int;

/// The next definition of each function, as the dynamic loader would have bound it without us.
#[derive(Debug)]
pub(crate) struct Real {
    ioctl: Ioctl,
    pub(crate) signals: SignalFunctions,
}

impl Real {
    /// Looks the functions up. `None` if the C library lacks one, which no C library does.
    pub(crate) fn find() -> Option<Self> {
        // SAFETY: the types are those of the C library's declarations; ioctl's variable argument is passed
        // as any third argument is on x86-64.
        let ioctl = unsafe { std::mem::transmute::<*mut c_void, Ioctl>(next(c"ioctl")?) };
        Some(Self { ioctl, signals: SignalFunctions::find(next)? })
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

    fn signal_action(&self, signal: i32, new: Option<Action>) -> Answer<Action> {
        self.signals.action(signal, new)
    }

    fn signal_mask(&self, change: Option<Change>) -> Answer<u64> {
        self.signals.mask(change)
    }

    fn signals_pending(&self) -> Answer<u64> {
        SignalFunctions::pending()
    }
}

fn checked(answer: c_long) -> Answer<()> {
    if answer == -1 { Err(last_errno()) } else { Ok(()) }
}

fn placed(answer: *mut c_void) -> Answer<usize> {
    if answer == libc::MAP_FAILED { Err(last_errno()) } else { Ok(answer as usize) }
}

fn whole(answer: isize, len: usize) -> Answer<()> {
    match usize::try_from(answer) {
        Ok(copied) if copied == len => Ok(()),
        Ok(_) => Err(Errno::FAULT),
        Err(_) => Err(last_errno()),
    }
}

fn last_errno() -> Errno {
    of(&std::io::Error::last_os_error())
}

fn of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

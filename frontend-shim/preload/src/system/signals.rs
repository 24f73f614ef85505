#![expect(unsafe_code, reason = "calls C functions by their addresses")]
//! The C library's functions about signals, with sets of signals as the kernel has them.

use std::ffi::{CStr, c_int, c_void};
use std::mem::zeroed;
use std::ptr::null;

use rustix::io::Errno;

use super::Answer;
use crate::sigbus::{Action, Change};

pub(crate) type SigAction =
    unsafe extern "C" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;
pub(crate) type SigMask =
    unsafe extern "C" fn(c_int, *const libc::sigset_t, *mut libc::sigset_t) -> c_int;
pub(crate) type Signal = unsafe extern "C" fn(c_int, usize) -> usize;
pub(crate) type SigInterrupt = unsafe extern "C" fn(c_int, c_int) -> c_int;
pub(crate) type SigIgnore = unsafe extern "C" fn(c_int) -> c_int;
pub(crate) type Start = extern "C-unwind" fn(*mut c_void) -> *mut c_void;
pub(crate) type PthreadCreate = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    Start,
    *mut c_void,
) -> c_int;

/// The functions, as the VMM would have them without us.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SignalFunctions {
    pub(crate) sigaction: SigAction,
    pub(crate) pthread_sigmask: SigMask,
    pub(crate) signal: Signal,
    pub(crate) sysv_signal: Signal,
    #[cfg_attr(test, expect(dead_code, reason = "the exports call it, which tests do without"))]
    pub(crate) sigset: Signal,
    #[cfg_attr(test, expect(dead_code, reason = "the exports call it, which tests do without"))]
    pub(crate) sigignore: SigIgnore,
    pub(crate) siginterrupt: SigInterrupt,
    #[cfg_attr(test, expect(dead_code, reason = "the exports call it, which tests do without"))]
    pub(crate) pthread_create: PthreadCreate,
}

impl SignalFunctions {
    /// By what `next` gives for their names. `None` if one is missing.
    pub(crate) fn find(next: impl Fn(&CStr) -> Option<*mut c_void>) -> Option<Self> {
        macro_rules! function {
            ($name:literal as $type:ty) => {{
                let found = next($name)?;
                // SAFETY: the type is that of the C library's declaration.
                unsafe { std::mem::transmute::<*mut c_void, $type>(found) }
            }};
        }
        Some(Self {
            sigaction: function!(c"sigaction" as SigAction),
            pthread_sigmask: function!(c"pthread_sigmask" as SigMask),
            signal: function!(c"signal" as Signal),
            sysv_signal: function!(c"__sysv_signal" as Signal),
            sigset: function!(c"sigset" as Signal),
            sigignore: function!(c"sigignore" as SigIgnore),
            siginterrupt: function!(c"siginterrupt" as SigInterrupt),
            pthread_create: function!(c"pthread_create" as PthreadCreate),
        })
    }

    /// `sigaction`.
    pub(crate) fn action(&self, signal: i32, new: Option<Action>) -> Answer<Action> {
        let new = new.map(to_c);
        // SAFETY: all zeros is a valid action.
        let mut old = unsafe { zeroed() };
        let new = new.as_ref().map_or(null(), std::ptr::from_ref);
        // SAFETY: the pointers are valid, or null where that is allowed; a handler is the caller's affair, as
        // in C.
        match unsafe { (self.sigaction)(signal, new, &raw mut old) } {
            0 => Ok(from_c(&old)),
            _ => Err(last_errno()),
        }
    }

    /// `pthread_sigmask`.
    pub(crate) fn mask(&self, change: Option<Change>) -> Answer<u64> {
        let mut old = to_set(0);
        let set = change.map(|change| to_set(change.set));
        let set = set.as_ref().map_or(null(), std::ptr::from_ref);
        let how = change.map_or(libc::SIG_BLOCK, |change| change.how);
        // SAFETY: the pointers are valid, or null where that is allowed.
        match unsafe { (self.pthread_sigmask)(how, set, &raw mut old) } {
            0 => Ok(from_set(&old)),
            error => Err(Errno::from_raw_os_error(error)),
        }
    }

    /// `sigpending`.
    pub(crate) fn pending() -> Answer<u64> {
        let mut set = to_set(0);
        // SAFETY: the pointer is valid.
        match unsafe { libc::sigpending(&raw mut set) } {
            0 => Ok(from_set(&set)),
            _ => Err(last_errno()),
        }
    }
}

/// The first 64 bits are the kernel's; the C library has room for more signals than there are.
pub(crate) fn from_set(set: &libc::sigset_t) -> u64 {
    // SAFETY: it is longer than this, and aligned for it.
    unsafe { std::ptr::from_ref(set).cast::<u64>().read() }
}

pub(crate) fn to_set(signals: u64) -> libc::sigset_t {
    // SAFETY: all zeros is the empty set.
    let mut set: libc::sigset_t = unsafe { zeroed() };
    // SAFETY: as in `from_set`.
    unsafe { (&raw mut set).cast::<u64>().write(signals) };
    set
}

pub(crate) fn from_c(action: &libc::sigaction) -> Action {
    Action {
        handler: action.sa_sigaction,
        flags: action.sa_flags,
        mask: from_set(&action.sa_mask),
        restorer: action.sa_restorer.map_or(0, |restorer| restorer as usize),
    }
}

pub(crate) fn to_c(action: Action) -> libc::sigaction {
    // SAFETY: 0 is no function, and any other number here was made of one.
    let restorer =
        unsafe { std::mem::transmute::<usize, Option<extern "C" fn()>>(action.restorer) };
    libc::sigaction {
        sa_sigaction: action.handler,
        sa_mask: to_set(action.mask),
        sa_flags: action.flags,
        sa_restorer: restorer,
    }
}

fn last_errno() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

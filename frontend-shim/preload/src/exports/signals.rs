#![expect(unsafe_code, reason = "C functions: pointers and addresses of functions")]
//! The disposition of signals, their masks, and the threads that inherit them.
//!
//! For a signal other than `SIGBUS`, a disposition is the next definition's affair.

use std::ffi::{c_int, c_void};

use rustix::io::Errno;

use super::{nothing, number, real, set_errno};
use crate::Shim;
use crate::sigbus::{Action, Change, Inherited, SIGBUS, inherited};
use crate::system::{Answer, Real, SignalFunctions, Start, from_c, from_set, to_c, to_set};

/// The one that keeps masks.
fn shim() -> Option<&'static Shim<Real>> {
    super::shim().filter(|shim| shim.has_sigbus())
}

/// The one that keeps the disposition of a signal, if that is ours.
fn ours(signal: c_int) -> Option<&'static Shim<Real>> {
    if signal == SIGBUS { shim() } else { None }
}

fn functions() -> &'static SignalFunctions {
    super::shim().map_or_else(|| &real().signals, |shim| &shim.system.signals)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(
    signal: c_int,
    action: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let Some(shim) = ours(signal) else {
        // SAFETY: the arguments are the caller's own.
        return unsafe { (functions().sigaction)(signal, action, old) };
    };
    // SAFETY: null or valid, as the caller of `sigaction` promises.
    let new = unsafe { action.as_ref() }.map(from_c);
    let before = shim.signal_action(new);
    if !old.is_null() {
        // SAFETY: likewise.
        unsafe { old.write(to_c(before)) };
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __sigaction(
    signal: c_int,
    action: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: the arguments are the caller's own.
    unsafe { sigaction(signal, action, old) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn signal(signal: c_int, handler: usize) -> usize {
    match ours(signal) {
        Some(_) if handler == libc::SIG_ERR => failed(Errno::INVAL),
        Some(shim) => shim.signal_bsd(handler),
        // SAFETY: the arguments are the caller's own.
        None => unsafe { (functions().signal)(signal, handler) },
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bsd_signal(number: c_int, handler: usize) -> usize {
    // SAFETY: the arguments are the caller's own.
    unsafe { signal(number, handler) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ssignal(number: c_int, handler: usize) -> usize {
    // SAFETY: the arguments are the caller's own.
    unsafe { signal(number, handler) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __sysv_signal(signal: c_int, handler: usize) -> usize {
    match ours(signal) {
        Some(_) if handler == libc::SIG_ERR => failed(Errno::INVAL),
        Some(shim) => shim.signal_system_v(handler),
        // SAFETY: the arguments are the caller's own.
        None => unsafe { (functions().sysv_signal)(signal, handler) },
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sysv_signal(signal: c_int, handler: usize) -> usize {
    // SAFETY: the arguments are the caller's own.
    unsafe { __sysv_signal(signal, handler) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn siginterrupt(signal: c_int, interrupt: c_int) -> c_int {
    let Some(shim) = ours(signal) else {
        // SAFETY: the arguments are the caller's own.
        return unsafe { (functions().siginterrupt)(signal, interrupt) };
    };
    shim.signal_interrupts(interrupt != 0);
    0
}

/// System V's: a handler, or to block a signal, or to unblock it.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigset(signal: c_int, disposition: usize) -> usize {
    /// Blocks the signal, and says that it was blocked (`signal.h`).
    const SIG_HOLD: usize = 2;
    let Some(shim) = ours(signal) else {
        // SAFETY: the arguments are the caller's own.
        return unsafe { (functions().sigset)(signal, disposition) };
    };
    if disposition == libc::SIG_ERR {
        return failed(Errno::INVAL);
    }
    let hold = disposition == SIG_HOLD;
    let new = Action { handler: disposition, flags: 0, mask: 0, restorer: 0 };
    let before = shim.signal_action((!hold).then_some(new)).handler;
    let how = if hold { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    match change_mask(Change::of_one(how, signal)) {
        Ok(mask) if mask >> (signal - 1) & 1 != 0 => SIG_HOLD,
        Ok(_) => before,
        Err(error) => failed(error),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigignore(signal: c_int) -> c_int {
    let Some(shim) = ours(signal) else {
        // SAFETY: the argument is the caller's own.
        return unsafe { (functions().sigignore)(signal) };
    };
    shim.signal_action(Some(Action { handler: libc::SIG_IGN, ..Action::DEFAULT }));
    0
}

#[unsafe(no_mangle)]
extern "C" fn sighold(signal: c_int) -> c_int {
    nothing(change_mask(Change::of_one(libc::SIG_BLOCK, signal)).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn sigrelse(signal: c_int) -> c_int {
    nothing(change_mask(Change::of_one(libc::SIG_UNBLOCK, signal)).map(drop))
}

/// BSD's: the first 32 signals.
#[unsafe(no_mangle)]
extern "C" fn sigblock(set: c_int) -> c_int {
    old_mask(libc::SIG_BLOCK, set)
}

#[unsafe(no_mangle)]
extern "C" fn sigsetmask(set: c_int) -> c_int {
    old_mask(libc::SIG_SETMASK, set)
}

#[unsafe(no_mangle)]
extern "C" fn siggetmask() -> c_int {
    old_mask(libc::SIG_BLOCK, 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigprocmask(
    how: c_int,
    set: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> c_int {
    // SAFETY: the arguments are the caller's own.
    match unsafe { pthread_sigmask(how, set, old) } {
        0 => 0,
        error => {
            set_errno(error);
            -1
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_sigmask(
    how: c_int,
    set: *const libc::sigset_t,
    old: *mut libc::sigset_t,
) -> c_int {
    let Some(shim) = shim() else {
        // SAFETY: the arguments are the caller's own.
        return unsafe { (functions().pthread_sigmask)(how, set, old) };
    };
    // SAFETY: null or valid, as the caller promises.
    let change = unsafe { set.as_ref() }.map(|set| Change { how, set: from_set(set) });
    match shim.signal_mask(change) {
        Ok(before) => {
            if !old.is_null() {
                // SAFETY: likewise.
                unsafe { old.write(to_set(before)) };
            }
            0
        }
        Err(error) => error.raw_os_error(),
    }
}

/// A thread whose mask is not all the kernel's to inherit.
struct Thread {
    start: Start,
    argument: *mut c_void,
    inherited: Inherited,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attributes: *const libc::pthread_attr_t,
    start: Start,
    argument: *mut c_void,
) -> c_int {
    let create = functions().pthread_create;
    let Some(inherited) = shim().and_then(|_| inherited()) else {
        // SAFETY: the arguments are the caller's own.
        return unsafe { create(thread, attributes, start, argument) };
    };
    let begin = Box::into_raw(Box::new(Thread { start, argument, inherited }));
    // SAFETY: the arguments are the caller's own, and what `begin_thread` takes.
    let error = unsafe { create(thread, attributes, begin_thread, begin.cast()) };
    if error != 0 {
        // SAFETY: there is no thread that it went to.
        drop(unsafe { Box::from_raw(begin) });
    }
    error
}

/// A thread may end in the middle of its function, which unwinds this one: nothing is left to drop.
extern "C-unwind" fn begin_thread(argument: *mut c_void) -> *mut c_void {
    // SAFETY: `pthread_create` made it, for this thread.
    let thread = unsafe { Box::from_raw(argument.cast::<Thread>()) };
    let Thread { start, argument, inherited } = *thread;
    if let Some(shim) = shim() {
        shim.thread_begins(inherited);
    }
    start(argument)
}

fn change_mask(change: Answer<Change>) -> Answer<u64> {
    let change = Some(change?);
    shim().map_or_else(|| functions().mask(change), |shim| shim.signal_mask(change))
}

#[expect(clippy::cast_possible_truncation, reason = "the first 32 signals are asked for")]
fn old_mask(how: c_int, set: c_int) -> c_int {
    let before = change_mask(Ok(Change { how, set: set.cast_unsigned().into() }));
    number(before.map(|before| (before as u32).cast_signed()))
}

fn failed(error: Errno) -> usize {
    set_errno(error.raw_os_error());
    libc::SIG_ERR
}

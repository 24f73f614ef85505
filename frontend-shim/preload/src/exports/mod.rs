#![expect(unsafe_code, reason = "the C library's errno is a place in memory")]

//! The functions that take the C library's place. They do nothing but translate: what a C function is
//! given, and the errno that it leaves.
//!
//! Those that a thread may be cancelled in have the ABI `C-unwind`, and call the next definition
//! outside of [`guarded`] and with nothing to drop.

mod descriptors;
mod ioctl;
mod memory;
mod signals;
mod sockets;

use std::ffi::c_int;
use std::sync::OnceLock;

use rustix::io::Errno;

use crate::Shim;
use crate::system::{Answer, Real};

static SHIM: OnceLock<Shim<Real>> = OnceLock::new();
static REAL: OnceLock<Real> = OnceLock::new();

/// The process's own. `None` before [`install`]: everything goes to [`real`] then.
pub(crate) fn shim() -> Option<&'static Shim<Real>> {
    SHIM.get()
}

/// Begins to step in. The constructor does it once; a second one is dropped.
pub(crate) fn install(shim: Shim<Real>) -> &'static Shim<Real> {
    // For those who come with no shim of their own in hand.
    let _ = real();
    SHIM.get_or_init(|| shim)
}

/// The next definitions of the functions here, looked up at the first call: constructors of other
/// libraries may run before ours.
pub(crate) fn real() -> &'static Real {
    REAL.get_or_init(|| Real::find().expect("the C library defines what it declares"))
}

/// Likewise for what an allocator may call. It may do so inside of a lookup, which allocates, and must
/// not begin another one then: `None` stands for the kernel itself.
pub(crate) fn real_for_allocator() -> Option<&'static Real> {
    REAL.get()
}

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, before: *mut c_int) -> c_int;
}

/// Does something in which this thread must not end, though somebody cancels it: it would leave our locks
/// held, and can't get through where panics are caught. Also what closes a copy of ours is the C library's.
pub(crate) fn uncancelled<T>(of_ours: impl FnOnce() -> T) -> T {
    const DISABLE: c_int = 1;
    let mut before = 0;
    // SAFETY: it sets a flag of this thread's, and tells what that was.
    let disabled = unsafe { pthread_setcancelstate(DISABLE, &raw mut before) };
    let answer = of_ours();
    if disabled == 0 {
        // SAFETY: likewise. It ends no thread by itself.
        unsafe { pthread_setcancelstate(before, std::ptr::null_mut()) };
    }
    answer
}

/// Does something of ours around a C function that is the VMM's. A panic is a bug of ours, which the
/// VMM must not die of: it is counted, and the answer is `None`. The errno stays as it is.
pub(crate) fn guarded<T>(of_ours: impl FnOnce(&'static Shim<Real>) -> T) -> Option<T> {
    let shim = shim()?;
    let errno = errno();
    let answer = uncancelled(|| shim.shielded(|| of_ours(shim)));
    set_errno(errno);
    answer
}

/// Calls a C function that may do something of ours as well: a success leaves the errno as it was.
pub(crate) fn keeping_errno<T>(call: impl FnOnce() -> Answer<T>) -> Answer<T> {
    let errno = errno();
    let answer = call();
    if answer.is_ok() {
        set_errno(errno);
    }
    answer
}

/// What a C function answers that gives a number, or -1 and an errno.
pub(crate) fn number(answer: Answer<c_int>) -> c_int {
    answer.unwrap_or_else(|error| {
        set_errno(error.raw_os_error());
        -1
    })
}

/// Likewise for one that gives 0.
pub(crate) fn nothing(answer: Answer<()>) -> c_int {
    number(answer.map(|()| 0))
}

/// Likewise for one that gives an address, or `MAP_FAILED`.
pub(crate) fn address(answer: Answer<usize>) -> usize {
    answer.unwrap_or_else(|error| {
        set_errno(Errno::raw_os_error(error));
        usize::MAX
    })
}

pub(crate) fn errno() -> c_int {
    let place = errno_place();
    // SAFETY: the place is this thread's own for as long as the thread lives.
    unsafe { *place }
}

pub(crate) fn set_errno(errno: c_int) {
    let place = errno_place();
    // SAFETY: the place is this thread's own for as long as the thread lives.
    unsafe { *place = errno };
}

fn errno_place() -> *mut c_int {
    // SAFETY: it only tells a place.
    unsafe { libc::__errno_location() }
}

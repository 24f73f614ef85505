#![expect(
    unsafe_code,
    reason = "the loader calls the library's beginning and end by their place in the file"
)]
//! The library's beginning and end, and a fork between them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use crate::Shim;
use crate::status::{FailOpen, QUIET, Status};
use crate::system::Real;

static SHIM: OnceLock<Shim<Real>> = OnceLock::new();

/// What `barkeep wrap` looks for: whatever has it is this library.
#[unsafe(no_mangle)]
pub static barkeep_preload_marker: u64 = 1;

#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

#[used]
#[unsafe(link_section = ".fini_array")]
static END: extern "C" fn() = end;

/// The process's shim. There is none before the loader has called the library's beginning: other
/// libraries' may have been called before, and what they ask for is the C library's alone to answer.
pub(crate) fn shim() -> Option<&'static Shim<Real>> {
    SHIM.get()
}

extern "C" fn begin() {
    let _ = catch_unwind(|| {
        let Some(real) = Real::find() else { return };
        let quiet = std::env::var_os(QUIET).is_some_and(|value| !value.is_empty() && value != "0");
        let status = Status::shared(quiet).unwrap_or_else(|_| {
            let status = Status::private(quiet);
            status.fail_open(FailOpen::NoPage);
            status
        });
        let shim = SHIM.get_or_init(|| Shim::new(real, status));
        follow_forks();
        let _ = shim;
    });
}

extern "C" fn end() {
    if let Some(shim) = shim() {
        shim.status.summary();
    }
}

fn follow_forks() {
    // SAFETY: functions of a library that is never unloaded, since it is preloaded.
    let failed = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    // ENOMEM: a child would count in its parent's page.
    let _ = failed;
}

unsafe extern "C" fn before() {}

unsafe extern "C" fn in_parent() {}

unsafe extern "C" fn in_child() {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        if let Some(shim) = shim() {
            shim.status.forked();
        }
    }));
}

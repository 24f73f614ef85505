#![expect(
    unsafe_code,
    reason = "the loader finds the library's beginning and end by their sections"
)]

//! The library's beginning and end, and the forks between them.

use std::cell::RefCell;
use std::panic::{catch_unwind, set_hook};
use std::sync::MutexGuard;
use std::sync::atomic::AtomicU64;

use crate::Shim;
use crate::device::Turn;
use crate::exports::{install, shim};
use crate::status::{FailOpen, Status};
use crate::system::Real;

/// An operator's wish for no word on standard error: set, and not 0.
const QUIET: &str = "BARKEEP_PRELOAD_QUIET";

/// What `barkeep wrap` looks for: a library that exports it is this one. All builds mean the first one's by
/// the name; where it points is each one's own.
#[unsafe(export_name = "barkeep_preload_marker")]
#[used]
pub(crate) static MARKER: &AtomicU64 = &OWN;

/// Atomic, since constants of the same value may share a place.
static OWN: AtomicU64 = AtomicU64::new(0);

#[unsafe(link_section = ".init_array")]
#[used]
static BEGIN: extern "C" fn() = begin;

#[unsafe(link_section = ".fini_array")]
#[used]
static END: extern "C" fn() = end;

/// All that needs a system call which a VMM may forbid itself later is done here.
extern "C" fn begin() {
    // A panic has told of itself, and leaves the VMM as it was shipped.
    let _ = catch_unwind(|| {
        if is_another_copy_first() {
            return;
        }
        let Some(real) = Real::find() else { return };
        let shim = install(Shim::new(real, status()));
        shim.at_home();
        if shim.sigbus_install().is_err() {
            shim.status.fail_open(FailOpen::NoHandler);
        }
        follow_forks(shim);
    });
}

fn status() -> Status {
    let mut quiet = std::env::var_os(QUIET).is_some_and(|value| !value.is_empty() && value != "0");
    if has_no_standard_error() {
        quiet = true;
        // This library's copy of Rust's runtime, and no other.
        set_hook(Box::new(|_| {}));
    }
    Status::shared(quiet).unwrap_or_else(|_| {
        let status = Status::private(quiet);
        status.fail_open(FailOpen::NoPage);
        status
    })
}

/// What the VMM opens first has the number of standard error then, be it a disk. To be asked before this
/// library opens anything.
fn has_no_standard_error() -> bool {
    rustix::io::fcntl_getfd(rustix::stdio::stderr()).is_err()
}

/// Whether the loader has found another build of this library before this one. Two would take each
/// other's steps for the VMM's.
fn is_another_copy_first() -> bool {
    let name = c"barkeep_preload_marker".as_ptr();
    // SAFETY: the name is a C string; the answer is an address or null.
    let first = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name) };
    if first.is_null() {
        return false;
    }
    // SAFETY: every build of this library has an address there, which is looked at and not followed.
    let points_to = unsafe { first.cast::<*const AtomicU64>().read() };
    points_to != &raw const OWN
}

extern "C" fn end() {
    if let Some(shim) = shim() {
        shim.status.say_summary();
    }
}

fn follow_forks(shim: &Shim<Real>) {
    // SAFETY: the functions are there as long as the process: what is preloaded is never unloaded.
    let refused = unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    if refused != 0 {
        shim.status.fail_open(FailOpen::Forks);
    }
}

thread_local! {
    /// What the thread that forks holds meanwhile: in the child there is nobody else to let go of it.
    static HELD: RefCell<Option<MutexGuard<'static, Turn>>> = const { RefCell::new(None) };
}

unsafe extern "C" fn before() {
    let Some(shim) = shim() else { return };
    shim.shielded(|| HELD.set(Some(shim.devices.hold())));
}

unsafe extern "C" fn in_parent() {
    let Some(shim) = shim() else { return };
    shim.shielded(|| HELD.take());
}

/// The child has the devices and their mappings. VMs and connections are its parent's.
unsafe extern "C" fn in_child() {
    let Some(shim) = shim() else { return };
    // One by one: whatever happens to the first, the last must let go.
    shim.shielded(|| shim.status.forked());
    shim.shielded(|| shim.kvm_forked());
    shim.shielded(|| shim.streams.forked(&shim.system));
    shim.at_home();
    shim.shielded(|| HELD.take());
}

//! Children that share the VMM's memory until they execute something, as those of `vfork` do.

use std::ffi::{c_int, c_void};

use super::PAGE;
use super::children::{Mode, Process, Status, as_shipped, log, process, wrapped};
use crate::sigbus::{Action, SIGBUS};

#[test]
fn what_a_vforked_child_asks_for_is_its_own() {
    let scenario = |process: &Process| {
        process.bench.shim.at_home();
        process.handle(libc::SA_SIGINFO, 0, Mode::Mend);
        vforked(child);
        log(&format!("handler {}, blocked {}", is_set(process), process.is_blocked(SIGBUS)));
        process.touch(0);
    };
    let end = as_shipped(scenario);
    assert_eq!(wrapped(scenario), end);
    assert_eq!(end.status, Status::Exited(0));
    assert!(end.log.contains("killed 7\nhandler true, blocked false\nhandler 7"), "{}", end.log);
}

/// What programs do between `vfork` and `exec`.
extern "C" fn child(_: *mut c_void) -> c_int {
    let process = process();
    log(&format!("inherited {}", is_set(process)));
    process.action(Some(Action::DEFAULT));
    process.block(SIGBUS);
    log(&format!("child {}, blocked {}", is_set(process), process.is_blocked(SIGBUS)));
    process.touch(1);
    3
}

fn is_set(process: &Process) -> bool {
    process.action(None).handler != libc::SIG_DFL
}

/// Runs a child in this memory, and says how it ended.
fn vforked(work: extern "C" fn(*mut c_void) -> c_int) {
    let mut stack = vec![0_u128; 64 * PAGE / 16];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack is as long as the child needs it; this thread waits for its end.
    let pid = unsafe { libc::clone(work, top.cast(), flags, std::ptr::null_mut()) };
    let mut status = 0;
    // SAFETY: the pointer is valid.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    log(&format!("killed {}", libc::WTERMSIG(status)));
}

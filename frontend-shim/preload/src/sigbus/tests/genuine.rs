//! A `SIGBUS` that is not about a BAR does what it does without us.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::children::{End, Mode, Process, Status, as_shipped, log, process, wrapped};
use crate::sigbus::{Action, Change, SIGBUS};

const KILLED: Status = Status::Killed(SIGBUS);
const EXITED: Status = Status::Exited(0);
const INFO: c_int = libc::SA_SIGINFO;
const USR1: u64 = 1 << (libc::SIGUSR1 - 1);

/// Both ways end the same, and so, with so many lines in their log.
#[track_caller]
fn same(status: Status, lines: usize, scenario: fn(&Process)) -> String {
    let expected = as_shipped(scenario);
    let End { status: found, log } = &expected;
    assert_eq!((*found, log.lines().count()), (status, lines), "as shipped: {log}");
    assert_eq!(wrapped(scenario), expected);
    expected.log
}

fn kill() {
    // SAFETY: of this process itself.
    unsafe { libc::kill(libc::getpid(), SIGBUS) };
}

fn raise() {
    // SAFETY: of this thread itself.
    unsafe { libc::raise(SIGBUS) };
}

fn ignore(process: &Process) {
    process.action(Some(Action { handler: libc::SIG_IGN, ..Action::DEFAULT }));
}

#[test]
fn a_fault_ends_a_process_that_does_nothing_about_it() {
    same(KILLED, 0, |process| {
        process.touch(0);
    });
    same(KILLED, 0, |process| {
        ignore(process);
        process.touch(0);
    });
}

#[test]
fn a_fault_calls_the_handler_with_what_the_kernel_says() {
    let log = same(EXITED, 2, |process| {
        process.handle(INFO, USR1, Mode::Mend);
        log(&format!("read {}", process.touch(2)));
    });
    // BUS_ADRERR, the page, and the mask: SIGBUS and SIGUSR1.
    assert_eq!(log, "handler 7 2 Some(2) 0 mask 0x240 stack false\nread 0\n");
    same(Status::Exited(7), 1, |process| {
        process.handle(0, 0, Mode::Exit);
        process.touch(0);
    });
}

#[test]
fn a_fault_ends_a_thread_that_blocks_the_signal() {
    same(KILLED, 0, |process| {
        process.handle(INFO, 0, Mode::Mend);
        process.block(SIGBUS);
        process.touch(0);
    });
    same(KILLED, 1, |process| {
        process.handle(INFO, 0, Mode::Mend);
        process.block(SIGBUS);
        process.thread(|| {
            log(&format!("inherited {}", process.is_blocked(SIGBUS)));
            process.touch(0);
        });
    });
    same(EXITED, 2, |process| {
        process.handle(INFO, 0, Mode::Mend);
        process.block(SIGBUS);
        process.thread(|| {
            process.unblock(SIGBUS);
            process.touch(0);
        });
        log(&format!("still {}", process.is_blocked(SIGBUS)));
    });
}

#[test]
fn a_handler_is_called_once_if_it_asked_for_that() {
    same(KILLED, 2, |process| {
        process.handle(INFO | libc::SA_RESETHAND, 0, Mode::Mend);
        process.touch(0);
        log(&format!("{:?}", process.action(None).handler));
        process.touch(1);
    });
}

#[test]
fn a_fault_in_a_handler_is_for_it_again_only_if_it_asked_for_that() {
    same(KILLED, 1, |process| {
        process.handle(INFO, 0, Mode::Fault);
        process.touch(0);
    });
    same(EXITED, 2, |process| {
        process.handle(INFO | libc::SA_NODEFER, 0, Mode::Fault);
        process.touch(0);
    });
    same(KILLED, 1, |process| {
        process.handle(INFO | libc::SA_NODEFER, 1 << 6, Mode::Fault);
        process.touch(0);
    });
}

/// Length of an alternate stack, and where the last one begins.
const STACK: usize = 1 << 16;
static ALTERNATE: AtomicUsize = AtomicUsize::new(0);

fn with_stack(flags: c_int) {
    let memory = Box::leak(vec![0_u8; STACK].into_boxed_slice()).as_mut_ptr();
    let stack = libc::stack_t { ss_sp: memory.cast(), ss_flags: flags, ss_size: STACK };
    ALTERNATE.store(memory.addr(), Ordering::SeqCst);
    // SAFETY: the memory stays.
    assert_eq!(unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) }, 0);
}

fn is_on_stack(address: usize) -> bool {
    let start = ALTERNATE.load(Ordering::SeqCst);
    (start..start + STACK).contains(&address)
}

#[test]
fn a_handler_runs_on_its_alternate_stack_if_there_is_one() {
    let on = same(EXITED, 1, |process| {
        with_stack(0);
        process.handle(INFO | libc::SA_ONSTACK, 0, Mode::Mend);
        process.touch(0);
    });
    assert!(on.ends_with("stack true\n"));
    let off = same(EXITED, 1, |process| {
        with_stack(0);
        process.handle(INFO, 0, Mode::Mend);
        process.touch(0);
    });
    assert!(off.ends_with("stack false\n"));
    same(EXITED, 1, |process| {
        process.handle(INFO | libc::SA_ONSTACK, 0, Mode::Mend);
        process.touch(0);
    });
    // SS_AUTODISARM, twice: it is there again.
    same(EXITED, 2, |process| {
        with_stack(c_int::MIN);
        process.handle(INFO | libc::SA_ONSTACK, 0, Mode::Mend);
        process.touch(0);
        process.touch(1);
    });
    same(EXITED, 2, |process| {
        with_stack(0);
        process.handle(INFO | libc::SA_ONSTACK | libc::SA_NODEFER, 0, Mode::Fault);
        process.touch(0);
    });
}

/// By `pthread_exit`, which unwinds the stack, from the alternate one to the thread's own. What code without
/// optimisation has in RBP helps an unwinder, so that this says more of a release build.
#[test]
fn a_handler_on_its_alternate_stack_ends_its_thread() {
    unsafe extern "C-unwind" {
        fn pthread_exit(value: *mut c_void) -> !;
        fn pthread_create(
            thread: *mut libc::pthread_t,
            attributes: *const libc::pthread_attr_t,
            start: extern "C-unwind" fn(*mut c_void) -> *mut c_void,
            argument: *mut c_void,
        ) -> c_int;
    }
    extern "C-unwind" fn on_signal(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
        let here = 0_u8;
        log(&format!("on it {}", is_on_stack(std::ptr::from_ref(&here).addr())));
        // SAFETY: what is on the two stacks can be unwound.
        unsafe { pthread_exit(7 as *mut c_void) }
    }
    struct Below;
    impl Drop for Below {
        fn drop(&mut self) {
            log("what is below the handler is dropped");
        }
    }
    #[inline(never)]
    fn touch() -> u8 {
        super::children::process().touch(0)
    }
    extern "C-unwind" fn start(_: *mut c_void) -> *mut c_void {
        with_stack(0);
        let _below = Below;
        std::hint::black_box(touch());
        std::ptr::null_mut()
    }
    same(EXITED, 3, |process| {
        let handler: extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_signal;
        let flags = INFO | libc::SA_ONSTACK;
        process.action(Some(Action { handler: handler as usize, flags, mask: 0, restorer: 0 }));
        let (mut thread, mut value) = (0, std::ptr::null_mut());
        // SAFETY: the pointers are valid or null.
        unsafe {
            pthread_create(&raw mut thread, std::ptr::null(), start, std::ptr::null_mut());
            libc::pthread_join(thread, &raw mut value);
        }
        log(&format!("ended with {}", value.addr()));
    });
}

#[test]
fn a_handler_changes_where_the_thread_goes_on_and_with_which_mask() {
    same(Status::Exited(9), 2, |process| {
        process.handle(INFO, 0, Mode::Leave);
        process.touch(0);
    });
    let log = same(KILLED, 2, |process| {
        process.handle(INFO, 0, Mode::BlockAfterwards);
        process.touch(0);
        log(&format!("blocked {}", process.is_blocked(SIGBUS)));
        process.touch(1);
    });
    assert!(log.ends_with("blocked true\n"));
}

/// In a handler of another signal, with all signals blocked meanwhile.
fn in_another_handler(process: &Process, work: fn(&Process)) {
    static WORK: OnceLock<fn(&Process)> = OnceLock::new();
    extern "C" fn on_usr1(_: c_int) {
        let process = super::children::process();
        WORK.get().unwrap()(process);
        log(&format!("inside {:#x}", process.mask(None)));
    }
    WORK.set(work).unwrap();
    let handler: extern "C" fn(c_int) = on_usr1;
    let action = Action { handler: handler as usize, flags: 0, mask: u64::MAX, restorer: 0 };
    process.bench.shim.system.functions.action(libc::SIGUSR1, Some(action)).unwrap();
    // SAFETY: of this thread itself.
    unsafe { libc::raise(libc::SIGUSR1) };
    log(&format!("outside {:#x}", process.mask(None)));
}

fn change_and_restore(process: &Process) {
    let before = process.mask(Some(Change { how: libc::SIG_BLOCK, set: USR1 }));
    process.mask(Some(Change { how: libc::SIG_SETMASK, set: before }));
}

#[test]
fn a_mask_that_is_restored_in_another_handler_ends_with_it() {
    let log = same(EXITED, 3, |process| {
        process.handle(INFO, 0, Mode::Mend);
        in_another_handler(process, change_and_restore);
        process.touch(0);
    });
    assert!(log.contains("outside 0x0\nhandler 7 "), "{log}");
    same(EXITED, 3, |process| {
        process.handle(INFO, 0, Mode::Mend);
        in_another_handler(process, |process| process.block(SIGBUS));
        process.touch(0);
    });
    same(EXITED, 3, |process| {
        process.handle(INFO, 0, Mode::Mend);
        in_another_handler(process, |process| process.unblock(SIGBUS));
        process.touch(0);
    });
    let log = same(KILLED, 2, |process| {
        process.handle(INFO, 0, Mode::Mend);
        process.block(SIGBUS);
        in_another_handler(process, change_and_restore);
        process.touch(0);
    });
    assert!(log.ends_with("outside 0x40\n"), "{log}");
}

#[test]
fn a_handler_that_gives_up_as_qemus_does_ends_the_process() {
    same(KILLED, 1, |process| {
        process.handle(INFO, 0, Mode::Reraise);
        process.touch(0);
    });
    same(KILLED, 1, |process| {
        process.handle(INFO, 0, Mode::Reraise);
        raise();
    });
}

#[test]
fn a_sent_signal_does_what_the_disposition_says() {
    same(KILLED, 0, |_| kill());
    same(KILLED, 0, |_| raise());
    same(EXITED, 0, |process| {
        ignore(process);
        kill();
        raise();
    });
    let log = same(EXITED, 3, |process| {
        process.handle(INFO, 0, Mode::Return);
        kill();
        raise();
        let value = libc::sigval { sival_ptr: 77 as *mut c_void };
        // SAFETY: of this process itself.
        unsafe { libc::sigqueue(libc::getpid(), SIGBUS, value) };
    });
    // SI_USER, SI_TKILL, SI_QUEUE.
    let codes: Vec<_> = log.lines().map(|line| &line[..20]).collect();
    assert_eq!(codes, ["handler 7 0 None 0 m", "handler 7 -6 None 0 ", "handler 7 -1 None 77"]);
}

#[test]
fn a_sent_signal_that_is_blocked_waits() {
    same(EXITED, 3, |process| wait_for(process, kill));
    same(EXITED, 3, |process| wait_for(process, raise));
    same(KILLED, 1, |process| default_after(process, kill));
    same(KILLED, 1, |process| default_after(process, raise));
}

fn wait_for(process: &Process, send: fn()) {
    process.handle(INFO, 0, Mode::Return);
    process.block(SIGBUS);
    send();
    log(&format!("pending {}", process.is_pending()));
    process.mask(Some(Change { how: libc::SIG_SETMASK, set: 1 << 6 | USR1 }));
    log(&format!("mask {:#x}", process.mask(None)));
    process.mask(Some(Change { how: libc::SIG_SETMASK, set: 0 }));
}

fn default_after(process: &Process, send: fn()) {
    process.block(SIGBUS);
    send();
    log(&format!("pending {}", process.is_pending()));
    process.unblock(SIGBUS);
}

#[test]
fn a_sent_signal_that_is_blocked_can_be_waited_for_and_read() {
    let log = same(EXITED, 4, |process| {
        process.handle(INFO, 0, Mode::Return);
        process.block(SIGBUS);
        let set = crate::system::to_set(1 << 6);
        for send in [kill as fn(), raise] {
            send();
            // SAFETY: all zeros is a valid value.
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            // SAFETY: the pointers are valid.
            let got = unsafe { libc::sigwaitinfo(&raw const set, &raw mut info) };
            log(&format!("waited {got} {}", info.si_code));
        }
        // SAFETY: the set is valid.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK) };
        for send in [kill as fn(), raise] {
            send();
            let mut info = [0_u8; 128];
            // SAFETY: the buffer is as long.
            let got = unsafe { libc::read(fd, info.as_mut_ptr().cast(), info.len()) };
            log(&format!("read {got} {:?}", &info[..12]));
        }
    });
    // The C library says SI_USER of both.
    assert!(log.starts_with("waited 7 0\nwaited 7 0\n"), "{log}");
}

#[test]
fn a_sent_signal_that_waits_is_gone_once_the_signal_is_ignored() {
    same(EXITED, 4, |process| {
        process.handle(INFO, 0, Mode::Return);
        process.block(SIGBUS);
        for send in [kill as fn(), raise] {
            send();
            log(&format!("pending {}", process.is_pending()));
            ignore(process);
            log(&format!("pending {}", process.is_pending()));
            process.handle(INFO, 0, Mode::Return);
        }
        process.unblock(SIGBUS);
    });
}

#[test]
fn a_thread_that_wants_a_sent_signal_gets_it_while_another_blocks_it() {
    same(EXITED, 2, |process| {
        process.handle(INFO, 0, Mode::Return);
        process.block(SIGBUS);
        process.thread(|| {
            process.unblock(SIGBUS);
            kill();
            process.wait_for_call();
        });
        log(&format!("blocked {}", process.is_blocked(SIGBUS)));
    });
}

#[test]
fn what_was_asked_for_is_told() {
    same(EXITED, 6, |process| {
        log(&format!("{:?}", process.action(None)));
        process.handle(INFO | libc::SA_NODEFER | 0x400 | 0x100, u64::MAX, Mode::Return);
        log(&format!("{:?}", process.action(None)));
        ignore(process);
        log(&format!("{:?}", process.action(Some(Action::DEFAULT))));
        let before = process.mask(Some(Change { how: libc::SIG_BLOCK, set: 1 << 6 | USR1 }));
        log(&format!("{before:#x} {:#x}", process.mask(None)));
        let before = process.mask(Some(Change { how: libc::SIG_UNBLOCK, set: 1 << 6 }));
        log(&format!("{before:#x} {:#x}", process.mask(None)));
        let before = process.mask(Some(Change { how: libc::SIG_SETMASK, set: 1 << 6 }));
        log(&format!("{before:#x} {:#x}", process.mask(None)));
    });
    same(EXITED, 1, |process| {
        let shim = process.bench.shim;
        let wrong = Some(Change { how: 77, set: 1 << 6 });
        let functions = &shim.system.functions;
        let answer = if process.wrapped { shim.signal_mask(wrong) } else { functions.mask(wrong) };
        log(&format!("{answer:?} {:#x}", process.mask(None)));
    });
}

#[test]
fn the_older_functions_set_what_they_set() {
    same(EXITED, 7, |process| {
        let functions = process.bench.shim.system.functions;
        let shim = process.bench.shim;
        let handler = libc::SIG_IGN;
        let signal = || match process.wrapped {
            true => shim.signal_bsd(handler),
            // SAFETY: no function.
            false => unsafe { (functions.signal)(SIGBUS, handler) },
        };
        let interrupts = |interrupts: bool| match process.wrapped {
            true => shim.signal_interrupts(interrupts),
            // SAFETY: numbers alone.
            false => drop(unsafe { (functions.siginterrupt)(SIGBUS, interrupts.into()) }),
        };
        let tell = || log(&format!("{:?}", process.action(None)));
        log(&format!("{} {}", signal(), signal()));
        tell();
        interrupts(true);
        tell();
        signal();
        tell();
        interrupts(false);
        tell();
        let before = if process.wrapped {
            shim.signal_system_v(handler)
        } else {
            // SAFETY: no function.
            unsafe { (functions.sysv_signal)(SIGBUS, handler) }
        };
        log(&format!("{before}"));
        tell();
    });
}

#[test]
fn a_process_that_starts_with_the_signal_blocked_or_ignored_goes_on_so() {
    let end = super::children::wrapped(|_| {
        let outer = process();
        // Another start of the same: the handler is gone, and SIGBUS is what exec would leave.
        let functions = outer.bench.shim.system.functions;
        functions
            .action(SIGBUS, Some(Action { handler: libc::SIG_IGN, ..Action::DEFAULT }))
            .unwrap();
        functions.mask(Some(Change { how: libc::SIG_BLOCK, set: 1 << 6 })).unwrap();
        let bench = super::bench();
        log(&format!(
            "{} {:#x}",
            bench.shim.signal_action(None).handler,
            bench.shim.signal_mask(None).unwrap()
        ));
        log(&format!("{:#x}", bench.read::<u32>(0)));
    });
    assert_eq!(end, End { status: EXITED, log: "1 0x40\n0xffffffff\n".to_owned() });
}

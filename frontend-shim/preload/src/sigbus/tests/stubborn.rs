//! Accesses to a BAR that can't be completed, or must not be.

use iced_x86::code_asm::*;

use super::children::{End, Mode, Process, Status, log, wrapped};
use super::machine::{Code, Program, State};
use super::{MEMORY, NOTHING, bench};
use crate::sigbus::SIGBUS;
use crate::status::Count;

fn killed(scenario: fn(&Process)) -> String {
    let End { status, log } = wrapped(scenario);
    assert_eq!(status, Status::Killed(SIGBUS), "{log}");
    log
}

#[test]
fn an_access_that_is_refused_while_the_bar_decodes_is_made_again() {
    let bench = bench();
    bench.set_command(MEMORY);
    bench.present_after(50);
    // Zeros: the memory that is there by now, and no ones.
    assert_eq!(bench.read::<u32>(4), 0);
    bench.write::<u32>(4, 7);
    assert_eq!(bench.read::<u32>(4), 7);
    assert_eq!(bench.shim.status.get(Count::SigbusCompleted), 0);
}

#[test]
fn an_access_that_is_refused_for_ever_ends_the_process_as_without_us() {
    killed(|process| {
        process.bench.set_command(MEMORY);
        process.bench.read::<u32>(0);
    });
    let end = wrapped(|process| {
        process.bench.set_command(MEMORY);
        process.handle(libc::SA_SIGINFO, 0, Mode::Exit);
        process.bench.read::<u32>(0);
    });
    assert_eq!(end.status, Status::Exited(7));
}

#[test]
fn retries_are_counted_in_a_row() {
    let bench = bench();
    for _ in 0..3 {
        // So many more than half of those allowed, and one that completes in between.
        bench.set_command(MEMORY);
        bench.present_after(6000);
        assert_eq!(bench.read::<u32>(0), 0);
        rustix::fs::ftruncate(&bench.host().file, 0).unwrap();
        bench.set_command(0);
        assert_eq!(bench.read::<u32>(0), u32::MAX);
    }
}

#[test]
fn a_device_that_does_not_tell_leaves_the_access_to_the_vmm() {
    killed(|process| {
        process.bench.set_command(NOTHING);
        process.bench.read::<u32>(0);
    });
}

#[test]
fn an_instruction_that_is_not_known_leaves_the_access_to_the_vmm() {
    fn run(process: &Process, code: Code) {
        let mut general = [0; 16];
        general[7] = process.bench.bar as u64;
        let mut state = State { vectors: [[0; 64]; 32], general, flags: 2, masks: [0; 8] };
        let program = Program::new(code);
        log("before");
        program.run(&mut state);
        log("after");
    }
    let before = ["before\n"; 4];
    let logs = [
        killed(|process| run(process, |a| a.fld(qword_ptr(rdi)))),
        killed(|process| run(process, |a| a.addps(xmm0, xmmword_ptr(rdi)))),
        killed(|process| run(process, |a| a.fxsave(ptr(rdi)))),
        killed(|process| run(process, |a| a.crc32(eax, dword_ptr(rdi)))),
    ];
    assert_eq!(logs, before);
}

#[test]
fn threads_that_block_the_signal_are_served() {
    let end = wrapped(|process| {
        process.block(SIGBUS);
        log(&format!("{:#x}", process.bench.read::<u32>(0)));
        process.thread(|| {
            log(&format!("{:#x} {}", process.bench.read::<u32>(0), process.is_blocked(SIGBUS)));
        });
    });
    assert_eq!(end, End { status: Status::Exited(0), log: "0xffffffff\n0xffffffff true\n".into() });
}

#[test]
fn a_signal_that_was_consumed_leaves_the_thread_served() {
    let end = wrapped(|process| {
        process.block(SIGBUS);
        // SAFETY: of this thread itself.
        unsafe { libc::raise(SIGBUS) };
        let set = crate::system::to_set(1 << 6);
        let mut signal = 0;
        // SAFETY: the pointers are valid.
        unsafe { libc::sigwait(&raw const set, &raw mut signal) };
        process.block(libc::SIGUSR1);
        log(&format!("{signal} {:#x}", process.bench.read::<u32>(0)));
    });
    assert_eq!(end, End { status: Status::Exited(0), log: "7 0xffffffff\n".into() });
}

#[test]
fn a_handler_that_has_the_signal_blocked_leaves_the_thread_served() {
    let end = wrapped(|process| {
        process.handle(libc::SA_SIGINFO, 0, Mode::BlockAfterwards);
        process.touch(0);
        log(&format!("{} {:#x}", process.is_blocked(SIGBUS), process.bench.read::<u32>(0)));
    });
    assert_eq!(end.status, Status::Exited(0));
    assert!(end.log.ends_with("true 0xffffffff\n"), "{}", end.log);
}

#[test]
fn a_child_of_a_fork_is_served() {
    let end = wrapped(|process| {
        // SAFETY: the child does as much as the parent could, and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            log(&format!("{:#x}", process.bench.read::<u32>(0)));
            // SAFETY: it ends the process.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: no status is asked for.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    });
    assert_eq!(end, End { status: Status::Exited(0), log: "0xffffffff\n".into() });
}

#[test]
fn errno_survives() {
    let bench = bench();
    // SAFETY: the thread's own.
    unsafe { *libc::__errno_location() = 77 };
    bench.read::<u8>(0);
    // SAFETY: likewise.
    assert_eq!(unsafe { *libc::__errno_location() }, 77);
}

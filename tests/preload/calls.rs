//! Which system calls a wrapped `KVM_RUN` makes: its own, and no other.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::wrapped::{With, has_kvm, scenario};

const READ: u64 = 0;
const WRITE: u64 = 1;
const IOCTL: u64 = 16;
const KVM_RUN: u64 = 0xae80;

#[test]
fn a_wrapped_run_makes_one_system_call_on_kvm() {
    if !has_kvm() {
        return;
    }
    const RUNS: usize = 50;
    // One for a port and one for MMIO.
    let expected = BTreeMap::from([("KVM_RUN".to_owned(), 2 * RUNS)]);
    for with in [With::Nothing, With::Library] {
        assert_eq!(system_calls(RUNS, with), expected, "{with:?}");
    }
}

/// What the VMM does between the byte that starts it and the line that ends it.
fn system_calls(runs: usize, with: With) -> BTreeMap<String, usize> {
    let mut command = scenario("count-runs", &[&runs.to_string()], with);
    let mut vmm = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut lines = BufReader::new(vmm.stdout.take().expect("a pipe"));
    let mut line = String::new();
    lines.read_line(&mut line).expect("a pipe");
    assert!(line.starts_with("ready"), "{line}");
    let pid = Pid::from_raw(vmm.id().try_into().expect("a process"));
    ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL)
        .expect("it is our child");
    ptrace::interrupt(pid).expect("it is traced");
    let mut calls = BTreeMap::new();
    let mut counting = false;
    let mut entering = true;
    let mut started = false;
    loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL)).expect("it is our child") {
            WaitStatus::PtraceSyscall(_) => {
                let registers = ptrace::getregs(pid).expect("it has stopped");
                let number = registers.orig_rax;
                // The read that waits for the byte was under way when it was stopped: it is restarted.
                if !entering && number == READ && registers.rax == 1 {
                    counting = true;
                } else if entering && counting && number == WRITE {
                    counting = false;
                } else if entering && counting {
                    let name = match (number, registers.rsi) {
                        (IOCTL, KVM_RUN) => "KVM_RUN".into(),
                        (IOCTL, request) => format!("ioctl {request:#x}"),
                        (other, _) => format!("system call {other}"),
                    };
                    *calls.entry(name).or_default() += 1;
                }
                entering = !entering;
            }
            WaitStatus::Exited(_, status) => {
                assert_eq!(status, 0);
                break;
            }
            WaitStatus::Signaled(_, signal, _) => unreachable!("{signal}"),
            _ if !started => {
                started = true;
                vmm.stdin.take().expect("a pipe").write_all(b"g").expect("it reads");
            }
            _ => {}
        }
        ptrace::syscall(pid, None).expect("it has stopped");
    }
    line.clear();
    lines.read_line(&mut line).expect("a pipe");
    assert_eq!(line, format!("good: {}\n", 2 * runs));
    let _ = vmm.wait();
    calls
}

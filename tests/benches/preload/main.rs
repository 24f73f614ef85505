//! What the preloaded library costs at each exit of a virtual CPU. docs/performance.md explains the figures.
//!
//!     cargo bench -p barkeep-tests --bench preload [-- --quick]
#![expect(clippy::unwrap_used, reason = "a benchmark that fails has no result")]
#![expect(clippy::print_stdout, reason = "it prints its tables")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use barkeep_tests::backend::Backend;
use barkeep_tests::binary;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const VMM: &str = env!("CARGO_BIN_EXE_preload-vmm");

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Effort {
    rounds: usize,
    /// Exits in a round, on KVM.
    exits: usize,
    /// Calls in a round, of a `KVM_RUN` that does nothing.
    calls: usize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        return;
    }
    let effort = if arguments.iter().any(|argument| argument == "--quick") {
        Effort { rounds: 15, exits: 2_000, calls: 100_000 }
    } else {
        Effort { rounds: 101, exits: 20_000, calls: 1_000_000 }
    };
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm: {error}");
        return;
    }
    let library = binary::preload_for_benchmark();
    let beneath = binary::beneath_for_benchmark();
    println!("| what | exit | without, ns | with, ns | difference, ns | ratio |");
    println!("|---|---|---|---|---|---|");
    in_one_process(&library, Some(&beneath), effort.rounds, effort.calls);
    in_one_process(&library, None, effort.rounds, effort.exits);
    in_two_processes(&library, effort);
}

/// The function that the program is bound to and the one beneath, in turns, on the same virtual CPU.
fn in_one_process(library: &Path, beneath: Option<&Path>, rounds: usize, calls: usize) {
    let mut preloaded = library.as_os_str().to_owned();
    let backend = Backend::serve(&["ivshmem,size=64K"]);
    let mut command = vmm("measure-runs", &[rounds, calls]);
    command.arg(backend.socket());
    if let Some(beneath) = beneath {
        preloaded.push(":");
        preloaded.push(beneath);
        command.env("PRELOAD_VMM_BENEATH", beneath);
    }
    let mut vmm = command.env("LD_PRELOAD", preloaded).stdout(Stdio::piped()).spawn().unwrap();
    pin(&vmm);
    let lines = BufReader::new(vmm.stdout.take().unwrap()).lines();
    let mut measured: Vec<(String, f64, f64)> = Vec::new();
    for line in lines {
        let line = line.unwrap();
        let mut words = line.split(' ');
        let kind = words.next().unwrap().to_owned();
        let mut each = || words.next().unwrap().parse::<f64>().unwrap() / calls as f64;
        measured.push((kind, each(), each()));
        assert_eq!(words.next(), Some("0"), "every call succeeds");
    }
    assert!(vmm.wait().unwrap().success());
    let what = if beneath.is_some() { "the wrapper alone" } else { "`KVM_RUN`, in one process" };
    let exits = [("port", "port"), ("mmio", "MMIO"), ("device", "MMIO beside a vfio-user device")];
    for (kind, exit) in exits {
        let of_kind: Vec<_> = measured.iter().filter(|(found, ..)| found == kind).collect();
        assert_eq!(of_kind.len(), rounds);
        let pairs: Vec<_> = of_kind.iter().map(|(_, with, without)| (*without, *with)).collect();
        row(what, exit, &pairs);
    }
}

/// A guest that does nothing but exit: a process with the library and one without, in turns.
fn in_two_processes(library: &PathBuf, effort: Effort) {
    let mut plain = Loop::start(None, effort.exits);
    let mut wrapped = Loop::start(Some(library), effort.exits);
    let pairs: Vec<_> = (0..effort.rounds)
        .map(|round| {
            // Neither is always the first.
            if round % 2 == 0 {
                let without = plain.round();
                (without, wrapped.round())
            } else {
                let with = wrapped.round();
                (plain.round(), with)
            }
        })
        .collect();
    row("a guest that only exits, in two processes", "port", &pairs);
}

/// Medians, of the times and of the ratios round by round.
fn row(what: &str, exit: &str, pairs: &[(f64, f64)]) {
    let without = median(pairs.iter().map(|(without, _)| *without));
    let with = median(pairs.iter().map(|(_, with)| *with));
    let difference = median(pairs.iter().map(|(without, with)| with - without));
    let ratio = median(pairs.iter().map(|(without, with)| with / without));
    println!("| {what} | {exit} | {without:.1} | {with:.1} | {difference:.1} | {ratio:.3} |");
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// `exit-loop`, round by round.
struct Loop {
    process: Child,
    lines: BufReader<ChildStdout>,
}

impl Loop {
    fn start(library: Option<&PathBuf>, exits: usize) -> Self {
        let mut command = vmm("exit-loop", &[exits]);
        if let Some(library) = library {
            command.env("LD_PRELOAD", library);
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        pin(&process);
        let lines = BufReader::new(process.stdout.take().unwrap());
        let mut this = Self { process, lines };
        assert!(this.line().starts_with("ready"));
        this.round();
        this
    }

    /// Nanoseconds per exit.
    fn round(&mut self) -> f64 {
        self.process.stdin.as_mut().unwrap().write_all(b"r").unwrap();
        self.line().trim().parse().unwrap()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

fn vmm(scenario: &str, numbers: &[usize]) -> Command {
    let mut command = Command::new(VMM);
    command.arg(scenario).args(numbers.iter().map(usize::to_string));
    command.env_remove("LD_PRELOAD").env("BARKEEP_PRELOAD_QUIET", "1").stdin(Stdio::null());
    command
}

/// To the last processor that this process may use.
fn pin(process: &Child) {
    let allowed = sched_getaffinity(None).unwrap();
    let last = (0..CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu)).unwrap();
    let mut set = CpuSet::new();
    set.set(last);
    sched_setaffinity(Some(Pid::from_child(process)), &set).unwrap();
}

//! Sidecars that die, fall silent and come back under guests that hammer their functions.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use barkeep_shim::vmm::{HypervisorChoice, Line, Progress, Report};
use barkeep_tests::binary;

use crate::on_both::on_both_hypervisors;
use crate::sidecar::Sidecar;

const DEVICES: [&str; 2] = ["edu", "ivshmem,size=64K"];
const FUNCTIONS: u64 = DEVICES.len() as u64;
const VCPUS: u64 = 3;
/// Reads that a device has answered, after which a guest is at work.
const AT_WORK: u64 = 1000;

/// A VMM in a process of its own: vCPU 0 recovers functions, the others hammer them.
struct Vmm {
    child: Child,
    /// The guest runs until it is closed.
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Vmm {
    fn start(sidecar: &Sidecar, hypervisor: HypervisorChoice, options: &[&str]) -> Self {
        let hypervisor = match hypervisor {
            HypervisorChoice::Kvm => "kvm",
            _ => "model",
        };
        let mut command = Command::new(binary::barkeep());
        command.args(["--log", "error", "vmm", "--json", "--program", "recover", "--reconnect"]);
        command.args(["--vcpus", &VCPUS.to_string(), "--hypervisor", hypervisor]).args(options);
        for socket in sidecar.sockets() {
            command.arg("--device").arg(socket);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { stdin: child.stdin.take(), lines, child }
    }

    fn next(&mut self) -> Line {
        let line = self.lines.next().expect("the VMM lives").unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn progress(&mut self) -> Progress {
        match self.next() {
            Line::Progress(progress) => progress,
            Line::Report(report) => panic!("the VM has ended: {report:?}"),
        }
    }

    /// Until the guest is so far.
    fn until(&mut self, reached: impl Fn(&Progress) -> bool) -> Progress {
        loop {
            let progress = self.progress();
            if reached(&progress) {
                return progress;
            }
        }
    }

    /// Until devices have answered the guest as if nothing were wrong.
    fn until_at_work(&mut self) -> Progress {
        let before = self.progress().live_reads;
        self.until(|progress| progress.live_reads > before + AT_WORK)
    }

    /// Until so many sessions have followed others, and the guest has programmed so many functions since
    /// `before`, and works.
    fn until_recovered(&mut self, back: u64, functions: u64, before: &Progress) {
        self.until(|progress| {
            progress.outages.back >= back && progress.recoveries >= before.recoveries + functions
        });
        self.until_at_work();
    }

    /// Until nothing in the guest moves: it waits.
    fn until_still(&mut self) -> Progress {
        let mut last = self.progress();
        loop {
            let progress = self.progress();
            if (progress.done, progress.live_reads) == (last.done, last.live_reads) {
                return progress;
            }
            last = progress;
        }
    }

    /// Ends the guest, of which every value that it read must have been right.
    fn finish(mut self) -> Report {
        drop(self.stdin.take());
        let report = loop {
            if let Line::Report(report) = self.next() {
                break *report;
            }
        };
        println!("ran on {}: {report:?}", report.hypervisor);
        assert!(report.passed(), "{:?}", report.failures);
        assert!(self.child.wait().unwrap().success());
        report
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

on_both_hypervisors!(functions_of_a_killed_sidecar_work_again_when_the_guest_has_programmed_them);
fn functions_of_a_killed_sidecar_work_again_when_the_guest_has_programmed_them(
    hypervisor: HypervisorChoice,
) {
    const KILLS: u64 = 5;
    let mut sidecar = Sidecar::start(&DEVICES);
    let mut vmm = Vmm::start(&sidecar, hypervisor, &[]);
    vmm.until_at_work();
    for kills in 1..=KILLS {
        sidecar.kill();
        let gone = vmm.until(|progress| progress.outages.gone == kills * FUNCTIONS);
        vmm.until(|progress| progress.done > gone.done + 1);
        sidecar.start_again();
        vmm.until_recovered(kills * FUNCTIONS, FUNCTIONS, &gone);
    }
    let report = vmm.finish();
    assert_eq!(report.outages.gone, KILLS * FUNCTIONS);
    assert_eq!(report.outages.back, KILLS * FUNCTIONS);
    assert!(report.outages.unsupported_requests > 0);
    assert_eq!(report.outages.resumed, 0, "nobody waits");
}

on_both_hypervisors!(accesses_wait_for_a_sidecar_that_is_soon_back);
fn accesses_wait_for_a_sidecar_that_is_soon_back(hypervisor: HypervisorChoice) {
    let mut sidecar = Sidecar::start(&DEVICES);
    let mut vmm = Vmm::start(&sidecar, hypervisor, &["--dead-backend", "stall=3600"]);
    vmm.until_at_work();
    sidecar.kill();
    vmm.until(|progress| progress.outages.gone == FUNCTIONS);
    let still = vmm.until_still();
    sidecar.start_again();
    vmm.until_recovered(FUNCTIONS, FUNCTIONS, &still);
    let report = vmm.finish();
    assert!(report.outages.resumed >= VCPUS - 1, "{:?}", report.outages);
    // Those that had been sent when the socket closed: one of each vCPU to each function at most.
    assert!(report.outages.unsupported_requests <= VCPUS * FUNCTIONS, "{:?}", report.outages);
}

on_both_hypervisors!(accesses_wait_no_longer_than_they_may);
fn accesses_wait_no_longer_than_they_may(hypervisor: HypervisorChoice) {
    let mut sidecar = Sidecar::start(&DEVICES);
    let mut vmm = Vmm::start(&sidecar, hypervisor, &["--dead-backend", "stall=1"]);
    vmm.until_at_work();
    sidecar.kill();
    vmm.until(|progress| progress.outages.gone == FUNCTIONS);
    let still = vmm.until_still();
    // From the deadline on, nobody waits.
    vmm.until(|progress| progress.done > still.done + 100);
    sidecar.start_again();
    vmm.until_recovered(FUNCTIONS, FUNCTIONS, &still);
    let report = vmm.finish();
    assert!(report.outages.unsupported_requests > VCPUS, "{:?}", report.outages);
}

on_both_hypervisors!(a_sidecar_that_falls_silent_costs_a_deadline_and_is_connected_again);
fn a_sidecar_that_falls_silent_costs_a_deadline_and_is_connected_again(
    hypervisor: HypervisorChoice,
) {
    for policy in ["ur", "stall=3600"] {
        let sidecar = Sidecar::start(&DEVICES);
        let options = ["--deadline", "1", "--dead-backend", policy];
        let mut vmm = Vmm::start(&sidecar, hypervisor, &options);
        vmm.until_at_work();
        sidecar.freeze();
        // Who waits for one function asks nothing of the other.
        let gone = vmm.until(|progress| progress.outages.gone > 0);
        sidecar.thaw();
        vmm.until_recovered(1, 1, &gone);
        let report = vmm.finish();
        assert_eq!(report.outages.gone, report.outages.back, "{policy}");
        assert!(report.outages.unsupported_requests > 0, "{policy}: what was sent is not repeated");
    }
}

on_both_hypervisors!(a_guest_outlives_a_sidecar_that_never_comes_back);
fn a_guest_outlives_a_sidecar_that_never_comes_back(hypervisor: HypervisorChoice) {
    for policy in ["ur", "stall=1"] {
        let mut sidecar = Sidecar::start(&DEVICES);
        let mut vmm = Vmm::start(&sidecar, hypervisor, &["--dead-backend", policy]);
        vmm.until_at_work();
        sidecar.kill();
        let gone = vmm.until(|progress| progress.outages.gone == FUNCTIONS);
        vmm.until(|progress| progress.done > gone.done + 100);
        let report = vmm.finish();
        assert_eq!(report.outages.back, 0, "{policy}");
    }
}

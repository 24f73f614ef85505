//! What came out of a run.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use barkeep_protocol::wire::RegionState;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::guest::{EduReport, InstructionsReport, ProbeReport, RunState, StatBlock};
use super::placement::{Placement, is_mapped};
use super::vcpu::VcpuEnd;
use super::{Arguments, MachineError, Program};
use crate::Frontend;
use crate::bar::{AddressSpace, Outages};
use crate::fault::FaultCounts;
use crate::hypervisor::{HostMapping, HypervisorKind};

/// One line of `--json` output.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The guest is at work.
    Progress(Progress),
    /// It has ended.
    Report(Box<Report>),
}

/// How far `toggle` or `recover` is.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Cycles, or rounds, that vCPU 0 has done.
    pub done: u64,
    /// Cycles in all; 0 for `recover`, which ends when it is told so.
    pub total: u64,
    /// Reads of BARs by the guest that a device answered.
    pub live_reads: u64,
    /// Functions that `recover` found reset, and programmed.
    pub recoveries: u64,
    /// What became of the sessions with backends.
    pub outages: Outages,
}

impl Progress {
    /// What the guest and the frontend have counted by now.
    pub(super) fn read(ram: &HostMapping, vcpus: u32, frontend: &Frontend) -> Self {
        let mut progress = Self { outages: outages(frontend), ..Self::default() };
        for block in (0..vcpus).filter_map(|vcpu| StatBlock::read(ram, vcpu).ok()) {
            let StatBlock { reads, reads_ur, narrow_reads, recoveries, .. } = block;
            // They are counted one after the other.
            progress.live_reads += reads.saturating_sub(reads_ur + narrow_reads);
            progress.recoveries += recoveries;
        }
        progress
    }
}

/// Of all functions.
fn outages(frontend: &Frontend) -> Outages {
    frontend.functions().iter().map(|function| function.outages()).sum()
}

/// The result of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// `kvm` or `model`.
    pub hypervisor: String,
    /// Rounds of `toggle` that were done.
    pub cycles: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Functions attached.
    pub functions: usize,
    /// Reads of BARs by the guest.
    pub reads: u64,
    /// Those of them that completed as Unsupported Request.
    pub reads_ur: u64,
    /// Reads of trapped BARs in widths that the device answers with all ones, decoding or not. Part of
    /// `reads`, never of `reads_ur`.
    pub narrow_reads: u64,
    /// Writes to trapped BARs by the guest.
    pub trapped_writes: u64,
    /// Writes to mapped BARs by the guest.
    pub mapped_writes: u64,
    /// Memory faults that were resolved.
    pub memory_faults: u64,
    /// All memory faults: how their place was known, and their verdicts.
    pub faults: FaultCounts,
    /// The longest time that one instruction took from its first memory fault to its last, or to the
    /// end of the MMIO exit that it became, in nanoseconds.
    pub longest_stuck_ns: u64,
    /// How often a memory slot came or went.
    pub slot_changes: u64,
    /// What became of the sessions with backends, of all functions.
    pub outages: Outages,
    /// Functions that `recover` found reset, and programmed.
    pub recoveries: u64,
    /// Values that no correct machine returns.
    pub wrong_values: u64,
    /// The backends' side of the trapped BARs.
    pub backends: Backends,
    /// Time of an MMIO exit in the VMM.
    pub latency: Latency,
    /// From the start of the first vCPU to the end of the last.
    pub seconds: f64,
    /// Everything that went wrong, in words.
    pub failures: Vec<String>,
    /// What the program found, in words.
    pub findings: Vec<String>,
}

/// What backends counted on the BARs that the guest program uses.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Backends {
    /// Writes that reached a device.
    pub writes_applied: u64,
    /// Writes that were dropped: Unsupported Request.
    pub writes_dropped: u64,
    /// Reads that completed as Unsupported Request, of trapped BARs and of mapped BARs without their
    /// slot.
    pub reads_ur: u64,
}

/// Percentiles in nanoseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
}

/// What a run leaves behind.
pub(super) struct Finished<'a> {
    pub(super) arguments: &'a Arguments,
    pub(super) kind: HypervisorKind,
    pub(super) ram: &'a HostMapping,
    pub(super) frontend: &'a Frontend,
    pub(super) placement: &'a Placement,
    pub(super) ends: Vec<VcpuEnd>,
    pub(super) elapsed: Duration,
}

/// Puts a report together from the guest's counters, the backends' and the VMM's own.
pub(super) fn collect(finished: Finished<'_>) -> Report {
    let Finished { arguments, kind, ram, frontend, placement, ends, elapsed } = finished;
    let mut report = Report {
        hypervisor: kind.to_string(),
        vcpus: u32::try_from(ends.len()).unwrap_or(u32::MAX),
        functions: frontend.functions().len(),
        memory_faults: frontend.fault_counters().get().resolved(),
        faults: frontend.fault_counters().get(),
        slot_changes: frontend.slot_changes(),
        outages: outages(frontend),
        seconds: elapsed.as_secs_f64(),
        ..Report::default()
    };
    let mut latency: Option<Histogram<u64>> = None;
    for (vcpu, end) in (0..).zip(ends) {
        report.failures.extend(end.failure);
        let stuck = u64::try_from(end.longest_stuck.as_nanos()).unwrap_or(u64::MAX);
        report.longest_stuck_ns = report.longest_stuck_ns.max(stuck);
        report.count(ram, vcpu);
        match &mut latency {
            None => latency = Some(end.latency),
            // Both have the same bounds, so nothing can be out of range.
            Some(sum) => sum.add(&end.latency).unwrap_or(()),
        }
    }
    if let Some(latency) = latency.filter(|latency| !latency.is_empty()) {
        report.latency = Latency {
            p50_ns: latency.value_at_quantile(0.5),
            p99_ns: latency.value_at_quantile(0.99),
        };
    }
    report.ask_backends(arguments, frontend, placement);
    report.add_findings(arguments, ram, frontend, placement);
    report
}

impl Report {
    /// Whether the VM lived and every value was right.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failures.is_empty() && self.wrong_values == 0
    }

    /// Prints the report to standard output, as a line of JSON or for a reader.
    pub fn print(&self, json: bool) {
        if json {
            return print_line(&Line::Report(Box::new(self.clone())));
        }
        let mut text = format!(
            "{} functions, {} vCPUs on {}, {:.2} s\n{} reads ({} UR), {} + {} writes, {} memory faults\n",
            self.functions,
            self.vcpus,
            self.hypervisor,
            self.seconds,
            self.reads,
            self.reads_ur,
            self.trapped_writes,
            self.mapped_writes,
            self.memory_faults,
        );
        if self.faults != FaultCounts::default() {
            let FaultCounts { reported, located, one_of, unknown, .. } = self.faults;
            let FaultCounts { unsupported_request, map, relax, retry, not_mine, .. } = self.faults;
            text.push_str(&format!(
                "  places: {reported} reported, {located} located, {one_of} one of several, {unknown} unknown\n  verdicts: {unsupported_request} UR, {map} map, {relax} relax, {retry} retry, {not_mine} not ours\n  longest stuck: {} us\n",
                self.longest_stuck_ns / 1000
            ));
        }
        if self.outages != Outages::default() {
            let Outages { gone, back, away_ns, unsupported_requests, resumed } = self.outages;
            text.push_str(&format!(
                "  backends: {gone} gone, {back} back, away {} ms; {unsupported_requests} accesses UR, {resumed} resumed\n",
                away_ns / 1_000_000
            ));
        }
        for line in self.findings.iter().chain(&self.failures) {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(if self.passed() { "passed\n" } else { "FAILED\n" });
        write_out(text.as_bytes());
    }

    fn count(&mut self, ram: &HostMapping, vcpu: u32) {
        let block = match StatBlock::read(ram, vcpu) {
            Ok(block) => block,
            Err(error) => return self.failures.push(format!("vCPU {vcpu}: {error}")),
        };
        if block.state != RunState::Finished {
            self.failures.push(format!("vCPU {vcpu} did not finish: {:?}", block.state));
        }
        if vcpu == 0 {
            self.cycles = block.progress;
        }
        self.reads += block.reads;
        self.reads_ur += block.reads_ur;
        self.narrow_reads += block.narrow_reads;
        self.trapped_writes += block.trapped_writes;
        self.mapped_writes += block.mapped_writes;
        self.recoveries += block.recoveries;
        self.wrong_values += block.wrong;
        if let Some(wrong) = block.first_wrong {
            self.failures.push(format!(
                "vCPU {vcpu}: read {:#x} at {}, not {:#x}",
                wrong.value, wrong.address, wrong.expected
            ));
        }
    }

    /// Every write of the guest must have arrived, applied or dropped, exactly once; where a mapped BAR
    /// of a passed-through function takes a part of them, nobody can count those, and a backend that went
    /// away has taken its counts with it.
    fn ask_backends(&mut self, arguments: &Arguments, frontend: &Frontend, placement: &Placement) {
        // Others keep no count of their own.
        if !matches!(arguments.program, Program::Toggle | Program::Hammer | Program::Recover) {
            return;
        }
        let mut counted = self.outages.gone == 0;
        for index in placement.edu_functions() {
            let state = self.ask_backend(frontend, index, 0);
            self.backends.writes_applied += state.writes;
            self.backends.writes_dropped += state.writes_dropped;
            self.backends.reads_ur += state.reads_ur;
            counted &= !is_mapped(frontend, index, 0);
        }
        for index in placement.ivshmem_functions() {
            self.backends.reads_ur += self.ask_backend(frontend, index, 2).reads_ur;
        }
        let Backends { writes_applied, writes_dropped, .. } = self.backends;
        let arrived = writes_applied + writes_dropped;
        if arrived > self.trapped_writes || (counted && arrived != self.trapped_writes) {
            self.failures.push(format!(
                "the guest wrote {} times to trapped BARs, the backends applied {writes_applied} and dropped {writes_dropped}",
                self.trapped_writes
            ));
        }
    }

    fn ask_backend(&mut self, frontend: &Frontend, function: usize, bar: u32) -> RegionState {
        let asked = frontend.functions()[function].client().region_state(bar);
        asked.unwrap_or_else(|error| {
            // That it has gone is told, and no failure of the VM's.
            if !(error.ends_session() && self.outages.gone > 0) {
                self.failures.push(format!("function {function}: {error}"));
            }
            RegionState::default()
        })
    }

    fn add_findings(
        &mut self,
        arguments: &Arguments,
        ram: &HostMapping,
        frontend: &Frontend,
        placement: &Placement,
    ) {
        match arguments.program {
            Program::Probe => self.add_probe(ram),
            Program::Edu => {
                let count = placement.edu_functions().count();
                (0..count).for_each(|device| self.add_edu(ram, device));
            }
            Program::Toggle => {
                let pairs = placement.pairs(frontend).len() as u64;
                self.check_toggle(arguments, pairs, passes_through(frontend, placement));
            }
            Program::Hammer | Program::Recover => self.add_ends(frontend, placement),
            Program::Instructions => self.add_instructions(ram),
            // That it came here at all is the failure.
            Program::LostRam => self.check_lost_ram(),
        }
    }

    /// A run in which nothing happened has shown nothing: every cycle reads and writes each pair with
    /// decode off, and maps and suspends the directly mapped BAR.
    fn check_toggle(&mut self, arguments: &Arguments, pairs: u64, passes_through: bool) {
        let reads_ur = self.backends.reads_ur;
        if !(self.reads_ur..=self.reads_ur + self.narrow_reads).contains(&reads_ur) {
            self.failures.push(format!(
                "the guest saw {} reads as UR and {} of undefined width, the backends gave {reads_ur}",
                self.reads_ur, self.narrow_reads
            ));
        }
        let least = arguments.cycles * pairs;
        let rows = [
            ("cycles", self.cycles, arguments.cycles),
            ("reads as UR", self.reads_ur, 2 * least),
            ("dropped writes", self.backends.writes_dropped, least),
            (
                "applied writes",
                self.backends.writes_applied,
                if passes_through { 0 } else { least },
            ),
            ("changes of memory slots", self.slot_changes, 2 * least),
        ];
        for (what, seen, least) in rows {
            if seen < least {
                self.failures.push(format!("{seen} {what}, not {least} or more"));
            }
        }
    }

    /// What BAR0 of each edu function answers in the end, and whether it is mapped again.
    fn add_ends(&mut self, frontend: &Frontend, placement: &Placement) {
        for index in placement.edu_functions() {
            let Some(address) = placement.bar(index, 0) else { continue };
            let mut data = [0; 4];
            frontend.read(AddressSpace::Memory, address, &mut data);
            let mapped = match frontend.functions()[index].mapped_at(0) {
                Some(_) => "mapped",
                None => "not mapped",
            };
            let answer = u32::from_le_bytes(data);
            self.findings.push(format!("edu {index}: {answer:#010x}, {mapped}"));
        }
    }

    fn add_instructions(&mut self, ram: &HostMapping) {
        let report = match InstructionsReport::read(ram) {
            Ok(report) => report,
            Err(error) => return self.failures.push(error.to_string()),
        };
        let (ran, left_out): (Vec<_>, Vec<_>) = report.kinds.iter().partition(|kind| kind.selected);
        let runs: u64 = ran.iter().map(|kind| kind.runs).sum();
        self.findings.push(format!("{} kinds of access, {runs} runs", ran.len()));
        for kind in left_out {
            self.findings.push(format!("not here: {}", kind.name));
        }
        for kind in ran.iter().filter(|kind| kind.runs == 0) {
            self.failures.push(format!("{}: did not run", kind.name));
        }
        for kind in &report.kinds {
            if let Some((value, right)) = kind.first_wrong {
                let (name, wrong, runs) = (kind.name, kind.wrong, kind.runs);
                self.failures.push(format!(
                    "{name}: {wrong} wrong in {runs} runs, {value:#x} not {right:#x}"
                ));
            }
        }
    }

    fn check_lost_ram(&mut self) {
        if self.failures.is_empty() {
            self.failures.push("the guest read RAM that was gone".into());
        }
    }

    fn add_probe(&mut self, ram: &HostMapping) {
        let probe = match ProbeReport::read(ram, 0) {
            Ok(probe) => probe,
            Err(error) => return self.failures.push(error.to_string()),
        };
        for found in &probe.functions {
            let (bus, device, function) = (found.bdf >> 8, (found.bdf >> 3) & 0x1f, found.bdf & 7);
            self.findings.push(format!(
                "{bus:02x}:{device:02x}.{function} {:04x}:{:04x}",
                found.vendor, found.device
            ));
        }
        if probe.mismatches > 0 {
            self.failures.push(format!("{} ids differ between ports and ECAM", probe.mismatches));
        }
        if probe.functions.len() != self.functions {
            let (found, attached) = (probe.functions.len(), self.functions);
            self.failures.push(format!("the guest found {found} of {attached} functions"));
        }
    }

    fn add_edu(&mut self, ram: &HostMapping, device: usize) {
        match EduReport::read(ram, device) {
            Ok(edu) if edu.passed() => {
                self.findings.push(format!("edu {device}: factorial and DMA are right"));
            }
            Ok(edu) => self.failures.push(format!("edu {device}: {edu:?}")),
            Err(error) => self.failures.push(format!("edu {device}: {error}")),
        }
    }
}

fn passes_through(frontend: &Frontend, placement: &Placement) -> bool {
    placement.edu_functions().any(|index| is_mapped(frontend, index, 0))
}

/// Prints one object on a line of its own.
pub(super) fn print_line(line: &Line) {
    let mut bytes = serde_json::to_vec(line).expect("plain data always serialises");
    bytes.push(b'\n');
    write_out(&bytes);
}

/// One line on standard error, and the exit status of an operator's mistake.
pub(super) fn start_failure(error: &MachineError) -> ExitCode {
    say(&error.to_string());
    ExitCode::from(2)
}

/// One line on standard error, written before this returns. It is lost if nobody can take it.
pub(super) fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "barkeep-vmm: {message}");
}

/// Whoever started us may have stopped listening; that is no reason to fail.
fn write_out(bytes: &[u8]) {
    let _ = std::io::stdout().lock().write_all(bytes);
}

use std::io::Write;

use barkeep_shim::vmm::Report;
use serde::Serialize;

use super::Arguments;

/// What the demo prints.
#[derive(Debug, Default, Serialize)]
pub(super) struct Outcome {
    hypervisor: String,
    cycles: u64,
    vcpus: u32,
    devices: u32,
    /// Reads of BARs by the guest, and those of them that were Unsupported Requests.
    reads: u64,
    reads_ur: u64,
    /// Writes to trapped BARs: the guest's count, and the backends' two, which must add up to it.
    writes: u64,
    writes_applied: u64,
    writes_dropped: u64,
    /// Writes to directly mapped BARs, which nobody but the guest can count.
    mapped_writes: u64,
    memory_faults: u64,
    wrong_values: u64,
    vm_alive: bool,
    seconds: f64,
    /// Time that the VMM takes for an MMIO exit.
    mmio_p50_ns: u64,
    mmio_p99_ns: u64,
    violations: Vec<String>,
}

impl Outcome {
    pub(super) fn new(
        arguments: &Arguments,
        report: Option<Report>,
        vm_alive: bool,
        sidecar_failures: Vec<String>,
    ) -> Self {
        let vm_alive = vm_alive && report.is_some();
        let report = report.unwrap_or_default();
        let mut violations = report.failures;
        violations.extend(sidecar_failures);
        if !vm_alive {
            violations.push("the VM died".into());
        }
        Self {
            hypervisor: report.hypervisor,
            cycles: report.cycles,
            vcpus: arguments.vcpus,
            devices: arguments.devices,
            reads: report.reads,
            reads_ur: report.reads_ur,
            writes: report.trapped_writes,
            writes_applied: report.backends.writes_applied,
            writes_dropped: report.backends.writes_dropped,
            mapped_writes: report.mapped_writes,
            memory_faults: report.memory_faults,
            wrong_values: report.wrong_values,
            vm_alive,
            seconds: report.seconds,
            mmio_p50_ns: report.latency.p50_ns,
            mmio_p99_ns: report.latency.p99_ns,
            violations,
        }
    }

    pub(super) fn passed(&self) -> bool {
        self.violations.is_empty() && self.wrong_values == 0 && self.vm_alive
    }

    /// Prints to standard output. If nobody reads it, the exit status still tells.
    pub(super) fn print(&self, json: bool) {
        let text = if json {
            let mut line = serde_json::to_string(self).expect("plain data always serialises");
            line.push('\n');
            line
        } else {
            self.table()
        };
        let _ = std::io::stdout().write_all(text.as_bytes());
    }

    fn table(&self) -> String {
        let micros = |nanos: u64| format!("{}.{:03} us", nanos / 1000, nanos % 1000);
        let writes = format!(
            "{} = {} applied + {} dropped",
            self.writes, self.writes_applied, self.writes_dropped
        );
        let rows = [
            ("hypervisor", self.hypervisor.clone()),
            ("MEM off and on again", format!("{} cycles", self.cycles)),
            ("vCPUs", format!("{}: 1 toggles, {} access", self.vcpus, self.vcpus - 1)),
            ("devices", format!("{}, each in its own process", self.devices)),
            ("reads", self.reads.to_string()),
            ("  answered as UR", self.reads_ur.to_string()),
            ("writes, trapped BARs", writes),
            ("writes, mapped BARs", self.mapped_writes.to_string()),
            ("memory faults resolved", self.memory_faults.to_string()),
            ("wrong values", self.wrong_values.to_string()),
            ("VM", if self.vm_alive { "alive".into() } else { "DEAD".into() }),
            ("MMIO exit p50", micros(self.mmio_p50_ns)),
            ("MMIO exit p99", micros(self.mmio_p99_ns)),
            ("time", format!("{:.2} s", self.seconds)),
            ("result", if self.passed() { "passed".into() } else { "FAILED".into() }),
        ];
        let mut text: String =
            rows.iter().map(|(name, value)| format!("{name:<24}{value}\n")).collect();
        for violation in &self.violations {
            text.push_str(&format!("violation: {violation}\n"));
        }
        text
    }
}

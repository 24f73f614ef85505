//! One virtual CPU: runs it and completes its exits.

use std::sync::mpsc;
use std::time::Instant;

use hdrhistogram::Histogram;

use super::guest::EXIT_PORT;
use super::machine::request_stop;
use super::pci_host::PciHost;
use crate::FaultOutcome;
use crate::fault::ProgressGuard;
use crate::hypervisor::{HostMapping, MemoryFault, Vcpu, VcpuExit};

/// Everything that one thread needs to run one virtual CPU.
pub(super) struct VcpuThread<'a> {
    id: u32,
    vcpu: Box<dyn Vcpu>,
    host: &'a PciHost,
    ram: &'a HostMapping,
    /// Dropped at the end: the monitor hears it.
    bell: mpsc::Sender<()>,
}

/// How a virtual CPU ended, and what it measured.
#[derive(Debug)]
pub(super) struct VcpuEnd {
    /// `None` when it halted, as programs do in the end.
    pub(super) failure: Option<String>,
    /// Time that the VMM took for each MMIO exit, in nanoseconds.
    pub(super) latency: Histogram<u64>,
}

impl VcpuEnd {
    pub(super) fn panicked() -> Self {
        Self { failure: Some("the thread of a vCPU panicked".into()), latency: new_histogram() }
    }
}

impl<'a> VcpuThread<'a> {
    pub(super) fn new(
        id: u32,
        vcpu: Box<dyn Vcpu>,
        host: &'a PciHost,
        ram: &'a HostMapping,
        bell: mpsc::Sender<()>,
    ) -> Self {
        Self { id, vcpu, host, ram, bell }
    }

    pub(super) fn run(mut self) -> VcpuEnd {
        let mut latency = new_histogram();
        let failure = self.run_until_end(&mut latency).err();
        if failure.is_some() {
            // The others would wait for this one for ever.
            request_stop(self.ram);
        }
        drop(self.bell);
        VcpuEnd { failure: failure.map(|text| format!("vCPU {}: {text}", self.id)), latency }
    }

    fn run_until_end(&mut self, latency: &mut Histogram<u64>) -> Result<(), String> {
        let mut guard = ProgressGuard::default();
        loop {
            let exit = self.vcpu.run().map_err(|error| error.to_string())?;
            match exit {
                VcpuExit::MmioRead { address, data } => {
                    guard.progress();
                    measure(latency, || self.host.mmio_read(address.0, data));
                }
                VcpuExit::MmioWrite { address, data } => {
                    guard.progress();
                    measure(latency, || self.host.mmio_write(address.0, data));
                }
                VcpuExit::PioRead { port, width, data } => {
                    guard.progress();
                    data.chunks_exact_mut(width).for_each(|item| self.host.port_read(port, item));
                }
                // What a program found is in its own counters.
                VcpuExit::PioWrite { port: EXIT_PORT, .. } => guard.progress(),
                VcpuExit::PioWrite { port, width, data } => {
                    guard.progress();
                    data.chunks_exact(width).for_each(|item| self.host.port_write(port, item));
                }
                VcpuExit::MemoryFault(fault) => resolve(self.host, &mut guard, &fault)?,
                VcpuExit::Interrupted => {}
                VcpuExit::Halted => return Ok(()),
                VcpuExit::Shutdown => return Err("triple fault".into()),
                other => return Err(format!("{other:?}")),
            }
        }
    }
}

fn resolve(host: &PciHost, guard: &mut ProgressGuard, fault: &MemoryFault) -> Result<(), String> {
    let frontend = host.frontend();
    if let Err(error) = guard.fault(fault, frontend.progress()) {
        // Trapped, the BAR needs no memory that could fault.
        guard.progress();
        return if frontend.quarantine(fault) { Ok(()) } else { Err(error.to_string()) };
    }
    match frontend.memory_fault(fault) {
        FaultOutcome::Reenter(_) => Ok(()),
        FaultOutcome::NotMine => Err(format!("{fault} outside of every BAR")),
    }
}

/// From the exit to the answer: what a guest waits, but for the exit itself.
fn measure(latency: &mut Histogram<u64>, access: impl FnOnce()) {
    let started = Instant::now();
    access();
    let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
    latency.saturating_record(elapsed);
}

/// 1 ns to 100 s with 3 digits.
fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("the bounds are valid")
}

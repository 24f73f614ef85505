//! One virtual CPU: runs it and completes its exits.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::MemoryFaults;
use super::guest::{EXIT_PORT, LOSE_RAM_PORT};
use super::guest_memory::GuestMemory;
use super::machine::request_stop;
use super::pci_host::PciHost;
use crate::fault::{MemoryFault, ProgressGuard, Verdict};
use crate::hypervisor::{Vcpu, VcpuExit};
use crate::{FaultOutcome, Frontend};

/// Everything that one thread needs to run one virtual CPU.
pub(super) struct VcpuThread<'a> {
    pub(super) id: u32,
    pub(super) vcpu: Box<dyn Vcpu>,
    pub(super) host: &'a PciHost,
    pub(super) memory: &'a GuestMemory,
    pub(super) memory_faults: MemoryFaults,
    /// Dropped at the end: the monitor hears it.
    pub(super) bell: mpsc::Sender<()>,
}

/// How a virtual CPU ended, and what it measured.
#[derive(Debug)]
pub(super) struct VcpuEnd {
    /// `None` when it halted, as programs do in the end.
    pub(super) failure: Option<String>,
    /// Time that the VMM took for each MMIO exit, in nanoseconds.
    pub(super) latency: Histogram<u64>,
    /// The longest time that one instruction took from its first memory fault to its last.
    pub(super) longest_stuck: Duration,
}

impl VcpuEnd {
    pub(super) fn panicked() -> Self {
        Self {
            failure: Some("the thread of a vCPU panicked".into()),
            latency: new_histogram(),
            longest_stuck: Duration::ZERO,
        }
    }
}

impl VcpuThread<'_> {
    pub(super) fn run(mut self) -> VcpuEnd {
        let mut latency = new_histogram();
        let mut faults = Faults { memory_faults: self.memory_faults, ..Faults::default() };
        let failure = self.run_until_end(&mut latency, &mut faults).err();
        if failure.is_some() {
            // The others would wait for this one for ever.
            request_stop(&self.memory.ram);
        }
        drop(self.bell);
        VcpuEnd {
            failure: failure.map(|text| format!("vCPU {}: {text}", self.id)),
            latency,
            longest_stuck: faults.longest_stuck,
        }
    }

    fn run_until_end(
        &mut self,
        latency: &mut Histogram<u64>,
        faults: &mut Faults,
    ) -> Result<(), String> {
        loop {
            let exit = self.vcpu.run().map_err(|error| error.to_string())?;
            match exit {
                VcpuExit::MmioRead { address, data } => {
                    self.memory.refuse_mmio(address)?;
                    measure(latency, || self.host.mmio_read(address.0, data));
                    faults.retired();
                }
                VcpuExit::MmioWrite { address, data } => {
                    self.memory.refuse_mmio(address)?;
                    measure(latency, || self.host.mmio_write(address.0, data));
                    faults.retired();
                }
                VcpuExit::PioRead { port, width, data } => {
                    data.chunks_exact_mut(width).for_each(|item| self.host.port_read(port, item));
                    faults.went_on();
                }
                // What a program found is in its own counters.
                VcpuExit::PioWrite { port: EXIT_PORT, .. } => faults.went_on(),
                VcpuExit::PioWrite { port: LOSE_RAM_PORT, .. } => {
                    self.memory.lose().map_err(|error| format!("can't lose RAM: {error}"))?;
                }
                VcpuExit::PioWrite { port, width, data } => {
                    data.chunks_exact(width).for_each(|item| self.host.port_write(port, item));
                    faults.went_on();
                }
                VcpuExit::MemoryFault(fault) => faults.resolve(self.host.frontend(), &fault)?,
                VcpuExit::Interrupted => {}
                VcpuExit::Halted => return Ok(()),
                VcpuExit::Shutdown => return Err("triple fault".into()),
                other => return Err(other.to_string()),
            }
        }
    }
}

/// The memory faults of one virtual CPU.
struct Faults {
    memory_faults: MemoryFaults,
    guard: ProgressGuard,
    /// The first fault of an instruction that has not gone on yet, as far as we know.
    since: Option<Instant>,
    longest_stuck: Duration,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            memory_faults: MemoryFaults::Resolve,
            guard: ProgressGuard::default(),
            since: None,
            longest_stuck: Duration::ZERO,
        }
    }
}

impl Faults {
    fn resolve(&mut self, frontend: &Frontend, fault: &MemoryFault) -> Result<(), String> {
        if self.memory_faults == MemoryFaults::Fatal {
            return Err(fault.to_string());
        }
        self.since.get_or_insert_with(Instant::now);
        if let Err(error) = self.guard.fault(fault, frontend.progress(fault)) {
            // Trapped, the BAR needs no memory that could fault.
            self.guard.progress();
            return if frontend.quarantine(fault) { Ok(()) } else { Err(error.to_string()) };
        }
        match frontend.memory_fault(fault) {
            // The instruction reaches the memory now, and may have no other exit.
            FaultOutcome::Reenter(Verdict::Map | Verdict::Relax) => self.note_stuck(),
            FaultOutcome::Reenter(_) => {}
            FaultOutcome::NotMine => return Err(format!("{fault}, which is in no BAR")),
        }
        Ok(())
    }

    /// An access was completed as MMIO: what had faulted has retired.
    fn retired(&mut self) {
        self.note_stuck();
        self.went_on();
    }

    fn went_on(&mut self) {
        self.since = None;
        self.guard.progress();
    }

    fn note_stuck(&mut self) {
        if let Some(since) = self.since {
            self.longest_stuck = self.longest_stuck.max(since.elapsed());
        }
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

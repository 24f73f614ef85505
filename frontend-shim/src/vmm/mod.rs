//! The reference VMM: RAM, virtual CPUs, a PCI host bridge's configuration access, and any number of
//! functions in backend processes. It runs the small built-in [`guest`] programs.

pub mod guest;
mod guest_memory;
mod instructions;
mod machine;
mod monitor;
mod pci_host;
mod placement;
mod report;
mod vcpu;

#[cfg(test)]
mod tests;

pub use machine::{Machine, MachineError};
pub use report::{Backends, Latency, Line, Progress, Report};

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::bar::SuspendOrder;
use crate::client::DeadBackend;

/// Options of `barkeep-vmm`.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Socket of a backend's function; may repeat. Functions become 00:00.0, 00:01.0, ...
    #[arg(long = "device", value_name = "SOCKET", required = true)]
    pub devices: Vec<PathBuf>,
    /// Guest program to run
    #[arg(long, value_enum, default_value_t = Program::Probe)]
    pub program: Program,
    /// Virtual CPUs; only `toggle`, `hammer` and `recover` use more than one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: u32,
    /// Rounds of `toggle`
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub cycles: u64,
    /// Hypervisor to run on
    #[arg(long, value_enum, default_value_t = HypervisorChoice::Auto)]
    pub hypervisor: HypervisorChoice,
    /// What comes first when the guest clears PCI_COMMAND.MEM
    #[arg(long, value_enum, default_value_t = Order::SlotsFirst)]
    pub suspend_order: Order,
    /// What to do about memory faults
    #[arg(long, value_enum, default_value_t = MemoryFaults::Resolve)]
    pub memory_faults: MemoryFaults,
    /// How backends reach guest memory
    #[arg(long, value_enum, default_value_t = Dma::Shared)]
    pub dma: Dma,
    /// How `lost-ram` loses its memory
    #[arg(long, value_enum, default_value_t = Loss::Protected)]
    pub loss: Loss,
    /// Seconds that a backend may take for one answer
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub deadline: u64,
    /// What accesses do while a backend is gone: `ur` (complete as Unsupported Request), or
    /// `stall=SECONDS` (wait for it, at most so long)
    #[arg(long, value_name = "POLICY", default_value = "ur", value_parser = parse_dead_backend)]
    pub dead_backend: DeadBackend,
    /// Connect again to backends that have gone
    #[arg(long)]
    pub reconnect: bool,
    /// Print progress and report as JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Guest programs, as an operator names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Program {
    /// Enumerate the bus through ports and ECAM
    Probe,
    /// Compute a factorial and copy by DMA on every edu function
    Edu,
    /// Toggle PCI_COMMAND.MEM on vCPU 0 while the others read and write the BARs
    Toggle,
    /// Read and write the BARs until standard input ends, while somebody else toggles them
    Hammer,
    /// Program functions anew on vCPU 0 whenever they have been reset, while the others read and write
    /// the BARs, until standard input ends
    Recover,
    /// Make every kind of access with decode on and off
    Instructions,
    /// Lose RAM and read it: the VM must not survive that
    LostRam,
}

/// What becomes of a memory fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum MemoryFaults {
    /// Resolve it
    Resolve,
    /// Stop the VM, as VMMs do that know nothing of disabled BARs
    Fatal,
}

/// How backends reach guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dma {
    /// It is shared with them
    Shared,
    /// They ask for it, message by message
    Messages,
}

/// How RAM gets lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Loss {
    /// Its pages refuse access (PROT_NONE)
    Protected,
    /// Its file is cut off; KVM only
    Vanished,
}

/// Which hypervisor to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum HypervisorChoice {
    /// KVM where it works, else the model
    Auto,
    /// KVM or nothing
    Kvm,
    /// Microsoft's hypervisor; has never been tried on a real one
    #[cfg(feature = "mshv")]
    Mshv,
    /// The software hypervisor
    Model,
}

/// [`SuspendOrder`], as an operator names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// Memory slots go before the write is forwarded: nothing can fault
    SlotsFirst,
    /// The memory goes first and its slots last, as with vfio-pci: accesses in between fault
    BackingFirst,
    /// Both in turn
    Alternate,
    /// The memory goes and its slots stay, until an access faults
    FaultsOnly,
}

impl From<Order> for SuspendOrder {
    fn from(order: Order) -> Self {
        match order {
            Order::SlotsFirst => Self::SlotsFirst,
            Order::BackingFirst => Self::BackingFirst,
            Order::Alternate => Self::Alternate,
            Order::FaultsOnly => Self::FaultsOnly,
        }
    }
}

/// Runs the VMM with these options. The exit status is 0 if every value that the guest read was
/// right, 1 if not or if the VM died, 2 if it could not start.
#[must_use]
pub fn run(arguments: &Arguments) -> ExitCode {
    let machine = match Machine::new(arguments) {
        Ok(machine) => machine,
        Err(error) => return report::start_failure(&error),
    };
    match machine.run(arguments) {
        Ok(report) => {
            report.print(arguments.json);
            if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => report::start_failure(&error),
    }
}

/// More than a day is no deadline.
const LONGEST_STALL: u64 = 24 * 60 * 60;

fn parse_dead_backend(text: &str) -> Result<DeadBackend, String> {
    let seconds = match text.split_once('=') {
        None if text == "ur" => return Ok(DeadBackend::UnsupportedRequest),
        Some(("stall", seconds)) => seconds.parse().ok(),
        _ => None,
    };
    match seconds {
        Some(seconds @ 1..=LONGEST_STALL) => Ok(DeadBackend::Stall(Duration::from_secs(seconds))),
        _ => Err(format!("ur, or stall=SECONDS from 1 to {LONGEST_STALL}")),
    }
}

/// How long the guest may stand still before the VM counts as hung. Far more than a backend's
/// deadline, so that a slow backend is told apart.
const STALL_LIMIT: Duration = Duration::from_secs(60);

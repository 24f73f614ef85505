//! `barkeep demo`: the main job, end to end, on this machine.
//!
//! One process for each device, one for the VM. In the guest, one virtual CPU clears and sets
//! `PCI_COMMAND.MEM` without pause while the others read and write the BARs: what kills a VM with an
//! assigned device. Here every read must return a legal register value or all ones, every write must
//! arrive once or be dropped and counted, and the VM must live.

mod outcome;
mod sidecar;
mod vm;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use barkeep_shim::vmm::{HypervisorChoice, Order};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::error;

use outcome::Outcome;
use sidecar::Sidecar;

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Cycles of clearing and setting PCI_COMMAND.MEM on every function
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    cycles: u64,
    /// Virtual CPUs: one toggles, the others access the BARs
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: u32,
    /// Devices, each in a process of its own: an edu function with a trapped BAR and an ivshmem
    /// function with a directly mapped one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    devices: u32,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
    /// Hypervisor to run on
    #[arg(long, value_enum, default_value_t = HypervisorChoice::Auto)]
    hypervisor: HypervisorChoice,
    /// What comes first when the guest clears PCI_COMMAND.MEM
    #[arg(long, value_enum, default_value_t = Order::Alternate)]
    suspend_order: Order,
}

pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    match play(arguments) {
        Ok(outcome) => {
            outcome.print(arguments.json);
            if outcome.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(failure) => {
            error!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn play(arguments: &Arguments) -> Result<Outcome, String> {
    // Before there is anything to clean up: from here on a signal ends the demo, not its cleanup.
    let interrupted = interruption()?;
    let directory = tempfile::Builder::new()
        .prefix("barkeep-demo-")
        .tempdir()
        .map_err(|failure| format!("can't create a directory for the sockets: {failure}"))?;
    let sidecars = (0..arguments.devices)
        .map(|number| Sidecar::start(directory.path(), number))
        .collect::<Result<Vec<_>, _>>()?;
    let sockets: Vec<_> = sidecars.iter().flat_map(Sidecar::sockets).collect();
    if interrupted.load(Ordering::Relaxed) {
        return Err(INTERRUPTED.into());
    }
    let (report, vm_alive) = vm::run(arguments, &sockets, &interrupted)?;
    // A sidecar that died has been noticed by the guest's counts; how it ended is told as well.
    let mut failures: Vec<_> =
        sidecars.into_iter().filter_map(|sidecar| sidecar.stop().err()).collect();
    if interrupted.load(Ordering::Relaxed) {
        // A terminal tells the sidecars too, so that they have ended is no news.
        failures = vec![INTERRUPTED.into()];
    }
    Ok(Outcome::new(arguments, report, vm_alive, failures))
}

const INTERRUPTED: &str = "interrupted";

/// Becomes true with SIGINT or SIGTERM.
fn interruption() -> Result<Arc<AtomicBool>, String> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|failure| format!("can't handle signals: {failure}"))?;
    }
    Ok(interrupted)
}

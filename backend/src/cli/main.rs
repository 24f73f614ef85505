//! The `barkeep` command.

mod ctl;
#[cfg(feature = "demo")]
mod demo;
mod heritage;
mod log;
mod run;
mod serve;
mod upgrade;
mod vhost_user;
mod worker;
mod wrap;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tracing_subscriber::EnvFilter;

/// PCI devices in sidecar processes that cannot take the VM down.
#[derive(Debug, Parser)]
#[command(name = "barkeep", version)]
struct Arguments {
    /// How much to log to standard error: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, global = true, env = "BARKEEP_LOG", default_value = "info", value_name = "FILTER")]
    log: String,

    /// Stop when the process that started this one ends: its process ID
    #[arg(long, hide = true, value_name = "PID")]
    die_with_parent: Option<u32>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve PCI functions over vfio-user, one socket each
    Serve(serve::Arguments),
    /// As serve, with workers that are replaced when they end and go on with the same clients
    Run(run::Arguments),
    /// Have a running 'barkeep run' execute what is at its path now, without an end for any client
    Upgrade(upgrade::Arguments),
    /// Run a VMM as it was shipped, with a library preloaded that completes accesses to disabled BARs
    Wrap(wrap::Arguments),
    /// Ask a running process
    Ctl(ctl::Arguments),
    /// Tell whether this program can take the place of one with these arguments
    #[command(hide = true)]
    UpgradeCheck(upgrade::CheckArguments),
    /// Serve functions for `run`, which starts this
    #[command(hide = true)]
    Worker(worker::Arguments),
    /// Toggle PCI_COMMAND.MEM under load in a real guest and check every value it reads
    #[cfg(feature = "demo")]
    Demo(demo::Arguments),
    /// The reference VMM of the demo, in a process of its own
    #[cfg(feature = "demo")]
    #[command(hide = true)]
    Vmm(barkeep_shim::vmm::Arguments),
}

/// An operator's mistake, as clap reports its own.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = match EnvFilter::builder().parse(&arguments.log) {
        Ok(filter) => filter,
        Err(error) => return usage_error(&format!("--log: {error}")),
    };
    // Dropped after everything else, so that the last lines are written.
    let _log = log::start(filter);
    if let Some(parent) = arguments.die_with_parent {
        match die_with_parent(parent) {
            Ok(true) => {}
            Ok(false) => {
                tracing::error!("the process that started this one has ended");
                return ExitCode::FAILURE;
            }
            Err(errno) => tracing::warn!("will not stop with the parent process: {errno}"),
        }
    }
    match arguments.command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Run(run) => run::run(&run, arguments.log),
        Command::Upgrade(arguments) => upgrade::run(&arguments),
        Command::Wrap(arguments) => wrap::run(&arguments),
        Command::Ctl(arguments) => ctl::run(&arguments),
        Command::UpgradeCheck(arguments) => upgrade::check(&arguments),
        Command::Worker(arguments) => worker::run(arguments),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::run(&arguments),
        #[cfg(feature = "demo")]
        Command::Vmm(arguments) => barkeep_shim::vmm::run(&arguments),
    }
}

/// Has the kernel end this process with `parent`. Returns whether the parent was still there: the
/// kernel says nothing about an end before it was asked.
fn die_with_parent(parent: u32) -> Result<bool, Errno> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    let parent = i32::try_from(parent).ok().and_then(Pid::from_raw);
    Ok(parent.is_some() && getppid() == parent)
}

/// One line on standard error that names the option and the reason.
fn usage_error(message: &str) -> ExitCode {
    log::say(&format!("barkeep: {message}"));
    ExitCode::from(EXIT_USAGE)
}

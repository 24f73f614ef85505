//! The `barkeep` command.

#[cfg(feature = "demo")]
mod demo;
mod serve;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use rustix::process::{Signal, set_parent_process_death_signal};
use tracing_subscriber::EnvFilter;

/// PCI devices in sidecar processes that cannot take the VM down.
#[derive(Debug, Parser)]
#[command(name = "barkeep", version)]
struct Arguments {
    /// How much to log to standard error: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, global = true, env = "BARKEEP_LOG", default_value = "info", value_name = "FILTER")]
    log: String,

    /// Stop when the process that started this one ends
    #[arg(long, hide = true)]
    die_with_parent: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve PCI functions over vfio-user, one socket each
    Serve(serve::Arguments),
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
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    if arguments.die_with_parent
        && let Err(errno) = set_parent_process_death_signal(Some(Signal::TERM))
    {
        tracing::warn!("will not stop with the parent process: {errno}");
    }
    match arguments.command {
        Command::Serve(arguments) => serve::run(arguments),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => demo::run(&arguments),
        #[cfg(feature = "demo")]
        Command::Vmm(arguments) => barkeep_shim::vmm::run(&arguments),
    }
}

/// One line on standard error that names the option and the reason.
#[expect(clippy::print_stderr, reason = "the command line's own answer")]
fn usage_error(message: &str) -> ExitCode {
    eprintln!("barkeep: {message}");
    ExitCode::from(EXIT_USAGE)
}

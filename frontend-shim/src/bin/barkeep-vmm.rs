//! The reference VMM. See `barkeep_shim::vmm`.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

/// Reference VMM for functions in barkeep processes: runs small built-in guest programs.
#[derive(Debug, Parser)]
#[command(name = "barkeep-vmm", version)]
struct Options {
    /// How much to log to standard error: error, warn, info, debug, trace, or a tracing filter
    #[arg(long, env = "BARKEEP_LOG", default_value = "info", value_name = "FILTER")]
    log: EnvFilter,

    #[command(flatten)]
    arguments: barkeep_shim::vmm::Arguments,
}

fn main() -> ExitCode {
    let options = Options::parse();
    tracing_subscriber::fmt()
        .with_env_filter(options.log)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    barkeep_shim::vmm::run(&options.arguments)
}

//! The lab's program inside the guest: drives the `edu` and `ivshmem` functions the way a driver
//! does and says what it saw, one `CHECK name ok|fail detail` line per check on standard output.
//!
//! `tests/lab/run` builds it statically, boots a Linux guest with it and reads the lines;
//! `tests/lab/checks` lists every name. It trusts nothing it reads: a check that cannot be carried
//! out fails and says why.

mod checks;
mod edu;
mod memory;
mod mmio;
mod pci;
mod report;
mod vfio;

use std::env;
use std::error::Error;
use std::io;
use std::process::ExitCode;

use report::Report;

/// A check fails with a sentence for the log; nobody handles its cause.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Fails the surrounding check with a formatted sentence unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err(format!($($sentence)+).into());
        }
    };
}
use ensure;

const USAGE: &str = "usage: lab-guest direct|vfio NONCE";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [boot, nonce] = arguments.as_slice() else {
        return fatal(USAGE);
    };
    let mut report = Report::new(io::stdout());
    let run = match boot.as_str() {
        "direct" => checks::direct::run(&mut report, nonce),
        "vfio" => checks::vfio::run(&mut report, nonce),
        _ => return fatal(USAGE),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fatal(&error.to_string()),
    }
}

#[expect(clippy::print_stderr, reason = "the guest's console is this program's error channel")]
fn fatal(why: &str) -> ExitCode {
    eprintln!("lab-guest: {why}");
    ExitCode::FAILURE
}

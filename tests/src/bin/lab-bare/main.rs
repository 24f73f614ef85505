//! Makes the guest that `tests/lab/wrap` hammers a function with: `lab-bare OUT`.
//!
//! The lab's host is emulated, and its SVM now and then hands an interrupt to a VM twice, or never. This
//! guest has no interrupts, so it can't be hit: two processors, each of which does one thing for ever.
//! One toggles `PCI_COMMAND.MEM` of an `edu` or `ivshmem` function, the other reads and writes the BAR
//! meanwhile. It says on the first serial port what the [hammer](../lab-guest/hammer.rs) of a Linux guest says.
//!
//! OUT is a flat multiboot image for QEMU's `-kernel`. The last word of `-append` is how often it
//! toggles; without a number somebody outside does, and a byte on the serial port is the end.

mod asm;
mod boot;
mod image;
mod program;
mod traps;

use std::env;
use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

/// A failure is a sentence for the log; nobody handles its cause.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [out] = arguments.as_slice() else {
        return fatal("usage: lab-bare OUT");
    };
    match image::make().and_then(|image| Ok(fs::write(out, image)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fatal(&format!("{out}: {error}")),
    }
}

fn fatal(message: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "lab-bare: {message}");
    ExitCode::FAILURE
}

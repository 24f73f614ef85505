//! The lab's program inside the guest: drives the `edu` and `ivshmem` functions the way a driver
//! does and says what it saw, one `CHECK name ok|fail|skipped detail` line per check on standard
//! output.
//!
//! `tests/lab/run` builds it statically, boots a Linux guest with it and reads the lines;
//! `tests/lab/checks` lists every name. It trusts nothing it reads: a check that cannot be carried
//! out fails and says why.
//!
//! On the host it can be the server that QEMU's own `ivshmem-doorbell` needs, and the other end of a
//! network or of a console.

mod checks;
mod console_peer;
mod doorbell_server;
mod edu;
mod hammer;
mod memory;
mod mmio;
mod net_peer;
mod pattern;
mod pci;
mod report;
mod requests;
mod vfio;

use std::env;
use std::error::Error;
use std::io;
use std::process::ExitCode;

use checks::reboot::Next;
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

const USAGE: &str = "usage: lab-guest BOOT NONCE ROUNDS
       lab-guest worker edu|ivshmem INDEX PART ROUNDS
       lab-guest hammer edu|ivshmem TOGGLES|until-told
       lab-guest doorbell-server SOCKET FILE VECTORS
       lab-guest net-peer ADDRESS
       lab-guest console-peer SOCKET";

/// What the exit status tells the script that runs this program: how the guest goes on.
const REBOOT: u8 = 3;
const AWAIT_RESET: u8 = 4;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(Next::PowerOff) => ExitCode::SUCCESS,
        Ok(Next::Reboot) => REBOOT.into(),
        Ok(Next::AwaitReset) => AWAIT_RESET.into(),
        Err(error) => fatal(&error.to_string()),
    }
}

fn run(arguments: &[&str]) -> Result<Next> {
    match *arguments {
        ["worker", kind, index, part, rounds] => {
            checks::many::work(kind, index.parse()?, part.parse()?, rounds.parse()?)?;
        }
        ["hammer", kind, toggles] => hammer::run(kind, toggles)?,
        ["doorbell-server", socket, file, vectors] => {
            doorbell_server::serve(socket, file, vectors.parse()?)?;
        }
        ["net-peer", address] => net_peer::serve(address)?,
        ["console-peer", socket] => console_peer::answer(socket)?,
        [boot, nonce, rounds] => return run_checks(boot, nonce, rounds.parse()?),
        _ => return Err(USAGE.into()),
    }
    Ok(Next::PowerOff)
}

fn run_checks(boot: &str, nonce: &str, rounds: u32) -> Result<Next> {
    let report = &mut Report::new(io::stdout());
    match boot {
        "direct" => checks::direct::run(report, nonce)?,
        "vfio" => checks::vfio::run(report, nonce, rounds)?,
        "msix" => checks::msix::run(report, rounds)?,
        "many" => checks::many::run(report, nonce, rounds)?,
        "hotplug" => checks::hotplug::run(report, rounds)?,
        "reboot" => return checks::reboot::run(report, rounds),
        "message" => checks::messages::run_direct(report)?,
        "message-vfio" => checks::messages::run_vfio(report, rounds)?,
        "vfio-user" => checks::virtio::run_devices(report, nonce, rounds)?,
        "vhost-user" => checks::virtio::run_vhost_user(report, nonce, rounds)?,
        "memory-off" => checks::virtio::run_memory(report, nonce, rounds)?,
        "master-off" => checks::virtio::run_master(report, nonce, rounds)?,
        "bridge" => checks::virtio::run_bridge(report, nonce, rounds)?,
        "copy" => checks::crash::run_copy(report, nonce)?,
        "functions" => checks::crash::run_functions(report, nonce)?,
        "mapped" => checks::crash::run_mapped(report)?,
        "toggled" => checks::crash::run_toggled(report, nonce)?,
        "restarted" => return checks::reboot::run(report, rounds),
        "unsupervised" => checks::crash::run_unsupervised(report, nonce)?,
        "stopped" => checks::crash::run_stopped(report, nonce, rounds)?,
        "upgraded" => checks::crash::run_upgraded(report, nonce, rounds)?,
        "full" => checks::crash::run_full(report, nonce)?,
        _ => return Err(USAGE.into()),
    }
    Ok(Next::PowerOff)
}

#[expect(clippy::print_stderr, reason = "the guest's console is this program's error channel")]
fn fatal(why: &str) -> ExitCode {
    eprintln!("lab-guest: {why}");
    ExitCode::FAILURE
}

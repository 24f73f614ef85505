//! `preload-vmm`, with the library and without.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use barkeep_tests::binary;

/// The program that stands for a VMM.
const VMM: &str = env!("CARGO_BIN_EXE_preload-vmm");

/// Whether the library is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum With {
    Nothing,
    Library,
}

/// A scenario's process, to be started.
pub(crate) fn scenario(name: &str, arguments: &[&str], with: With) -> Command {
    let mut command = Command::new(VMM);
    command.arg(name).args(arguments).env_remove("LD_PRELOAD").env("BARKEEP_PRELOAD_QUIET", "1");
    if with == With::Library {
        command.env("LD_PRELOAD", library());
    }
    command.stdin(Stdio::null());
    command
}

/// Runs a scenario to its end.
pub(crate) fn run(name: &str, arguments: &[&str], with: With) -> Output {
    scenario(name, arguments, with).output().expect("the VMM starts")
}

/// What a scenario has printed.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn library() -> PathBuf {
    binary::preload()
}

/// Whether this machine has a KVM that can be used. Says that the test is skipped if not.
pub(crate) fn has_kvm() -> bool {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            barkeep_tests::skip(&format!("/dev/kvm: {error}"));
            false
        }
    }
}

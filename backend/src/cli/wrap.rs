//! `barkeep wrap`

mod elf;
mod library;
mod program;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::log::say;
use program::{Kind, Program, ProgramError};

/// What the dynamic loader reads.
const LD_PRELOAD: &str = "LD_PRELOAD";
/// What the library reads.
const QUIET: &str = "BARKEEP_PRELOAD_QUIET";

/// The program was not even looked for, as env(1) says it.
const EXIT_OURS: u8 = 125;
/// The program can't be executed, or not with the library.
const EXIT_CANNOT: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  barkeep wrap -- qemu-system-x86_64 -accel kvm -device vfio-pci,host=03:00.0 ...\n\n\
    Exit status: that of the program; 125 without the library, 126 if the program cannot be executed with\n\
    it, 127 if there is no such program."
)]
pub(crate) struct Arguments {
    /// The library to preload; without it, libbarkeep_preload.so beside this program, in ../lib/barkeep or
    /// in ../lib
    #[arg(long, env = "BARKEEP_PRELOAD", value_name = "FILE")]
    library: Option<PathBuf>,
    /// Say nothing on standard error, and have the library say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The VMM and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    program: Vec<OsString>,
}

/// Becomes the program, with the library in it. Comes back if it can't.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let Some((name, rest)) = arguments.program.split_first() else {
        return failed(EXIT_OURS, "no program");
    };
    let library = match library::find(arguments.library.as_deref()) {
        Ok(library) => library,
        Err(error) => return failed(EXIT_OURS, &error.to_string()),
    };
    let program = match Program::find(name) {
        Ok(program) => program,
        Err(error) => {
            let status = match error {
                ProgramError::NotFound => EXIT_NOT_FOUND,
                _ => EXIT_CANNOT,
            };
            return failed(status, &format!("{}: {error}", name.display()));
        }
    };
    if !arguments.quiet {
        announce(&library, &program);
    }
    let mut command = Command::new(&program.path);
    command.arg0(name).args(rest).env(LD_PRELOAD, preload(&library));
    if arguments.quiet {
        command.env(QUIET, "1");
    }
    let failure = command.exec();
    let status = match failure.kind() {
        io::ErrorKind::NotFound => EXIT_NOT_FOUND,
        _ => EXIT_CANNOT,
    };
    failed(status, &format!("{}: {failure}", name.display()))
}

fn announce(library: &Path, program: &Program) {
    let note = match program.kind {
        Kind::Dynamic => "",
        Kind::Loader => " (the dynamic loader: what it loads is not checked)",
        Kind::Unknown => " (what it is can't be seen)",
        Kind::Script => " (a script: what it executes is not checked)",
    };
    say(&format!(
        "barkeep: preloading {} into {}{note}: accesses to BARs that do not decode complete as \
         Unsupported Requests, everything else passes through",
        library.display(),
        program.path.display()
    ));
}

/// The library before all that is preloaded anyway.
fn preload(library: &Path) -> OsString {
    let mut value = library.as_os_str().to_owned();
    let before = std::env::var_os(LD_PRELOAD).unwrap_or_default();
    let separators = |byte: &u8| matches!(byte, b' ' | b':');
    for other in before.as_bytes().split(separators) {
        if !other.is_empty() && other != library.as_os_str().as_bytes() {
            value.push(":");
            value.push(OsStr::from_bytes(other));
        }
    }
    value
}

fn failed(status: u8, message: &str) -> ExitCode {
    say(&format!("barkeep: {message}"));
    ExitCode::from(status)
}

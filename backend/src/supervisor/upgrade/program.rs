use std::env;
use std::ffi::{CString, NulError, OsString};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{SigSet, Signal};
use nix::unistd::execve;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;

use super::{Handover, VARIABLE};
use crate::supervisor::inheritance;
use crate::supervisor::systemd::PRIVATE_ENVIRONMENT;

/// A hidden command of ours: `barkeep upgrade-check -- ARGUMENTS`, with the handover as standard input.
const CHECK: &str = "upgrade-check";
/// How long a program may think about it.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };
/// The longest answer, in bytes.
const MAX_ANSWER: u64 = 1024;

/// Signals that would end a program before it is ready for them.
const HANDLED: [Signal; 4] = [Signal::SIGUSR2, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT];

/// A program as it was started: what is at a path, whatever that is by now, with arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// What it is called (`argv[0]`).
    name: OsString,
    path: PathBuf,
    arguments: Vec<OsString>,
}

/// Why a program did not take the place of the running one.
#[derive(Debug, Error)]
pub enum UpgradeError {
    /// It can't be started.
    #[error("{path}: {error}", path = .path.display())]
    NotStarted {
        /// The program.
        path: PathBuf,
        /// The kernel's reason.
        error: io::Error,
    },
    /// It does not know what it is asked, or has said no.
    #[error("{path} refuses: {reason}", path = .path.display())]
    Refused {
        /// The program.
        path: PathBuf,
        /// The first line that it wrote.
        reason: String,
    },
    /// It did not answer.
    #[error("{path} does not answer", path = .path.display())]
    Silent {
        /// The program.
        path: PathBuf,
    },
    /// The handover can't be prepared.
    #[error("{0}")]
    Prepare(#[from] io::Error),
}

impl Program {
    /// This one. To be asked at the start, while the working directory is the one that its path counts
    /// from.
    ///
    /// # Errors
    /// When it can't be found out where it is.
    pub fn running() -> io::Result<Self> {
        let mut arguments = env::args_os();
        let name = arguments.next().unwrap_or_default();
        Self::named(name, arguments.collect(), env::current_dir, env::current_exe)
    }

    /// The program that a process runs, as far as `/proc` tells.
    ///
    /// # Errors
    /// When there is no such process, or it may not be looked at.
    pub fn of_process(pid: Pid) -> io::Result<Self> {
        let process = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
        let line = std::fs::read(process.join("cmdline"))?;
        let words = line.strip_suffix(b"\0").unwrap_or(&line).split(|byte| *byte == 0);
        let mut words = words.map(|word| OsString::from_vec(word.to_vec()));
        let name = words.next().unwrap_or_default();
        let link = |name| process.join(name).read_link();
        Self::named(name, words.collect(), || link("cwd"), || link("exe"))
    }

    /// A name with a directory is a path: a link that it names is followed anew. A bare one was looked
    /// up by whoever started it.
    fn named(
        name: OsString,
        arguments: Vec<OsString>,
        directory: impl FnOnce() -> io::Result<PathBuf>,
        file: impl FnOnce() -> io::Result<PathBuf>,
    ) -> io::Result<Self> {
        let is_path = name.as_bytes().contains(&b'/');
        let path = if is_path { directory()?.join(&name) } else { file()? };
        Ok(Self { name, path, arguments })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is told, without its name.
    #[must_use]
    pub fn arguments(&self) -> &[OsString] {
        &self.arguments
    }

    /// Asks what is at the path now whether it knows the arguments, and the handover if there is one.
    ///
    /// # Errors
    /// [`UpgradeError`]: then it can't take anybody's place.
    pub fn check(&self, handover: Option<&Handover>) -> Result<(), UpgradeError> {
        let stdin = match handover {
            Some(handover) => Stdio::from(handover.to_file()?),
            None => Stdio::null(),
        };
        let mut answer = File::from(answer_sheet().map_err(io::Error::from)?);
        let mut command = Command::new(&self.path);
        command.arg(CHECK).arg("--").args(&self.arguments);
        command.stdin(stdin).stdout(Stdio::null()).stderr(answer.try_clone()?);
        for variable in PRIVATE_ENVIRONMENT {
            command.env_remove(variable);
        }
        let mut child = command.spawn().map_err(|error| self.not_started(error))?;
        let Some(status) = wait(&mut child)? else {
            return Err(UpgradeError::Silent { path: self.path.clone() });
        };
        if status.success() {
            return Ok(());
        }
        let mut text = Vec::new();
        answer.rewind()?;
        answer.read_to_end(&mut text)?;
        let reason = first_line(&text).unwrap_or_else(|| status.to_string());
        Err(UpgradeError::Refused { path: self.path.clone(), reason })
    }

    /// Becomes this program, which finds the descriptors open and `upgrades` in its [`Handover`].
    /// Returns only if that fails, and then nothing has changed.
    #[must_use]
    pub fn replace(&self, upgrades: u32, held: &[(String, BorrowedFd<'_>)]) -> UpgradeError {
        let descriptors = held.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())).collect();
        let file = match (Handover { upgrades, descriptors }).to_file() {
            Ok(file) => file,
            Err(error) => return error.into(),
        };
        let error = self.execute(upgrades, &file, held);
        for fd in held.iter().map(|(_, fd)| *fd) {
            // It was open a moment ago.
            let _ = inheritance::leave_open(fd, false);
        }
        error
    }

    fn execute(
        &self,
        upgrades: u32,
        file: &OwnedFd,
        held: &[(String, BorrowedFd<'_>)],
    ) -> UpgradeError {
        for fd in held.iter().map(|(_, fd)| *fd).chain([file.as_fd()]) {
            if let Err(errno) = inheritance::leave_open(fd, true) {
                return io::Error::from(errno).into();
            }
        }
        let announcement = format!("{VARIABLE}={upgrades}:{}", file.as_raw_fd());
        let words = self.c_strings(&announcement);
        let Ok((path, arguments, environment)) = words else {
            return self.not_started(io::ErrorKind::InvalidInput.into());
        };
        // A mask outlives the exec, the handlers don't; see `ready_for_signals`.
        if let Err(errno) = SigSet::from_iter(HANDLED).thread_block() {
            return io::Error::from(errno).into();
        }
        // Not `Command::exec`: when that fails, a write to a closed pipe ends this process.
        let Err(errno) = execve(&path, &arguments, &environment);
        ready_for_signals();
        self.not_started(errno.into())
    }

    /// Path, arguments and environment of the program, as the kernel takes them.
    fn c_strings(
        &self,
        announcement: &str,
    ) -> Result<(CString, Vec<CString>, Vec<CString>), NulError> {
        let path = CString::new(self.path.as_os_str().as_bytes())?;
        let words = [&self.name].into_iter().chain(&self.arguments);
        let arguments =
            words.map(|word| CString::new(word.as_bytes())).collect::<Result<_, _>>()?;
        // What this process has taken over is not to be believed once more.
        let over = |name: &OsString| name == VARIABLE || name.as_bytes().starts_with(b"LISTEN_");
        let kept = env::vars_os().filter(|(name, _)| !over(name));
        let lines = kept.map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
        let lines = lines.chain([announcement.as_bytes().to_vec()]);
        let environment = lines.map(CString::new).collect::<Result<_, _>>()?;
        Ok((path, arguments, environment))
    }

    fn not_started(&self, error: io::Error) -> UpgradeError {
        UpgradeError::NotStarted { path: self.path.clone(), error }
    }
}

/// Lets signals come that were held back while one program took the place of another: whoever may have
/// been executed so calls it when it handles them.
pub fn ready_for_signals() {
    // Fails for no signals that exist.
    let _ = SigSet::from_iter(HANDLED).thread_unblock();
}

/// A file that a program can fill and no more. Not a pipe, which somebody would have to read meanwhile.
fn answer_sheet() -> Result<OwnedFd, Errno> {
    let file = memfd_create("barkeep-check", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, MAX_ANSWER)?;
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
    Ok(file)
}

/// Waits for a child as long as it may take; `None` if it takes longer, and it is gone then.
fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut ends = [PollFd::new(&pidfd, PollFlags::IN)];
    let ended = loop {
        match poll(&mut ends, Some(&PATIENCE)) {
            Err(Errno::INTR) => {}
            ended => break ended? > 0,
        }
    };
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(ended.then_some(status))
}

/// The first line that says something, without our own name before it.
fn first_line(text: &[u8]) -> Option<String> {
    let written = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(written);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty())?;
    let line = line.strip_prefix("barkeep: ").unwrap_or(line);
    Some(line.replace(char::is_control, "?"))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    use rustix::io::{FdFlags, fcntl_getfd};
    use tempfile::TempDir;

    use super::*;

    /// A program of a few lines of shell.
    fn program(script: &str) -> (TempDir, Program) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("barkeep");
        write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let arguments = vec!["run".into(), "--device".into(), "edu".into()];
        (directory, Program { name: "barkeep".into(), path, arguments })
    }

    fn answer(script: &str) -> Result<(), String> {
        let (_directory, program) = program(script);
        let path = program.path.display().to_string();
        program
            .check(Some(&Handover::default()))
            .map_err(|error| error.to_string().replace(&path, "P"))
    }

    #[test]
    fn a_program_is_asked_about_its_arguments_and_reads_the_handover() {
        assert_eq!(answer(r#"[ "$*" = "upgrade-check -- run --device edu" ]"#), Ok(()));
        assert_eq!(answer(r#"[ "$(head -c 8)" = barkhand ]"#), Ok(()));
        assert_eq!(answer(r#"[ -z "$NOTIFY_SOCKET" ]"#), Ok(()));
    }

    #[test]
    fn the_reason_of_a_program_that_refuses_is_one_line() {
        let refused = |text: &str| Err(format!("P refuses: {text}"));
        let answered = answer("echo; echo 'barkeep: --device edu: no' >&2; echo more >&2; exit 2");
        assert_eq!(answered, refused("--device edu: no"));
        assert_eq!(answer("printf 'a\\033b' >&2; exit 1"), refused("a?b"));
        assert_eq!(answer("exit 3"), refused("exit status: 3"));
        // Most of what `dd` writes is more than it may.
        let long =
            answer("tr '\\0' x < /dev/zero | dd bs=1024 count=9 iflag=fullblock >&2; exit 1")
                .unwrap_err();
        assert_eq!(long.len(), "P refuses: ".len() + 1024);
    }

    #[test]
    fn a_program_that_is_not_there_or_does_not_answer_is_no_successor() {
        let (_directory, mut program) = program("exec sleep 60");
        assert!(matches!(program.check(None), Err(UpgradeError::Silent { .. })));
        program.path = program.path.with_extension("gone");
        assert!(matches!(program.check(None), Err(UpgradeError::NotStarted { .. })));
    }

    #[test]
    fn a_program_that_cannot_be_executed_leaves_everything_as_it_was() {
        let (_directory, mut program) = program("exit 0");
        program.path = program.path.with_extension("gone");
        let held = File::open("/dev/null").unwrap();
        let error = program.replace(1, &[("disk/state".into(), held.as_fd())]);
        assert!(matches!(error, UpgradeError::NotStarted { .. }));
        assert!(fcntl_getfd(&held).unwrap().contains(FdFlags::CLOEXEC));
        let blocked = SigSet::thread_get_mask().unwrap();
        assert!(HANDLED.into_iter().all(|signal| !blocked.contains(signal)));
    }

    #[test]
    fn a_path_is_followed_anew_and_a_bare_name_is_where_it_was_found() {
        let path = |name: &str| {
            let (directory, file) = (|| Ok("/srv".into()), || Ok("/usr/bin/barkeep".into()));
            Program::named(name.into(), Vec::new(), directory, file).unwrap().path
        };
        assert_eq!(path("/opt/current/barkeep"), Path::new("/opt/current/barkeep"));
        assert_eq!(path("./barkeep"), Path::new("/srv/./barkeep"));
        assert_eq!(path("barkeep"), Path::new("/usr/bin/barkeep"));
    }

    #[test]
    fn another_process_is_found_by_its_number() {
        let ours = Program::of_process(rustix::process::getpid()).unwrap();
        assert_eq!(ours, Program::running().unwrap());
    }
}

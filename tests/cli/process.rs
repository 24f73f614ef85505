//! A running `barkeep`.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use barkeep_tests::binary;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// One that does not end after this many seconds hangs.
const DEADLINE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The commands that serve functions; they have the same options, and refuse the same ones.
pub(crate) const COMMANDS: [&str; 2] = ["serve", "run"];

/// `barkeep serve` or `run`, ready; killed when dropped.
pub(crate) struct Sidecar {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Sidecar {
    /// Starts it on sockets, each with a device, and waits until all of them are there.
    pub(crate) fn start(functions: &[(&Path, &str)]) -> Self {
        Self::start_with(functions, &[], Stdio::piped())
    }

    /// Starts it with further options, and with its logs going somewhere.
    pub(crate) fn start_with(
        functions: &[(&Path, &str)],
        options: &[&str],
        stderr: impl Into<Stdio>,
    ) -> Self {
        Self::start_command("serve", functions, options, stderr)
    }

    /// Starts it with workers.
    pub(crate) fn supervise(
        functions: &[(&Path, &str)],
        options: &[&str],
        stderr: impl Into<Stdio>,
    ) -> Self {
        Self::start_command("run", functions, options, stderr)
    }

    fn start_command(
        command: &str,
        functions: &[(&Path, &str)],
        options: &[&str],
        stderr: impl Into<Stdio>,
    ) -> Self {
        let mut arguments = arguments(functions);
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        Self::start_as(command, &arguments, functions, stderr)
    }

    /// Starts it in words of the test's own, which serve these functions.
    pub(crate) fn start_as(
        command: &str,
        arguments: &[String],
        functions: &[(&Path, &str)],
        stderr: impl Into<Stdio>,
    ) -> Self {
        let mut command = barkeep(command, arguments);
        let mut child =
            command.stdout(Stdio::piped()).stderr(stderr).spawn().expect("barkeep starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut sidecar = Self { child, stdout };
        for (path, spec) in functions {
            let mut line = String::new();
            sidecar.stdout.read_line(&mut line).expect("a pipe");
            let expected = format!("serving {spec} on {}\n", path.display());
            assert_eq!(line, expected, "{}", sidecar.stderr_if_dead());
        }
        sidecar
    }

    /// What its main thread does in the kernel: the system call's number and arguments, or "running".
    /// `None` where the kernel does not tell.
    pub(crate) fn system_call(&self) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{}/syscall", self.child.id())).ok()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it is our child");
    }

    /// Waits for it to end, without another word on standard output. `None` is an end by a signal.
    pub(crate) fn wait(mut self) -> Option<i32> {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("it is our child");
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&DEADLINE));
        assert_eq!(ended, Ok(1), "barkeep does not end");
        let mut more = String::new();
        self.stdout.read_to_string(&mut more).expect("a pipe");
        assert_eq!(more, "", "standard output is for the ready lines");
        self.child.wait().expect("it is our child").code()
    }

    /// The processes that it has started and that have not ended.
    pub(crate) fn children(&self) -> Vec<Pid> {
        let id = self.child.id();
        let path = format!("/proc/{id}/task/{id}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        let pid = |id: &str| Pid::from_raw(id.parse().expect("a number")).expect("not 0");
        children.split_whitespace().map(pid).collect()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn stderr_if_dead(&mut self) -> String {
        let mut text = String::new();
        if self.child.try_wait().is_ok_and(|status| status.is_some())
            && let Some(stderr) = &mut self.child.stderr
        {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory for sockets, with a path in it.
pub(crate) fn socket() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("function.sock");
    (directory, path)
}

/// `--socket PATH --device SPEC` for each function.
pub(crate) fn arguments(functions: &[(&Path, &str)]) -> Vec<String> {
    functions
        .iter()
        .flat_map(|(path, spec)| {
            ["--socket".into(), path.display().to_string(), "--device".into(), (*spec).into()]
        })
        .collect()
}

/// Runs `barkeep` with arguments that the command refuses. One that serves all the same is ended.
pub(crate) fn run(command: &str, arguments: &[String]) -> Output {
    let mut command = barkeep(command, arguments);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("barkeep starts");
    let mut stdout = Vec::new();
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe"));
    if lines.read_until(b'\n', &mut stdout).expect("a pipe") > 0 {
        child.kill().expect("it is our child");
    }
    let mut output = child.wait_with_output().expect("it is our child");
    output.stdout = stdout;
    output
}

/// Checks the answer of every command to an operator's mistake.
pub(crate) fn assert_refused(arguments: &[String], words: &[&str]) {
    COMMANDS.iter().for_each(|command| assert_refused_by(command, arguments, words));
}

/// Checks the answer to an operator's mistake: one line on standard error that has all of `words`,
/// nothing on standard output, and status 2.
pub(crate) fn assert_refused_by(command: &str, arguments: &[String], words: &[&str]) {
    let output = run(command, arguments);
    assert!(output.stdout.is_empty(), "{command} {arguments:?} was served");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(2), "{command} {arguments:?}: {stderr}");
    assert_eq!(stderr.matches('\n').count(), 1, "{command} {arguments:?} has one line: {stderr}");
    assert!(stderr.starts_with("barkeep: ") && stderr.ends_with('\n'), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{command}: {stderr:?} says {word:?}");
    }
}

fn barkeep(command: &str, arguments: &[String]) -> Command {
    let mut barkeep = Command::new(binary::barkeep());
    barkeep.arg(command).args(arguments).env_remove("BARKEEP_LOG").stdin(Stdio::null());
    barkeep
}

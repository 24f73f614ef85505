//! A real `barkeep serve` process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use barkeep_tests::binary;
use rustix::process::{Pid, Signal, kill_process};

pub(crate) struct Sidecar {
    child: Child,
    directory: tempfile::TempDir,
    devices: Vec<String>,
}

impl Sidecar {
    /// Serves each device on a socket of its own; ready when this returns.
    pub(crate) fn start(devices: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let child = serve(directory.path(), devices);
        Self { child, directory, devices: devices.iter().copied().map(Into::into).collect() }
    }

    /// Serves the same devices on the same sockets again, after [`kill`](Self::kill).
    pub(crate) fn start_again(&mut self) {
        let devices: Vec<_> = self.devices.iter().map(String::as_str).collect();
        self.child = serve(self.directory.path(), &devices);
    }

    /// Serves others on the same sockets, after [`kill`](Self::kill).
    pub(crate) fn start_as(&mut self, devices: &[&str]) {
        self.child = serve(self.directory.path(), devices);
    }

    /// Stops the process where it is: it is there, and does not answer.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    pub(crate) fn socket(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("{index}.sock"))
    }

    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        (0..self.devices.len()).map(|index| self.socket(index)).collect()
    }

    /// Ends the process as a crash would. When it returns, the process is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn serve(directory: &Path, devices: &[&str]) -> Child {
    let mut command = Command::new(binary::barkeep());
    command.args(["--log", "warn", "serve"]);
    for (index, device) in devices.iter().enumerate() {
        command.arg("--socket").arg(directory.join(format!("{index}.sock")));
        command.args(["--device", device]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.take(devices.len()).count(), devices.len(), "the sidecar starts");
    child
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The children of a process that run `barkeep serve`.
pub(crate) fn serving_children(parent: u32) -> Vec<Pid> {
    let children = format!("/proc/{parent}/task/{parent}/children");
    let Ok(children) = std::fs::read_to_string(Path::new(&children)) else { return Vec::new() };
    children
        .split_whitespace()
        .filter(|id| {
            let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|argument| argument == b"serve")
        })
        .filter_map(|id| Pid::from_raw(id.parse().ok()?))
        .collect()
}

pub(crate) fn kill(process: Pid) {
    kill_process(process, Signal::KILL).unwrap();
}

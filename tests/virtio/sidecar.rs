//! A real `barkeep serve` process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use barkeep_tests::binary;
use barkeep_tests::virtio::{Driver, Function, Memory, Setup};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Serves one function; ends when it is dropped.
pub(crate) struct Sidecar {
    process: Process,
    device: String,
    directory: TempDir,
}

struct Process(Child);

impl Sidecar {
    /// Ready when this returns.
    pub(crate) fn start(device: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), device)
    }

    /// With a directory that may hold the device's own files, and goes away with it.
    pub(crate) fn start_in(directory: TempDir, device: &str) -> Self {
        let process = Process::start(directory.path(), device);
        Self { process, device: device.to_owned(), directory }
    }

    /// Ends the process as a crash would, and starts another one in its place.
    pub(crate) fn killed_and_started_anew(self) -> Self {
        let Self { process, device, directory } = self;
        drop(process);
        Self::start_in(directory, &device)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("function.sock")
    }

    pub(crate) fn connect(&self) -> Arc<Function> {
        Arc::new(Function::connect(&self.socket()))
    }

    pub(crate) fn hang_up(&self) {
        kill_process(Pid::from_child(&self.process.0), Signal::HUP).unwrap();
    }
}

impl Process {
    fn start(directory: &Path, device: &str) -> Self {
        let mut command = Command::new(binary::barkeep());
        command.args(["--log", "warn", "serve", "--device", device, "--socket"]);
        command.arg(directory.join("function.sock"));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.take(1).count(), 1, "the sidecar starts: {device}");
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.0.try_wait();
        let _ = self.0.kill();
        let _ = self.0.wait();
        // The test's own failure comes first.
        if !std::thread::panicking() {
            assert!(matches!(ended, Ok(None)), "the sidecar ended by itself: {ended:?}");
        }
    }
}

/// A function with its driver, and memory of 4 MiB for data.
pub(crate) fn drive(sidecar: &Sidecar, setup: Setup) -> Driver {
    let function = sidecar.connect();
    let memory = Arc::new(Memory::new(4 << 20));
    memory.map(&function.client);
    Driver::start(&function, &memory, setup)
}

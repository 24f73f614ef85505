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
    child: Child,
    directory: TempDir,
}

impl Sidecar {
    /// Ready when this returns.
    pub(crate) fn start(device: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), device)
    }

    /// With a directory that may hold the device's own files, and goes away with it.
    pub(crate) fn start_in(directory: TempDir, device: &str) -> Self {
        let socket = directory.path().join("function.sock");
        let mut command = Command::new(binary::barkeep());
        command.args(["--log", "warn", "serve", "--device", device, "--socket"]).arg(socket);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.take(1).count(), 1, "the sidecar starts: {device}");
        Self { child, directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("function.sock")
    }

    pub(crate) fn connect(&self) -> Arc<Function> {
        Arc::new(Function::connect(&self.socket()))
    }

    pub(crate) fn hang_up(&self) {
        kill_process(Pid::from_child(&self.child), Signal::HUP).unwrap();
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The test's own failure comes first.
        if !std::thread::panicking() {
            assert!(matches!(ended, Ok(None)), "the sidecar ended by itself: {ended:?}");
        }
    }
}

/// A function with its driver, and memory of 64 MiB for data.
pub(crate) fn drive(sidecar: &Sidecar, setup: Setup) -> Driver {
    let function = sidecar.connect();
    let memory = Arc::new(Memory::new(64 << 20));
    memory.map(&function.client);
    Driver::start(&function, &memory, setup)
}

//! A real `barkeep serve --transport vhost-user` process.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use barkeep_tests::binary;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::TempDir;

/// One that does not end after this many seconds hangs.
const DEADLINE: Timespec = Timespec { tv_sec: 15, tv_nsec: 0 };

/// Serves some devices; ends when it is dropped.
pub(crate) struct Sidecar {
    child: Child,
    log: BufReader<ChildStderr>,
    directory: TempDir,
}

impl Sidecar {
    /// Ready when this returns.
    pub(crate) fn start(devices: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), devices)
    }

    /// With a directory that may hold the devices' own files, and goes away with it.
    pub(crate) fn start_in(directory: TempDir, devices: &[&str]) -> Self {
        let mut command = Command::new(binary::barkeep());
        command.args(["--log", "info", "serve", "--transport", "vhost-user"]);
        for (index, device) in devices.iter().enumerate() {
            command.arg("--socket").arg(path(directory.path(), index));
            command.args(["--device", device]);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let ready = BufReader::new(child.stdout.take().unwrap()).lines().take(devices.len());
        let ready = ready.count();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        if ready != devices.len() {
            let mut text = String::new();
            let _ = log.read_to_string(&mut text);
            panic!("the sidecar does not start: {text}");
        }
        Self { child, log, directory }
    }

    /// What it says to arguments that it refuses: one line.
    pub(crate) fn refused(socket: &Path, device: &str) -> String {
        let mut command = Command::new(binary::barkeep());
        command.args(["serve", "--transport", "vhost-user", "--device", device, "--socket"]);
        let output = command.arg(socket).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), error.matches('\n').count()), (Some(2), 1), "{error}");
        error
    }

    /// Ends it as a crash would. What it leaves behind.
    pub(crate) fn kill(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap())
    }

    pub(crate) fn socket(&self, index: usize) -> PathBuf {
        path(self.directory.path(), index)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for a line in its log that has these words.
    pub(crate) fn expect_log(&mut self, words: &str) {
        loop {
            let mut line = String::new();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "nothing says {words:?}");
            if line.contains(words) {
                return;
            }
        }
    }

    /// Stops it: it ends by itself, well, and leaves no socket.
    pub(crate) fn stop(mut self, signal: Signal) {
        self.signal(signal);
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&DEADLINE));
        assert_eq!(ended, Ok(1), "the sidecar does not end");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        assert!(!self.socket(0).exists() && !self.socket(1).exists());
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn path(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("{index}.sock"))
}

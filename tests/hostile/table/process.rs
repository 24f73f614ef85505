//! `barkeep serve` as a process of its own, seen through procfs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use barkeep_tests::binary;
use barkeep_tests::edu;
use barkeep_tests::peer::Peer;
use tempfile::TempDir;

use super::Function;

/// The functions that are served, in the order of their sockets. Nobody is hostile to the last.
const DEVICES: [&str; 3] = ["edu", "ivshmem,size=64K", "edu"];

/// A running sidecar; killed when dropped.
pub(crate) struct Sidecar {
    child: Child,
    directory: TempDir,
}

impl Sidecar {
    /// Starts it and waits until all sockets are there.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut command = Command::new(binary::barkeep());
        command.arg("serve").env_remove("BARKEEP_LOG").stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        for (index, device) in DEVICES.iter().enumerate() {
            let path = socket_in(directory.path(), index);
            command.arg("--socket").arg(path).arg("--device").arg(device);
        }
        let mut child = command.spawn().expect("barkeep starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let sidecar = Self { child, directory };
        for device in DEVICES {
            let mut line = String::new();
            stdout.read_line(&mut line).expect("a pipe");
            assert!(line.starts_with(&format!("serving {device} on ")), "{line:?}");
        }
        sidecar
    }

    pub(crate) fn socket_of(&self, function: Function) -> PathBuf {
        socket_in(self.directory.path(), function as usize)
    }

    /// A client of the function that nobody is hostile to.
    pub(crate) fn neighbour(&self) -> Peer {
        Peer::greeted(&socket_in(self.directory.path(), DEVICES.len() - 1))
    }

    /// The process of the beginning serves honest clients of all its functions.
    pub(crate) fn assert_served(&mut self) {
        assert_eq!(self.child.try_wait().expect("our child"), None, "barkeep has ended");
        edu::assert_served(&self.socket_of(Function::Edu));
        let mut shared = Peer::greeted(&self.socket_of(Function::Ivshmem));
        assert_eq!(shared.config_u16(0), 0x1af4);
        assert_eq!(self.neighbour().config_u16(0), 0x1234);
    }

    /// What the process has, while exactly one client of each function is served: what their first
    /// answers find is all that earlier clients have left.
    pub(crate) fn usage(&self) -> Usage {
        let functions = [Function::Edu, Function::Ivshmem];
        let _clients = functions.map(|function| Peer::greeted(&self.socket_of(function)));
        let _neighbour = self.neighbour();
        let process = PathBuf::from(format!("/proc/{}", self.child.id()));
        let fds = std::fs::read_dir(process.join("fd")).expect("procfs").count();
        let status = std::fs::read_to_string(process.join("status")).expect("procfs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let resident = line.trim().trim_end_matches(" kB").parse().expect("a number");
        Usage { fds, resident_kib: resident }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Open descriptors.
    pub(crate) fds: usize,
    /// Resident memory in KiB.
    pub(crate) resident_kib: u64,
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn socket_in(directory: &Path, index: usize) -> PathBuf {
    directory.join(format!("{index}.sock"))
}

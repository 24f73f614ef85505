use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A `barkeep serve` process with the two functions of one demo device.
pub(super) struct Sidecar {
    child: Child,
    sockets: [PathBuf; 2],
}

const DEVICES: [&str; 2] = ["edu", "ivshmem,size=4M"];

impl Sidecar {
    /// Starts the process and waits until its sockets are there.
    pub(super) fn start(directory: &Path, number: u32) -> Result<Self, String> {
        let sockets = ["edu", "ivshmem"].map(|name| directory.join(format!("{name}{number}.sock")));
        let mut command = myself()?;
        // What the guest does on purpose would fill the screen.
        command.args(["--log", "error", "--die-with-parent", "serve"]);
        for (socket, device) in sockets.iter().zip(DEVICES) {
            command.arg("--socket").arg(socket).args(["--device", device]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|failure| format!("can't start a sidecar: {failure}"))?;
        let stdout = child.stdout.take().expect("stdout is piped");
        let ready =
            BufReader::new(stdout).lines().take(DEVICES.len()).filter(Result::is_ok).count();
        let sidecar = Self { child, sockets };
        if ready < DEVICES.len() {
            return Err(format!("sidecar {number} did not start"));
        }
        Ok(sidecar)
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = &Path> {
        self.sockets.iter().map(PathBuf::as_path)
    }

    /// Stops the process as an operator would, and tells if it was not there any more.
    pub(super) fn stop(mut self) -> Result<(), String> {
        let id = self.child.id();
        if let Ok(Some(status)) = self.child.try_wait() {
            return Err(format!("sidecar {id} died: {status}"));
        }
        terminate(id);
        match self.child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("sidecar {id} did not stop cleanly: {status}")),
            Err(failure) => Err(format!("sidecar {id}: {failure}")),
        }
    }
}

impl Drop for Sidecar {
    /// For the ways out on which something else has failed already.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            terminate(self.child.id());
            let _ = self.child.wait();
        }
    }
}

/// A command that runs this program, whatever its name is by now.
pub(super) fn myself() -> Result<Command, String> {
    let path = std::env::current_exe().map_err(|failure| format!("own executable: {failure}"))?;
    Ok(Command::new(path))
}

fn terminate(id: u32) {
    if let Some(pid) = i32::try_from(id).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::TERM);
    }
}

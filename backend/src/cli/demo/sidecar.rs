use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// A `barkeep serve` process with the two functions of one demo device.
pub(super) struct Sidecar {
    child: Child,
    sockets: [PathBuf; 2],
}

const DEVICES: [&str; 2] = ["edu", "ivshmem,size=4M"];

/// A sidecar has nothing to do when it stops; one that takes longer hangs.
const STOP_DEADLINE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

impl Sidecar {
    /// Starts the process and waits until its sockets are there.
    pub(super) fn start(directory: &Path, number: u32) -> Result<Self, String> {
        let sockets = ["edu", "ivshmem"].map(|name| directory.join(format!("{name}{number}.sock")));
        let mut command = myself()?;
        // What the guest does on purpose would fill the screen.
        command.args(["--log", "error", "serve"]);
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

    /// Stops the process as an operator would, and tells if it was not there any more or had to be
    /// killed.
    pub(super) fn stop(mut self) -> Result<(), String> {
        let id = self.child.id();
        if let Ok(Some(status)) = self.child.try_wait() {
            return Err(format!("sidecar {id} died: {status}"));
        }
        match end(&mut self.child) {
            Ok(End::Stopped(status)) if status.success() => Ok(()),
            Ok(End::Stopped(status)) => Err(format!("sidecar {id} did not stop cleanly: {status}")),
            Ok(End::Killed) => {
                Err(format!("sidecar {id} did not stop within {} s", STOP_DEADLINE.tv_sec))
            }
            Err(failure) => Err(format!("sidecar {id}: {failure}")),
        }
    }
}

impl Drop for Sidecar {
    /// For the ways out on which something else has failed already.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = end(&mut self.child);
        }
    }
}

/// A command that runs this program, whatever its name is by now, and ends it with this process.
pub(super) fn myself() -> Result<Command, String> {
    let path = std::env::current_exe().map_err(|failure| format!("own executable: {failure}"))?;
    let mut command = Command::new(path);
    command.arg("--die-with-parent").arg(std::process::id().to_string());
    Ok(command)
}

/// How a child ended that was asked to.
enum End {
    Stopped(ExitStatus),
    Killed,
}

/// Asks a child that has not been waited for to end, and kills it if it takes too long.
fn end(child: &mut Child) -> io::Result<End> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    terminate(child);
    let mut events = [PollFd::new(&process, PollFlags::IN)];
    // A signal to the demo must not turn this into a wait without a deadline.
    if retry_on_intr(|| poll(&mut events, Some(&STOP_DEADLINE))) == Ok(0) {
        child.kill()?;
        child.wait()?;
        return Ok(End::Killed);
    }
    Ok(End::Stopped(child.wait()?))
}

/// Sends SIGTERM to a child that has not been waited for.
pub(super) fn terminate(child: &Child) {
    // It may have ended already, which is as good.
    let _ = kill_process(Pid::from_child(child), Signal::TERM);
}

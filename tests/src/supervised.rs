//! `barkeep run` with its workers, which tests kill one by one.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::binary;

/// A supervisor or worker that takes so long for anything hangs.
const DEADLINE: Duration = Duration::from_secs(30);

/// How `barkeep run` is started.
#[derive(Debug, Default)]
pub struct Launch {
    /// Another binary than the usual one.
    pub binary: Option<PathBuf>,
    /// Further arguments of `run`.
    pub arguments: Vec<String>,
    /// Further environment.
    pub environment: Vec<(String, String)>,
    /// The limit of open files.
    pub descriptors: Option<u32>,
}

/// A running `barkeep run`, each function on a socket of its own in a temporary directory.
///
/// Dropping it stops it, and fails the test if it or one of its workers does not end.
#[derive(Debug)]
pub struct Supervised {
    child: Child,
    sockets: Vec<PathBuf>,
    killed: bool,
    directory: TempDir,
}

/// A process that serves functions for the supervisor.
#[derive(Debug)]
pub struct Worker {
    /// Its process id, which may be another's when it has ended.
    pub pid: Pid,
    pidfd: OwnedFd,
}

impl Supervised {
    /// Serves devices, each on a socket of its own; ready when this returns.
    #[must_use]
    pub fn start(devices: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self::start_in(directory, devices, &Launch::default())
    }

    /// With a directory that may hold the devices' own files, and goes away with it.
    ///
    /// # Panics
    /// If it does not say of each function that it is served.
    #[must_use]
    pub fn start_in(directory: TempDir, devices: &[&str], launch: &Launch) -> Self {
        let sockets: Vec<_> = (0..devices.len())
            .map(|index| directory.path().join(format!("{index}.sock")))
            .collect();
        let child = spawn(directory.path(), &sockets, devices, launch);
        let mut supervised = Self { child, sockets, killed: false, directory };
        supervised.wait_until_served(devices);
        supervised
    }

    /// Starts it on the same sockets again when it was [killed](Self::kill).
    pub fn start_again(&mut self, devices: &[&str], launch: &Launch) {
        assert!(self.killed, "it is still there");
        self.child = spawn(self.directory.path(), &self.sockets, devices, launch);
        self.killed = false;
        self.wait_until_served(devices);
    }

    fn wait_until_served(&mut self, devices: &[&str]) {
        let mut lines = BufReader::new(self.child.stdout.take().expect("a pipe")).lines();
        for device in devices {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            assert!(line.starts_with("serving "), "{device}: {line:?}\n{}", self.log());
        }
    }

    /// The socket of a function.
    #[must_use]
    pub fn socket(&self, function: usize) -> &Path {
        &self.sockets[function]
    }

    /// Where the sockets are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What was logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(log_of(self.directory.path())).unwrap_or_default()
    }

    /// How many of the log's lines have all of these words.
    #[must_use]
    pub fn logged(&self, words: &[&str]) -> usize {
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        self.log().lines().filter(has_all).count()
    }

    /// The process id of the supervisor.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// How many descriptors the supervisor has.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        let list = std::fs::read_dir(format!("/proc/{}/fd", self.pid()));
        list.expect("it is our child").count()
    }

    /// Sends the supervisor a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("it is our child");
    }

    /// All children of the supervisor, whatever they do, even such that have not become a worker yet.
    #[must_use]
    pub fn children(&self) -> Vec<Worker> {
        children_of(self.pid()).into_iter().filter_map(|pid| self.hold(pid)).collect()
    }

    /// The worker that serves a function. Waits for one if there is none.
    ///
    /// # Panics
    /// If there is none for long.
    #[must_use]
    pub fn worker(&self, function: usize) -> Worker {
        self.until("a worker", || {
            let pid = children_of(self.pid()).into_iter().find(|pid| serves(*pid, function))?;
            let worker = self.hold(pid)?;
            // Whoever had this number when it was looked at is the one that is held.
            serves(pid, function).then_some(worker)
        })
    }

    /// Waits for something that happens by itself and of which nobody tells.
    ///
    /// # Panics
    /// If it does not happen for long.
    pub fn until<T>(&self, what: &str, mut happened: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = happened() {
                return value;
            }
            assert!(start.elapsed() < DEADLINE, "waiting for {what}:\n{}", self.log());
            // Those that are waited for need the processor.
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Ends the supervisor as a crash would, and leaves its workers alone.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is our child");
        self.child.wait().expect("it is our child");
        self.killed = true;
    }

    /// Ends it as an operator does; its exit status.
    ///
    /// # Panics
    /// If it or a worker of its does not end.
    pub fn stop(&mut self) -> Option<i32> {
        let workers = self.children();
        self.signal(Signal::TERM);
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("it is our child");
        assert!(ends(&pidfd), "barkeep run does not end:\n{}", self.log());
        let status = self.child.wait().expect("it is our child");
        self.killed = true;
        for worker in workers {
            assert!(worker.ends(), "a worker outlives its supervisor's orderly end");
        }
        status.code()
    }

    fn hold(&self, pid: Pid) -> Option<Worker> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // A number is used anew only when its process is no child any more.
        children_of(self.pid()).contains(&pid).then_some(Worker { pid, pidfd })
    }
}

impl Drop for Supervised {
    #[expect(clippy::print_stderr, reason = "the log tells why a test failed")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of barkeep run:\n{}", self.log());
            let children = self.children();
            let _ = self.child.kill();
            let _ = self.child.wait();
            for child in children {
                child.signal(Signal::KILL);
            }
        } else if !self.killed {
            assert_eq!(self.stop(), Some(0), "barkeep run ends well:\n{}", self.log());
        }
    }
}

impl Worker {
    /// Sends it a signal, if it is still there.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Ends it as a crash would. When this returns, it has ended.
    ///
    /// # Panics
    /// If it does not.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
        assert!(self.ends(), "a killed process ends");
    }

    /// Whether it ends within a long time.
    #[must_use]
    pub fn ends(&self) -> bool {
        ends(&self.pidfd)
    }

    /// Whether it has had the processor for so long.
    #[must_use]
    pub fn has_worked(&self, time: Duration) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/schedstat", self.pid));
        let spent = status.ok().and_then(|text| text.split(' ').next()?.parse().ok());
        spent.is_some_and(|nanoseconds| Duration::from_nanos(nanoseconds) >= time)
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&Timespec::default())) == Ok(1)
    }
}

fn spawn(directory: &Path, sockets: &[PathBuf], devices: &[&str], launch: &Launch) -> Child {
    let binary = launch.binary.clone().unwrap_or_else(binary::barkeep);
    let mut command = match launch.descriptors {
        None => Command::new(binary),
        Some(limit) => {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("ulimit -n {limit}; exec \"$0\" \"$@\"")]).arg(binary);
            shell
        }
    };
    command.args(["--log", "info", "run"]).args(&launch.arguments);
    for (socket, device) in sockets.iter().zip(devices) {
        command.arg("--socket").arg(socket).args(["--device", device]);
    }
    command.envs(launch.environment.iter().map(|(name, value)| (name, value)));
    command.env_remove("BARKEEP_LOG").stdin(Stdio::null()).stdout(Stdio::piped());
    let log = File::options().append(true).create(true).open(log_of(directory));
    command.stderr(log.expect("a file for the log"));
    command.spawn().expect("barkeep starts")
}

fn ends(pidfd: impl AsFd) -> bool {
    let deadline = Timespec { tv_sec: DEADLINE.as_secs().cast_signed(), tv_nsec: 0 };
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&deadline)) == Ok(1)
}

fn log_of(directory: &Path) -> PathBuf {
    directory.join("log")
}

/// The children of a process, whichever of its threads has started them.
fn children_of(parent: Pid) -> Vec<Pid> {
    let threads = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = threads.map(|thread| std::fs::read_to_string(thread.path().join("children")));
    let mut children = Vec::new();
    for list in lists {
        let list = list.unwrap_or_default();
        children.extend(list.split_whitespace().filter_map(|id| Pid::from_raw(id.parse().ok()?)));
    }
    children
}

/// Whether a process is a worker of this function.
fn serves(pid: Pid, function: usize) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    let mut words = line.split('\0');
    if !words.any(|word| word == "worker") || !words.any(|word| word == "--functions") {
        return false;
    }
    let functions = words.next().unwrap_or_default();
    functions.split(',').any(|index| index.parse() == Ok(function))
}

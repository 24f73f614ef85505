//! A service manager as small as it can be: it starts a service, hears what that says, holds its
//! descriptors, and gives them to the next process of the service.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

/// A service that says nothing for so long hangs.
const DEADLINE: Duration = Duration::from_secs(20);
const END_DEADLINE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// Where descriptors wait for the shell that puts them where they belong: above all that it uses.
const WAITING: i32 = 200;

/// Puts descriptors 200, 201... where `sd_listen_fds(3)` looks for them, and becomes the service.
const PASS_ON: &str = r#"
number=0
while [ "$number" -lt "${LISTEN_FDS:-0}" ]; do
  eval "exec $((number + 3))<&$((number + 200)) $((number + 200))<&-"
  number=$((number + 1))
done
if [ -n "${LISTEN_FDS:-}" ]; then export LISTEN_PID=$$; fi
exec "$@"
"#;

/// The service manager. What it holds stays until it is dropped.
#[derive(Debug)]
pub struct ServiceManager {
    notify: PathBuf,
    heard: Arc<Heard>,
    thread: Option<JoinHandle<()>>,
    /// Sockets of its own, which it gives to every process.
    sockets: Vec<(String, OwnedFd)>,
    watchdog: Option<Duration>,
    _directory: TempDir,
}

#[derive(Debug, Default)]
struct Heard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// All assignments but those about descriptors, in order.
    said: Vec<String>,
    held: Vec<(String, OwnedFd)>,
    ended: bool,
}

/// A running service, whose processes are killed when it is dropped.
#[derive(Debug)]
pub struct Service {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl ServiceManager {
    /// One that holds nothing yet.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let notify = directory.path().join("notify");
        let socket = UnixDatagram::bind(&notify).expect("a fresh path");
        let heard = Arc::new(Heard::default());
        let listener = Arc::clone(&heard);
        let thread = std::thread::spawn(move || {
            while let Some((text, fds)) = receive(&socket) {
                listener.take(&text, fds);
            }
        });
        Self {
            notify,
            heard,
            thread: Some(thread),
            sockets: Vec::new(),
            watchdog: None,
            _directory: directory,
        }
    }

    /// Opens a socket for the service, as a socket unit with this `FileDescriptorName`.
    pub fn open(&mut self, name: &str, socket: impl Into<OwnedFd>) {
        self.sockets.push((name.to_owned(), socket.into()));
    }

    /// Wants to hear so often that processes started from now on are alive.
    pub fn set_watchdog(&mut self, time: Duration) {
        self.watchdog = Some(time);
    }

    /// Starts a process of the service, with all that is held.
    #[must_use]
    pub fn start(&self, program: impl AsRef<OsStr>, arguments: &[String]) -> Service {
        let state = self.heard.state.lock().expect("no test panics with it");
        let passed: Vec<_> = self.sockets.iter().chain(&state.held).collect();
        let waiting: Vec<OwnedFd> = passed
            .iter()
            .enumerate()
            .map(|(at, (_, fd))| {
                let number = WAITING + i32::try_from(at).expect("few descriptors");
                let waiting = fcntl_dupfd_cloexec(fd, number).expect("a descriptor");
                assert_eq!(waiting.as_raw_fd(), number, "the test itself has few descriptors");
                fcntl_setfd(&waiting, FdFlags::empty()).expect("it is open");
                waiting
            })
            .collect();
        let mut command = Command::new("bash");
        command.args(["-c", PASS_ON, "start"]).arg(program).args(arguments);
        command.env_remove("BARKEEP_LOG").env("NOTIFY_SOCKET", &self.notify);
        if !passed.is_empty() {
            let names: Vec<_> = passed.iter().map(|(name, _)| name.as_str()).collect();
            command
                .env("LISTEN_FDS", passed.len().to_string())
                .env("LISTEN_FDNAMES", names.join(":"));
        }
        if let Some(time) = self.watchdog {
            command.env("WATCHDOG_USEC", time.as_micros().to_string());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("bash starts");
        drop(waiting);
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        Service { child, stdout }
    }

    /// Waits until the service has said this once more since the last call, and forgets what came before.
    pub fn wait_for(&self, assignment: &str) {
        let heard = |state: &mut State| {
            let at = state.said.iter().position(|said| said == assignment);
            at.map(|at| drop(state.said.drain(..=at)))
        };
        assert!(
            self.wait(heard).is_some(),
            "the service does not say {assignment}: {:?}",
            self.said()
        );
    }

    /// Waits until what is held has these names, sorted.
    pub fn wait_until_held(&self, names: &[&str]) {
        let held = |state: &mut State| (sorted(state) == names).then_some(());
        assert!(self.wait(held).is_some(), "held are {:?}", self.held());
    }

    /// The names of what is held, sorted.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        sorted(&self.heard.state.lock().expect("no test panics with it"))
    }

    /// All that has been said and not waited for.
    #[must_use]
    pub fn said(&self) -> Vec<String> {
        self.heard.state.lock().expect("no test panics with it").said.clone()
    }

    /// Forgets what is held: the service has stopped for good.
    pub fn release(&self) {
        self.heard.state.lock().expect("no test panics with it").held.clear();
    }

    fn wait<T>(&self, mut done: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let mut result = None;
        let state = self.heard.state.lock().expect("no test panics with it");
        let waiting = self.heard.changed.wait_timeout_while(state, DEADLINE, |state| {
            result = done(state);
            result.is_none() && !state.ended
        });
        drop(waiting.expect("no test panics with it"));
        result
    }
}

impl Default for ServiceManager {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        let end = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"", &self.notify));
        if end.is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Heard {
    fn take(&self, text: &str, fds: Vec<OwnedFd>) {
        let mut state = self.state.lock().expect("no test panics with it");
        let value =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
        let name = value("FDNAME=");
        if value("FDSTORE=1").is_some() {
            let name = name.expect("what is stored has a name");
            assert!(name.len() <= 255 && !name.contains(':'), "{name}: systemd refuses it");
            state.held.extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        } else if value("FDSTOREREMOVE=1").is_some() {
            let name = name.expect("what is forgotten has a name");
            state.held.retain(|(held, _)| *held != name);
        } else {
            state.said.extend(text.lines().map(str::to_owned));
        }
        self.changed.notify_all();
    }
}

fn sorted(state: &State) -> Vec<String> {
    let mut names: Vec<_> = state.held.iter().map(|(name, _)| name.clone()).collect();
    names.sort();
    names
}

/// The next message; `None` for an empty one, which the manager sends to itself.
fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let count = recvmsg(socket, &mut buffer, &mut ancillary, flags).expect("a message").bytes;
    let fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    let text = String::from_utf8(bytes[..count].to_vec()).expect("UTF-8");
    (!text.is_empty()).then_some((text, fds))
}

impl Service {
    /// Its main process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The next line on its standard output.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a pipe");
        line
    }

    /// Sends a signal to the main process.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it is our child");
    }

    /// The processes that the main process has started.
    #[must_use]
    pub fn workers(&self) -> Vec<Pid> {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
    }

    /// Kills the main process, and then all others, and waits until they are gone: as systemd does with
    /// a service that has failed.
    pub fn kill(mut self) {
        self.end();
    }

    /// Waits until the main process ends; its status, or `None` for a signal.
    pub fn wait(&mut self) -> Option<i32> {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("it is our child");
        let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&END_DEADLINE));
        assert_eq!(ended, Ok(1), "the service does not end");
        self.child.wait().expect("it is our child").code()
    }

    fn end(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Stopped, so that it starts no further one meanwhile.
        let _ = kill_process(self.pid(), Signal::STOP);
        let workers = self.workers();
        let workers: Vec<_> = workers
            .into_iter()
            .filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
            .collect();
        let _ = self.child.kill();
        let _ = self.child.wait();
        for worker in workers {
            let _ = pidfd_send_signal(&worker, Signal::KILL);
            let _ = poll(&mut [PollFd::new(&worker.as_fd(), PollFlags::IN)], Some(&END_DEADLINE));
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

//! A backend in a thread of the test.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use barkeep_backend::config::DeviceSpec;
use barkeep_backend::devices::{Device, Options, Registry};
use barkeep_backend::server::{HostedFunction, Server, SocketPath};
use barkeep_backend::supervisor::link::WorkerLink;
use tempfile::TempDir;

use crate::peer::Peer;
use crate::recorded;

/// A server is stopped by one byte; one that takes this long hangs.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// A running server, each function on a socket of its own in a temporary directory.
///
/// Dropping it stops the server and fails the test if its thread has panicked, failed or hangs.
#[derive(Debug)]
pub struct Backend {
    sockets: Vec<PathBuf>,
    stop: UnixStream,
    thread: Option<JoinHandle<()>>,
    done: Receiver<()>,
    // Last, so that the sockets are gone before their directory is.
    _directory: TempDir,
}

impl Backend {
    /// Serves what each of `specs` describes, as in `barkeep serve --device SPEC`.
    #[must_use]
    pub fn serve(specs: &[&str]) -> Self {
        let mut registry = Registry::default();
        let device = |spec: &&str| {
            let spec: DeviceSpec = spec.parse().expect("the test's SPEC is well-formed");
            registry.create(spec).expect("the test's SPEC describes a device")
        };
        Self::host_with(specs.iter().map(device).collect())
    }

    /// Serves devices of the test's own.
    #[must_use]
    pub fn host(devices: Vec<Box<dyn Device>>) -> Self {
        Self::host_with(devices.into_iter().map(|device| (device, Options::default())).collect())
    }

    /// Serves devices of the test's own with options.
    #[must_use]
    pub fn host_with(devices: Vec<(Box<dyn Device>, Options)>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut server = Server::new().expect("an event loop");
        let mut sockets = Vec::new();
        let mut functions = Vec::new();
        for (index, (device, options)) in devices.into_iter().enumerate() {
            let path = directory.path().join(format!("{index}.sock"));
            let socket = SocketPath::claim(&path).expect("a socket in a fresh directory");
            let name = format!("function {index}");
            let function = HostedFunction::with_options(name, device, options)
                .expect("a function that can exist");
            functions.push((socket, function));
            sockets.push(path);
        }
        let (stop, stopped) = UnixStream::pair().expect("a socket pair");
        let (finished, done): (Sender<()>, _) = channel();
        let serve: Box<dyn FnOnce() + Send> = if recorded::is_wanted() {
            serve_recorded(server, functions, stopped)
        } else {
            for (socket, function) in functions {
                server.add(socket, function).expect("a socket that can be watched");
            }
            Box::new(move || {
                server.run(stopped.as_fd()).expect("nothing a client does ends the event loop");
            })
        };
        let thread = std::thread::spawn(move || {
            let _finished = finished;
            serve();
        });
        Self { sockets, stop, thread: Some(thread), done, _directory: directory }
    }

    /// The socket of the first function.
    #[must_use]
    pub fn socket(&self) -> &Path {
        self.socket_of(0)
    }

    /// The socket of function `index`, in the order they were given.
    #[must_use]
    pub fn socket_of(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    /// A client of the first function that has negotiated everything there is.
    #[must_use]
    pub fn client(&self) -> Peer {
        Peer::greeted(self.socket())
    }
}

/// The same as a supervisor would have it served, which here is a thread as well.
fn serve_recorded(
    mut server: Server,
    functions: Vec<(SocketPath, HostedFunction)>,
    stopped: UnixStream,
) -> Box<dyn FnOnce() + Send> {
    let (sockets, functions): (Vec<_>, Vec<_>) = functions.into_iter().unzip();
    let (holding, link) = recorded::Holding::new(sockets, stopped);
    let link = WorkerLink::from_fd(link);
    let held = link.begin().expect("what was just told");
    server.supervise(link).expect("a link that can be watched");
    for (held, function) in held.into_iter().zip(functions) {
        server.add_held("test", held, function).expect("a state that can be mapped");
    }
    Box::new(move || {
        let holding = std::thread::spawn(move || holding.run());
        // Nobody stops it but the supervisor.
        let (_stop, stopped) = UnixStream::pair().expect("a socket pair");
        server.run(stopped.as_fd()).expect("nothing a client does ends the event loop");
        holding.join().expect("the supervisor has nothing to complain about");
    })
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.stop.write_all(&[0]);
        let hangs = self.done.recv_timeout(STOP_DEADLINE) == Err(RecvTimeoutError::Timeout);
        // The test's own failure comes first; a second panic would abort and hide it.
        if std::thread::panicking() {
            return;
        }
        assert!(!hangs, "the server does not stop");
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

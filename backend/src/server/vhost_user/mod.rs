//! Serves virtio devices to VMMs that speak vhost-user, through the crate `vhost-user-backend`.
//!
//! A front-end brings the PCI function, a device core does what its queues ask for. Each device has
//! a thread that takes one front-end after another; a session has three more: two of the crate, for
//! messages and for events, and one that passes messages on to the crate. A front-end ends its own session and nothing else.

mod control;
mod device;
mod port;
mod queues;
mod relay;
mod ring;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::info;

use self::control::Control;
use self::port::Port;
use super::SocketPath;
use crate::devices::virtio::Core;
use crate::dma::SharedMemory;

/// Virtio devices and the sockets that they are served on.
pub struct VhostUserServer {
    ports: Vec<Arc<Port>>,
    sockets: Vec<SocketPath>,
    control: Arc<Control>,
}

/// A session ends when its connection does; one that takes longer hangs and is left behind.
const STOP_TIME: Duration = Duration::from_secs(10);

impl VhostUserServer {
    /// A server of nothing.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub fn new() -> io::Result<Self> {
        let control = Arc::new(Control::new()?);
        Ok(Self { ports: Vec::new(), sockets: Vec::new(), control })
    }

    /// Adds a device, which logs call `name`.
    ///
    /// # Errors
    /// When the process has no more descriptors.
    pub fn add(
        &mut self,
        socket: SocketPath,
        name: String,
        core: Box<dyn Core<SharedMemory>>,
    ) -> io::Result<()> {
        let listener = socket.listener().try_clone_to_owned()?;
        self.sockets.push(socket);
        self.ports.push(Arc::new(Port::new(name, listener, core, Arc::clone(&self.control))));
        Ok(())
    }

    /// Serves until `stop` becomes readable. What becomes readable in `reload` is taken, and devices
    /// look at their surroundings anew.
    ///
    /// # Errors
    /// When the process has no more threads, waiting fails, or a session does not end.
    pub fn run(self, stop: BorrowedFd<'_>, reload: BorrowedFd<'_>) -> io::Result<()> {
        let (done, ended) = channel::<()>();
        let mut result = Ok(());
        for port in &self.ports {
            let (port, done) = (Arc::clone(port), done.clone());
            let serve = move || {
                port.serve();
                drop(done);
            };
            result = thread::Builder::new().name("device".into()).spawn(serve).map(drop);
            if result.is_err() {
                break;
            }
        }
        if result.is_ok() {
            result = self.attend(stop, reload).map_err(io::Error::from);
        }
        self.control.begin_stop();
        // From here on, nobody finds a socket that nobody serves.
        drop(self.sockets);
        self.ports.iter().for_each(|port| port.stop());
        drop(done);
        if ended.recv_timeout(STOP_TIME) == Err(RecvTimeoutError::Timeout) {
            let reason = "a session does not end";
            return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
        }
        if result.is_ok() {
            info!("stopped");
        }
        result
    }

    /// What the main thread does.
    fn attend(&self, stop: BorrowedFd<'_>, reload: BorrowedFd<'_>) -> Result<(), Errno> {
        loop {
            let [stopped, reloaded, deadline] = {
                let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
                let mut watched = [watch(stop), watch(reload), self.control.deadline_news()];
                match poll(&mut watched, self.time_left().as_ref()) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
                watched.map(|watched| !watched.revents().is_empty())
            };
            if stopped {
                return Ok(());
            }
            if reloaded {
                // Signals in quick succession are one.
                rustix::io::read(reload, &mut [0; 64])?;
                self.ports.iter().for_each(|port| port.reload());
            }
            if deadline {
                self.control.take_deadline_news();
            }
            let now = Instant::now();
            self.ports.iter().for_each(|port| port.expire(now));
        }
    }

    /// Until the first deadline.
    fn time_left(&self) -> Option<Timespec> {
        let first = self.ports.iter().filter_map(|port| port.deadline()).min()?;
        let left = first.saturating_duration_since(Instant::now());
        // A round later rather than a moment too early, which would be a round for nothing.
        Timespec::try_from(left + Duration::from_millis(1)).ok()
    }
}

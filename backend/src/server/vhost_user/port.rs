use std::fmt;
use std::mem;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::{error, info, warn};
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;

use super::control::Control;
use super::device::VhostUserDevice;
use super::relay::{self, Relay};
use super::ring::Table;
use crate::devices::virtio::Core;
use crate::dma::SharedMemory;
use crate::irq::EventFd;
use crate::log_limit::RateLimit;

/// How long a front-end may take to its first message. The next one is waiting.
const HANDSHAKE_TIME: Duration = Duration::from_secs(1);
/// How long accepting pauses when the process is out of descriptors, threads or memory.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// One device, its listening socket, and the front-end that has it at the moment.
pub(super) struct Port {
    name: String,
    listener: OwnedFd,
    device: Arc<VhostUserDevice>,
    client: Arc<Mutex<Client>>,
    control: Arc<Control>,
}

/// The front-end of the session. Its first message can come before the rest is known.
#[derive(Default)]
struct Client {
    greeted: bool,
    connection: Option<Arc<UnixStream>>,
    /// When it must have sent its first message.
    until: Option<Instant>,
    expired: bool,
}

/// How a session ended.
enum End {
    /// A probe that connects and leaves without a word is no client.
    Silence,
    Left,
    Expired,
    Failed(ProtocolError),
    /// A mistake of ours or of the crate's.
    Panic,
}

impl Port {
    pub(super) fn new(
        name: String,
        listener: OwnedFd,
        core: Box<dyn Core<SharedMemory>>,
        control: Arc<Control>,
    ) -> Self {
        let client = Arc::new(Mutex::new(Client::default()));
        let log = Mutex::new(RateLimit::default());
        let greeted = {
            let (client, name) = (Arc::clone(&client), name.clone());
            move || {
                if !mem::replace(&mut lock(&client).greeted, true)
                    && let Some(suppressed) = lock(&log).admit()
                {
                    info!(device = name, suppressed, "client connected");
                }
            }
        };
        let device = Arc::new(VhostUserDevice::new(name.clone(), core, Box::new(greeted)));
        Self { name, listener, device, client, control }
    }

    /// Serves one front-end after another, until the server stops.
    pub(super) fn serve(&self) {
        let mut client_log = RateLimit::default();
        let mut failure_log = RateLimit::default();
        while self.wait_for_client() {
            match self.serve_client() {
                Ok(End::Silence) => {}
                Ok(End::Panic) => error!(device = self.name, "a session panicked"),
                Ok(end) => {
                    if let Some(suppressed) = client_log.admit() {
                        info!(device = self.name, suppressed, "client gone: {end}");
                    }
                }
                Err(failure) => {
                    // The connection may still be in the backlog; trying again at once would spin.
                    if let Some(suppressed) = failure_log.admit() {
                        let device = &self.name;
                        warn!(device, suppressed, "can't serve a client: {failure}");
                    }
                    self.control.pause(&ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Ends the session, if there is one. Called when the server is already known to stop.
    pub(super) fn stop(&self) {
        if let Some(connection) = &lock(&self.client).connection {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let client = lock(&self.client);
        client.until.filter(|_| !client.greeted && !client.expired)
    }

    /// Ends a session that has not begun in time.
    pub(super) fn expire(&self, now: Instant) {
        if self.deadline().is_some_and(|until| until <= now) {
            lock(&self.client).expired = true;
            self.stop();
        }
    }

    /// The operator wants the device to look at its surroundings anew.
    pub(super) fn reload(&self) {
        self.device.reload();
    }

    /// Waits until there is a connection. `false` when the server stops.
    fn wait_for_client(&self) -> bool {
        loop {
            if self.control.is_stopping() {
                return false;
            }
            let waiting = PollFd::new(&self.listener, PollFlags::IN);
            let mut watched = [waiting, self.control.stop_request()];
            let polled = poll(&mut watched, None);
            if polled.is_ok() && !watched[0].revents().is_empty() && !self.control.is_stopping() {
                return true;
            }
        }
    }

    fn serve_client(&self) -> Result<End, DaemonError> {
        let mut session = Session::new(&self.device)?;
        let (entrance, back_end) = relay::connection().map_err(DaemonError::StartDaemon)?;
        let front_end =
            Arc::new(self.accept().map_err(|errno| DaemonError::StartDaemon(errno.into()))?);
        let relay = Relay { front_end: Arc::clone(&front_end), back_end };
        session.daemon().start(&mut Listener::from(entrance))?;
        {
            let mut client = lock(&self.client);
            client.connection = Some(front_end);
            client.until = Some(Instant::now() + HANDSHAKE_TIME);
        }
        self.control.new_deadline();
        if self.control.is_stopping() {
            self.stop();
        }
        let result = session.run(&relay);
        drop(session);
        let client = mem::take(&mut *lock(&self.client));
        Ok(End::new(result?, &client))
    }

    /// It does not wait: nobody else accepts here, and a connection stays until it is accepted.
    fn accept(&self) -> Result<UnixStream, Errno> {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Err(Errno::INTR) => {}
                accepted => return accepted.map(UnixStream::from),
            }
        }
    }
}

impl End {
    fn new(result: Result<(), DaemonError>, client: &Client) -> Self {
        use ProtocolError::{Disconnected, PartialMessage};
        match result {
            _ if client.expired => Self::Expired,
            Err(DaemonError::WaitDaemon(_)) => Self::Panic,
            Ok(()) | Err(DaemonError::HandleRequest(Disconnected | PartialMessage)) => {
                if client.greeted { Self::Left } else { Self::Silence }
            }
            Err(DaemonError::HandleRequest(error)) => Self::Failed(error),
            // It is not what waiting returns.
            Err(_) => Self::Left,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silence | Self::Left => f.write_str("left"),
            Self::Expired => f.write_str("did not say anything in time"),
            Self::Failed(error) => write!(f, "{error}"),
            Self::Panic => f.write_str("a session panicked"),
        }
    }
}

/// The threads for one front-end. Dropped, they are gone and the device is reset.
struct Session<'a> {
    device: &'a VhostUserDevice,
    /// Always there, but in the midst of the drop.
    daemon: Option<Daemon>,
    /// Signalled, it ends the thread of events.
    door: EventFd,
}

type Daemon = VhostUserDaemon<Arc<VhostUserDevice>>;

impl<'a> Session<'a> {
    fn new(device: &'a Arc<VhostUserDevice>) -> Result<Self, DaemonError> {
        let table = Table::new(GuestMemoryMmap::new());
        let daemon = Daemon::new("vhost-user".into(), Arc::clone(device), table)?;
        let handler = daemon.get_epoll_handlers().pop().expect("there is one thread of events");
        match device.join(&handler) {
            Ok(door) => Ok(Self { device, daemon: Some(daemon), door }),
            Err(failure) => {
                // There is no way to end its thread, for which a drop would wait.
                mem::forget(daemon);
                device.leave();
                Err(DaemonError::StartDaemon(failure))
            }
        }
    }

    /// Passes messages on until the crate's thread ends. Returns how it did.
    fn run(&mut self, relay: &Relay) -> Result<Result<(), DaemonError>, DaemonError> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("relay".into());
            let passing = thread.spawn_scoped(scope, || relay.run());
            if passing.is_err() {
                relay.finish();
            }
            let result = self.daemon().wait();
            // After a panic, the crate's end is still open.
            relay.finish();
            passing.map(|_| result).map_err(DaemonError::StartDaemon)
        })
    }

    fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("it is there until the drop")
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.door.signal();
        drop(self.daemon.take());
        self.device.leave();
    }
}

/// What it protects is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::stdio::dup2_stdin;

use super::channel::{Channel, Message, Patience};
use super::{ENDS, Frame, Kind, LinkError};
use crate::state::{FdKey, Holder, PreviousEnd};

/// The worker's end.
#[derive(Debug)]
pub struct WorkerLink {
    channel: Arc<Channel>,
    held: Arc<Mutex<Keys>>,
}

/// What the supervisor holds for a function.
#[derive(Debug)]
pub struct Held {
    /// Which one: its position on the command line.
    pub function: u16,
    /// Its state memory. Empty and unsealed if no worker has used it yet.
    pub state: OwnedFd,
    /// The client's socket, if there is a client.
    pub client: Option<OwnedFd>,
    /// What was stored by the workers before this one.
    pub fds: BTreeMap<FdKey, OwnedFd>,
    /// How the worker before this one ended.
    pub previous_end: PreviousEnd,
}

/// What the supervisor wants.
#[derive(Debug)]
pub enum Order {
    /// Serve a new client of this function, which has none.
    Client {
        /// Which function.
        function: u16,
        /// The connection; reads and writes of it never wait.
        socket: OwnedFd,
    },
    /// Answer with [`Report::Pong`] and the same number.
    Ping(u32),
    /// Finish what was begun, commit, report [`Report::Drained`] and end: the next worker goes on with
    /// the same clients.
    Drain,
    /// Finish the turn, take leave of the clients and end with status 0.
    Stop,
}

/// What the supervisor is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// Every device is made and every state restored. Said before a turn that a former worker did not
    /// survive is tried again: from here on the watchdog looks for answers.
    Ready,
    /// The answer to [`Order::Ping`].
    Pong(u32),
    /// The function's client has gone; the supervisor closes its socket and accepts the next one. The
    /// state must hold nothing of the session any more.
    SessionEnded {
        /// Which function.
        function: u16,
    },
    /// Everything is committed, and nothing will be said or done any more.
    Drained,
}

/// The keys under which something is held, for each function.
#[derive(Debug, Default)]
struct Keys {
    functions: BTreeMap<u16, BTreeSet<FdKey>>,
    /// So many for each function.
    limit: usize,
}

impl WorkerLink {
    /// The link that [`Supervisor`](crate::supervisor) gives its workers as standard input, which is
    /// `/dev/null` afterwards.
    ///
    /// # Errors
    /// When there is none, or no descriptor is left.
    pub fn from_stdin() -> io::Result<Self> {
        let socket = io::stdin().as_fd().try_clone_to_owned()?;
        // A device must not find the link by its number.
        let null = open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        dup2_stdin(null)?;
        rustix::net::sockopt::socket_type(&socket)?;
        Ok(Self::from_fd(socket))
    }

    /// A link over the worker's end of a socket pair.
    #[must_use]
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { channel: Arc::new(Channel::new(socket)), held: Arc::default() }
    }

    /// Waits until this worker is the one to serve, and takes what is held, by function.
    ///
    /// # Errors
    /// [`LinkError::Closed`] when the supervisor has ended, or doesn't need this worker.
    pub fn begin(&self) -> Result<Vec<Held>, LinkError> {
        let mut functions: BTreeMap<u16, Held> = BTreeMap::new();
        loop {
            let message = self.channel.receive(Patience::Wait)?.ok_or(LinkError::Garbled)?;
            let Message { frame, fd, .. } = message;
            let Frame { kind, function, number } = frame;
            if kind == Kind::Begin {
                let previous_end = *ENDS.get(usize::from(function)).ok_or(LinkError::Garbled)?;
                let with_end = |held| Held { previous_end, ..held };
                let functions: Vec<Held> = functions.into_values().map(with_end).collect();
                self.remember(&functions, usize::try_from(number).unwrap_or(usize::MAX));
                return Ok(functions);
            }
            let fd = fd.ok_or(LinkError::Garbled)?;
            if kind == Kind::State {
                let (fds, previous_end) = (BTreeMap::new(), PreviousEnd::default());
                let held = Held { function, state: fd, client: None, fds, previous_end };
                functions.insert(function, held);
                continue;
            }
            let held = functions.get_mut(&function).ok_or(LinkError::Garbled)?;
            match kind {
                Kind::Client => held.client = Some(fd),
                Kind::Fd => drop(held.fds.insert(frame.key(), fd)),
                _ => return Err(LinkError::Garbled),
            }
        }
    }

    fn remember(&self, functions: &[Held], limit: usize) {
        let mut keys = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        keys.limit = limit;
        let held = functions.iter().map(|held| (held.function, held.fds.keys().copied().collect()));
        keys.functions = held.collect();
    }

    /// The next order, if there is one already.
    ///
    /// # Errors
    /// [`LinkError::Closed`] when the supervisor has ended. It is said again whenever one asks.
    pub fn next(&self) -> Result<Option<Order>, LinkError> {
        let Some(message) = self.channel.receive(Patience::DontWait)? else { return Ok(None) };
        let Frame { kind, function, number } = message.frame;
        Ok(Some(match kind {
            Kind::Client => {
                let socket = message.fd.ok_or(LinkError::Garbled)?;
                Order::Client { function, socket }
            }
            Kind::Ping => Order::Ping(u32::try_from(number).map_err(|_| LinkError::Garbled)?),
            Kind::Drain => Order::Drain,
            Kind::Stop => Order::Stop,
            _ => return Err(LinkError::Garbled),
        }))
    }

    /// Tells the supervisor. Nobody hears it when there is none any more, which
    /// [`next`](Self::next) tells.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn report(&self, report: Report) -> Result<(), LinkError> {
        let (kind, function, number) = match report {
            Report::Ready => (Kind::Ready, 0, 0),
            Report::Pong(number) => (Kind::Pong, 0, number.into()),
            Report::SessionEnded { function } => (Kind::SessionEnded, function, 0),
            Report::Drained => (Kind::Drained, 0, 0),
        };
        heard(self.channel.send(Frame { kind, function, number }, None, Patience::Wait))
    }

    /// Where a function's descriptors are held.
    #[must_use]
    pub fn holder(&self, function: u16) -> FunctionHolder {
        let (channel, held) = (Arc::clone(&self.channel), Arc::clone(&self.held));
        FunctionHolder { function, channel, held }
    }
}

impl AsFd for WorkerLink {
    /// Readable when there is an order.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// Has the supervisor hold descriptors of one function. When there is no supervisor any more, nothing
/// is held, and nobody is told.
#[derive(Debug)]
pub struct FunctionHolder {
    function: u16,
    channel: Arc<Channel>,
    held: Arc<Mutex<Keys>>,
}

impl Holder for FunctionHolder {
    /// Waits only while the kernel holds thousands of messages that the supervisor has not read.
    fn store(&mut self, key: FdKey, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut keys = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = keys.limit;
        let held = keys.functions.entry(self.function).or_default();
        if held.len() >= limit && !held.contains(&key) {
            return Err(Errno::MFILE.into());
        }
        let frame = Frame { kind: Kind::Store, function: self.function, number: key.0 };
        match heard(self.channel.send(frame, Some(fd), Patience::Wait)) {
            Ok(()) => {
                held.insert(key);
                Ok(())
            }
            Err(LinkError::System(errno)) => Err(errno.into()),
            Err(other) => Err(io::Error::other(other)),
        }
    }

    fn forget(&mut self, key: FdKey) {
        let mut keys = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.functions.get_mut(&self.function).is_some_and(|held| held.remove(&key)) {
            let frame = Frame { kind: Kind::Forget, function: self.function, number: key.0 };
            let _ = self.channel.send(frame, None, Patience::Wait);
        }
    }
}

/// Who has no supervisor goes on without one.
fn heard(sent: Result<(), LinkError>) -> Result<(), LinkError> {
    match sent {
        Err(LinkError::Closed) => Ok(()),
        other => other,
    }
}

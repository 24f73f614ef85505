//! Keeps functions alive while the processes that serve them come and go.
//!
//! The supervisor holds what must not die with a worker: the listening socket, the client's socket,
//! the state, and every descriptor that the worker has been given since. A worker that ends, however it
//! ends, is replaced by one that gets all of that and goes on. The client's connection never closes.
//!
//! The supervisor reads nothing that a guest or a client writes: it accepts connections and passes
//! them on. From workers, which do read that, it takes frames of fixed size, and a worker that sends
//! anything else is replaced.
//!
//! # When the supervisor is killed
//! Workers notice the end of their [`link`] and go on serving the clients that they have, unsupervised:
//! a guest does not notice. They take no new clients, and one that dies from then on is dead. Each ends
//! when its clients have gone. The sockets' files are left behind, and a supervisor that is started
//! again replaces them, but whatever the workers have open (a disk image) is theirs until they end.

mod clients;
mod disposal;
mod holding;
mod inheritance;
mod limits;
pub mod link;
mod poll;
mod process;
mod slot;
pub mod systemd;
#[cfg(test)]
mod tests;
pub mod upgrade;
mod workers;

pub use holding::Holding;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::{Errno, ioctl_fionbio};
use thiserror::Error;
use tracing::{info, warn};

use self::holding::Function;
use self::link::ToWorker;
use self::poll::{Epoll, Token};
use self::slot::Slot;
use self::systemd::Watch;
use crate::socket_path::SocketPath;

/// What workers may take to end when they are told to.
const PARTING_TIME: Duration = Duration::from_secs(5);
/// Frames that one worker has read for it before others have their turn.
const FRAMES: usize = 256;

/// How a worker for the functions with these indices is started. Its standard input and a variable of
/// its environment are added.
pub type Start = Box<dyn Fn(&[u16]) -> Command + Send>;

/// A function to keep alive.
#[derive(Debug)]
pub struct Setup {
    /// What the operator calls it.
    pub name: String,
    /// Functions of the same group have one worker; one of no group has one of its own.
    pub group: Option<String>,
    /// What is held for it.
    pub holding: Holding,
}

/// What the supervisor is asked by, each when it becomes readable: stream sockets or pipes.
#[derive(Debug)]
pub struct Signals {
    /// To end, with all workers.
    pub stop: OwnedFd,
    /// To pass on to all workers as SIGHUP.
    pub reload: OwnedFd,
    /// To end all workers so that others can go on with the same clients.
    pub upgrade: OwnedFd,
}

/// Workers and what is held for them.
pub struct Supervisor {
    epoll: Epoll,
    start: Start,
    signals: Signals,
    functions: Vec<Function>,
    slots: Vec<Slot>,
    /// How long a worker may take to answer.
    watchdog: Option<Duration>,
    /// Descriptors that are held for each function at most.
    share: usize,
    /// What workers may take to end.
    parting_time: Duration,
    phase: Phase,
    /// The service manager, which holds everything as well.
    manager: Watch,
    /// Asked before workers end for an upgrade.
    may_upgrade: Box<dyn FnMut() -> bool + Send>,
}

/// What the supervisor is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The first workers become ready, one after the other.
    Starting,
    /// The start has failed; there is nobody to wait for.
    Failed(StartError),
    Serving,
    /// Workers end, and are killed after this.
    Ending(End, Instant),
}

/// Why [`Supervisor::run`] returned. There are no workers then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The supervisor was asked to stop.
    Stopped,
    /// It was asked for an upgrade: everything is held, and whoever starts workers now goes on with it,
    /// be it by another [`run`](Supervisor::run).
    Drained,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Drained => "all workers have ended, and what they served is held",
        })
    }
}

/// Why [`Supervisor::start`] did not succeed. There are no workers then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StartError {
    /// A worker found a mistake of the operator's and has said so.
    #[error("a worker refused its arguments")]
    Refused,
    /// A worker could not start; the log says how it ended.
    #[error("a worker could not start")]
    Failed,
    /// The supervisor was asked to stop.
    #[error("stopped")]
    Stopped,
    /// The event loop failed, or the kernel is out of something.
    #[error("{0}")]
    System(Errno),
}

impl Supervisor {
    /// Takes what is to be kept alive. Nothing runs yet.
    ///
    /// # Errors
    /// When the kernel has no more descriptors, or allows too few for so many functions.
    pub fn new(
        setups: Vec<Setup>,
        start: Start,
        signals: Signals,
        watchdog: Option<Duration>,
    ) -> io::Result<Self> {
        let share = limits::share(setups.len()).map_err(io::Error::other)?;
        let epoll = Epoll::new()?;
        ioctl_fionbio(&signals.reload, true)?;
        ioctl_fionbio(&signals.upgrade, true)?;
        epoll.add(signals.stop.as_fd(), Token::Stop, EventFlags::IN)?;
        epoll.add(signals.reload.as_fd(), Token::Reload, EventFlags::IN)?;
        epoll.add(signals.upgrade.as_fd(), Token::Upgrade, EventFlags::IN)?;
        let mut slots: Vec<Slot> = Vec::new();
        let mut functions = Vec::new();
        let mut groups: Vec<Option<String>> = Vec::new();
        for (index, Setup { name, group, holding }) in setups.into_iter().enumerate() {
            let index = u16::try_from(index).map_err(|_| Errno::MFILE)?;
            let label = name.clone();
            let known = groups.iter().position(|known| known.is_some() && *known == group);
            let slot = known.unwrap_or_else(|| {
                slots.push(Slot::new(group.clone().unwrap_or(name), Vec::new()));
                groups.push(group);
                slots.len() - 1
            });
            slots[slot].functions.push(index);
            functions.push(Function::new(label, holding, slot));
        }
        let phase = Phase::Starting;
        let (parting_time, manager) = (PARTING_TIME, Watch::default());
        Ok(Self {
            epoll,
            start,
            signals,
            functions,
            slots,
            watchdog,
            share,
            parting_time,
            phase,
            manager,
            may_upgrade: Box::new(|| true),
        })
    }

    /// Starts the workers, one after the other, and waits until all are ready.
    ///
    /// # Errors
    /// [`StartError`], when they could not start.
    pub fn start(&mut self) -> Result<(), StartError> {
        let result = self.start_all();
        if result.is_err() {
            self.slots.iter_mut().for_each(|slot| slot.process = None);
        }
        result
    }

    fn start_all(&mut self) -> Result<(), StartError> {
        let failed = |failure: io::Error| {
            StartError::System(Errno::from_io_error(&failure).unwrap_or(Errno::IO))
        };
        for slot in 0..self.slots.len() {
            self.begin(slot).map_err(failed)?;
            loop {
                match self.phase {
                    Phase::Failed(error) => return Err(error),
                    Phase::Ending(..) if self.has_ended() => return Err(StartError::Stopped),
                    Phase::Starting if self.slots[slot].is_ready() => break,
                    Phase::Starting | Phase::Serving | Phase::Ending(..) => {}
                }
                self.turn().map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Accepts a function's clients on this socket, from [`run`](Self::run) on.
    ///
    /// # Panics
    /// If there is no such function.
    pub fn listen(&mut self, function: usize, socket: SocketPath) {
        self.functions[function].socket = Some(socket);
    }

    /// What is held for the functions, by their index.
    pub fn holdings(&self) -> impl Iterator<Item = &Holding> {
        self.functions.iter().map(|function| &function.holding)
    }

    /// Keeps the functions alive until it is asked for something else.
    ///
    /// # Errors
    /// When the event loop itself fails; nothing that a client or worker does can cause that.
    pub fn run(&mut self) -> io::Result<End> {
        if !matches!(self.phase, Phase::Ending(End::Stopped, _)) {
            self.phase = Phase::Serving;
            let now = Instant::now();
            for slot in self.slots.iter_mut().filter(|slot| slot.process.is_none()) {
                slot.restart_at.get_or_insert(now);
            }
            for function in 0..self.functions.len() {
                self.look_for_clients(function)?;
            }
        }
        loop {
            match self.phase {
                Phase::Ending(end, _) if self.has_ended() => {
                    info!("{end}");
                    return Ok(end);
                }
                _ => self.turn()?,
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.slots.iter().all(|slot| slot.process.is_none())
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> io::Result<()> {
        for token in self.epoll.wait(self.next_deadline())? {
            match token {
                Token::Stop => {
                    self.epoll.remove(self.signals.stop.as_fd())?;
                    self.manager.stopping();
                    self.end_workers(End::Stopped)?;
                }
                Token::Reload => {
                    if self.read_all(&self.signals.reload)? {
                        self.manager.reloading();
                        self.reload();
                        self.manager.ready();
                    }
                }
                Token::Upgrade => {
                    let asked = self.read_all(&self.signals.upgrade)?;
                    if asked && self.phase == Phase::Serving && (self.may_upgrade)() {
                        self.end_workers(End::Drained)?;
                    }
                }
                Token::Listener(function) => self.accept(function as usize)?,
                Token::Link(slot) => {
                    self.hear(slot as usize, FRAMES)?;
                    self.flush(slot as usize)?;
                }
                Token::Ended(slot) => self.bury(slot as usize)?,
                Token::Manager => drop(self.manager.flush()),
            }
        }
        self.expire(Instant::now())
    }

    /// Nobody is asked whether they are alive while they end.
    fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|_| !matches!(self.phase, Phase::Ending(..)))
    }

    /// When a worker is due to be looked at.
    fn check_at(&self, slot: &Slot) -> Option<Instant> {
        // The first may take as long as it likes to start: nobody relies on it yet.
        let watchdog = self.watchdog().filter(|_| slot.has_served);
        slot.process.as_ref().and_then(|process| process.deadline(watchdog, self.parting_time))
    }

    fn next_deadline(&self) -> Option<Instant> {
        let slots = self.slots.iter().flat_map(|slot| {
            let flush_at = slot.process.as_ref().and_then(|process| process.flush_at);
            [slot.restart_at, flush_at, self.check_at(slot)]
        });
        let functions = self.functions.iter().map(|function| function.accept_again_at);
        let end = match self.phase {
            Phase::Ending(_, until) => Some(until),
            _ => None,
        };
        slots.chain(functions).chain([end, self.manager.alive_at()]).flatten().min()
    }

    /// Does what it is time for.
    fn expire(&mut self, now: Instant) -> io::Result<()> {
        self.manager.expire(now);
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        for slot in 0..self.slots.len() {
            if due(self.slots[slot].restart_at) {
                self.restart(slot)?;
            }
            if due(self.slots[slot].process.as_ref().and_then(|process| process.flush_at)) {
                self.flush(slot)?;
            }
            self.watch(slot, now)?;
        }
        for index in 0..self.functions.len() {
            if due(self.functions[index].accept_again_at) {
                self.functions[index].accept_again_at = None;
                self.look_for_clients(index)?;
            }
        }
        if let Phase::Ending(end, until) = self.phase
            && until <= now
        {
            for slot in &mut self.slots {
                if let Some(process) = &mut slot.process {
                    warn!("worker {} of {} does not end: killed", process.id(), slot.name);
                    process.kill();
                }
            }
            self.phase = Phase::Ending(end, now + self.parting_time);
        }
        Ok(())
    }

    /// Tells all workers to end, each in its own time.
    fn end_workers(&mut self, end: End) -> io::Result<()> {
        self.phase = Phase::Ending(end, Instant::now() + self.parting_time);
        for function in &mut self.functions {
            function.accept_again_at = None;
            if let Some(socket) = function.socket.as_ref().filter(|_| function.listening) {
                self.epoll.remove(socket.listener())?;
            }
            function.listening = false;
        }
        for slot in 0..self.slots.len() {
            self.slots[slot].restart_at = None;
            if let Some(process) = &mut self.slots[slot].process {
                process.link.tell(match end {
                    // The next supervisor may go on with what the service manager holds.
                    End::Stopped if !self.manager.is_there() => ToWorker::Stop,
                    End::Stopped | End::Drained => ToWorker::Drain,
                });
                self.flush(slot)?;
            }
        }
        Ok(())
    }

    /// Whether it was asked for, however often.
    fn read_all(&self, requests: &OwnedFd) -> io::Result<bool> {
        let (mut bytes, mut asked) = ([0; 64], false);
        loop {
            match rustix::io::read(requests, &mut bytes) {
                Ok(1..) => asked = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(asked),
                Ok(0) | Err(_) => {
                    // Nobody can ask any more.
                    self.epoll.remove(requests.as_fd())?;
                    return Ok(asked);
                }
            }
        }
    }

    fn reload(&mut self) {
        for slot in &mut self.slots {
            match &slot.process {
                Some(process) if process.is_ready() => process.reload(),
                // It might not expect the signal yet.
                _ => slot.reload = true,
            }
        }
    }
}

impl fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { functions, slots, phase, .. } = self;
        f.debug_struct("Supervisor")
            .field("functions", functions)
            .field("slots", slots)
            .field("phase", phase)
            .finish_non_exhaustive()
    }
}

/// There are at most 65536 functions.
fn token_index(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::link::{SupervisorLink, ToWorker};
use crate::state::PreviousEnd;

/// Tells a worker how many have begun before it in its place.
pub(super) const INCARNATION: &str = "BARKEEP_INCARNATION";
/// How often a worker is asked whether it is alive, at least.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Pings for each time that the watchdog waits.
const PINGS: u32 = 3;
/// What a worker may take to make its devices, if the watchdog's patience is shorter.
const START_TIME: Duration = Duration::from_secs(10);

/// A worker's process. It ends with this value, and leaves no zombie.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    pidfd: OwnedFd,
    pub(super) link: SupervisorLink,
    pub(super) watched: Watched,
    /// Since when it serves.
    ready_since: Option<Instant>,
    /// To be tried again: there were too many descriptors on their way.
    pub(super) flush_at: Option<Instant>,
    pulse: Pulse,
    pings: u32,
}

/// What the event loop looks for on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watched {
    Nothing,
    Read,
    ReadWrite,
}

/// What the watchdog waits for.
#[derive(Clone, Copy, Debug)]
enum Pulse {
    /// For the worker to become ready.
    Starting(Instant),
    /// For the time of the next question.
    Resting(Instant),
    /// For the answer with this number.
    Asked(u32, Instant),
    /// For its end, which it has begun.
    Leaving(Instant),
    /// For its end, which it can't help.
    Killed,
}

impl Process {
    /// Starts a worker. Nothing is said to it yet.
    pub(super) fn spawn(mut command: Command, incarnation: u32) -> io::Result<Self> {
        let (link, theirs) = SupervisorLink::pair().map_err(io::Error::other)?;
        command.stdin(theirs).env(INCARNATION, incarnation.to_string());
        // A terminal's signals are for the supervisor, which stops its workers in order.
        command.process_group(0);
        let mut child = command.spawn()?;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self {
                child,
                pidfd,
                link,
                watched: Watched::Nothing,
                ready_since: None,
                flush_at: None,
                pulse: Pulse::Starting(Instant::now()),
                pings: 0,
            }),
            Err(errno) => {
                end(&mut child);
                Err(errno.into())
            }
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Readable when it has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it ended, if it has. There is no zombie then.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Who did it, for its successor.
    pub(super) fn previous_end(&self, status: ExitStatus) -> PreviousEnd {
        let killed_by_us = matches!(self.pulse, Pulse::Killed);
        let killed = [Signal::KILL, Signal::TERM].map(|signal| Some(signal.as_raw()));
        match status.code() {
            Some(0) => PreviousEnd::Orderly,
            None if killed.contains(&status.signal()) && !killed_by_us => PreviousEnd::FromOutside,
            Some(_) | None => PreviousEnd::ByItself,
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready_since.is_some()
    }

    /// For how long it has served.
    pub(super) fn served_for(&self) -> Option<Duration> {
        self.ready_since.map(|since| since.elapsed())
    }

    pub(super) fn became_ready(&mut self) {
        let now = Instant::now();
        self.ready_since.get_or_insert(now);
        if let Pulse::Starting(_) = self.pulse {
            self.pulse = Pulse::Resting(now);
        }
    }

    pub(super) fn answered(&mut self, number: u32) {
        if let Pulse::Asked(asked, at) = self.pulse
            && asked == number
        {
            self.pulse = Pulse::Resting(at);
        }
    }

    /// When the watchdog, if there is one, has something to do; or its time to leave is over.
    pub(super) fn deadline(
        &self,
        watchdog: Option<Duration>,
        parting_time: Duration,
    ) -> Option<Instant> {
        match (self.pulse, watchdog) {
            (Pulse::Leaving(since), _) => Some(since + parting_time),
            (Pulse::Killed, _) | (_, None) => None,
            (Pulse::Starting(since), Some(time)) => Some(since + time.max(START_TIME)),
            (Pulse::Resting(since), Some(time)) => Some(since + PING_INTERVAL.min(time / PINGS)),
            (Pulse::Asked(_, since), Some(time)) => Some(since + time),
        }
    }

    /// Asks whether it is alive, at its deadline. `false` if it should have answered by now.
    pub(super) fn check(&mut self, now: Instant) -> bool {
        let Pulse::Resting(_) = self.pulse else { return false };
        self.pings = self.pings.wrapping_add(1);
        self.link.tell(ToWorker::Ping(self.pings));
        self.pulse = Pulse::Asked(self.pings, now);
        true
    }

    /// It has closed its link, and so is about to end.
    pub(super) fn leaves(&mut self) {
        if !matches!(self.pulse, Pulse::Leaving(_) | Pulse::Killed) {
            self.pulse = Pulse::Leaving(Instant::now());
        }
    }

    /// Has the kernel end it, whatever it does.
    pub(super) fn kill(&mut self) {
        self.pulse = Pulse::Killed;
        // It fails only if it has ended.
        let _ = self.child.kill();
    }

    pub(super) fn reload(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::HUP);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A supervisor that panics leaves its workers alone: they go on serving.
        if !thread::panicking() {
            end(&mut self.child);
        }
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

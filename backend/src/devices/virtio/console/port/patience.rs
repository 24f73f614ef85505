use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use tracing::warn;

use super::Output;
use crate::devices::timer::Timer;
use crate::log_limit::RateLimit;

/// How long output waits for a reader that takes none of it.
///
/// It can't wait for ever: the driver of Linux sends with a spinlock held, and spins until the
/// request is back. Then whoever forgets to read at the host's end stops the guest.
#[derive(Debug)]
pub(super) struct Patience {
    /// It runs while output waits, and only then.
    timer: Timer,
    length: Duration,
    state: State,
    /// What logs call the console.
    path: PathBuf,
    log: RateLimit,
}

#[derive(Debug)]
enum State {
    /// Nothing waits.
    Calm,
    /// Output waits, and the timer runs.
    Waiting,
    /// The time is over. If the reader has still taken nothing when output is tried once more, it
    /// is lost: they may have taken less than what makes the kernel tell.
    LastTry,
    /// The reader is stuck. Output is dropped until they take something, or leave.
    Exhausted { dropped: u64 },
}

impl Patience {
    pub(super) fn new(length: Duration, path: &Path) -> Result<Self, Errno> {
        let timer = Timer::new()?;
        let log = RateLimit::default();
        Ok(Self { timer, length, state: State::Calm, path: path.to_owned(), log })
    }

    /// The end of its timer is [`expire`](Self::expire)'s occasion; to be watched for the edge.
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// What becomes of output that the reader has no room for. The time runs from the first on.
    pub(super) fn blocked(&mut self) -> Output {
        match self.state {
            State::Calm => {
                self.timer.set(self.length);
                self.state = State::Waiting;
                Output::Blocked
            }
            State::Waiting => Output::Blocked,
            State::LastTry => {
                self.state = State::Exhausted { dropped: 0 };
                Output::Dropped
            }
            State::Exhausted { .. } => Output::Dropped,
        }
    }

    /// The timer went off.
    pub(super) fn expire(&mut self) {
        if matches!(self.state, State::Waiting) {
            self.state = State::LastTry;
        }
    }

    pub(super) fn is_exhausted(&self) -> bool {
        matches!(self.state, State::Exhausted { .. })
    }

    /// So many bytes were dropped while it was exhausted.
    pub(super) fn count(&mut self, bytes: u64) {
        if let State::Exhausted { dropped } = &mut self.state {
            *dropped = dropped.saturating_add(bytes);
        }
    }

    /// The reader took something, or there is another, or none.
    pub(super) fn renew(&mut self) {
        self.nothing_waits();
        if let State::Exhausted { dropped } = self.state {
            self.state = State::Calm;
            if let Some(suppressed) = self.log.admit() {
                let (console, length) = (self.path.display(), self.length);
                warn!(
                    %console,
                    dropped, suppressed, "output was dropped: nobody read any of it for {length:?}"
                );
            }
        }
    }

    /// The output that waited is forgotten. A reader that is stuck is still stuck.
    pub(super) fn nothing_waits(&mut self) {
        if matches!(self.state, State::Waiting | State::LastTry) {
            self.timer.stop();
            self.state = State::Calm;
        }
    }
}

impl Drop for Patience {
    /// What was lost is told in any case.
    fn drop(&mut self) {
        self.renew();
    }
}

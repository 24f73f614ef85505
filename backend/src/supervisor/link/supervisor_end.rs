use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;

use super::channel::{Channel, Message, Patience};
use super::{ENDS, Frame, Kind, LinkError};
use crate::state::{FdKey, PreviousEnd};

/// The supervisor's end. It never waits for the worker, which may be stopped or worse.
#[derive(Debug)]
pub struct SupervisorLink {
    channel: Channel,
    /// What the kernel has not taken yet.
    unsent: VecDeque<(Frame, Option<Arc<OwnedFd>>)>,
}

/// What the worker is told.
#[derive(Clone, Debug)]
pub enum ToWorker {
    /// A function's state memory. Before [`Begin`](Self::Begin), and before what else is held for it.
    State(u16, Arc<OwnedFd>),
    /// A function's client: the one that it had before, or after [`Begin`](Self::Begin) a new one.
    Client(u16, Arc<OwnedFd>),
    /// What a former worker has stored for a function.
    Fd(u16, FdKey, Arc<OwnedFd>),
    /// That was everything: serve. So many descriptors are held for each function at most.
    Begin {
        /// At most so many.
        limit: usize,
        /// How the last worker ended.
        previous_end: PreviousEnd,
    },
    /// Answer with the same number.
    Ping(u32),
    /// Finish what was begun, and end: the next worker goes on with the same clients.
    Drain,
    /// End.
    Stop,
}

/// What the worker says.
#[derive(Debug)]
pub enum FromWorker {
    /// It serves.
    Ready,
    /// The answer to a ping.
    Pong(u32),
    /// A function's client has gone.
    SessionEnded(u16),
    /// Everything is committed.
    Drained,
    /// Hold this for a function.
    Store(u16, FdKey, OwnedFd),
    /// This was to be held for a function, but this process has no room for more descriptors.
    Lost(u16, FdKey),
    /// Hold this no more.
    Forget(u16, FdKey),
}

impl SupervisorLink {
    /// A link, and the end for the worker.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn pair() -> Result<(Self, OwnedFd), LinkError> {
        let (channel, theirs) = Channel::pair()?;
        Ok((Self { channel, unsent: VecDeque::new() }, theirs))
    }

    /// Tells the worker, as soon as there is room for it.
    pub fn tell(&mut self, order: ToWorker) {
        let (kind, function, number, fd) = match order {
            ToWorker::State(function, fd) => (Kind::State, function, 0, Some(fd)),
            ToWorker::Client(function, fd) => (Kind::Client, function, 0, Some(fd)),
            ToWorker::Fd(function, key, fd) => (Kind::Fd, function, key.0, Some(fd)),
            ToWorker::Begin { limit, previous_end } => {
                let end = (0..).zip(ENDS).find(|(_, end)| *end == previous_end);
                (Kind::Begin, end.map_or(0, |(code, _)| code), limit as u64, None)
            }
            ToWorker::Ping(number) => (Kind::Ping, 0, number.into(), None),
            ToWorker::Drain => (Kind::Drain, 0, 0, None),
            ToWorker::Stop => (Kind::Stop, 0, 0, None),
        };
        self.unsent.push_back((Frame { kind, function, number }, fd));
    }

    /// Sends what there is room for.
    ///
    /// # Errors
    /// [`LinkError::Closed`] when the worker has gone; what it has said is still there to be read.
    /// [`LinkError::System`] when the kernel has no room for another reason; then it may have later.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while let Some((frame, fd)) = self.unsent.front() {
            let fd = fd.as_ref().map(|fd| fd.as_fd());
            match self.channel.send(*frame, fd, Patience::DontWait) {
                Ok(()) => drop(self.unsent.pop_front()),
                Err(LinkError::System(Errno::AGAIN)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether there was no room for something.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// The next message of the worker, if there is one.
    ///
    /// # Errors
    /// [`LinkError::Closed`] at the end, [`LinkError::Garbled`] if no worker would say that.
    pub fn next(&self) -> Result<Option<FromWorker>, LinkError> {
        let Some(message) = self.channel.receive(Patience::DontWait)? else { return Ok(None) };
        let Message { frame, fd, fd_lost } = message;
        let Frame { kind, function, number } = frame;
        Ok(Some(match kind {
            Kind::Ready => FromWorker::Ready,
            Kind::Pong => FromWorker::Pong(u32::try_from(number).map_err(|_| LinkError::Garbled)?),
            Kind::SessionEnded => FromWorker::SessionEnded(function),
            Kind::Drained => FromWorker::Drained,
            Kind::Store if fd_lost => FromWorker::Lost(function, frame.key()),
            Kind::Store => FromWorker::Store(function, frame.key(), fd.ok_or(LinkError::Garbled)?),
            Kind::Forget => FromWorker::Forget(function, frame.key()),
            _ => return Err(LinkError::Garbled),
        }))
    }
}

impl AsFd for SupervisorLink {
    /// Readable when the worker has said something or has gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::connection::Connection;

/// Attends to a connection while no request is under way: learns at once that the backend has gone,
/// and serves the server's own commands.
///
/// For a thread of the VMM, one for each client. It takes nothing from those that wait for answers:
/// it does not wake up for their replies, unless the server is known to send commands on the same
/// socket, and reads only when nobody else does.
#[derive(Clone, Debug)]
pub struct Attendant {
    connection: Arc<Connection>,
}

/// Why an attendant has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attended {
    /// The session has ended: nothing of the backend's may stay mapped.
    Ended,
    /// [`Attendant::stop`] was called.
    Stopped,
    /// The time is over.
    TimedOut,
}

/// A server that has never sent a command of its own may begin: it is looked for this often.
const PATIENCE: Duration = Duration::from_millis(100);

impl Attendant {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        Self { connection }
    }

    /// Attends until the session ends or [`stop`](Self::stop) is called.
    pub fn attend(&self) -> Attended {
        loop {
            match self.attend_within(Duration::MAX) {
                Attended::TimedOut => {}
                end => return end,
            }
        }
    }

    /// As [`attend`](Self::attend), for at most `limit`. A VMM with an event loop of its own calls it
    /// with a limit of zero when [`hangup_fd`](Self::hangup_fd) is ready.
    pub fn attend_within(&self, limit: Duration) -> Attended {
        let expires = Instant::now().checked_add(limit);
        loop {
            let connection = &self.connection;
            if connection.has_ended() {
                return Attended::Ended;
            }
            if connection.is_stopped() {
                return Attended::Stopped;
            }
            let left = expires.map(|at| at.saturating_duration_since(Instant::now()));
            if let Err(error) = self.round(left) {
                // Whoever waits for an answer is told that there is none.
                tracing::debug!("attending: {error}");
                connection.end();
                return Attended::Ended;
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Attended::TimedOut;
            }
        }
    }

    /// Has all attendants of this connection return, for good. The session goes on; the server's socket
    /// for its own commands, if it has one, is open still and not served any more.
    pub fn stop(&self) {
        self.connection.stop();
    }

    /// The socket, to be polled for `POLLRDHUP` and `POLLHUP`, and never to be read.
    #[must_use]
    pub fn hangup_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }

    fn round(&self, left: Option<Duration>) -> Result<(), super::ClientError> {
        let connection = &self.connection;
        // A reply that arrives for somebody else does not wake one that does not ask for data.
        let commands = connection.hears_commands();
        let limit =
            if commands { left } else { Some(left.map_or(PATIENCE, |left| left.min(PATIENCE))) };
        let mut found = connection.poll_idle(commands, limit)?;
        if !commands && found.socket.is_empty() {
            found.socket = connection.poll_now(PollFlags::IN)?;
        }
        if !found.twin.is_empty() {
            connection.serve_twin()?;
        }
        if found.socket.is_empty() {
            return Ok(());
        }
        match connection.try_read() {
            // The end of the stream is read like a message.
            Some(reading) => reading.receive_idle(),
            None => {
                connection.wait_for_reader(left);
                Ok(())
            }
        }
    }
}

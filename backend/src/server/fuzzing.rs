//! A session without an event loop, for the fuzz targets: what it does depends on its bytes alone.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::ServedFunction;
use super::session::Session;

/// A client cannot be late here.
const HANDSHAKE_TIME: Duration = Duration::from_secs(3600);

/// One client's connection to a function.
#[derive(Debug)]
pub struct Connection {
    session: Session,
}

impl Connection {
    /// A connection on a non-blocking socket.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { session: Session::new(socket, Instant::now() + HANDSHAKE_TIME) }
    }

    /// Serves as long as the socket has something to read, or takes what waits to be written.
    /// Returns whether the session goes on.
    pub fn serve(&mut self, function: &mut ServedFunction) -> bool {
        loop {
            if self.session.serve(function.0.as_mut()).is_err() {
                return false;
            }
            if self.session.has_more() {
                continue;
            }
            let (socket, writes) = self.session.waits();
            let events = if writes { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let mut socket = [PollFd::from_borrowed_fd(socket, events)];
            if poll(&mut socket, Some(&Timespec::default())) != Ok(1) {
                return true;
            }
        }
    }

    /// Ends the session, as when the client has left: the function is as at power-on.
    pub fn end(self, function: &mut ServedFunction) {
        function.0.client_left();
    }
}

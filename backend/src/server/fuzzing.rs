//! A session without a server around it, for the fuzz targets: what it does depends on its bytes alone.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::ServedFunction;
use super::event_loop::{Epoll, Source, Token, Wait};
use super::session::Session;
use super::unmask_watch::UnmaskWatch;

/// A client cannot be late here.
const HANDSHAKE_TIME: Duration = Duration::from_secs(3600);
/// Rounds in a row in which nothing but eventfds spoke. One that is the signal of an interrupt and
/// its end wakes itself for ever, which a server bears round by round.
const MAX_EVENTFD_ROUNDS: usize = 64;
/// It has one function.
const PORT: usize = 0;

/// One client's connection to a function.
#[derive(Debug)]
pub struct Connection {
    session: Session,
    epoll: Epoll,
    unmask: UnmaskWatch,
}

impl Connection {
    /// A connection on a non-blocking socket.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn new(socket: OwnedFd, function: &ServedFunction) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        function.watch_wakes(&epoll, PORT)?;
        let mut session = Session::new(socket, Instant::now() + HANDSHAKE_TIME);
        session.watch(&epoll, PORT)?;
        Ok(Self { session, epoll, unmask: UnmaskWatch::default() })
    }

    /// Serves until nothing is left to read, to write or to do. Returns whether the session goes on.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn serve(&mut self, function: &mut ServedFunction) -> io::Result<bool> {
        let mut tokens = Vec::new();
        let mut eventfd_rounds = 0;
        while eventfd_rounds < MAX_EVENTFD_ROUNDS {
            self.epoll.wait(Wait::None, &mut tokens)?;
            if self.session.has_more() || function.0.has_work() {
                tokens.push(Token::Port(PORT, Source::Work));
            }
            if tokens.is_empty() {
                return Ok(true);
            }
            let eventfd =
                |token: &Token| matches!(token, Token::Port(_, Source::Wake(_) | Source::Unmask));
            eventfd_rounds = if tokens.iter().all(eventfd) { eventfd_rounds + 1 } else { 0 };
            for token in &tokens {
                let Token::Port(_, source) = *token else { continue };
                function.hear(source);
                if self.session.turn(source, function.0.as_mut()).is_err() {
                    return Ok(false);
                }
                self.session.watch(&self.epoll, PORT)?;
                self.unmask.follow(function.0.unmask_eventfd(), &self.epoll, PORT)?;
            }
        }
        Ok(true)
    }

    /// Ends the session, as when the client has left: the function is as at power-on.
    pub fn end(self, function: &mut ServedFunction) {
        function.0.client_left();
    }
}

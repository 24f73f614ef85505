//! A session without a server around it, for the fuzz targets: what it does depends on its bytes alone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ServedFunction;
use super::event_loop::{Epoll, Interest, Source, Token, Wait};
use super::session::{Session, SessionEnd};
use crate::irq::EventFd;

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
    unmask: Option<Arc<EventFd>>,
}

impl Connection {
    /// A connection on a non-blocking socket.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn new(socket: OwnedFd, function: &ServedFunction) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for (index, eventfd) in function.0.wakes().into_iter().enumerate() {
            let wake = Source::Wake(u16::try_from(index).unwrap_or(u16::MAX));
            epoll.add(eventfd, Token::Port(PORT, wake), Interest::Edge)?;
        }
        let mut session = Session::new(socket, Instant::now() + HANDSHAKE_TIME);
        session.watch(&epoll, PORT)?;
        Ok(Self { session, epoll, unmask: None })
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
                if self.turn(source, function).is_err() {
                    return Ok(false);
                }
                self.session.watch(&self.epoll, PORT)?;
                self.watch_unmask(function)?;
            }
        }
        Ok(true)
    }

    /// Ends the session, as when the client has left: the function is as at power-on.
    pub fn end(self, function: &mut ServedFunction) {
        function.0.client_left();
    }

    fn turn(&mut self, source: Source, function: &mut ServedFunction) -> Result<(), SessionEnd> {
        let (session, function) = (&mut self.session, function.0.as_mut());
        match source {
            Source::Client => session.serve(function).map(|_| ()),
            Source::Work => {
                function.work();
                if session.has_more() {
                    return session.serve(function).map(|_| ());
                }
                session.speak(function)
            }
            Source::Twin => session.serve_twin(function),
            Source::Wake(index) => {
                function.woken(usize::from(index));
                session.speak(function)
            }
            Source::Unmask => {
                function.unmask();
                session.speak(function)
            }
            Source::Listener | Source::Look => Ok(()),
        }
    }

    fn watch_unmask(&mut self, function: &ServedFunction) -> io::Result<()> {
        let wanted = function.0.unmask_eventfd();
        if wanted.map(Arc::as_ptr) == self.unmask.as_ref().map(Arc::as_ptr) {
            return Ok(());
        }
        if let Some(watched) = self.unmask.take() {
            self.epoll.remove(watched.as_fd())?;
        }
        let token = Token::Port(PORT, Source::Unmask);
        self.unmask = wanted
            .cloned()
            .filter(|unmask| self.epoll.add(unmask.as_fd(), token, Interest::Edge).is_ok());
        Ok(())
    }
}

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::{info, warn};

use super::event_loop::{Epoll, Interest, Source, Token};
use super::served::ServedFunction;
use super::session::{Progress, Session, SessionEnd};
use super::unmask_watch::UnmaskWatch;
use crate::log_limit::RateLimit;
use crate::socket_path::SocketPath;

/// How long a client may take from being accepted to its VERSION message. The next one is waiting,
/// and has patience of its own: QEMU's is 5 seconds, so it outlasts a few that stay silent.
const HANDSHAKE_TIME: Duration = Duration::from_secs(1);
/// How long accepting pauses when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// One function with its socket and the client that has it at the moment.
#[derive(Debug)]
pub(super) struct Port {
    index: usize,
    socket: SocketPath,
    function: ServedFunction,
    session: Option<Session>,
    unmask: UnmaskWatch,
    accept_again_at: Option<Instant>,
    client_log: RateLimit,
    accept_log: RateLimit,
}

/// What a turn brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Nothing,
    /// Requests of the client were served.
    Served,
    /// The client is gone.
    Ended,
}

impl Port {
    pub(super) fn new(index: usize, socket: SocketPath, function: ServedFunction) -> Self {
        Self {
            index,
            socket,
            function,
            session: None,
            unmask: UnmaskWatch::default(),
            accept_again_at: None,
            client_log: RateLimit::default(),
            accept_log: RateLimit::default(),
        }
    }

    /// Adds it to the event loop.
    pub(super) fn add(&self, epoll: &Epoll) -> io::Result<()> {
        self.function.watch_wakes(epoll, self.index)?;
        self.listen(epoll)
    }

    /// Does what an event asks for.
    pub(super) fn turn(&mut self, epoll: &Epoll, source: Source) -> io::Result<Turn> {
        if source == Source::Listener {
            return self.accept(epoll).map(|()| Turn::Nothing);
        }
        self.function.hear(source);
        // An event of a session that ended earlier in this round finds none.
        let Some(session) = &mut self.session else { return Ok(Turn::Nothing) };
        let greeted = session.handshake_deadline().is_none();
        let progress = match session.turn(source, self.function.0.as_mut()) {
            Ok(progress) => progress,
            Err(end) => return self.end_session(epoll, &end).map(|()| Turn::Ended),
        };
        session.watch(epoll, self.index)?;
        if !greeted && session.handshake_deadline().is_none() {
            log_client(&mut self.client_log, &self.socket, "client connected");
        }
        if progress == Progress::Nothing {
            return Ok(Turn::Nothing);
        }
        self.watch_unmask(epoll)?;
        Ok(Turn::Served)
    }

    /// Whether the function goes on by itself when it gets another turn.
    pub(super) fn has_work(&self) -> bool {
        self.function.0.has_work() || self.session.as_ref().is_some_and(Session::has_more)
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.session {
            Some(session) => session.handshake_deadline(),
            None => self.accept_again_at,
        }
    }

    /// Ends a handshake that takes too long, or resumes accepting.
    pub(super) fn expire(&mut self, epoll: &Epoll, now: Instant) -> io::Result<()> {
        if self.deadline().is_none_or(|at| at > now) {
            return Ok(());
        }
        if self.session.is_some() {
            return self.end_session(epoll, &SessionEnd::Silent);
        }
        self.accept_again_at = None;
        self.listen(epoll)
    }

    /// The end of the server, which waits for nobody.
    pub(super) fn stop(&mut self) {
        if let Some(session) = &mut self.session {
            let _ = session.flush();
        }
        self.function.0.client_left();
        if let Some(session) = &mut self.session {
            session.show(self.function.0.as_ref());
        }
    }

    /// Takes the next client. Further ones wait in the socket's backlog until it leaves.
    fn accept(&mut self, epoll: &Epoll) -> io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match accept_with(self.socket.listener(), flags) {
            Ok(socket) => self.start_session(epoll, socket),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(()),
            Err(errno) => {
                // The connection stays in the backlog; trying again at once would spin.
                if let Some(suppressed) = self.accept_log.admit() {
                    let socket = &self.socket;
                    warn!(%socket, suppressed, "can't accept a client: {errno}");
                }
                epoll.remove(self.socket.listener())?;
                self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
                Ok(())
            }
        }
    }

    fn start_session(&mut self, epoll: &Epoll, socket: OwnedFd) -> io::Result<()> {
        epoll.remove(self.socket.listener())?;
        let mut session = Session::new(socket, Instant::now() + HANDSHAKE_TIME);
        session.watch(epoll, self.index)?;
        self.session = Some(session);
        Ok(())
    }

    fn end_session(&mut self, epoll: &Epoll, end: &SessionEnd) -> io::Result<()> {
        let mut session = self.session.take();
        if let Some(session) = &mut session {
            session.remove(epoll)?;
            // A probe that connects and leaves without a word is no client.
            if session.handshake_deadline().is_none() || !matches!(end, SessionEnd::Left) {
                log_client(&mut self.client_log, &self.socket, &format!("client gone: {end}"));
            }
        }
        self.function.0.client_left();
        if let Some(session) = &mut session {
            session.show(self.function.0.as_ref());
        }
        self.watch_unmask(epoll)?;
        // Not earlier: the end of the connection tells the client that its memory is given back.
        drop(session);
        self.listen(epoll)
    }

    fn watch_unmask(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.unmask.follow(self.function.0.unmask_eventfd(), epoll, self.index)
    }

    fn listen(&self, epoll: &Epoll) -> io::Result<()> {
        epoll.add(self.socket.listener(), self.token(Source::Listener), Interest::Read)
    }

    fn token(&self, source: Source) -> Token {
        Token::Port(self.index, source)
    }
}

/// Clients may come and go as fast as they like, and this is all that it costs.
fn log_client(log: &mut RateLimit, socket: &SocketPath, what: &str) {
    if let Some(suppressed) = log.admit() {
        info!(%socket, suppressed, "{what}");
    }
}

#[cfg(test)]
mod tests;

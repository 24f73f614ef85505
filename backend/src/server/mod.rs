//! Serves functions to clients: one socket a function, one client a socket, one event loop for all.

mod event_loop;
mod function;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "passthrough")]
mod passthrough;
mod rate_limit;
mod request_error;
mod served;
mod session;
mod socket_path;

#[cfg(test)]
mod tests;

pub use function::HostedFunction;
#[cfg(feature = "passthrough")]
pub use passthrough::PassthroughFunction;
pub use request_error::RequestError;
pub use served::ServedFunction;
pub use socket_path::{SocketError, SocketPath};

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::{info, warn};

use self::event_loop::{Epoll, Interest, Token};
use self::rate_limit::RateLimit;
use self::session::{Session, SessionEnd};

/// How long a client may take from being accepted to its VERSION message. The next one is waiting,
/// and has patience of its own: QEMU's is 5 seconds, so it outlasts a few that stay silent.
const HANDSHAKE_TIME: Duration = Duration::from_secs(1);
/// How long accepting pauses when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Functions and the sockets they are served on.
#[derive(Debug)]
pub struct Server {
    epoll: Epoll,
    ports: Vec<Port>,
}

/// One function with its socket and the client that has it at the moment.
#[derive(Debug)]
struct Port {
    socket: SocketPath,
    function: ServedFunction,
    session: Option<Session>,
    accept_again_at: Option<Instant>,
    client_log: RateLimit,
    accept_log: RateLimit,
}

impl Server {
    /// A server of nothing.
    ///
    /// # Errors
    /// When the kernel has no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, ports: Vec::new() })
    }

    /// Adds a function. Clients that connect are served from [`run`](Self::run) on.
    ///
    /// # Errors
    /// When the kernel can't watch the socket.
    pub fn add(
        &mut self,
        socket: SocketPath,
        function: impl Into<ServedFunction>,
    ) -> io::Result<()> {
        let token = Token::listener(self.ports.len());
        self.epoll.add(socket.listener(), token, Interest::Read)?;
        self.ports.push(Port {
            socket,
            function: function.into(),
            session: None,
            accept_again_at: None,
            client_log: RateLimit::default(),
            accept_log: RateLimit::default(),
        });
        Ok(())
    }

    /// Serves until `stop` becomes readable. Functions are quiesced and sockets removed when it
    /// returns.
    ///
    /// # Errors
    /// When the event loop itself fails; nothing that a client does can cause that.
    pub fn run(mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        self.epoll.add(stop, Token::STOP, Interest::Read)?;
        loop {
            for token in self.epoll.wait(self.next_deadline())? {
                if token == Token::STOP {
                    self.stop();
                    return Ok(());
                }
                let Some(port) = self.ports.get_mut(token.port()) else { continue };
                if token.is_listener() {
                    port.accept(&self.epoll, token)?;
                } else {
                    port.serve(&self.epoll, token)?;
                }
            }
            self.expire()?;
        }
    }

    fn stop(&mut self) {
        for port in &mut self.ports {
            if let Some(session) = &mut port.session {
                session.flush();
            }
            port.function.0.client_left();
        }
        info!("stopped");
    }

    fn next_deadline(&self) -> Option<Instant> {
        let deadline = |port: &Port| match &port.session {
            Some(session) => session.handshake_deadline(),
            None => port.accept_again_at,
        };
        self.ports.iter().filter_map(deadline).min()
    }

    /// Ends handshakes that take too long and resumes accepting where it paused.
    fn expire(&mut self) -> io::Result<()> {
        let now = Instant::now();
        for (index, port) in self.ports.iter_mut().enumerate() {
            match &port.session {
                Some(session) if session.handshake_deadline().is_some_and(|at| at <= now) => {
                    port.end_session(&self.epoll, Token::session(index), &SessionEnd::Silent)?;
                }
                None if port.accept_again_at.is_some_and(|at| at <= now) => {
                    port.accept_again_at = None;
                    port.listen(&self.epoll, Token::listener(index))?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Port {
    /// Takes the next client. Further ones wait in the socket's backlog until it leaves.
    fn accept(&mut self, epoll: &Epoll, token: Token) -> io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match accept_with(self.socket.listener(), flags) {
            Ok(socket) => self.start_session(epoll, token, socket),
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

    fn start_session(&mut self, epoll: &Epoll, token: Token, socket: OwnedFd) -> io::Result<()> {
        epoll.remove(self.socket.listener())?;
        let session = Session::new(socket, Instant::now() + HANDSHAKE_TIME);
        epoll.add(session.as_fd(), Token::session(token.port()), Interest::Read)?;
        self.session = Some(session);
        Ok(())
    }

    fn serve(&mut self, epoll: &Epoll, token: Token) -> io::Result<()> {
        // An event of a session that ended earlier in this round.
        let Some(session) = &mut self.session else { return Ok(()) };
        let greeted = session.handshake_deadline().is_none();
        let end = match session.serve(self.function.0.as_mut()) {
            Ok(interest) => {
                if !greeted && session.handshake_deadline().is_none() {
                    log_client(&mut self.client_log, &self.socket, "client connected");
                }
                return session.watch(epoll, token, interest);
            }
            Err(end) => end,
        };
        self.end_session(epoll, token, &end)
    }

    fn end_session(&mut self, epoll: &Epoll, token: Token, end: &SessionEnd) -> io::Result<()> {
        let session = self.session.take();
        if let Some(session) = &session {
            epoll.remove(session.as_fd())?;
            // A probe that connects and leaves without a word is no client.
            if session.handshake_deadline().is_none() || !matches!(end, SessionEnd::Left) {
                log_client(&mut self.client_log, &self.socket, &format!("client gone: {end}"));
            }
        }
        self.function.0.client_left();
        // Not earlier: the end of the connection tells the client that its memory is given back.
        drop(session);
        self.listen(epoll, Token::listener(token.port()))
    }

    fn listen(&self, epoll: &Epoll, token: Token) -> io::Result<()> {
        epoll.add(self.socket.listener(), token, Interest::Read)
    }
}

/// Clients may come and go as fast as they like, and this is all that it costs.
fn log_client(log: &mut RateLimit, socket: &SocketPath, what: &str) {
    if let Some(suppressed) = log.admit() {
        info!(%socket, suppressed, "{what}");
    }
}

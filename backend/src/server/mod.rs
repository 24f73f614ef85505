//! Serves functions to clients: one socket a function, one client a socket, one event loop for all.

mod channel;
mod commands;
mod decode_page;
mod desk;
mod event_loop;
mod function;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod migration;
#[cfg(feature = "passthrough")]
mod passthrough;
mod peer;
mod poller;
mod port;
mod ports;
mod recorded;
mod request_error;
mod requests;
mod served;
mod session;
mod unmask_watch;
mod vhost_user;
mod worker;

#[cfg(test)]
mod tests;

pub use function::HostedFunction;
#[cfg(feature = "passthrough")]
pub use passthrough::PassthroughFunction;
pub use request_error::RequestError;
pub use served::ServedFunction;
pub use vhost_user::VhostUserServer;

pub use crate::socket_path::{SocketError, SocketPath};

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tracing::info;

use self::event_loop::{Epoll, Interest, Source, Token, Wait};
use self::poller::Poller;
use self::port::Turn;
use self::ports::Port;
use self::worker::{Flow, Supervised};

/// Functions and the sockets they are served on.
#[derive(Debug)]
pub struct Server {
    epoll: Epoll,
    ports: Vec<Port>,
    /// Ports that have a deadline. Few of many do, and only for a moment.
    timed: BTreeSet<usize>,
    poller: Poller,
    reload: Option<OwnedFd>,
    /// Who accepts the clients, if that is not us.
    supervised: Option<Supervised>,
}

impl Server {
    /// A server of nothing.
    ///
    /// # Errors
    /// When the kernel has no more descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            ports: Vec::new(),
            timed: BTreeSet::new(),
            poller: Poller::new(Duration::ZERO),
            reload: None,
            supervised: None,
        })
    }

    /// Lets the server look for further requests for so long before it sleeps, while the client's
    /// requests follow each other closely enough for that to pay. Zero, the default, turns it off.
    pub fn set_poll_budget(&mut self, budget: Duration) {
        self.poller = Poller::new(budget);
    }

    /// Has every function look at its surroundings anew ([`Device::reload`]) whenever bytes arrive on a
    /// stream socket or pipe.
    ///
    /// # Errors
    /// When the kernel can't watch it.
    ///
    /// [`Device::reload`]: crate::devices::Device::reload
    pub fn set_reload(&mut self, reload: impl Into<OwnedFd>) -> io::Result<()> {
        let reload = reload.into();
        rustix::io::ioctl_fionbio(&reload, true)?;
        self.epoll.add(reload.as_fd(), Token::Reload, Interest::Read)?;
        self.reload = Some(reload);
        Ok(())
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
        let port = port::Port::new(self.ports.len(), socket, function.into());
        port.add(&self.epoll)?;
        self.ports.push(Port::Listening(Box::new(port)));
        Ok(())
    }

    /// Serves until `stop` becomes readable. Functions are quiesced and sockets removed when it
    /// returns.
    ///
    /// In a worker, `stop` ends this process and not the sessions, with which another one goes on.
    ///
    /// # Errors
    /// When the event loop itself fails; nothing that a client does can cause that.
    pub fn run(mut self, stop: BorrowedFd<'_>) -> io::Result<()> {
        self.epoll.add(stop, Token::Stop, Interest::Read)?;
        let mut tokens = Vec::new();
        // Ports with work left that needs no event.
        let mut unfinished = self.begin_work();
        loop {
            let polled = self.poller.target();
            let wait = if polled.is_some() || !unfinished.is_empty() {
                Wait::None
            } else {
                Wait::Until(self.next_deadline())
            };
            self.epoll.wait(wait, &mut tokens)?;
            tokens.extend(unfinished.drain(..).map(|port| Token::Port(port, Source::Work)));
            // What devices hear comes before what is asked of them.
            tokens.sort_by_key(|token| matches!(token, Token::Port(_, Source::Client)));
            for token in &tokens {
                match *token {
                    Token::Stop => {
                        self.stop();
                        return Ok(());
                    }
                    Token::Link => {
                        if self.hear_supervisor(&mut unfinished)? == Flow::End {
                            return Ok(());
                        }
                    }
                    Token::Reload => self.reload(&mut unfinished)?,
                    Token::Port(port, source) => {
                        self.turn(port, source, &mut unfinished)?;
                    }
                }
            }
            if let Some(port) = polled {
                self.turn(port, Source::Look, &mut unfinished)?;
            }
            self.expire()?;
            if self.supervised.is_some() && self.tell_ends() == Flow::End {
                return Ok(());
            }
        }
    }

    fn reload(&mut self, unfinished: &mut Vec<usize>) -> io::Result<()> {
        let Some(reload) = &self.reload else { return Ok(()) };
        // However often it was asked for.
        let mut bytes = [0; 64];
        loop {
            match rustix::io::read(reload, &mut bytes) {
                Ok(1..) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Ok(0) | Err(_) => {
                    // Nobody can ask any more.
                    self.epoll.remove(reload.as_fd())?;
                    self.reload = None;
                    return Ok(());
                }
            }
        }
        for index in 0..self.ports.len() {
            self.turn(index, Source::Reload, unfinished)?;
        }
        Ok(())
    }

    fn turn(
        &mut self,
        index: usize,
        source: Source,
        unfinished: &mut Vec<usize>,
    ) -> io::Result<()> {
        let Some(port) = self.ports.get_mut(index) else { return Ok(()) };
        match port.turn(&self.epoll, source)? {
            Turn::Nothing => {}
            Turn::Served => self.poller.served(index),
            Turn::Ended => self.poller.forget(index),
        }
        if port.has_work() && !unfinished.contains(&index) {
            unfinished.push(index);
        }
        if port.deadline().is_some() {
            self.timed.insert(index);
        } else if !self.timed.is_empty() {
            self.timed.remove(&index);
        }
        Ok(())
    }

    fn stop(&mut self) {
        if self.supervised.is_some() {
            return self.drain();
        }
        self.stop_ports();
    }

    fn stop_ports(&mut self) {
        self.ports.iter_mut().for_each(Port::stop);
        info!("stopped");
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.timed.iter().filter_map(|port| self.ports[*port].deadline()).min()
    }

    /// Ends handshakes that take too long and resumes accepting where it paused.
    fn expire(&mut self) -> io::Result<()> {
        if self.timed.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        for port in &self.timed {
            self.ports[*port].expire(&self.epoll, now)?;
        }
        let ports = &self.ports;
        self.timed.retain(|port| ports[*port].deadline().is_some());
        Ok(())
    }
}

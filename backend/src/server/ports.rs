use std::io;
use std::time::Instant;

use super::event_loop::{Epoll, Source};
use super::port::{self, Turn};
use super::recorded;

/// A function and how it is served.
#[derive(Debug)]
pub(super) enum Port {
    /// Its clients come over a socket of ours.
    Listening(Box<port::Port>),
    /// Its client comes from the supervisor, and outlives this process.
    Recorded(Box<recorded::Port>),
}

impl Port {
    pub(super) fn turn(&mut self, epoll: &Epoll, source: Source) -> io::Result<Turn> {
        match self {
            Self::Listening(port) => port.turn(epoll, source),
            Self::Recorded(port) => port.turn(epoll, source),
        }
    }

    /// Whether the function goes on by itself when it gets another turn.
    pub(super) fn has_work(&self) -> bool {
        match self {
            Self::Listening(port) => port.has_work(),
            Self::Recorded(port) => port.has_work(),
        }
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Listening(port) => port.deadline(),
            Self::Recorded(port) => port.deadline(),
        }
    }

    pub(super) fn expire(&mut self, epoll: &Epoll, now: Instant) -> io::Result<()> {
        match self {
            Self::Listening(port) => port.expire(epoll, now),
            Self::Recorded(port) => port.expire(epoll, now),
        }
    }

    /// The end of the server, which waits for nobody.
    pub(super) fn stop(&mut self) {
        match self {
            Self::Listening(port) => port.stop(),
            Self::Recorded(port) => port.stop(),
        }
    }
}

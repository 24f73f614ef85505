use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{MemfdFlags, memfd_create};

use super::link::{SupervisorLink, ToWorker};
use crate::log_limit::RateLimit;
use crate::socket_path::SocketPath;
use crate::state::FdKey;

/// What of a function must outlive its worker.
#[derive(Clone, Debug)]
pub struct Holding {
    /// Its state memory, which the first worker sizes and seals.
    pub state: Arc<OwnedFd>,
    /// The client's socket, while there is a client.
    pub client: Option<Arc<OwnedFd>>,
    /// What workers have stored.
    pub fds: BTreeMap<FdKey, Arc<OwnedFd>>,
}

impl Holding {
    /// Of a function that no worker has served yet.
    ///
    /// # Errors
    /// When the kernel has no more memory or descriptors.
    pub fn fresh() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = Arc::new(memfd_create("barkeep-state", flags)?);
        Ok(Self { state, client: None, fds: BTreeMap::new() })
    }

    /// Hands everything to a worker.
    pub(super) fn tell(&self, function: u16, link: &mut SupervisorLink) {
        link.tell(ToWorker::State(function, Arc::clone(&self.state)));
        if let Some(client) = &self.client {
            link.tell(ToWorker::Client(function, Arc::clone(client)));
        }
        for (key, fd) in &self.fds {
            link.tell(ToWorker::Fd(function, *key, Arc::clone(fd)));
        }
    }

    /// Whether there was room for it among `limit` others.
    pub(super) fn store(&mut self, key: FdKey, fd: OwnedFd, limit: usize) -> bool {
        let room = self.fds.len() < limit || self.fds.contains_key(&key);
        if room {
            self.fds.insert(key, Arc::new(fd));
        }
        room
    }
}

/// A function that is kept alive.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) holding: Holding,
    /// Which worker serves it.
    pub(super) slot: usize,
    pub(super) socket: Option<SocketPath>,
    /// Whether the event loop looks for clients.
    pub(super) listening: bool,
    pub(super) accept_again_at: Option<Instant>,
    pub(super) accept_log: RateLimit,
}

impl Function {
    pub(super) fn new(holding: Holding, slot: usize) -> Self {
        Self {
            holding,
            slot,
            socket: None,
            listening: false,
            accept_again_at: None,
            accept_log: RateLimit::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_held_than_there_is_room_for() {
        let mut holding = Holding::fresh().unwrap();
        let mut store = |key| {
            let fd = holding.state.try_clone().unwrap();
            holding.store(FdKey(key), fd, 2)
        };
        let stored = [1, 2, 3, 2, 4].map(&mut store);
        assert_eq!(stored, [true, true, false, true, false]);
        holding.fds.remove(&FdKey(1));
        let fd = holding.state.try_clone().unwrap();
        assert!(holding.store(FdKey(4), fd, 2));
    }
}

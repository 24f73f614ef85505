use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{MemfdFlags, memfd_create};

use super::disposal::Disposal;
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
}

/// A function that is kept alive.
#[derive(Debug)]
pub(super) struct Function {
    pub(super) name: String,
    pub(super) holding: Holding,
    /// Which worker serves it.
    pub(super) slot: usize,
    pub(super) socket: Option<SocketPath>,
    /// Whether the event loop looks for clients.
    pub(super) listening: bool,
    pub(super) accept_again_at: Option<Instant>,
    pub(super) accept_log: RateLimit,
    pub(super) disposal: Disposal,
}

impl Function {
    pub(super) fn new(name: String, holding: Holding, slot: usize) -> Self {
        Self {
            name,
            holding,
            slot,
            socket: None,
            listening: false,
            accept_again_at: None,
            accept_log: RateLimit::default(),
            disposal: Disposal::default(),
        }
    }

    /// Holds this if there are fewer than `limit` others.
    pub(super) fn store(&mut self, key: FdKey, fd: OwnedFd, limit: usize) -> Stored {
        let fds = &mut self.holding.fds;
        let others = fds.len() - usize::from(fds.contains_key(&key));
        if others + self.disposal.pending() >= limit {
            self.disposal.take(fd);
            return if others >= limit { Stored::TooMany } else { Stored::Lost };
        }
        if let Some(before) = fds.insert(key, Arc::new(fd)) {
            self.disposal.take(before);
        }
        Stored::Held
    }

    /// Whether there was something under this key.
    pub(super) fn forget(&mut self, key: FdKey) -> bool {
        let fd = self.holding.fds.remove(&key);
        fd.map(|fd| self.disposal.take(fd)).is_some()
    }

    /// Its client has gone.
    pub(super) fn forget_client(&mut self) {
        if let Some(client) = self.holding.client.take() {
            self.disposal.take(client);
        }
    }
}

/// What became of a descriptor that was to be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    Held,
    /// There is no room as long as others are not closed, which no worker can know of.
    Lost,
    /// So many were not allowed.
    TooMany,
}

impl Drop for Function {
    fn drop(&mut self) {
        self.forget_client();
        self.disposal.take(mem::take(&mut self.holding.fds));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settle(function: &Function) {
        while function.disposal.pending() > 0 {
            std::thread::yield_now();
        }
    }

    /// Closed when the other end is.
    struct Stuck(std::sync::mpsc::Receiver<()>);

    impl Drop for Stuck {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn no_more_is_held_than_there_is_room_for() {
        let mut function = Function::new("one".into(), Holding::fresh().unwrap(), 0);
        let stored = [1, 2, 3, 2, 4].map(|key| {
            let fd = function.holding.state.try_clone().unwrap();
            let stored = function.store(FdKey(key), fd, 2);
            settle(&function);
            stored
        });
        let (held, too_many) = (Stored::Held, Stored::TooMany);
        assert_eq!(stored, [held, held, too_many, held, too_many]);
        assert!(function.forget(FdKey(1)) && !function.forget(FdKey(1)));
        settle(&function);
        let fd = function.holding.state.try_clone().unwrap();
        assert_eq!(function.store(FdKey(4), fd, 2), held);
    }

    /// A client could have as many as it likes otherwise, one after the other.
    #[test]
    fn what_cant_be_closed_yet_takes_its_room() {
        let mut function = Function::new("one".into(), Holding::fresh().unwrap(), 0);
        let (release, released) = std::sync::mpsc::channel::<()>();
        function.disposal.take(Stuck(released));
        let fd = || Holding::fresh().unwrap().state.try_clone().unwrap();
        assert_eq!(function.store(FdKey(1), fd(), 2), Stored::Held);
        assert!(function.forget(FdKey(1)));
        assert_eq!(function.store(FdKey(2), fd(), 2), Stored::Lost);
        drop(release);
        settle(&function);
        assert_eq!(function.store(FdKey(2), fd(), 2), Stored::Held);
    }
}

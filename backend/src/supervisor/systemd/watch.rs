use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::epoll::EventFlags;

use super::fd_name::activated;
use super::{FdName, ServiceManager, What};
use crate::socket_path::SocketPath;
use crate::supervisor::holding::Function;
use crate::supervisor::poll::{Epoll, Token};
use crate::supervisor::{Holding, Supervisor};

/// A service manager, and when it wants to hear from us.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Watch {
    manager: ServiceManager,
    alive_at: Option<Instant>,
}

impl Supervisor {
    /// Has this service manager hold what is held here from now on, and watch over the event loop.
    ///
    /// # Errors
    /// When the kernel can't watch its socket.
    pub fn set_service_manager(&mut self, manager: ServiceManager) -> io::Result<()> {
        self.manager = Watch::new(manager, &self.epoll)?;
        Ok(())
    }

    /// Has this asked before workers end for an upgrade: whether there is something to upgrade to.
    pub fn set_upgrade_check(&mut self, may_upgrade: Box<dyn FnMut() -> bool + Send>) {
        self.may_upgrade = may_upgrade;
    }

    /// All that is held, with the names by which [`Inherited`](super::Inherited) knows it.
    #[must_use]
    pub fn held(&self) -> Vec<(String, BorrowedFd<'_>)> {
        let mut held = Vec::new();
        for function in &self.functions {
            let Function { name, holding, socket, .. } = function;
            let named = |what| FdName { function: name.clone(), what }.to_string();
            let Holding { state, client, fds } = holding;
            held.extend(socket.as_ref().map(|socket| {
                let ours = socket.is_ours();
                let name = if ours { named(What::Listener) } else { activated(name) };
                (name, socket.listener())
            }));
            held.push((named(What::State), state.as_fd()));
            held.extend(client.as_ref().map(|client| (named(What::Client), client.as_fd())));
            held.extend(fds.iter().map(|(key, fd)| (named(What::Fd(*key)), fd.as_fd())));
        }
        held
    }

    /// Takes leave of the service manager: what it holds stays where it is, and so do the sockets in the
    /// file system, since the next supervisor may go on with them. Without one nothing is left behind.
    pub fn leave(&mut self) {
        if self.manager.is_there() {
            self.functions
                .iter_mut()
                .filter_map(|function| function.socket.as_mut())
                .for_each(SocketPath::leave);
            self.manager.finish();
        }
    }

    /// The service manager.
    pub fn service_manager(&mut self) -> &mut ServiceManager {
        &mut self.manager
    }
}

impl Watch {
    fn new(manager: ServiceManager, epoll: &Epoll) -> io::Result<Self> {
        if let Some(socket) = manager.as_fd() {
            // It can nearly always be told more.
            epoll.add(socket, Token::Manager, EventFlags::OUT | EventFlags::ET)?;
        }
        let alive_at = manager.watchdog_interval().map(|_| Instant::now());
        Ok(Self { manager, alive_at })
    }

    /// When it wants to hear that the event loop lives.
    pub(in crate::supervisor) fn alive_at(&self) -> Option<Instant> {
        self.alive_at
    }

    /// Tells it if it is time.
    pub(in crate::supervisor) fn expire(&mut self, now: Instant) {
        if self.alive_at.is_some_and(|at| at <= now) {
            self.manager.alive();
            self.alive_at = self.manager.watchdog_interval().map(|interval| now + interval);
        }
    }
}

impl Deref for Watch {
    type Target = ServiceManager;

    fn deref(&self) -> &ServiceManager {
        &self.manager
    }
}

impl DerefMut for Watch {
    fn deref_mut(&mut self) -> &mut ServiceManager {
        &mut self.manager
    }
}

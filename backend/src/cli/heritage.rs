//! What `barkeep run` finds when it starts: what the program before it has left, or the service manager
//! has held, and what of it goes on.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use barkeep_backend::server::{SocketError, SocketPath};
use barkeep_backend::supervisor::Holding;
use barkeep_backend::supervisor::systemd::{
    HeldFunction, Inherited, Listener, ServiceManager, What,
};
use barkeep_backend::supervisor::upgrade;
use tracing::{info, warn};

/// What is there, and who holds it.
pub(crate) struct Heritage {
    inherited: Inherited,
    /// Listening sockets by position of their function.
    listeners: BTreeMap<usize, Listener>,
    pub(crate) manager: ServiceManager,
    /// How often this process has executed a program in place of another.
    pub(crate) upgrades: u32,
    /// How many functions go on.
    resumed: usize,
}

impl Heritage {
    /// Takes what the environment announces.
    pub(crate) fn take() -> Result<Self, String> {
        let manager = ServiceManager::from_environment();
        let adopted = upgrade::inherited().map_err(|error| error.to_string())?;
        let (inherited, upgrades) = match adopted {
            Some(adopted) => adopted,
            None => (Inherited::from_service_manager().map_err(|error| error.to_string())?, 0),
        };
        let listeners = BTreeMap::new();
        Ok(Self { inherited, listeners, manager, upgrades, resumed: 0 })
    }

    /// What is held for the function with this name and position.
    pub(crate) fn holding(&mut self, name: &str, position: usize) -> io::Result<Holding> {
        let HeldFunction { listener, state, client, fds } = self.inherited.function(name);
        self.listeners.extend(listener.map(|listener| (position, listener)));
        let Some(state) = state else {
            let fresh = Holding::fresh()?;
            self.manager.store(name, What::State, fresh.state.as_fd());
            return Ok(fresh);
        };
        self.resumed += 1;
        let fds = fds.into_iter().map(|(key, fd)| (key, Arc::new(fd))).collect();
        Ok(Holding { state: Arc::new(state), client: client.map(Arc::new), fds })
    }

    /// Whether a function goes on that was served before.
    pub(crate) fn resumes(&self) -> bool {
        self.resumed > 0
    }

    /// Lets go of what no function has asked for.
    pub(crate) fn forget_rest(&mut self) {
        let rest = std::mem::take(&mut self.inherited).leftovers();
        if !rest.is_empty() {
            warn!("{} descriptors of functions that are not there any more are closed", rest.len());
        }
        for name in rest {
            self.manager.forget_named(name);
        }
        if self.resumes() {
            info!("{} functions go on", self.resumed);
        }
    }

    /// The socket of the function with this name and position: the one that was left, or a new one at
    /// this path.
    pub(crate) fn socket(
        &mut self,
        name: &str,
        position: usize,
        path: &Path,
        manager: &mut ServiceManager,
    ) -> Result<SocketPath, SocketError> {
        match self.listeners.remove(&position) {
            Some(Listener::Activated(listener)) => {
                let mut socket = SocketPath::adopt(listener)?;
                socket.leave();
                return Ok(socket);
            }
            Some(Listener::Held(listener)) => {
                // It may have been removed from the file system, or belong elsewhere now.
                let held = SocketPath::adopt(listener).ok().filter(|held| held.path() == path);
                if let Some(held) = held {
                    return Ok(held);
                }
                manager.forget(name, What::Listener);
            }
            None => {}
        }
        let socket = SocketPath::claim(path)?;
        manager.store(name, What::Listener, socket.listener());
        Ok(socket)
    }
}

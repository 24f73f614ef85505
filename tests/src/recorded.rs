//! The supervisor of a server in a thread of the test: it accepts and holds, and restarts nothing.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use barkeep_backend::server::SocketPath;
use barkeep_backend::state::{FdKey, PreviousEnd};
use barkeep_backend::supervisor::link::{FromWorker, LinkError, SupervisorLink, ToWorker};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SocketFlags, accept_with};

/// Descriptors that are held for a function at most.
const LIMIT: usize = 512;

/// Whether servers of tests are to record what they do: set `BARKEEP_TEST_RECORDED`.
pub(crate) fn is_wanted() -> bool {
    std::env::var_os("BARKEEP_TEST_RECORDED").is_some()
}

/// Holds what a worker's functions need to live on.
#[derive(Debug)]
pub(crate) struct Holding {
    link: SupervisorLink,
    functions: Vec<Function>,
    stop: UnixStream,
}

#[derive(Debug)]
struct Function {
    socket: SocketPath,
    client: Option<Arc<OwnedFd>>,
    held: BTreeMap<FdKey, OwnedFd>,
}

impl Holding {
    /// For functions with these sockets, until a byte comes over `stop`. The worker's end is returned as
    /// well.
    pub(crate) fn new(sockets: Vec<SocketPath>, stop: UnixStream) -> (Self, OwnedFd) {
        let (mut link, theirs) = SupervisorLink::pair().expect("a socket pair");
        for index in 0..sockets.len() {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let state = memfd_create("state", flags).expect("a memory file");
            link.tell(ToWorker::State(number(index), Arc::new(state)));
        }
        let previous_end = PreviousEnd::Orderly;
        link.tell(ToWorker::Begin { limit: LIMIT, previous_end });
        link.flush().expect("room in a new socket");
        let function = |socket| Function { socket, client: None, held: BTreeMap::new() };
        let functions = sockets.into_iter().map(function).collect();
        (Self { link, functions, stop }, theirs)
    }

    /// Until the worker has ended.
    pub(crate) fn run(mut self) {
        let mut stopping = false;
        loop {
            let free: Vec<usize> = (0..self.functions.len())
                .filter(|index| self.functions[*index].client.is_none() && !stopping)
                .collect();
            let listeners = free.iter().map(|index| self.functions[*index].socket.listener());
            let mut fds = vec![PollFd::new(&self.link, PollFlags::IN)];
            fds.extend(listeners.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            if !stopping {
                fds.push(PollFd::new(&self.stop, PollFlags::IN));
            }
            poll(&mut fds, None).expect("poll");
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if !stopping && ready.last() == Some(&true) {
                stopping = true;
                self.link.tell(ToWorker::Stop);
            }
            for (index, ready) in free.iter().zip(&ready[1..]) {
                if *ready && !stopping {
                    self.accept(*index);
                }
            }
            let _ = self.link.flush();
            if ready[0] && self.listen_to_worker().is_err() {
                return;
            }
        }
    }

    fn accept(&mut self, index: usize) {
        let function = &mut self.functions[index];
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let Ok(client) = accept_with(function.socket.listener(), flags) else { return };
        let client = Arc::new(client);
        function.client = Some(client.clone());
        self.link.tell(ToWorker::Client(number(index), client));
    }

    fn listen_to_worker(&mut self) -> Result<(), LinkError> {
        while let Some(said) = self.link.next()? {
            match said {
                FromWorker::SessionEnded(function) => {
                    self.functions[usize::from(function)].client = None;
                }
                FromWorker::Store(function, key, fd) => {
                    self.functions[usize::from(function)].held.insert(key, fd);
                }
                FromWorker::Forget(function, key) => {
                    let forgotten = self.functions[usize::from(function)].held.remove(&key);
                    assert!(forgotten.is_some(), "{key:?} is not held");
                }
                FromWorker::Lost(..) => unreachable!("a test has room for its descriptors"),
                FromWorker::Ready | FromWorker::Pong(_) | FromWorker::Drained => {}
            }
        }
        Ok(())
    }
}

fn number(index: usize) -> u16 {
    u16::try_from(index).expect("a few functions")
}

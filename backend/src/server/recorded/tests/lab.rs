//! A server with one recorded port, and what outlives it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::sockopt::set_socket_send_buffer_size;

use crate::server::ServedFunction;
use crate::server::event_loop::{Epoll, Source, Token, Wait};
use crate::server::recorded::{Legacy, Port};
use crate::state::{FdKey, Holder, PreviousEnd};

/// Rounds without a step of the client's, after which it is waited for in vain.
const PATIENCE: usize = 1000;

type Shelf = Arc<Mutex<Held>>;

#[derive(Debug, Default)]
struct Held {
    fds: BTreeMap<FdKey, OwnedFd>,
    full: bool,
    /// How often something was to be held.
    stored: usize,
}

pub(super) struct Lab {
    function: fn() -> ServedFunction,
    name: &'static str,
    state: OwnedFd,
    client: OwnedFd,
    shelf: Shelf,
    worker: Option<(Port, Epoll)>,
    end: PreviousEnd,
}

struct ShelfHolder(Shelf);

impl Holder for ShelfHolder {
    fn store(&mut self, key: FdKey, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut held = self.0.lock().unwrap();
        held.stored += 1;
        if held.full {
            return Err(rustix::io::Errno::MFILE.into());
        }
        held.fds.insert(key, fd.try_clone_to_owned()?);
        Ok(())
    }

    fn forget(&mut self, key: FdKey) {
        self.0.lock().unwrap().fds.remove(&key);
    }
}

/// What a client says of its script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// It has done something.
    Busy,
    Waits,
    Done,
}

impl Lab {
    /// With a client that has just connected, whose end is returned.
    pub(super) fn new(function: fn() -> ServedFunction) -> (Self, UnixStream) {
        let (ours, theirs) = connection();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = memfd_create("state", flags).unwrap();
        let (shelf, end) = (Shelf::default(), PreviousEnd::ByItself);
        (Self { function, name: "test", state, client: ours, shelf, worker: None, end }, theirs)
    }

    /// Starts a server with all that is held.
    pub(super) fn start(&mut self) {
        let held = |shelf: &Shelf| {
            let held = shelf.lock().unwrap();
            held.fds.iter().map(|(key, fd)| (*key, fd.try_clone().unwrap())).collect()
        };
        let fds = held(&self.shelf);
        let state = self.state.try_clone().unwrap();
        let client = Some(self.client.try_clone().unwrap());
        let legacy = Legacy { state, client, fds, previous_end: self.end };
        let holder = Box::new(ShelfHolder(self.shelf.clone()));
        let mut port = Port::new(0, self.name, (self.function)(), legacy, holder).unwrap();
        let epoll = Epoll::new().unwrap();
        port.add(&epoll).unwrap();
        self.worker = Some((port, epoll));
    }

    /// Takes away what is left of a server that was killed.
    pub(super) fn bury(&mut self) {
        self.worker = None;
    }

    /// Serves once what there is.
    pub(super) fn round(&mut self) {
        let (port, epoll) = self.worker.as_mut().unwrap();
        let mut tokens = Vec::new();
        epoll.wait(Wait::None, &mut tokens).unwrap();
        if port.has_work() {
            tokens.push(Token::Port(0, Source::Work));
        }
        for token in tokens {
            let Token::Port(_, source) = token else { continue };
            port.turn(epoll, source).unwrap();
        }
    }

    pub(super) fn run_until(&mut self, mut step: impl FnMut() -> Status) {
        let mut idle = 0;
        loop {
            match step() {
                Status::Done => return,
                Status::Busy => idle = 0,
                Status::Waits => idle += 1,
            }
            assert!(idle < PATIENCE, "the client waits for ever");
            self.round();
        }
    }

    /// Nothing is held but what the state refers to: asked by starting once more.
    pub(super) fn expect_no_litter(&mut self) {
        self.bury();
        let before = self.held();
        self.start();
        assert_eq!(before, self.held());
    }

    /// Whether the server dies before the client is done.
    pub(super) fn dies_within(&mut self, step: impl FnMut() -> Status) -> bool {
        std::panic::catch_unwind(AssertUnwindSafe(|| self.run_until(step))).is_err()
    }

    pub(super) fn port(&mut self) -> &mut Port {
        &mut self.worker.as_mut().unwrap().0
    }

    pub(super) fn has_ended(&mut self) -> bool {
        self.port().take_ended()
    }

    /// A new client, of the server that is here or of the next one.
    pub(super) fn accept(&mut self, restart: bool) -> UnixStream {
        let (ours, theirs) = connection();
        self.client = ours;
        if restart {
            self.bury();
            self.start();
        } else {
            let (port, epoll) = self.worker.as_mut().unwrap();
            port.start_session(epoll, self.client.try_clone().unwrap()).unwrap();
        }
        theirs
    }

    pub(super) fn held(&self) -> Vec<FdKey> {
        self.shelf.lock().unwrap().fds.keys().copied().collect()
    }

    /// Of those, the function's own.
    pub(super) fn kept(&self) -> Vec<FdKey> {
        self.held().into_iter().filter(|key| (1 << 32..1 << 33).contains(&key.0)).collect()
    }

    /// Signals the first descriptor that the function has kept.
    pub(super) fn kick(&self) {
        let shelf = self.shelf.lock().unwrap();
        let (_, kick) = shelf.fds.first_key_value().unwrap();
        rustix::io::write(kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// How servers are said to have ended from now on.
    pub(super) fn blame(&mut self, end: PreviousEnd) {
        self.end = end;
    }

    pub(super) fn serve_instead(&mut self, function: fn() -> ServedFunction) {
        self.function = function;
    }

    pub(super) fn rename(&mut self, name: &'static str) {
        self.name = name;
    }

    pub(super) fn lose_held(&self) {
        let kept = self.kept();
        self.shelf.lock().unwrap().fds.retain(|key, _| kept.contains(key));
    }

    /// The kernel takes few bytes that the client does not read.
    pub(super) fn send_little_at_once(&self) {
        set_socket_send_buffer_size(&self.client, 1).unwrap();
    }

    pub(super) fn state(&self) -> OwnedFd {
        self.state.try_clone().unwrap()
    }

    /// Bytes that the client has sent and nobody has taken.
    pub(super) fn unread(&self) -> usize {
        usize::try_from(rustix::io::ioctl_fionread(&self.client).unwrap()).unwrap()
    }

    pub(super) fn stored(&self) -> usize {
        self.shelf.lock().unwrap().stored
    }

    pub(super) fn hold_no_more(&self) {
        self.shelf.lock().unwrap().full = true;
    }
}

/// A server's end and a client's.
fn connection() -> (OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours.into(), theirs)
}

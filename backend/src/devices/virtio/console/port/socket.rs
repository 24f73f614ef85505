use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::{Output, watch};
use crate::socket_path::{SocketError, SocketPath};

/// A listening socket. One client at a time; the others wait in the backlog.
#[derive(Debug)]
pub(super) struct Socket {
    path: SocketPath,
    /// Somebody may wait in the backlog.
    waiting: bool,
    client: Option<Client>,
    /// The last client that left, for as long as there is input of theirs that the guest has not
    /// taken. Without it, what a short-lived client says would depend on the guest's being quick.
    former: Option<OwnedFd>,
}

#[derive(Debug)]
struct Client {
    stream: OwnedFd,
    /// It said that it has no more to say; it may still want to hear.
    silent: bool,
    gone: bool,
}

const LISTENER: u64 = 1;
const CLIENT: u64 = 2;

impl Socket {
    pub(super) fn new(path: &Path, epoll: &OwnedFd) -> Result<Self, SocketError> {
        let path = SocketPath::claim(path)?;
        watch(epoll, path.listener(), LISTENER, EventFlags::IN)?;
        Ok(Self { path, waiting: false, client: None, former: None })
    }

    pub(super) fn event(&mut self, source: u64, flags: EventFlags) {
        match (source, &mut self.client) {
            (LISTENER, _) => self.waiting = true,
            (_, Some(client)) if flags.intersects(EventFlags::HUP | EventFlags::ERR) => {
                client.gone = true;
            }
            _ => {}
        }
    }

    /// Lets the next client in if there is none, or none any more.
    pub(super) fn accept(&mut self, epoll: &OwnedFd) {
        if let Some(client) = self.client.take_if(|client| client.gone) {
            // What it said lies there already.
            let _ = epoll::delete(epoll, &client.stream);
            self.former = (!client.silent).then_some(client.stream);
        }
        while self.client.is_none() && self.waiting {
            match accept_with(self.path.listener(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(stream) => {
                    // One that can't be watched could neither come nor go: the next, please.
                    let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP;
                    if watch(epoll, &stream, CLIENT, interest).is_ok() {
                        self.client = Some(Client { stream, silent: false, gone: false });
                    }
                }
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(Errno::AGAIN) => self.waiting = false,
                // Out of descriptors: tried again at the next occasion.
                Err(_) => return,
            }
        }
    }

    /// Whether the client was found to be gone since the last look at the events.
    pub(super) fn is_left(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.gone)
    }

    pub(super) fn has_client(&self) -> bool {
        self.client.as_ref().is_some_and(|client| !client.gone)
    }

    pub(super) fn read(&mut self, bytes: &mut [u8]) -> usize {
        if let Some(former) = &self.former {
            match receive(former, bytes) {
                Ok(read) if read > 0 => return read,
                _ => self.former = None,
            }
        }
        let Some(client) = self.client.as_mut().filter(|client| !client.silent) else {
            return 0;
        };
        match receive(&client.stream, bytes) {
            Ok(0) => client.silent = true,
            Ok(read) => return read,
            Err(Errno::AGAIN) => {}
            Err(_) => client.gone = true,
        }
        0
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Output {
        let Some(client) = self.client.as_mut().filter(|client| !client.gone) else {
            return Output::Nobody;
        };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::io::retry_on_intr(|| send(&client.stream, bytes, flags)) {
            Ok(sent) => Output::Sent(sent),
            Err(Errno::AGAIN) => Output::Blocked,
            Err(_) => {
                client.gone = true;
                Output::Nobody
            }
        }
    }
}

fn receive(stream: &OwnedFd, bytes: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| recv(stream, &mut *bytes, RecvFlags::DONTWAIT))
        .map(|(read, _)| read)
}

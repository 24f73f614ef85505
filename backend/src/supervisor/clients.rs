//! What the supervisor does about clients.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::warn;

use super::link::ToWorker;
use super::poll::Token;
use super::systemd::What;
use super::{Supervisor, token_index};

/// How long accepting pauses when the process is out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

impl Supervisor {
    /// Looks for the next client of a function that has none. Further ones wait in the socket's backlog.
    pub(super) fn look_for_clients(&mut self, function: usize) -> io::Result<()> {
        let token = Token::Listener(token_index(function));
        let function = &mut self.functions[function];
        if function.holding.client.is_none()
            && !function.listening
            && let Some(socket) = &function.socket
        {
            self.epoll.add(socket.listener(), token, EventFlags::IN)?;
            function.listening = true;
            function.accept_again_at = None;
        }
        Ok(())
    }

    pub(super) fn accept(&mut self, index: usize) -> io::Result<()> {
        let function = &mut self.functions[index];
        let Some(socket) = function.socket.as_ref().filter(|_| function.listening) else {
            return Ok(());
        };
        let process = &mut self.slots[function.slot].process;
        // A worker that does not even read is not told about ever more clients.
        let is_full = process.as_ref().is_some_and(|process| process.link.has_unsent())
            || function.disposal.pending() >= self.share;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let accepted =
            if is_full { Ok(None) } else { accept_with(socket.listener(), flags).map(Some) };
        if let Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) = accepted {
            return Ok(());
        }
        self.epoll.remove(socket.listener())?;
        function.listening = false;
        let client = match accepted {
            Ok(Some(client)) => Arc::new(client),
            failed => {
                // The connection stays in the backlog; trying again at once would spin.
                function.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
                if let Err(errno) = failed
                    && let Some(suppressed) = function.accept_log.admit()
                {
                    warn!(%socket, suppressed, "can't accept a client: {errno}");
                }
                return Ok(());
            }
        };
        self.manager.store(&function.name, What::Client, client.as_fd());
        function.holding.client = Some(Arc::clone(&client));
        // Without a worker, it is the next one's.
        if let (Some(process), Ok(index)) = (process, u16::try_from(index)) {
            process.link.tell(ToWorker::Client(index, client));
        }
        let slot = function.slot;
        self.flush(slot)
    }
}

//! Our own commands: sent between two messages of the VMM, with the answers taken out of the stream.

use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use barkeep_protocol::wire::limits::HEADER_SIZE;
use barkeep_protocol::wire::{Command, Header, MessageId, MessageKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, send};

use super::super::incoming::{Answer as Reply, Incoming, Next};
use super::super::pending::Pending;
use super::{Connection, Reader, TICK, Writer};
use crate::system::Answer;

/// What there was for us to read.
enum Pumped {
    /// Answers to us, or nothing: the socket tells when there is more.
    Dry,
    /// The next bytes are for the VMM to read.
    Theirs,
    /// The stream has ended.
    Ended,
}

impl Connection {
    /// Asks the server something of our own. `None` if it does not answer by the deadline, or nothing may
    /// be asked.
    pub(in crate::stream) fn ask(
        &self,
        command: Command,
        body: &[u8],
        deadline: Instant,
    ) -> Option<Reply> {
        if self.is_passing() || !self.pending().may_ask() {
            return None;
        }
        let boundary = |writer: &Writer| writer.outgoing.at_boundary();
        let mut writer = self.writer.take_when(deadline, boundary);
        let id = writer.as_mut().and_then(|writer| self.post(writer, command, body, deadline));
        drop(writer);
        let Some(id) = id else {
            // The next thread need not wait for the same in vain.
            self.pending().silent = true;
            return None;
        };
        self.wait(id, deadline)
    }

    /// Likewise, between two messages of the VMM and with the turn to send.
    pub(in crate::stream) fn ask_between(
        &self,
        writer: &mut Writer,
        command: Command,
        body: &[u8],
        deadline: Instant,
    ) -> Option<Reply> {
        if self.is_passing() || !self.pending().may_ask() {
            return None;
        }
        let id = self.post(writer, command, body, deadline)?;
        self.wait(id, deadline)
    }

    /// Sends a command of ours, between two messages of the VMM. What the socket has no room for is owed.
    pub(in crate::stream) fn post(
        &self,
        writer: &mut Writer,
        command: Command,
        body: &[u8],
        deadline: Instant,
    ) -> Option<MessageId> {
        if !writer.outgoing.at_boundary() || !self.is_itself() {
            return None;
        }
        self.pay(writer, deadline).ok().filter(|()| writer.owed.is_empty())?;
        let id = self.pending().ask(command)?;
        let kind = MessageKind::Command { no_reply: false };
        let body_size = u32::try_from(body.len()).ok()?;
        let header = Header { id, command: command.code(), body_size, kind };
        writer.owed = [&header.to_bytes(), body].concat();
        let whole = writer.owed.len();
        let paid = self.pay(writer, deadline);
        if writer.owed.len() == whole {
            // Not a byte of it is out.
            writer.owed.clear();
            self.pending().forget(id);
            return None;
        }
        if paid.is_err() {
            self.close();
        }
        Some(id)
    }

    /// Sends what is owed, as far as the socket has room for it before the deadline.
    pub(super) fn pay(&self, writer: &mut Writer, deadline: Instant) -> Answer<()> {
        while !writer.owed.is_empty() {
            match send(&self.socket, &writer.owed, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => drop(writer.owed.drain(..sent.min(writer.owed.len()))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(());
                    }
                    self.poll(PollFlags::OUT, left)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes what is there for us, if the VMM does not read.
    #[cfg(test)]
    pub(in crate::stream) fn look(&self) {
        if let Some(mut reader) = self.reader.try_take() {
            self.pump(&mut reader);
        }
    }

    /// Waits for an answer. Whoever waits reads for all that wait, as far as the VMM does not.
    fn wait(&self, id: MessageId, deadline: Instant) -> Option<Reply> {
        loop {
            let mut pending = self.pending();
            if let Some(reply) = pending.take(id) {
                return Some(reply);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_passing() {
                pending.abandon(id);
                pending.silent = true;
                return None;
            }
            if pending.watched {
                self.sleep(pending, left.min(TICK));
                continue;
            }
            pending.watched = true;
            drop(pending);
            let pumped = self.watch(left);
            let mut pending = self.pending();
            pending.watched = false;
            self.news.notify_all();
            match pumped {
                Pumped::Dry => {}
                Pumped::Theirs => self.sleep(pending, left.min(TICK)),
                Pumped::Ended => {
                    pending.abandon(id);
                    pending.closed = true;
                    return None;
                }
            }
        }
    }

    fn sleep(&self, pending: MutexGuard<'_, Pending>, limit: Duration) {
        drop(self.news.wait_timeout(pending, limit).unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes what is there for us, or waits a while for something to come.
    fn watch(&self, left: Duration) -> Pumped {
        let before = self.poll(PollFlags::IN, left.min(TICK));
        let over = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        let over = before.is_ok_and(|events| events.intersects(over));
        // Reading is the VMM's while it does.
        let Some(mut reader) = self.reader.try_take() else { return Pumped::Theirs };
        match self.pump(&mut reader) {
            Pumped::Dry if over && self.waiting() == 0 => Pumped::Ended,
            pumped => pumped,
        }
    }

    fn poll(&self, events: PollFlags, limit: Duration) -> Answer<PollFlags> {
        let mut fds = [PollFd::new(&self.socket, events)];
        let limit = Timespec::try_from(limit).ok();
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(fds[0].revents()),
            Err(error) => Err(error),
        }
    }

    /// Takes what is for us, and nothing else. Never waits.
    fn pump(&self, reader: &mut Reader) -> Pumped {
        loop {
            match &reader.incoming {
                Incoming::Ours(_) => match self.swallow(reader) {
                    Ok(true) => {}
                    Ok(false) => return Pumped::Dry,
                    Err(_) => return Pumped::Ended,
                },
                // An error would be the VMM's to hear of, and an end as well.
                Incoming::Header(_) if self.waiting() == 0 => return Pumped::Dry,
                Incoming::Header(read) if read.is_empty() => {
                    let mut start = [0; HEADER_SIZE];
                    let waiting = match self.peek(&mut start, RecvFlags::DONTWAIT) {
                        Ok([]) => return Pumped::Ended,
                        Ok(waiting) => waiting,
                        Err(Errno::AGAIN | Errno::INTR) => return Pumped::Dry,
                        Err(_) => return Pumped::Theirs,
                    };
                    let next = reader.incoming.decide(waiting, &*self.pending());
                    let Next::Ours(header) = next else { return Pumped::Theirs };
                    reader.incoming = Incoming::Ours(Reply::new(&header));
                }
                _ => return Pumped::Theirs,
            }
        }
    }
}

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

/// What became of a command of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::stream) enum Posted {
    /// Some of it is out, at least.
    Sent(MessageId),
    /// There is no room for any of it now.
    Full,
    /// It can't be sent.
    Refused,
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
        let id = loop {
            let writer = self.writer.take_when(deadline, boundary);
            let posted = writer.map(|mut writer| self.post(&mut writer, command, body));
            match posted {
                Some(Posted::Sent(id)) => break Some(id),
                // Without the turn: whoever has to read, so that there is room, may need it first.
                Some(Posted::Full) if self.make_room(deadline) => {}
                _ => break None,
            }
        };
        let Some(id) = id else {
            // The next thread need not wait for the same in vain.
            self.pending().silent = true;
            return None;
        };
        self.wait(id, deadline)
    }

    /// Likewise, between two messages of the VMM and with the turn to send, in a call of the VMM's that
    /// sends.
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
        let id = loop {
            match self.post(writer, command, body) {
                Posted::Sent(id) => break id,
                Posted::Full if self.make_room(deadline) => {}
                Posted::Full | Posted::Refused => return None,
            }
        };
        self.pay_all(writer, deadline);
        self.wait(id, deadline)
    }

    /// Sends a command of ours, between two messages of the VMM. Never waits: if some of it is out, what the
    /// socket has no room for is owed.
    pub(in crate::stream) fn post(
        &self,
        writer: &mut Writer,
        command: Command,
        body: &[u8],
    ) -> Posted {
        if !writer.outgoing.at_boundary() || !self.socket.is_itself() || self.pay(writer).is_err() {
            return Posted::Refused;
        }
        if !writer.owed.is_empty() {
            return Posted::Full;
        }
        let Ok(body_size) = u32::try_from(body.len()) else { return Posted::Refused };
        let Some(id) = self.pending().ask(command) else { return Posted::Refused };
        let kind = MessageKind::Command { no_reply: false };
        let header = Header { id, command: command.code(), body_size, kind };
        writer.owed = [&header.to_bytes(), body].concat();
        let whole = writer.owed.len();
        let paid = self.pay(writer);
        if writer.owed.len() == whole {
            // Not a byte of it is out.
            writer.owed.clear();
            self.pending().forget(id);
            return if paid.is_ok() { Posted::Full } else { Posted::Refused };
        }
        if paid.is_err() {
            self.lose();
        }
        Posted::Sent(id)
    }

    /// Sends what is owed, as far as the socket has room for it.
    fn pay(&self, writer: &mut Writer) -> Answer<()> {
        if !writer.owed.is_empty() && !self.socket.is_itself() {
            return Err(Errno::BADF);
        }
        while !writer.owed.is_empty() {
            match send(&self.socket, &writer.owed, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => drop(writer.owed.drain(..sent.min(writer.owed.len()))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends what is owed, as far as there is room for it before the deadline.
    pub(super) fn pay_all(&self, writer: &mut Writer, deadline: Instant) {
        while self.pay(writer).is_ok() && !writer.owed.is_empty() && self.make_room(deadline) {}
    }

    /// Waits a while for the socket to have room, and reads what is for us meanwhile: a server that waits for
    /// us to read does not read. Returns whether there is time for that.
    fn make_room(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || self.is_passing() {
            return false;
        }
        let polled = self.poll(PollFlags::OUT, left.min(TICK));
        if let Some(mut reader) = self.reader.try_take() {
            self.pump(&mut reader);
        }
        polled.is_ok()
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
        let came = before.is_ok_and(|events| events.contains(PollFlags::IN));
        // The rest of what is asked, unless the VMM sends and with that sees to it.
        if let Some(mut writer) = self.writer.try_take() {
            let _ = self.pay(&mut writer);
        }
        // Reading is the VMM's while it does.
        let Some(mut reader) = self.reader.try_take() else { return Pumped::Theirs };
        match self.pump(&mut reader) {
            Pumped::Dry if over && self.waiting() == 0 => Pumped::Ended,
            // An end of the server's half alone is no hangup. If there is an error, it is not looked at.
            Pumped::Dry
                if came && self.peek(&mut [0], RecvFlags::DONTWAIT).is_ok_and(<[u8]>::is_empty) =>
            {
                Pumped::Ended
            }
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
        if !self.is_readable(reader) {
            return Pumped::Ended;
        }
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

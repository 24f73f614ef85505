//! A connection: the VMM's calls on it, with our commands between its own and the answers to them taken
//! out again.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use barkeep_protocol::wire::limits::HEADER_SIZE;
use barkeep_protocol::wire::{BarkeepExtensions, Command, Header, MessageKind};
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

mod asking;

#[cfg(test)]
pub(super) use self::asking::Posted;

use super::hello::{Hello, LONGEST, Welcome};
use super::incoming::{Answer as Reply, Incoming, Next, Patched};
use super::outgoing::{Begun, Configured, Outgoing};
use super::pending::{Greeting, Pending};
use super::socket::Socket;
use super::turn::{Taken, Turn};
use crate::device::Decode;
use crate::system::{Answer, SocketMessage, SocketReceived, System};

/// How long the server may leave a message unfinished that may be for us, before all is the VMM's.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a thread that waits for the socket does not look elsewhere.
const TICK: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(super) struct Connection {
    socket: Socket,
    writer: Turn<Writer>,
    reader: Turn<Reader>,
    pending: Mutex<Pending>,
    /// Something in `pending` has changed.
    news: Condvar,
    /// Nothing is done with the stream any more.
    passing: AtomicBool,
    /// What passes is not understood, which nobody has been told yet.
    lost: AtomicBool,
}

/// The stream to the server.
#[derive(Debug, Default)]
pub(super) struct Writer {
    outgoing: Outgoing,
    /// Bytes of a message of ours, or of the VERSION, that the socket had no room for. They come before
    /// anything else.
    pub(super) owed: Vec<u8>,
    /// What the device is was asked.
    pub(super) introduced: bool,
}

/// The stream from the server.
#[derive(Debug, Default)]
struct Reader {
    incoming: Incoming,
    /// Since when it has been unclear whose the next message is.
    unclear: Option<Instant>,
    /// The VMM's message is an answer to something that configures the device, which decoded this before.
    configured: Option<Decode>,
}

impl Connection {
    /// One on which a VERSION is about to be sent.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub(super) fn new(socket: OwnedFd, hello: &Hello) -> Answer<Self> {
        Ok(Self {
            socket: Socket::new(socket)?,
            writer: Turn::new(Writer::default()),
            reader: Turn::new(Reader::default()),
            pending: Mutex::new(Pending::new(hello.id)),
            news: Condvar::new(),
            passing: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        })
    }

    /// Sends a VERSION instead of the VMM's, whose bytes it stands for.
    ///
    /// # Errors
    /// Those of `sendmsg`, with nothing sent.
    pub(super) fn greet(&self, hello: &Hello, flags: SendFlags) -> Answer<()> {
        let mut writer = self.writer();
        let sent = send(&self.socket, &hello.bytes, flags | SendFlags::NOSIGNAL)?;
        writer.owed = hello.bytes[sent.min(hello.bytes.len())..].to_vec();
        // On a new socket there is room for it; if not, the rest is owed.
        self.pay_all(&mut writer, Instant::now() + PATIENCE);
        Ok(())
    }

    pub(super) fn is_passing(&self) -> bool {
        self.passing.load(Ordering::Acquire)
    }

    /// Leaves the stream alone from now on. Nobody waits here any more.
    pub(super) fn pass(&self) {
        self.passing.store(true, Ordering::Release);
        self.news.notify_all();
    }

    pub(super) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is not understood: nothing more is asked. What was asked is still taken out of the stream.
    fn lose(&self) {
        self.pending().closed = true;
        self.lost.store(true, Ordering::Release);
        self.news.notify_all();
    }

    /// Whether that happened since this was last asked.
    pub(super) fn was_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire) && self.lost.swap(false, Ordering::AcqRel)
    }

    /// For the VMM's next bytes to the server.
    pub(super) fn writer(&self) -> Taken<'_, Writer> {
        self.writer.take()
    }

    /// Whether the device may be asked what it is, with this turn: the VMM has had its answer to VERSION
    /// in calls that are seen, and waits for nothing.
    pub(super) fn may_introduce(&self, writer: &Writer) -> bool {
        let pending = self.pending();
        !writer.introduced
            && writer.outgoing.at_boundary()
            && writer.owed.is_empty()
            && matches!(pending.greeting, Greeting::Answered(_))
            && !pending.vmm_waits()
    }

    /// `sendmsg` of the VMM. Returns besides what of it may change what the device decodes. Before that,
    /// `decode` is called, which tells what the device decodes so far.
    pub(super) fn send(
        &self,
        system: &impl System,
        writer: &mut Writer,
        fd: RawFd,
        message: &SocketMessage,
        flags: i32,
        decode: impl FnOnce() -> Decode,
    ) -> (Answer<usize>, Option<Configured>) {
        if let Err(error) = self.settle(system, writer, fd, flags) {
            return (Err(error), None);
        }
        let read = |at, data: &mut [u8]| read(system, message, at, data);
        // The answer may be here before the call returns.
        let mut ahead = writer.outgoing.clone();
        let begins = ahead.pass(message.len(), read);
        let before = begins.configured.map(|_| decode());
        let mut pending = self.pending();
        for begun in &begins.begun {
            pending.begins(*begun);
            if let (Begun::Asked(id, _), Some(before)) = (begun, before) {
                pending.configures(*id, before);
            }
        }
        drop(pending);
        let sent = system.sendmsg(fd, message, flags);
        if let Ok(count) = sent {
            writer.outgoing.pass(count, read);
        }
        if writer.outgoing.is_lost() {
            self.lose();
        }
        (sent, begins.configured)
    }

    /// Sends what is owed, as the VMM's own call would: with its flags, and whether it waits or not.
    fn settle(
        &self,
        system: &impl System,
        writer: &mut Writer,
        fd: RawFd,
        flags: i32,
    ) -> Answer<()> {
        if writer.owed.is_empty() {
            return Ok(());
        }
        let theirs = if self.socket.is_itself() { None } else { Some(system.keep(fd)?) };
        let socket = theirs.as_ref().map_or(self.socket.as_fd(), AsFd::as_fd);
        let flags = SendFlags::from_bits_truncate(flags.cast_unsigned()) & SendFlags::DONTWAIT;
        while !writer.owed.is_empty() {
            match send(socket, &writer.owed, flags | SendFlags::NOSIGNAL) {
                Ok(sent) => drop(writer.owed.drain(..sent.min(writer.owed.len()))),
                // The VMM's own call is told the same.
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    writer.owed.clear();
                    self.lose();
                }
                // Half a message of ours is out: nothing of the VMM's may come before the rest.
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// `recvmsg` of the VMM. If with that it has all of an answer to something that configures the device,
    /// what the device decoded before is returned besides.
    ///
    /// # Errors
    /// Those of `recvmsg`.
    pub(super) fn receive(
        &self,
        system: &impl System,
        fd: RawFd,
        message: &SocketMessage,
        flags: i32,
    ) -> Answer<(SocketReceived, Option<Decode>)> {
        let mut reader = self.reader.take();
        let (mut got, mut cut) = self.receive_once(system, &mut reader, fd, message, flags)?;
        let all = flags & libc::MSG_WAITALL != 0 && flags & libc::MSG_PEEK == 0;
        // It ended with a message, which the VMM's own call would not have done. That would have ended behind
        // ancillary data.
        while all && cut && got.control_len == 0 {
            let rest = message.part(got.count, message.len() - got.count);
            let (control, control_len) = (message.control, message.control_len);
            let rest = SocketMessage { control, control_len, ..rest };
            match self.receive_once(system, &mut reader, fd, &rest, flags) {
                Ok((more, again)) if more.count > 0 => {
                    got.count += more.count;
                    got.control_len = more.control_len;
                    got.flags |= more.flags;
                    cut = again;
                }
                _ => break,
            }
        }
        let whole = matches!(&reader.incoming, Incoming::Header(read) if read.is_empty());
        let configured = if whole { reader.configured.take() } else { None };
        Ok((got, configured))
    }

    /// The same up to the end of a message at most. Returns besides whether it ended there, with room left.
    fn receive_once(
        &self,
        system: &impl System,
        reader: &mut Reader,
        fd: RawFd,
        message: &SocketMessage,
        flags: i32,
    ) -> Answer<(SocketReceived, bool)> {
        loop {
            if self.is_passing() || message.len() == 0 || !self.is_readable(reader) {
                return system.recvmsg(fd, message, flags).map(|got| (got, false));
            }
            let wait = RecvFlags::from_bits_truncate(flags.cast_unsigned()) & RecvFlags::DONTWAIT;
            let (most, waiting) = match &mut reader.incoming {
                Incoming::Lost => {
                    return system.recvmsg(fd, message, flags).map(|got| (got, false));
                }
                Incoming::Theirs(left) => (*left, Vec::new()),
                Incoming::Welcome(patched) => {
                    ((patched.shown.len() - patched.at) as u64, Vec::new())
                }
                Incoming::Ours(_) => {
                    if !self.swallow(reader)? {
                        // Waits as the VMM's call would, and is told of the end by it.
                        if self.peek(&mut [0], wait)?.is_empty() {
                            reader.incoming = Incoming::Lost;
                        }
                    }
                    continue;
                }
                Incoming::Header(read) => {
                    let mut start = [0; HEADER_SIZE];
                    let undecided = HEADER_SIZE - read.len();
                    let waiting = self.peek(&mut start[..undecided], wait)?.to_vec();
                    match self.decide(reader, &waiting)? {
                        Some(most) => (most, waiting),
                        None if matches!(reader.incoming, Incoming::Header(_)) => {
                            self.unclear(reader, wait)?;
                            continue;
                        }
                        None => continue,
                    }
                }
            };
            reader.unclear = None;
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            // Not beyond the message: what follows may be for us. Nothing is left where it has ended.
            let got = system.recvmsg(fd, &message.part(0, most), flags)?;
            if self.give(system, reader, message, got.count, flags, &waiting).is_none() {
                reader.incoming = Incoming::Lost;
                self.lose();
            }
            return Ok((got, got.count == most && most < message.len()));
        }
    }

    /// Decides whose the next message is. `Some`: the VMM's, which may read so much.
    fn decide(&self, reader: &mut Reader, waiting: &[u8]) -> Answer<Option<u64>> {
        if waiting.is_empty() {
            // The end of the stream, which is the VMM's.
            return Ok(Some(u64::MAX));
        }
        let next = reader.incoming.decide(waiting, &*self.pending());
        match next {
            Next::Theirs(most) => return Ok(Some(most)),
            Next::Unclear => {}
            Next::Lost => {
                reader.incoming = Incoming::Lost;
                self.lose();
            }
            Next::Ours(header) => reader.incoming = Incoming::Ours(Reply::new(&header)),
            Next::Welcome(size) => self.welcome(reader, size)?,
        }
        Ok(None)
    }

    /// The answer to VERSION, as soon as all of it is there.
    fn welcome(&self, reader: &mut Reader, size: usize) -> Answer<()> {
        if size > LONGEST {
            self.greeted(None);
            return Ok(());
        }
        let mut whole = vec![0; size];
        if self.peek(&mut whole, RecvFlags::DONTWAIT)?.len() < size {
            return Ok(());
        }
        let Welcome { shown, extensions } = Welcome::without_ours(&whole);
        self.greeted(extensions);
        let hidden = size - shown.len();
        reader.incoming = Incoming::Welcome(Patched { shown, at: 0, hidden });
        Ok(())
    }

    fn greeted(&self, extensions: Option<BarkeepExtensions>) {
        let mut pending = self.pending();
        if let Greeting::Asked(id) = pending.greeting {
            let reply = MessageKind::Reply { error: None };
            let command = Command::Version.code();
            pending.answered(&Header { id, command, body_size: 0, kind: reply });
        }
        pending.greeting = Greeting::Answered(extensions);
    }

    /// What has arrived may be the beginning of something for us: more of it must come.
    fn unclear(&self, reader: &mut Reader, wait: RecvFlags) -> Answer<()> {
        let since = *reader.unclear.get_or_insert_with(Instant::now);
        if since.elapsed() > PATIENCE {
            reader.incoming = Incoming::Lost;
            self.lose();
            return Ok(());
        }
        let flags = rustix::fs::fcntl_getfl(&self.socket)?;
        if wait.contains(RecvFlags::DONTWAIT) || flags.contains(rustix::fs::OFlags::NONBLOCK) {
            return Err(Errno::AGAIN);
        }
        std::thread::sleep(TICK);
        Ok(())
    }

    /// The VMM has read `count` bytes. `None` if it must not be followed further.
    fn give(
        &self,
        system: &impl System,
        reader: &mut Reader,
        message: &SocketMessage,
        count: usize,
        flags: i32,
        waiting: &[u8],
    ) -> Option<()> {
        let peeks = flags & libc::MSG_PEEK != 0;
        if let Incoming::Welcome(patched) = &mut reader.incoming {
            let shown = patched.shown.get(patched.at..patched.at + count)?;
            write(system, message, shown)?;
            if peeks {
                return Some(());
            }
            patched.at += count;
            if patched.at == patched.shown.len() {
                let hidden = patched.hidden;
                reader.incoming = Incoming::default();
                self.hide(hidden)?;
            }
        } else if !peeks && let Some(header) = reader.incoming.given(count, waiting) {
            let mut pending = self.pending();
            reader.configured = pending.configured(&header).or(reader.configured);
            let seen = pending.answered(&header);
            drop(pending);
            if !seen {
                // It asks in calls that are not seen, so that nobody knows where its messages end.
                self.lose();
            }
        }
        if !peeks {
            self.pending().silent = false;
        }
        Some(())
    }

    /// Takes bytes out of the stream that are there.
    fn hide(&self, mut count: usize) -> Option<()> {
        while count > 0 {
            let (bytes, _) = self.take(count.min(HEADER_SIZE * 64)).ok()?;
            count = count.checked_sub(bytes.len()).filter(|_| !bytes.is_empty())?;
        }
        Some(())
    }

    /// Reads on in an answer to us. Returns whether it is complete; if not, there is nothing more now.
    fn swallow(&self, reader: &mut Reader) -> Answer<bool> {
        let Incoming::Ours(reply) = &mut reader.incoming else { return Ok(true) };
        while !reply.is_complete() {
            match self.take(reply.wanted(4096)) {
                Ok((bytes, _)) if bytes.is_empty() => return Ok(false),
                Ok((bytes, fds)) => reply.add(&bytes, fds),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        if let Incoming::Ours(reply) = std::mem::take(&mut reader.incoming) {
            self.pending().deliver(reply);
            self.news.notify_all();
        }
        Ok(true)
    }

    /// Bytes that can be read.
    fn waiting(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.socket).unwrap_or(0)
    }

    /// Whether the stream can be read through our descriptor. If not, all that comes is the VMM's.
    fn is_readable(&self, reader: &mut Reader) -> bool {
        let readable = self.socket.is_itself();
        if !readable && !matches!(reader.incoming, Incoming::Lost) {
            reader.incoming = Incoming::Lost;
            self.lose();
        }
        readable
    }

    /// In a child, whose parent has the connection: closes our descriptor, which nobody uses here.
    pub(super) fn let_go(&self, system: &impl System) {
        if self.socket.is_itself() {
            system.close_own(self.number());
        }
    }

    pub(super) fn number(&self) -> RawFd {
        self.socket.as_fd().as_raw_fd()
    }

    /// As if the VMM had used the number of our descriptor for something else.
    #[cfg(test)]
    pub(super) fn replace(&mut self, other: impl AsFd) {
        self.socket.replace(other);
    }

    /// Looks at what waits in the socket.
    fn peek<'a>(&self, data: &'a mut [u8], flags: RecvFlags) -> Answer<&'a [u8]> {
        let (count, _) = recv(&self.socket, &mut *data, flags | RecvFlags::PEEK)?;
        Ok(&data[..count.min(data.len())])
    }

    /// Takes bytes out of the socket, with descriptors. Never waits.
    fn take(&self, most: usize) -> Answer<(Vec<u8>, Vec<OwnedFd>)> {
        let mut data = vec![0; most];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let room = &mut [IoSliceMut::new(&mut data)];
        let got = recvmsg(&self.socket, room, &mut control, flags)?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        data.truncate(got.bytes);
        Ok((data, fds))
    }
}

/// As many as the kernel sends at once (`SCM_MAX_FD`).
const MOST_FDS: usize = 253;

/// Reads some of a message's data. Returns whether it is there.
pub(super) fn read(
    system: &impl System,
    message: &SocketMessage,
    at: usize,
    mut data: &mut [u8],
) -> bool {
    for extent in &message.part(at, data.len()).extents {
        let (some, rest) = data.split_at_mut(extent.len);
        if system.read_memory(extent.address, some).is_err() {
            return false;
        }
        data = rest;
    }
    data.is_empty()
}

/// Writes the beginning of a message's room.
fn write(system: &impl System, message: &SocketMessage, mut data: &[u8]) -> Option<()> {
    for extent in &message.part(0, data.len()).extents {
        let (some, rest) = data.split_at(extent.len);
        system.write_memory(extent.address, some).ok()?;
        data = rest;
    }
    Some(())
}

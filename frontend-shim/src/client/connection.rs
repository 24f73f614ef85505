use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use barkeep_protocol::transport::{
    Flush, Frame, Message, Received, Receiver, Sender, TransportError,
};
use barkeep_protocol::wire::{Command, Errno, Header, MessageKind};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with,
};

use super::ClientError;
use super::dma::DmaService;
use super::twin::{Twin, TwinStream};
use super::waiters::{Ticket, Turn, Waiters};

/// A stream that any number of threads use at a time, with a deadline for each request.
///
/// A thread sends its request and then waits for the reply with the id of its own. One of those that
/// wait reads the socket, in the read itself, and hands the others what is theirs: alone, a request
/// is one send and one receive.
///
/// The deadline covers the whole exchange, of those that read and of those that sleep. A backend that
/// drips bytes, or sends commands of its own without end, gains no time. A missed deadline ends the
/// session: the guest has gone on by then, with all ones, and a device that does what was asked of it
/// long ago is worse than one that is gone.
///
/// Locks are taken in the order of the fields.
#[derive(Debug)]
pub(super) struct Connection {
    /// Of who reads.
    receiving: Mutex<Receiver>,
    /// Of the attendant that reads the server's own socket.
    twin_stream: Mutex<TwinStream>,
    /// Held while the socket is given what it takes at once.
    sending: Mutex<Sender>,
    waiters: Mutex<Waiters>,
    /// As in `waiters`, to be seen without its lock.
    ended: AtomicBool,
    /// Attendants shall return.
    stopped: AtomicBool,
    /// The server is known to send commands on this socket, or likely to.
    commands: AtomicBool,
    /// Wakes an attendant that polls.
    bell: OwnedFd,
    socket: OwnedFd,
    twin: OnceLock<Twin>,
    dma: DmaService,
    deadline: Duration,
}

/// The successful answer to a request.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    pub(super) body: &'a [u8],
    pub(super) fds: Vec<OwnedFd>,
}

/// Why a request could not be sent.
enum SendError {
    /// The peer had gone before the first byte of it.
    Unsent,
    /// The peer may have it, or a part of it.
    Outstanding(ClientError),
}

/// Takes the reply where it is, without a copy.
type Take<'a> = &'a mut dyn FnMut(Reply<'_>);

/// A full send buffer is waited for in `poll` and not under the lock of those that send: the kernel
/// rounds this up to its tick.
const SEND_TIMEOUT: Duration = Duration::from_millis(1);

/// Longer than any VM runs, and short enough for the clock and the kernel.
const LONGEST_DEADLINE: Duration = Duration::from_secs(1 << 32);

/// A thread that can't send looks this often whether it has to read by now.
const READER_CHECK: Duration = Duration::from_millis(10);

impl Connection {
    pub(super) fn open(path: &Path, deadline: Duration) -> Result<Self, ClientError> {
        let deadline = deadline.min(LONGEST_DEADLINE);
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(ClientError::Connect)?;
        // Each wait in the kernel ends early enough for the clock to be looked at: a request takes
        // its deadline and one of these at most. A full backlog makes connect wait as well.
        let slice = slice(deadline);
        for timeout in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, timeout, Some(slice)).map_err(ClientError::Connect)?;
        }
        let address = SocketAddrUnix::new(path).map_err(ClientError::Connect)?;
        connect(&socket, &address).map_err(ClientError::Connect)?;
        set_socket_timeout(&socket, Timeout::Send, Some(SEND_TIMEOUT))
            .map_err(ClientError::Connect)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(ClientError::Connect)?;
        Ok(Self {
            receiving: Mutex::default(),
            twin_stream: Mutex::default(),
            sending: Mutex::default(),
            waiters: Mutex::default(),
            ended: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            commands: AtomicBool::new(false),
            bell,
            socket,
            twin: OnceLock::new(),
            dma: DmaService::default(),
            deadline,
        })
    }

    /// Sends a command and returns what `take` makes of its successful reply.
    pub(super) fn call<T>(
        &self,
        command: Command,
        body: impl FnOnce(&mut Vec<u8>),
        fds: Vec<OwnedFd>,
        mut take: impl FnMut(Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let expires = Instant::now() + self.deadline;
        let ticket = lock(&self.waiters).enter(command.code()).ok_or(ClientError::Gone)?;
        let mut taken = None;
        let queue = |sender: &mut Sender| sender.command(ticket.id, command, false, fds, body);
        let result = match self.send(Some(ticket), queue, expires) {
            Ok(()) => self
                .await_reply(ticket, expires, &mut |reply| taken = Some(take(reply)))
                .map_err(SendError::Outstanding),
            Err(error) => Err(error),
        };
        let failed = result.err().map(|failure| {
            let error = match failure {
                SendError::Unsent => ClientError::Gone,
                SendError::Outstanding(error) => match self.cause(error) {
                    ClientError::Gone => ClientError::Lost,
                    error => error,
                },
            };
            // Whose reply has come has left, and somebody else may have its id by now.
            if error.ends_session() {
                lock(&self.waiters).leave(ticket);
            }
            self.note(&error);
            error
        });
        // What has come counts, also when it was the last that came. A reply that can't be read ends the
        // session like one that does not come.
        let outcome = taken.unwrap_or_else(|| Err(failed.unwrap_or(ClientError::Lost)));
        outcome.inspect_err(|error| self.note(error))
    }

    /// Sends a command that has no reply.
    pub(super) fn post(
        &self,
        command: Command,
        body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), ClientError> {
        let expires = Instant::now() + self.deadline;
        let id = lock(&self.waiters).free_id();
        let queue = |sender: &mut Sender| sender.command(id, command, true, Vec::new(), body);
        self.send(None, queue, expires).map_err(|failure| {
            let error = match failure {
                SendError::Unsent => ClientError::Gone,
                SendError::Outstanding(error) => self.cause(error),
            };
            self.note(&error);
            error
        })
    }

    /// Whether no request can succeed any more.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends the session, whoever waits or reads: they return at once.
    pub(super) fn end(&self) {
        // Whoever sees the end finds that no more guest memory is reached for the backend.
        self.dma.close();
        if !self.ended.swap(true, Ordering::AcqRel) {
            lock(&self.waiters).end();
            // It may be gone already, which is as good.
            let _ = shutdown(&self.socket, Shutdown::Both);
            self.twin.get().inspect(|twin| twin.shut_down());
        }
    }

    /// The server's own commands, and the memory that they reach.
    pub(super) fn dma(&self) -> &DmaService {
        &self.dma
    }

    /// Serves the server's commands on a socket of their own.
    pub(super) fn set_twin(&self, socket: OwnedFd) -> Result<(), ClientError> {
        let twin = Twin::new(socket).ok_or(ClientError::Protocol("strange socket for commands"))?;
        // VERSION is answered once.
        let _ = self.twin.set(twin);
        Ok(())
    }

    /// The server is going to send commands of its own.
    pub(super) fn expect_commands(&self) {
        if self.twin.get().is_none() && !self.commands.swap(true, Ordering::Relaxed) {
            self.ring();
        }
    }

    /// Whether the server may send commands on the same socket as replies.
    pub(super) fn hears_commands(&self) -> bool {
        self.commands.load(Ordering::Relaxed)
    }

    /// Has attendants return.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.ring();
        lock(&self.waiters).wake_attendants();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn ring(&self) {
        // A counter that is full wakes as well.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Waits until the session ends, the bell rings or a command arrives; on the socket itself for
    /// data only if `for_data`.
    pub(super) fn poll_idle(
        &self,
        for_data: bool,
        limit: Option<Duration>,
    ) -> Result<Found, ClientError> {
        let data = if for_data { PollFlags::IN } else { PollFlags::empty() };
        let twin = self.twin.get().filter(|_| !lock(&self.twin_stream).is_closed());
        let mut polled = [
            PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::RDHUP | data),
            PollFd::from_borrowed_fd(twin.map_or(self.bell.as_fd(), AsFd::as_fd), PollFlags::IN),
        ];
        let count = if twin.is_some() { 3 } else { 2 };
        poll_all(&mut polled[..count], limit)?;
        if !polled[0].revents().is_empty() && !self.is_stopped() {
            // Whatever it says: what it was rung for is looked at.
            let _ = rustix::io::read(&self.bell, &mut [0; 8]);
        }
        let twin = if twin.is_some() { polled[2].revents() } else { PollFlags::empty() };
        Ok(Found { socket: polled[1].revents(), twin })
    }

    /// For what the socket is ready at this moment.
    pub(super) fn poll_now(&self, interest: PollFlags) -> Result<PollFlags, ClientError> {
        wait_for(self.socket.as_fd(), interest, Duration::ZERO)
    }

    /// Reads the server's own socket once, and serves what is complete.
    pub(super) fn serve_twin(&self) -> Result<(), ClientError> {
        let Some(twin) = self.twin.get() else { return Ok(()) };
        let stream = &mut lock(&self.twin_stream);
        // With a socket for commands, the bell rings for nothing else than the end of attending.
        let ends = [
            PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::RDHUP),
            PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
        ];
        match twin.serve(stream, &self.dma, ends, self.deadline) {
            // It was left in the middle of something.
            Err(_) if self.is_stopped() => Ok(()),
            result => result,
        }
    }

    /// Sleeps while somebody else reads.
    pub(super) fn wait_for_reader(&self, limit: Option<Duration>) {
        if lock(&self.waiters).attend() && !self.is_stopped() {
            match limit {
                Some(limit) => std::thread::park_timeout(limit),
                None => std::thread::park(),
            }
        }
    }

    /// Ends the session unless the backend just said no.
    fn note(&self, error: &ClientError) {
        if error.ends_session() {
            self.end();
        }
    }

    /// A socket that another thread has shut down fails in ways that say nothing.
    fn cause(&self, error: ClientError) -> ClientError {
        match error {
            ClientError::Transport(TransportError::Socket(Errno::PIPE | Errno::CONNRESET)) => {
                ClientError::Gone
            }
            ClientError::Transport(_) if self.has_ended() => ClientError::Gone,
            error => error,
        }
    }

    fn send(
        &self,
        ticket: Option<Ticket>,
        queue: impl FnOnce(&mut Sender),
        expires: Instant,
    ) -> Result<(), SendError> {
        let flushed = {
            let mut sender = lock(&self.sending);
            let before = sender.queued_bytes();
            queue(&mut sender);
            let mine = sender.queued_bytes() - before;
            sender.flush(&self.socket).map_err(|error| match error {
                // The kernel takes nothing for a peer that has gone. Whoever is queued last goes last.
                TransportError::Socket(Errno::PIPE) if sender.queued_bytes() >= mine => {
                    SendError::Unsent
                }
                error => SendError::Outstanding(error.into()),
            })?
        };
        match flushed {
            Flush::Done => Ok(()),
            // The others send for it from here on, so nobody knows how far it came.
            Flush::Blocked => self.push(ticket, expires).map_err(SendError::Outstanding),
        }
    }

    /// Goes on sending to a backend that does not read, perhaps because nobody reads what it has
    /// sent.
    fn push(&self, ticket: Option<Ticket>, expires: Instant) -> Result<(), ClientError> {
        while !ticket.is_some_and(|ticket| lock(&self.waiters).is_answered(ticket)) {
            let (reading, left) = (self.try_read(), self.left(expires)?);
            let (interest, limit) = match reading {
                Some(_) => (PollFlags::IN, left),
                // Whoever reads may stop, and can't wake a thread that polls.
                None => (PollFlags::empty(), left.min(READER_CHECK)),
            };
            let found = wait_for(self.socket.as_fd(), interest | PollFlags::OUT, limit)?;
            if let Some(reading) = reading.filter(|_| !(found - PollFlags::OUT).is_empty()) {
                reading.receive(None, expires)?;
            }
            if lock(&self.sending).flush(&self.socket)? == Flush::Done {
                break;
            }
        }
        Ok(())
    }

    fn await_reply(
        &self,
        ticket: Ticket,
        expires: Instant,
        take: Take<'_>,
    ) -> Result<(), ClientError> {
        loop {
            let turn = lock(&self.waiters).turn(ticket);
            match turn {
                Turn::Answered(answer) => {
                    let result = match answer.error {
                        None => {
                            take(Reply { body: &answer.body, fds: answer.fds });
                            Ok(())
                        }
                        Some(errno) => Err(ClientError::Refused(errno)),
                    };
                    lock(&self.waiters).give_back(answer.body);
                    return result;
                }
                Turn::Ended => return Err(ClientError::Gone),
                Turn::Lead => {
                    let reading = Reading { connection: self };
                    while !reading.receive(Some((ticket, take)), expires)? {
                        self.left(expires)?;
                    }
                    return Ok(());
                }
                Turn::Sleep => std::thread::park_timeout(self.left(expires)?),
            }
        }
    }

    /// Becomes the one that reads, if nobody does.
    pub(super) fn try_read(&self) -> Option<Reading<'_>> {
        lock(&self.waiters).lead().then(|| Reading { connection: self })
    }

    /// Sends what nobody answers. A backend that does not read gets no more commands served.
    fn reply(&self, queue: impl FnOnce(&mut Sender), expires: Instant) -> Result<(), ClientError> {
        queue(&mut lock(&self.sending));
        while lock(&self.sending).flush(&self.socket)? == Flush::Blocked {
            wait_for(self.socket.as_fd(), PollFlags::OUT, self.left(expires)?)?;
        }
        Ok(())
    }

    /// How often somebody would have read, and somebody else did.
    #[cfg(test)]
    pub(super) fn turned_away(&self) -> usize {
        lock(&self.waiters).turned_away
    }

    /// Time until `expires`.
    fn left(&self, expires: Instant) -> Result<Duration, ClientError> {
        if self.has_ended() {
            return Err(ClientError::Gone);
        }
        let left = expires.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ClientError::Deadline(self.deadline)) } else { Ok(left) }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What an attendant has found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) socket: PollFlags,
    pub(super) twin: PollFlags,
}

/// The right to read the socket; somebody else gets it when this one is dropped.
pub(super) struct Reading<'a> {
    connection: &'a Connection,
}

impl Reading<'_> {
    /// Reads once if there is something, for nobody in particular.
    pub(super) fn receive_idle(&self) -> Result<(), ClientError> {
        // Whoever read until now may have read it all.
        if self.connection.poll_now(PollFlags::IN)?.is_empty() {
            return Ok(());
        }
        self.receive(None, Instant::now() + self.connection.deadline).map(|_| ())
    }

    /// Reads once, and passes on all that has come: nobody would look for what stays in the buffer.
    /// Whether that held the reply to `mine`.
    fn receive(
        &self,
        mine: Option<(Ticket, Take<'_>)>,
        expires: Instant,
    ) -> Result<bool, ClientError> {
        let connection = self.connection;
        let mut receiver = lock(&connection.receiving);
        let (mut mine, mut outcome) = (mine, Ok(false));
        // One read at a time, and then the clock. Waiting in the read itself, and not in a poll
        // before it, saves a system call for each request.
        let mut reads = 1;
        loop {
            match receiver.receive_within(&connection.socket, reads)? {
                Received::Message(Message { header, body, fds }) => match header.kind {
                    MessageKind::Reply { error } => {
                        if let Some(found) = self.hand_out(&mut mine, &header, error, body, fds)? {
                            outcome = found.map(|()| true);
                        }
                    }
                    MessageKind::Command { no_reply } => {
                        connection.expect_commands();
                        let result = connection.dma.serve(&header, body);
                        if !no_reply {
                            let queue = |sender: &mut Sender| answer(sender, &header, result);
                            connection.reply(queue, expires)?;
                        }
                    }
                },
                Received::Refused(..) => return Err(ClientError::Protocol("oversized message")),
                Received::Pending => return outcome,
                Received::Closed => return Err(ClientError::Gone),
            }
            reads = 0;
        }
    }

    /// Takes a reply to whom it is for; for `mine`, how that went.
    fn hand_out(
        &self,
        mine: &mut Option<(Ticket, Take<'_>)>,
        header: &Header,
        error: Option<Errno>,
        body: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Result<(), ClientError>>, ClientError> {
        let mut waiters = lock(&self.connection.waiters);
        let ticket = Ticket { id: header.id, command: header.command };
        if let Some((mine, take)) = mine.take_if(|(mine, _)| *mine == ticket) {
            waiters.leave(mine);
            drop(waiters);
            return Ok(Some(match error {
                None => {
                    take(Reply { body, fds });
                    Ok(())
                }
                Some(errno) => Err(ClientError::Refused(errno)),
            }));
        }
        if waiters.answer(header, error, body, fds) {
            Ok(None)
        } else {
            Err(ClientError::Protocol("reply to no request of ours"))
        }
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        lock(&self.connection.waiters).pass_on();
    }
}

/// Queues the reply to a command of the server's.
pub(super) fn answer(sender: &mut Sender, header: &Header, result: Result<Vec<u8>, Errno>) {
    match result {
        Ok(body) => sender.queue(Frame::reply(header, body)),
        Err(errno) => sender.error(header.id, header.command, errno),
    }
}

/// Waits until a descriptor is ready, at most `timeout`; tells for what.
fn wait_for(
    fd: BorrowedFd<'_>,
    interest: PollFlags,
    timeout: Duration,
) -> Result<PollFlags, ClientError> {
    let mut polled = [PollFd::from_borrowed_fd(fd, interest)];
    poll_all(&mut polled, Some(timeout))?;
    Ok(polled[0].revents())
}

pub(super) fn poll_all(
    polled: &mut [PollFd<'_>],
    limit: Option<Duration>,
) -> Result<(), ClientError> {
    // One that is too long for the kernel is as good as none.
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(polled, limit.as_ref()) {
        Ok(_) => Ok(()),
        Err(Errno::INTR) => {
            polled.iter_mut().for_each(PollFd::clear_revents);
            Ok(())
        }
        Err(errno) => Err(TransportError::Socket(errno).into()),
    }
}

/// How long one read may take: the clock is looked at after each.
fn slice(deadline: Duration) -> Duration {
    (deadline / 4).max(Duration::from_millis(1))
}

/// Locks what every holder leaves valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

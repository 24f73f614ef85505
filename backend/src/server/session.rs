use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use barkeep_protocol::transport::{Flush, Frame, Received, Receiver, Sender, TransportError};
use barkeep_protocol::wire::{
    BarkeepExtensions, Command, Errno, Header, MessageKind, Request, Version, WireError,
};
use thiserror::Error;
use tracing::debug;

use super::event_loop::{Epoll, Interest, Token};
use super::rate_limit::RateLimit;
use super::request_error::RequestError;
use super::served::{Reply, Served};

/// Requests served before other functions of the process get their turn, and those that were read
/// with the last of them.
const BATCH: usize = 64;
/// Bytes of replies that may wait for a client that does not read; beyond, its requests are not read
/// either.
const MAX_QUEUED: usize = 4 << 20;
/// The same for descriptors, of which a process has far fewer.
const MAX_QUEUED_FDS: usize = 8;

/// One client's connection.
#[derive(Debug)]
pub(super) struct Session {
    socket: OwnedFd,
    receiver: Receiver,
    sender: Sender,
    state: State,
    interest: Interest,
    log: RateLimit,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// VERSION is due by then.
    Greeting(Instant),
    Ready(BarkeepExtensions),
}

/// Why a session ended.
#[derive(Debug, Error)]
pub(super) enum SessionEnd {
    #[error("it closed the connection")]
    Left,
    #[error("it did not negotiate a version in time")]
    Silent,
    #[error("no common protocol version: {0}")]
    Refused(RequestError),
    #[error("it sent a reply to nothing")]
    UnsolicitedReply,
    #[error("{0}")]
    Transport(#[from] TransportError),
}

impl Session {
    pub(super) fn new(socket: OwnedFd, handshake_deadline: Instant) -> Self {
        Self {
            socket,
            receiver: Receiver::default(),
            sender: Sender::default(),
            state: State::Greeting(handshake_deadline),
            interest: Interest::Read,
            log: RateLimit::default(),
        }
    }

    /// When the client's patience with VERSION ends; `None` once it is negotiated.
    pub(super) fn handshake_deadline(&self) -> Option<Instant> {
        match self.state {
            State::Greeting(deadline) => Some(deadline),
            State::Ready(_) => None,
        }
    }

    /// Tells the event loop what [`serve`](Self::serve) waits for, if that has changed.
    pub(super) fn watch(
        &mut self,
        epoll: &Epoll,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        if self.interest == interest {
            return Ok(());
        }
        self.interest = interest;
        epoll.modify(self.socket.as_fd(), token, interest)
    }

    /// Reads and answers requests as long as the socket has some, up to a batch. Returns what to
    /// wait for next.
    pub(super) fn serve(&mut self, function: &mut dyn Served) -> Result<Interest, SessionEnd> {
        for turn in 0.. {
            if self.sender.flush(&self.socket)? == Flush::Blocked && self.holds_too_much() {
                return Ok(Interest::Write);
            }
            let received = match turn {
                0 => self.receiver.receive(&self.socket),
                1..BATCH => self.receiver.receive_more(&self.socket),
                // No wake-up tells of what has been read already.
                _ => self.receiver.receive_within(&self.socket, 0),
            };
            let outcome = match received {
                Ok(Received::Message(message)) => {
                    let frame = message.into_frame();
                    self.handle(frame, function)
                }
                Ok(Received::Refused(header, error)) => self.answer(&header, Err(error.into())),
                Ok(Received::Pending) => break,
                Ok(Received::Closed) => return Err(SessionEnd::Left),
                Err(error) => return Err(self.farewell(error)),
            };
            if let Err(end) = outcome {
                // The last reply says why; it is lost if the client does not read.
                let _ = self.sender.flush(&self.socket);
                return Err(end);
            }
        }
        Ok(match self.sender.flush(&self.socket)? {
            Flush::Done => Interest::Read,
            Flush::Blocked => Interest::ReadWrite,
        })
    }

    /// Hands over what the socket takes of the replies that still wait. For the end of the server,
    /// which waits for nobody.
    pub(super) fn flush(&mut self) {
        let _ = self.sender.flush(&self.socket);
    }

    fn holds_too_much(&self) -> bool {
        self.sender.queued_bytes() > MAX_QUEUED || self.sender.queued_fds() > MAX_QUEUED_FDS
    }

    fn handle(&mut self, frame: Frame, function: &mut dyn Served) -> Result<(), SessionEnd> {
        let Frame { header, body, fds } = frame;
        let request = Request::parse(header.command, &body).map_err(RequestError::from);
        let result = match (self.state, request) {
            (_, Ok(request)) if fds.len() > request.max_fds() => Err(WireError::TooManyFds.into()),
            (State::Greeting(_), Ok(Request::Version(version))) => self.negotiate(&version),
            (State::Greeting(_), Ok(_)) | (State::Ready(_), Ok(Request::Version(_))) => {
                Err(RequestError::OutOfOrder)
            }
            (State::Ready(extensions), Ok(request)) => {
                serve_request(function, extensions, request, fds)
            }
            (_, Err(error)) => Err(error),
        };
        self.answer(&header, result)
    }

    fn negotiate(&mut self, theirs: &Version) -> Result<Reply, RequestError> {
        let answer = theirs.answer()?;
        self.state = State::Ready(answer.capabilities.barkeep.unwrap_or_default());
        Ok(Reply::body(answer.to_bytes()))
    }

    /// Queues the reply. A message that no client of ours would send ends the session after it: a
    /// refused handshake has nothing to go on with, and an error reply to a reply could be answered
    /// in turn for ever.
    fn answer(
        &mut self,
        header: &Header,
        result: Result<Reply, RequestError>,
    ) -> Result<(), SessionEnd> {
        let MessageKind::Command { no_reply } = header.kind else {
            self.sender.queue(Frame::error(header.id, header.command, Errno::INVAL));
            return Err(SessionEnd::UnsolicitedReply);
        };
        let error = match result {
            Ok(reply) => {
                if !no_reply {
                    self.sender.queue(Frame::reply(header, reply.body).with_fds(reply.fds));
                }
                return Ok(());
            }
            Err(error) => error,
        };
        if let Some(suppressed) = self.log.admit() {
            debug!(command = header.command, suppressed, "request refused: {error}");
        }
        if !no_reply {
            self.sender.queue(Frame::error(header.id, header.command, error.errno()));
        }
        match self.state {
            State::Greeting(_) => Err(SessionEnd::Refused(error)),
            State::Ready(_) => Ok(()),
        }
    }

    /// Tells a client whose stream can't be followed any more, if that is the reason.
    fn farewell(&mut self, error: TransportError) -> SessionEnd {
        if let TransportError::Framing { id, command, .. } = error {
            self.sender.queue(Frame::error(id, command, Errno::INVAL));
            let _ = self.sender.flush(&self.socket);
        }
        error.into()
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn serve_request(
    function: &mut dyn Served,
    extensions: BarkeepExtensions,
    request: Request<'_>,
    fds: Vec<OwnedFd>,
) -> Result<Reply, RequestError> {
    match request {
        Request::Version(_) => Err(RequestError::OutOfOrder),
        Request::DmaMap(map) => function.dma_map(&map, fds.into_iter().next()),
        Request::DmaUnmap(unmap) => function.dma_unmap(&unmap),
        Request::GetInfo => Ok(function.device_info()),
        Request::GetRegionInfo(query) => function.region_info(query, extensions),
        Request::GetIrqInfo(query) => function.irq_info(query),
        Request::SetIrqs(set) => function.set_irqs(&set, fds),
        Request::RegionRead(access) => function.region_read(&access),
        Request::RegionWrite(write) => function.region_write(&write),
        Request::Reset => function.device_reset(),
        Request::MemoryFault(report) if extensions.memory_fault => function.memory_fault(&report),
        Request::RegionState(query) if extensions.region_state => function.region_state(query),
        Request::MemoryFault(_) | Request::RegionState(_) => Err(RequestError::NotNegotiated),
        Request::GetRegionIoFds(_) => Err(WireError::Unsupported(Command::GetRegionIoFds).into()),
        Request::RegionWriteMulti(_) => {
            Err(WireError::Unsupported(Command::RegionWriteMulti).into())
        }
        Request::DeviceFeature(_) => Err(WireError::Unsupported(Command::DeviceFeature).into()),
        Request::MigDataRead(_) => Err(WireError::Unsupported(Command::MigDataRead).into()),
        Request::MigDataWrite(_) => Err(WireError::Unsupported(Command::MigDataWrite).into()),
    }
}

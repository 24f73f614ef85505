use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use barkeep_protocol::transport::{Received, TransportError};
use barkeep_protocol::wire::{Errno, MessageId};
use thiserror::Error;

use super::channel::Channel;
use super::commands::Commands;
use super::desk::{Desk, State};
use super::event_loop::{Epoll, Source, Token};
use super::request_error::RequestError;
use super::served::Served;
use crate::state::Heirs;

/// Requests served before other functions of the process get their turn.
const BATCH: usize = 64;
/// How often a busy client's socket is looked at between two looks at everything.
const LOOKS: u32 = 32;
/// Bytes of requests likewise: one REGION_WRITE_MULTI can be tens of thousands of writes.
const BATCH_BYTES: usize = 64 << 10;
/// Bytes of replies that are collected before they are sent with one call.
const MAX_UNSENT: usize = 64 << 10;

/// One client's connection.
#[derive(Debug)]
pub(super) struct Session {
    client: Channel,
    /// Where our own commands go, if the client wanted them apart.
    twin: Option<Channel>,
    /// The client has closed its end of the twin socket: it serves no commands any more, and may go on
    /// with everything else.
    twin_closed: bool,
    /// Messages may have been read that are not served yet: others have their turn first.
    more: bool,
    /// The same, because the client has to read first.
    stalled: bool,
    /// The same, over the twin socket.
    more_from_twin: bool,
    desk: Desk,
}

/// What came of serving a session for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Nothing was there.
    Nothing,
    /// Requests were served.
    Served,
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
    #[error("its message of {size} bytes is too long to be recorded")]
    TooLong {
        id: MessageId,
        /// The message's command number.
        command: u16,
        size: usize,
    },
    #[error("nobody has survived its first message")]
    Deadly,
    #[error("{0}")]
    Transport(#[from] TransportError),
}

impl SessionEnd {
    /// The message that the stream can't be followed behind, by id and command number.
    pub(super) fn message(&self) -> Option<(MessageId, u16)> {
        match *self {
            Self::TooLong { id, command, .. }
            | Self::Transport(TransportError::Framing { id, command, .. }) => Some((id, command)),
            _ => None,
        }
    }
}

impl Session {
    pub(super) fn new(socket: OwnedFd, handshake_deadline: Instant) -> Self {
        Self {
            client: Channel::new(socket),
            twin: None,
            twin_closed: false,
            more: false,
            stalled: false,
            more_from_twin: false,
            desk: Desk::new(State::Greeting(handshake_deadline), Commands::default(), Heirs::None),
        }
    }

    /// When the client's patience with VERSION ends; `None` once it is negotiated.
    pub(super) fn handshake_deadline(&self) -> Option<Instant> {
        match self.desk.state {
            State::Greeting(deadline) => Some(deadline),
            State::Ready(_) => None,
        }
    }

    /// Tells the event loop what [`serve`](Self::serve) waits for, if it does not know that.
    pub(super) fn watch(&mut self, epoll: &Epoll, port: usize) -> io::Result<()> {
        self.client.watch(epoll, Token::Port(port, Source::Client))?;
        let token = Token::Port(port, Source::Twin);
        if self.twin_closed
            && let Some(mut twin) = self.twin.take()
        {
            return twin.forget(epoll);
        }
        self.twin.as_mut().map_or(Ok(()), |twin| twin.watch(epoll, token))
    }

    /// Takes its sockets from the event loop.
    pub(super) fn remove(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.client.forget(epoll)?;
        self.twin.as_mut().map_or(Ok(()), |twin| twin.forget(epoll))
    }

    /// Whether it has to be served again although nothing may happen at its socket.
    pub(super) fn has_more(&self) -> bool {
        // What was read already is no event of the socket's, however the client came to have room.
        self.more || self.more_from_twin || self.stalled && !self.client.holds_too_much()
    }

    /// Does what an event asks of the session, after the function has heard of it.
    pub(super) fn turn(
        &mut self,
        source: Source,
        function: &mut dyn Served,
    ) -> Result<Progress, SessionEnd> {
        match source {
            Source::Client => self.serve(function),
            Source::Look => self.look(LOOKS, function),
            Source::Work if self.has_more() => self.serve(function),
            Source::Twin => self.serve_twin(function).map(|()| Progress::Nothing),
            _ => self.speak(function).map(|()| Progress::Nothing),
        }
    }

    /// Reads and answers requests as long as the socket has some, up to a batch.
    fn serve(&mut self, function: &mut dyn Served) -> Result<Progress, SessionEnd> {
        if self.more_from_twin {
            self.serve_twin(function)?;
        }
        let mut progress = Progress::Nothing;
        self.more = false;
        self.stalled = false;
        let mut bytes = 0;
        for served in 0..=BATCH {
            let sender = &self.client.sender;
            if sender.queued_bytes() > MAX_UNSENT || sender.queued_fds() > 0 {
                self.client.flush()?;
                if self.client.holds_too_much() {
                    self.stalled = true;
                    break;
                }
            }
            if served == BATCH || bytes > BATCH_BYTES {
                self.more = true;
                break;
            }
            let Channel { socket, receiver, sender, .. } = &mut self.client;
            // What the socket was empty of just now, it tells of when it comes.
            let received = match served {
                0 => receiver.receive(&*socket),
                _ => receiver.receive_more(&*socket),
            };
            let outcome = match received {
                Ok(Received::Message(message)) => {
                    bytes += message.body.len();
                    self.desk.handle(message, sender, function)
                }
                Ok(Received::Refused(header, error)) => {
                    self.desk.refuse(&header, error.into(), sender)
                }
                Ok(Received::Pending) => break,
                Ok(Received::Closed) => return Err(farewell(&mut self.client, SessionEnd::Left)),
                Err(error) => return Err(farewell(&mut self.client, error.into())),
            };
            self.desk.show(function);
            progress = Progress::Served;
            if let Err(end) = outcome {
                // The last reply says why; it is lost if the client does not read.
                let _ = self.client.flush();
                return Err(end);
            }
        }
        // Nothing can have come of nothing, and a loop that polls looks often.
        if progress == Progress::Served || self.client.sender.queued_bytes() > 0 {
            self.send_commands(function);
            self.flush()?;
        }
        Ok(progress)
    }

    /// Looks for requests so often, and answers those that come. Only while nothing waits to be sent.
    fn look(&mut self, times: u32, function: &mut dyn Served) -> Result<Progress, SessionEnd> {
        let mut progress = Progress::Nothing;
        for _ in 0..times {
            if self.client.sender.queued_bytes() > 0 || self.more {
                break;
            }
            match self.serve(function)? {
                Progress::Served => progress = Progress::Served,
                Progress::Nothing => std::hint::spin_loop(),
            }
        }
        Ok(progress)
    }

    /// Reads what came over the twin socket: answers to our own commands, nothing else.
    fn serve_twin(&mut self, function: &mut dyn Served) -> Result<(), SessionEnd> {
        self.more_from_twin = true;
        for _ in 0..BATCH {
            let Some(twin) = self.twin.as_mut().filter(|_| !self.twin_closed) else {
                self.more_from_twin = false;
                break;
            };
            let Channel { socket, receiver, sender, .. } = &mut *twin;
            let outcome = match receiver.receive(&*socket) {
                Ok(Received::Message(message)) => self.desk.handle_twin(message, sender, function),
                Ok(Received::Refused(header, error)) => {
                    self.desk.refuse(&header, error.into(), sender)
                }
                Ok(Received::Pending) => {
                    self.more_from_twin = false;
                    break;
                }
                Err(error @ TransportError::Framing { .. }) => {
                    return Err(farewell(twin, error.into()));
                }
                Ok(Received::Closed) | Err(_) => {
                    self.twin_closed = true;
                    self.more_from_twin = false;
                    break;
                }
            };
            if let Err(end) = outcome {
                let _ = twin.flush();
                return Err(end);
            }
        }
        self.send_commands(function);
        self.flush()?;
        Ok(())
    }

    /// Sends what the function has to say by itself: after a wake, for instance.
    fn speak(&mut self, function: &mut dyn Served) -> Result<(), SessionEnd> {
        self.send_commands(function);
        self.flush()?;
        Ok(())
    }

    /// Hands over what the sockets take of what still waits.
    pub(super) fn flush(&mut self) -> Result<(), TransportError> {
        self.client.flush()?;
        if let Some(twin) = &mut self.twin {
            self.twin_closed |= twin.flush().is_err();
        }
        Ok(())
    }

    /// Shows a client that has a page of the function what has become of it.
    pub(super) fn show(&mut self, function: &dyn Served) {
        self.desk.show(function);
    }

    fn send_commands(&mut self, function: &mut dyn Served) {
        self.desk.show(function);
        let State::Ready(peer) = self.desk.state else { return };
        // Negotiated in this turn, and meant for the first command already.
        if let Some(socket) = self.desk.new_twin.take() {
            self.twin = Some(Channel::new(socket));
        }
        if self.twin_closed {
            return self.desk.commands.refuse(function);
        }
        let channel = self.twin.as_mut().unwrap_or(&mut self.client);
        self.desk.commands.send(function, peer, &mut channel.sender);
    }
}

/// Hands over the last answers: a client that says nothing more may still read. One whose stream can't
/// be followed any more is told.
fn farewell(channel: &mut Channel, end: SessionEnd) -> SessionEnd {
    if let Some((id, command)) = end.message() {
        channel.sender.error(id, command, Errno::INVAL);
    }
    let _ = channel.flush();
    end
}

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use barkeep_protocol::transport::{self, Frame, Sender, TransportError};
use barkeep_protocol::wire::limits::HEADER_SIZE;
use barkeep_protocol::wire::{Errno, MessageKind};
use rustix::net::sockopt::set_socket_oobinline;
use rustix::net::{Shutdown, shutdown};

use super::quarantine;
use super::recorder::{Arrived, Attempt, Message, Recorder};
use super::saved_session::{SavedSession, Twin};
use crate::server::commands::Commands;
use crate::server::decode_page::ClientPage;
use crate::server::desk::{Desk, Handled, State};
use crate::server::event_loop::{Epoll, Interest, Source, Token};
use crate::server::served::Served;
use crate::server::session::{Progress, SessionEnd};
use crate::state::{Activity, Heirs, StreamId};

/// Requests served before other functions of the process get their turn.
const BATCH: usize = 64;

/// One client's connection, of which everything is recorded.
#[derive(Debug)]
pub(super) struct Session {
    client: Line,
    /// Where our own commands go, if the client wanted them apart.
    twin: Option<Line>,
    saved_twin: Twin,
    desk: Desk,
    /// Where answers are made. Nothing stays in it.
    sender: Sender,
    /// A predecessor may have left messages that no event tells of.
    inherited: bool,
}

/// One of its sockets.
#[derive(Debug)]
struct Line {
    id: StreamId,
    socket: OwnedFd,
    /// What the event loop watches it for, once it has it.
    watched: Option<Interest>,
}

impl Session {
    /// One of a client that has said nothing yet.
    pub(super) fn new(socket: OwnedFd, handshake_deadline: Instant) -> Self {
        let state = State::Greeting(handshake_deadline);
        let desk = Desk::new(state, Commands::default(), Heirs::Holder);
        Self::with(socket, None, Twin::None, desk)
    }

    /// One that a predecessor began.
    pub(super) fn inherited(
        socket: OwnedFd,
        twin: Option<OwnedFd>,
        saved: SavedSession,
        handshake_deadline: Instant,
    ) -> Self {
        let saved_twin = saved.twin();
        Self::with(socket, twin, saved_twin, saved.desk(handshake_deadline))
    }

    fn with(socket: OwnedFd, twin: Option<OwnedFd>, saved_twin: Twin, desk: Desk) -> Self {
        Self {
            client: Line::new(StreamId::Client, socket),
            twin: twin.map(|socket| Line::new(StreamId::Twin, socket)),
            saved_twin,
            desk,
            sender: Sender::default(),
            inherited: true,
        }
    }

    /// See the unrecorded session.
    pub(super) fn handshake_deadline(&self) -> Option<Instant> {
        match self.desk.state {
            State::Greeting(deadline) => Some(deadline),
            State::Ready(_) => None,
        }
    }

    pub(super) fn has_more(&self) -> bool {
        self.inherited
    }

    /// What a successor has to know.
    pub(super) fn saved(&self) -> SavedSession {
        SavedSession::new(&self.desk, self.saved_twin)
    }

    /// Goes on with the page that the client has of a predecessor.
    pub(super) fn set_page(&mut self, page: ClientPage) {
        self.desk.page = page;
    }

    /// Makes everything true at once, and then shows it to a client that has a page: before it hears of
    /// it, and not before it can't be undone.
    ///
    /// # Errors
    /// See [`Recorder::commit`].
    pub(super) fn commit(
        &mut self,
        recorder: &mut Recorder,
        function: &mut dyn Served,
        taken: Option<StreamId>,
        send: Option<(StreamId, Vec<u8>, Vec<OwnedFd>)>,
    ) -> Result<(), Errno> {
        recorder.commit(function, Some(self.saved()), taken, send)?;
        self.show(function);
        Ok(())
    }

    /// Shows a client that has a page of the function what has become of it.
    pub(super) fn show(&mut self, function: &dyn Served) {
        self.desk.show(function);
    }

    /// A successor goes on, which may be of a version that has no pages.
    pub(super) fn suspend_page(&mut self) {
        self.desk.page.suspend();
    }

    /// Tells the event loop what is waited for, if it does not know that.
    pub(super) fn watch(
        &mut self,
        epoll: &Epoll,
        port: usize,
        recorder: &mut Recorder,
    ) -> io::Result<()> {
        self.client.watch(epoll, Token::Port(port, Source::Client), recorder)?;
        if self.saved_twin == Twin::Closed
            && let Some(mut twin) = self.twin.take()
        {
            return twin.forget(epoll);
        }
        let token = Token::Port(port, Source::Twin);
        self.twin.as_mut().map_or(Ok(()), |twin| twin.watch(epoll, token, recorder))
    }

    /// Takes its sockets from the event loop.
    pub(super) fn remove(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.client.forget(epoll)?;
        self.twin.as_mut().map_or(Ok(()), |twin| twin.forget(epoll))
    }

    /// Does what an event asks of the session, after the function has heard of it.
    pub(super) fn turn(
        &mut self,
        source: Source,
        recorder: &mut Recorder,
        function: &mut dyn Served,
    ) -> Result<Progress, SessionEnd> {
        if std::mem::take(&mut self.inherited) {
            self.serve_twin(recorder, function)?;
            return self.serve(recorder, function);
        }
        match source {
            Source::Client | Source::Look => self.serve(recorder, function),
            Source::Twin => self.serve_twin(recorder, function).map(|()| Progress::Nothing),
            _ => self.speak(recorder, function).map(|()| Progress::Nothing),
        }
    }

    /// Hands over what the sockets take of what still waits.
    pub(super) fn flush(&mut self, recorder: &mut Recorder) -> Result<(), TransportError> {
        recorder.flush(StreamId::Client, self.client.socket.as_fd())?;
        let twin = self.twin.as_ref().filter(|_| self.saved_twin != Twin::Closed);
        if let Some(twin) = twin
            && recorder.flush(StreamId::Twin, twin.socket.as_fd()).is_err()
        {
            self.close_twin(recorder);
        }
        Ok(())
    }

    /// The client can neither say nor hear anything any more, whoever else has its socket.
    pub(super) fn hang_up(self) {
        let _ = shutdown(&self.client.socket, Shutdown::Both);
        if let Some(twin) = &self.twin {
            let _ = shutdown(&twin.socket, Shutdown::Both);
        }
    }

    /// Answers requests one after the other, each when the answer to the one before is with the kernel.
    fn serve(
        &mut self,
        recorder: &mut Recorder,
        function: &mut dyn Served,
    ) -> Result<Progress, SessionEnd> {
        let mut progress = Progress::Nothing;
        for _ in 0..BATCH {
            recorder.flush(StreamId::Client, self.client.socket.as_fd())?;
            if !recorder.has_room(StreamId::Client) {
                break;
            }
            let more = match recorder.receive(StreamId::Client, self.client.socket.as_fd()) {
                Ok(Arrived::Message { more }) => more,
                Ok(Arrived::Nothing) => break,
                Ok(Arrived::Closed) => return Err(SessionEnd::Left),
                Err(end) => return Err(self.farewell(end, recorder, function)),
            };
            self.handle(StreamId::Client, recorder, function)?;
            progress = Progress::Served;
            if !more {
                break;
            }
        }
        self.speak(recorder, function)?;
        Ok(progress)
    }

    /// Takes answers to our own commands.
    fn serve_twin(
        &mut self,
        recorder: &mut Recorder,
        function: &mut dyn Served,
    ) -> Result<(), SessionEnd> {
        for _ in 0..BATCH {
            let Some(twin) = self.twin.as_ref().filter(|_| self.saved_twin != Twin::Closed) else {
                break;
            };
            if recorder.flush(StreamId::Twin, twin.socket.as_fd()).is_err() {
                self.close_twin(recorder);
                break;
            }
            if !recorder.has_room(StreamId::Twin) {
                break;
            }
            match recorder.receive(StreamId::Twin, twin.socket.as_fd()) {
                Ok(Arrived::Message { .. }) => self.handle(StreamId::Twin, recorder, function)?,
                Ok(Arrived::Nothing) => break,
                Err(
                    end @ (SessionEnd::TooLong { .. }
                    | SessionEnd::Transport(TransportError::Framing { .. })),
                ) => {
                    return Err(self.farewell_on_twin(end));
                }
                Ok(Arrived::Closed) | Err(_) => {
                    self.close_twin(recorder);
                    break;
                }
            }
        }
        self.speak(recorder, function)
    }

    fn close_twin(&mut self, recorder: &mut Recorder) {
        if let Some(key) = self.saved().twin_key() {
            recorder.drop_key(key);
        }
        self.saved_twin = Twin::Closed;
    }

    /// Does what the message in an inbox asks for: a transaction.
    fn handle(
        &mut self,
        id: StreamId,
        recorder: &mut Recorder,
        function: &mut dyn Served,
    ) -> Result<(), SessionEnd> {
        let attempt = recorder.begin(Activity::Message(id));
        let mut message = recorder.message(id)?;
        let fds = std::mem::replace(&mut message.fds, Ok(Vec::new()));
        let Message { header, bytes, .. } = &message;
        let header = *header;
        let body = &bytes[HEADER_SIZE..];
        let outcome = match (attempt, fds) {
            (Attempt::GiveUp, _) => {
                quarantine::answer(&header, body, &mut self.sender);
                match self.desk.state {
                    State::Greeting(_) => Err(SessionEnd::Deadly),
                    State::Ready(_) => Ok(Handled::Refused),
                }
            }
            (_, Err(error)) => self.desk.refuse(&header, error, &mut self.sender),
            (_, Ok(fds)) => {
                let message = transport::Message { header, body, fds };
                match id {
                    StreamId::Client => self.desk.handle(message, &mut self.sender, function),
                    StreamId::Twin => self.desk.handle_twin(message, &mut self.sender, function),
                }
            }
        };
        if matches!(outcome, Ok(Handled::Done))
            && matches!(header.kind, MessageKind::Command { .. })
        {
            recorder.note(&message);
        }
        recorder.release(&message.keys);
        let (mut bytes, mut fds) = self.sender.take();
        if let Err(errno) = self.adopt_twin(recorder) {
            // Without the one end the other is of no use.
            return Err(TransportError::Socket(errno).into());
        }
        if let Err(errno) = self.hold_page(recorder) {
            drop((bytes, fds));
            self.sender.queue(Frame::error(header.id, header.command, errno));
            (bytes, fds) = self.sender.take();
        }
        loop {
            let send = Some((id, bytes, fds));
            let Err(errno) = self.commit(recorder, function, Some(id), send) else {
                break;
            };
            // There is no room to hold what the answer brings.
            self.sender.queue(Frame::error(header.id, header.command, errno));
            (bytes, fds) = self.sender.take();
        }
        if outcome.is_err() {
            // The last reply says why; it is lost if the client does not read.
            let _ = self.flush(recorder);
        }
        outcome.map(drop)
    }

    /// The twin socket that was just negotiated is ours from here on, and held.
    fn adopt_twin(&mut self, recorder: &mut Recorder) -> Result<(), Errno> {
        if let Some(socket) = self.desk.new_twin.take() {
            let key = recorder.keep(socket.as_fd())?;
            self.twin = Some(Line::new(StreamId::Twin, socket));
            self.saved_twin = Twin::Open(key.0);
        }
        Ok(())
    }

    /// A page that the client is about to have must be there for a successor.
    fn hold_page(&mut self, recorder: &mut Recorder) -> Result<(), Errno> {
        let Some(page) = self.desk.page.file() else { return Ok(()) };
        let held = recorder.hold_page(page);
        if held.is_err() {
            self.desk.page.discard();
        }
        held
    }

    /// Sends what the function has to ask the client, one after the other as well.
    fn speak(
        &mut self,
        recorder: &mut Recorder,
        function: &mut dyn Served,
    ) -> Result<(), SessionEnd> {
        self.flush(recorder)?;
        let State::Ready(peer) = self.desk.state else { return Ok(()) };
        loop {
            let (id, closed) = match self.saved_twin {
                Twin::None => (StreamId::Client, false),
                Twin::Open(_) => (StreamId::Twin, false),
                Twin::Closed => (StreamId::Client, true),
            };
            let commands = &self.desk.commands;
            let due = if closed {
                function.has_message() || commands.are_waiting()
            } else {
                function.has_message() && commands.have_room() && recorder.is_sent(id)
            };
            if !due {
                return Ok(());
            }
            let attempt = recorder.begin(Activity::Work);
            let spoke = match attempt {
                Attempt::GiveUp => function.device_reset().is_err(),
                Attempt::Do if closed => {
                    self.desk.commands.refuse(function);
                    false
                }
                Attempt::Do => self.desk.commands.send_one(function, peer, &mut self.sender),
            };
            let (bytes, fds) = self.sender.take();
            let send = Some((id, bytes, fds));
            self.commit(recorder, function, None, send).map_err(TransportError::Socket)?;
            self.flush(recorder)?;
            if !spoke {
                return Ok(());
            }
        }
    }

    /// Tells a client whose stream can't be followed any more.
    fn farewell(
        &mut self,
        end: SessionEnd,
        recorder: &mut Recorder,
        function: &mut dyn Served,
    ) -> SessionEnd {
        if let Some((id, command)) = end.message() {
            self.sender.error(id, command, Errno::INVAL);
            let (bytes, fds) = self.sender.take();
            let send = Some((StreamId::Client, bytes, fds));
            let _ = self.commit(recorder, function, None, send);
            let _ = self.flush(recorder);
        }
        end
    }

    /// The same over the twin socket, where commands of ours may still wait.
    fn farewell_on_twin(&mut self, end: SessionEnd) -> SessionEnd {
        if let (Some((id, command)), Some(twin)) = (end.message(), &self.twin) {
            self.sender.error(id, command, Errno::INVAL);
            let _ = self.sender.flush(&twin.socket);
            drop(self.sender.take());
        }
        end
    }
}

impl Line {
    fn new(id: StreamId, socket: OwnedFd) -> Self {
        // An urgent byte (MSG_OOB) would stop every look at what comes, and make the socket readable all
        // the while. It is one like the others. No unix socket refuses that.
        let _ = set_socket_oobinline(&socket, true);
        Self { id, socket, watched: None }
    }

    fn watch(&mut self, epoll: &Epoll, token: Token, recorder: &mut Recorder) -> io::Result<()> {
        let interest = match (recorder.is_sent(self.id), recorder.has_room(self.id)) {
            (true, _) => Interest::Read,
            (false, true) => Interest::ReadWrite,
            (false, false) => Interest::Write,
        };
        match self.watched.replace(interest) {
            None => epoll.add(self.socket.as_fd(), token, interest),
            Some(before) if before == interest => Ok(()),
            Some(_) => epoll.modify(self.socket.as_fd(), token, interest),
        }
    }

    fn forget(&mut self, epoll: &Epoll) -> io::Result<()> {
        self.watched.take().map_or(Ok(()), |_| epoll.remove(self.socket.as_fd()))
    }
}

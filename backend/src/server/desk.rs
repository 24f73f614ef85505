//! Who answers what: a session without its sockets.

use std::os::fd::OwnedFd;
use std::time::Instant;

use barkeep_protocol::page::decode::LENGTH;
use barkeep_protocol::transport::{Message, Sender};
use barkeep_protocol::wire::{
    DecodePageInfo, Errno, Header, MessageKind, Offer, Request, Version, WireError,
};
use rustix::io::ioctl_fionbio;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tracing::debug;

use super::commands::Commands;
use super::decode_page::ClientPage;
use super::peer::Peer;
use super::request_error::RequestError;
use super::requests::serve_request;
use super::served::{Reply, Served};
use super::session::SessionEnd;
use crate::log_limit::RateLimit;
use crate::state::Heirs;

/// A session without its sockets.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) state: State,
    pub(super) commands: Commands,
    /// The end of the twin socket that is ours, until the session has it.
    pub(super) new_twin: Option<OwnedFd>,
    /// On which the client sees what the function decodes.
    pub(super) page: ClientPage,
    /// What a request without reply would have been answered.
    unsent: (Vec<u8>, Vec<OwnedFd>),
    log: RateLimit,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum State {
    /// VERSION is due by then.
    Greeting(Instant),
    Ready(Peer),
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handled {
    Done,
    /// It was answered with an error, or would have been.
    Refused,
}

impl Desk {
    pub(super) fn new(state: State, commands: Commands, heirs: Heirs) -> Self {
        Self {
            state,
            commands,
            new_twin: None,
            page: ClientPage::new(heirs),
            unsent: Default::default(),
            log: RateLimit::default(),
        }
    }

    pub(super) fn handle(
        &mut self,
        message: Message<'_>,
        sender: &mut Sender,
        function: &mut dyn Served,
    ) -> Result<Handled, SessionEnd> {
        let Message { header, body, fds } = message;
        let MessageKind::Command { no_reply } = header.kind else {
            return self.answered(&header, body, fds, sender, function);
        };
        let result = match Request::parse(header.command, body) {
            Ok(request) if fds.len() > request.max_fds() => Err(WireError::TooManyFds.into()),
            Ok(request) if no_reply => {
                let (body, fds_out) = &mut self.unsent;
                // The other end would go with the reply that is not sent.
                let mut no_twin = None;
                let result = Self::dispatch(
                    &mut self.state,
                    &mut no_twin,
                    &mut self.page,
                    request,
                    fds,
                    function,
                    &mut Reply::new(body, fds_out),
                );
                body.clear();
                fds_out.clear();
                result
            }
            Ok(request) => sender.try_reply(&header, |body, fds_out| {
                Self::dispatch(
                    &mut self.state,
                    &mut self.new_twin,
                    &mut self.page,
                    request,
                    fds,
                    function,
                    &mut Reply::new(body, fds_out),
                )
            }),
            Err(error) => Err(error.into()),
        };
        match result {
            Ok(()) => Ok(Handled::Done),
            Err(error) => self.refuse(&header, error, sender),
        }
    }

    fn dispatch(
        state: &mut State,
        new_twin: &mut Option<OwnedFd>,
        page: &mut ClientPage,
        request: Request<'_>,
        fds: Vec<OwnedFd>,
        function: &mut dyn Served,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        match (*state, request) {
            (State::Greeting(_), Request::Version(version)) => {
                let (answer, peer) = negotiate(&version, new_twin, reply)?;
                reply.bytes(&answer.to_bytes());
                *state = State::Ready(peer);
                Ok(())
            }
            (State::Greeting(_), _) | (State::Ready(_), Request::Version(_)) => {
                Err(RequestError::OutOfOrder)
            }
            (State::Ready(peer), Request::DecodePage(_)) => {
                if !peer.extensions.decode_page {
                    return Err(RequestError::NotNegotiated);
                }
                reply.fd(page.open(function).map_err(|error| RequestError::page(&error))?);
                reply.bytes(&DecodePageInfo { length: LENGTH as u64 }.to_bytes());
                Ok(())
            }
            (State::Ready(peer), request) => serve_request(function, peer, request, fds, reply),
        }
    }

    /// Brings the page up to date, if there is one. To be called before the client hears of anything that
    /// may have changed.
    pub(super) fn show(&mut self, function: &dyn Served) {
        self.page.show(function);
    }

    /// Answers with an error. A message that no client of ours would send ends the session after it:
    /// a refused handshake has nothing to go on with, and an error reply to a reply could be answered
    /// in turn for ever.
    pub(super) fn refuse(
        &mut self,
        header: &Header,
        error: RequestError,
        sender: &mut Sender,
    ) -> Result<Handled, SessionEnd> {
        let MessageKind::Command { no_reply } = header.kind else {
            sender.error(header.id, header.command, Errno::INVAL);
            return Err(SessionEnd::UnsolicitedReply);
        };
        if let Some(suppressed) = self.log.admit() {
            debug!(command = header.command, suppressed, "request refused: {error}");
        }
        if !no_reply {
            sender.error(header.id, header.command, error.errno());
        }
        match self.state {
            State::Greeting(_) => Err(SessionEnd::Refused(error)),
            State::Ready(_) => Ok(Handled::Refused),
        }
    }

    fn answered(
        &mut self,
        header: &Header,
        body: &[u8],
        fds: Vec<OwnedFd>,
        sender: &mut Sender,
        function: &mut dyn Served,
    ) -> Result<Handled, SessionEnd> {
        if fds.is_empty() && self.commands.answered(header, body, function) {
            return Ok(Handled::Done);
        }
        sender.error(header.id, header.command, Errno::INVAL);
        Err(SessionEnd::UnsolicitedReply)
    }

    /// The twin socket is for our commands alone.
    pub(super) fn handle_twin(
        &mut self,
        message: Message<'_>,
        sender: &mut Sender,
        function: &mut dyn Served,
    ) -> Result<Handled, SessionEnd> {
        let Message { header, body, fds } = message;
        match header.kind {
            MessageKind::Command { .. } => self.refuse(&header, RequestError::OutOfOrder, sender),
            MessageKind::Reply { .. } => self.answered(&header, body, fds, sender, function),
        }
    }
}

/// Agrees with a client on what is spoken. The other end of a twin socket goes with the answer.
fn negotiate(
    theirs: &Version,
    new_twin: &mut Option<OwnedFd>,
    reply: &mut Reply<'_>,
) -> Result<(Version, Peer), RequestError> {
    let mut offer = Offer::WRITE_MULTIPLE | Offer::MIGRATION;
    let twin = theirs.capabilities.offer().contains(Offer::TWIN_SOCKET);
    if twin && theirs.capabilities.message_fds() > 0 {
        let flags = SocketFlags::CLOEXEC;
        let (ours, client) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(RequestError::Descriptor)?;
        // Ours alone: how the client waits is its own business.
        ioctl_fionbio(&ours, true).map_err(RequestError::Descriptor)?;
        *new_twin = Some(ours);
        reply.fd(client);
        offer |= Offer::TWIN_SOCKET;
    }
    let answer = theirs.answer_with(offer)?;
    let peer = Peer::new(theirs, &answer);
    Ok((answer, peer))
}

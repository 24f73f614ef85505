use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    recvmsg, sendmsg, socket_with,
};
use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;

use super::channel::{Broken, Channel};

/// The connection to a daemon: one message at a time, and never longer than the daemon's patience.
///
/// The frontend of the crate `vhost` would do, but it tries again for as long as a socket says that
/// nothing is there, so no time-out ends a call to a daemon that is silent
/// (docs/decisions/0017-vhost-user-bridge.md).
#[derive(Debug)]
pub(super) struct Exchange {
    socket: OwnedFd,
    /// What the daemon asks of us, if it may.
    channel: Option<Channel>,
    /// How long a group of messages may take.
    patience: Duration,
    deadline: Instant,
    /// Whether the daemon answers every message when it is asked to.
    acknowledges: bool,
    /// Whether it was told something that it may not have acted on.
    unsettled: bool,
}

/// Why a daemon counts as gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum DaemonError {
    /// It can't be reached, or the connection broke.
    #[error("{0}")]
    Socket(Errno),
    /// It closed the connection.
    #[error("the daemon closed the connection")]
    Closed,
    /// It did not answer in time.
    #[error("the daemon does not answer")]
    Silent,
    /// It says that it can't do something.
    #[error("the daemon refuses {0:?}")]
    Refused(FrontendReq),
    /// It answers something that the protocol does not allow.
    #[error("the daemon's answer to {0:?} is malformed")]
    Malformed(FrontendReq),
    /// It speaks without being asked.
    #[error("the daemon sends answers to nothing")]
    Unsolicited,
    /// It does not have what it takes to serve the function.
    #[error("the daemon {0}")]
    Unfit(&'static str),
}

impl From<Errno> for DaemonError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Socket(errno),
        }
    }
}

/// Whether something came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    Nothing,
    Something,
}

/// "Message Specification", "Header": request, flags, size.
pub(super) const HEADER: usize = 12;
pub(super) const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
pub(super) const REPLY: u32 = 1 << 2;
pub(super) const NEED_REPLY: u32 = 1 << 3;
/// Room for descriptors of a reply; there is never more than one, and the rest is closed.
const REPLY_FDS: usize = 4;
/// Descriptors of a request: one for each region of a memory table.
const REQUEST_FDS: usize = 8;

impl Exchange {
    /// Connects without waiting.
    ///
    /// # Errors
    /// [`DaemonError::Socket`].
    pub(super) fn connect(path: &Path, patience: Duration) -> Result<Self, DaemonError> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        let deadline = Instant::now() + patience;
        Ok(Self {
            socket,
            channel: None,
            patience,
            deadline,
            acknowledges: false,
            unsettled: false,
        })
    }

    /// What tells of answers and of the end.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What the daemon asks with, if it may.
    pub(super) fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.channel.as_ref().map(AsFd::as_fd)
    }

    /// Serves what the daemon asks. Returns whether there may be more. A daemon that misuses the
    /// channel loses it.
    pub(super) fn serve_channel(&mut self) -> bool {
        let served = self.channel.as_mut().map(Channel::serve);
        if let Some(Err(Broken)) = served {
            self.channel = None;
        }
        served.and_then(Result::ok).unwrap_or(false)
    }

    /// Whether the daemon said since the last call that its configuration changed.
    pub(super) fn take_config_changed(&mut self) -> bool {
        self.channel.as_mut().is_some_and(Channel::take_config_changed)
    }

    pub(super) fn set_channel(&mut self, channel: Channel) {
        self.channel = Some(channel);
    }

    /// From now on the daemon is asked to acknowledge what it does not answer anyway.
    pub(super) fn set_acknowledges(&mut self) {
        self.acknowledges = true;
    }

    /// A group of messages begins, which altogether take no longer than the patience.
    pub(super) fn begin(&mut self) {
        self.deadline = Instant::now() + self.patience;
    }

    /// Has a message done: when this returns, the daemon has acted on it if it
    /// [acknowledges](Self::set_acknowledges), or else will before it acts on the next one.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn tell(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), DaemonError> {
        self.start_telling(request, body, fds)?;
        self.end_telling(request)
    }

    /// The first half of [`tell`](Self::tell): answers to what was asked before come before its own.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn start_telling(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), DaemonError> {
        self.unsettled |= !self.acknowledges;
        let flags = if self.acknowledges { VERSION | NEED_REPLY } else { VERSION };
        self.send(request, flags, body, fds)
    }

    /// The second half.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn end_telling(&mut self, request: FrontendReq) -> Result<(), DaemonError> {
        if self.acknowledges && self.receive_u64(request)? != 0 {
            return Err(DaemonError::Refused(request));
        }
        Ok(())
    }

    /// Waits for something that the daemon does by itself.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn wait_until(&mut self, mut done: impl FnMut() -> bool) -> Result<(), DaemonError> {
        const LOOK_AGAIN: Duration = Duration::from_millis(1);
        while !done() {
            match self.wait_for(PollFlags::empty(), Some(LOOK_AGAIN))? {
                // Nothing was asked for, so it is the end.
                Arrived::Something => return Err(DaemonError::Closed),
                Arrived::Nothing => {}
            }
        }
        Ok(())
    }

    /// Returns when the daemon has acted on everything that it was told.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn settle(&mut self) -> Result<(), DaemonError> {
        if std::mem::take(&mut self.unsettled) {
            self.ask_u64(FrontendReq::GET_FEATURES)?;
        }
        Ok(())
    }

    /// Asks for a number.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn ask_u64(&mut self, request: FrontendReq) -> Result<u64, DaemonError> {
        self.send(request, VERSION, &[], &[])?;
        self.receive_u64(request)
    }

    /// Sends a message, whose answer is for later.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn send_request(
        &mut self,
        request: FrontendReq,
        body: &[u8],
    ) -> Result<(), DaemonError> {
        self.send(request, VERSION, body, &[])
    }

    /// The answer to a message, a number.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn receive_u64(&mut self, request: FrontendReq) -> Result<u64, DaemonError> {
        let mut body = [0; 8];
        self.receive(request, &mut body)?;
        Ok(u64::from_ne_bytes(body))
    }

    /// The answer to a message: `body` is filled, without descriptors.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn receive(
        &mut self,
        request: FrontendReq,
        body: &mut [u8],
    ) -> Result<(), DaemonError> {
        match self.receive_some(request, body)? {
            (length, fds) if length == body.len() && fds.is_empty() => Ok(()),
            _ => Err(DaemonError::Malformed(request)),
        }
    }

    /// The answer to a message, with one descriptor.
    ///
    /// # Errors
    /// [`DaemonError`].
    pub(super) fn receive_fd(
        &mut self,
        request: FrontendReq,
        body: &mut [u8],
    ) -> Result<OwnedFd, DaemonError> {
        match self.receive_some(request, body)? {
            (length, mut fds) if length == body.len() && fds.len() == 1 => {
                fds.pop().ok_or(DaemonError::Malformed(request))
            }
            _ => Err(DaemonError::Malformed(request)),
        }
    }

    /// The answer to a message: the start of `body` is filled with what there is of it.
    ///
    /// # Errors
    /// [`DaemonError`]; also when it is longer than `body`.
    pub(super) fn receive_some(
        &mut self,
        request: FrontendReq,
        body: &mut [u8],
    ) -> Result<(usize, Vec<OwnedFd>), DaemonError> {
        let malformed = DaemonError::Malformed(request);
        let mut fds = Vec::new();
        let mut header = [0; HEADER];
        self.read_exact(&mut header, &mut fds)?;
        let word = |at: usize| {
            let bytes = header[at..at + 4].try_into().expect("four bytes");
            u32::from_ne_bytes(bytes)
        };
        let (code, flags, size) = (word(0), word(4), word(8));
        if code != u32::from(request) || flags & (VERSION_MASK | REPLY) != VERSION | REPLY {
            return Err(malformed);
        }
        let length = usize::try_from(size).map_err(|_| malformed)?;
        let body = body.get_mut(..length).ok_or(malformed)?;
        self.read_exact(body, &mut fds)?;
        Ok((length, fds))
    }

    /// Looks whether something came while nothing was asked.
    ///
    /// # Errors
    /// [`DaemonError`]: the connection broke.
    pub(super) fn peek(&self) -> Result<Arrived, DaemonError> {
        let mut byte = [0];
        match recv(&self.socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(DaemonError::Closed),
            Ok(_) => Ok(Arrived::Something),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Arrived::Nothing),
            Err(errno) => Err(errno.into()),
        }
    }

    fn send(
        &mut self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), DaemonError> {
        let size = u32::try_from(body.len()).map_err(|_| DaemonError::Malformed(request))?;
        let header: Vec<u8> =
            [request.into(), flags, size].into_iter().flat_map(u32::to_ne_bytes).collect();
        let message = [&header, body].concat();
        let mut sent = 0;
        while sent < message.len() {
            // Descriptors go with the first byte ("Communication").
            let fds = if sent == 0 { fds } else { &[] };
            match send_some(self.socket.as_fd(), &message[sent..], fds) {
                Ok(count) => sent += count,
                Err(Errno::AGAIN) => drop(self.wait_for(PollFlags::OUT, None)?),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn read_exact(&mut self, data: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), DaemonError> {
        let mut filled = 0;
        while filled < data.len() {
            match receive_some(self.socket.as_fd(), &mut data[filled..], fds) {
                Ok(0) => return Err(DaemonError::Closed),
                Ok(count) => filled += count,
                Err(Errno::AGAIN) => drop(self.wait_for(PollFlags::IN, None)?),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Waits for the socket, or no longer than a while, and serves the daemon meanwhile: it may want
    /// an answer of ours before it gives its own.
    fn wait_for(
        &mut self,
        want: PollFlags,
        at_most: Option<Duration>,
    ) -> Result<Arrived, DaemonError> {
        loop {
            let rest = self.deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(DaemonError::Silent);
            }
            let timeout = Timespec::try_from(at_most.unwrap_or(rest).min(rest)).ok();
            let mut fds = vec![PollFd::new(&self.socket, want)];
            fds.extend(self.channel.as_ref().map(|channel| PollFd::new(channel, PollFlags::IN)));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (socket, channel) = (ready(0), ready(1));
            if channel {
                self.serve_channel();
            }
            if socket {
                return Ok(Arrived::Something);
            }
            if at_most.is_some() {
                return Ok(Arrived::Nothing);
            }
        }
    }
}

fn send_some(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REQUEST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(data)], &mut control, flags)
}

fn receive_some(
    socket: BorrowedFd<'_>,
    data: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REPLY_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [std::io::IoSliceMut::new(data)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            // A peer that sends more than it may has sent a malformed answer already.
            fds.extend(rights.take(REPLY_FDS.saturating_sub(fds.len())));
        }
    }
    Ok(received.bytes)
}

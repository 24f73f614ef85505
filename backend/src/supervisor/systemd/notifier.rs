//! Messages to the service manager (`sd_notify(3)`).

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use tracing::warn;

/// A connection to the service manager that never waits for it.
///
/// What its queue has no room for waits here, in order. That is never much: a message is dropped when
/// a later one repeats or undoes it.
#[derive(Debug)]
pub(super) struct Notifier {
    address: SocketAddrUnix,
    socket: OwnedFd,
    waiting: VecDeque<Message>,
}

/// What is said; `D` is a descriptor.
#[derive(Debug)]
pub(super) enum Message<D = OwnedFd> {
    /// Assignments, each on a line. One replaces another that begins with the same variable.
    Say(String),
    /// A descriptor to hold under a name.
    Store { name: String, fd: D },
    /// All that is held under a name is to be forgotten.
    Remove { name: String },
}

impl Notifier {
    /// Connects to what `NOTIFY_SOCKET` says: a path, or a name in the abstract namespace after an `@`.
    pub(super) fn connect(place: &str) -> Result<Self, Errno> {
        let address = match place.strip_prefix('@') {
            Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
            None if place.starts_with('/') => SocketAddrUnix::new(place)?,
            // Sockets of other kinds (`vsock:`) take no descriptors.
            None => return Err(Errno::AFNOSUPPORT),
        };
        let socket = connected(&address)?;
        Ok(Self { address, socket, waiting: VecDeque::new() })
    }

    /// Readable never; writable when what waits can go on.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a message, now or as soon as there is room.
    pub(super) fn send(&mut self, message: Message<BorrowedFd<'_>>) {
        if let Message::Remove { name } = &message
            && let Some(last) = self.waiting.iter().rposition(|waits| waits.is_about(name))
        {
            // What it was never told to hold it need not be told to forget. What it was is forgotten
            // already, or was before.
            if matches!(self.waiting[last], Message::Store { .. }) {
                self.waiting.remove(last);
            }
            return;
        }
        self.waiting.retain(|waits| !message.supersedes(waits));
        if self.flush() && self.try_send(&message) {
            return;
        }
        match message.to_owned() {
            Ok(message) => self.waiting.push_back(message),
            Err(errno) => warn!("the service manager is not told {message}: {errno}"),
        }
    }

    /// How many messages wait.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sends what waits as far as there is room. Returns whether nothing waits any more.
    pub(super) fn flush(&mut self) -> bool {
        while let Some(message) = self.waiting.pop_front() {
            if !self.try_send(&message) {
                self.waiting.push_front(message);
                return false;
            }
        }
        true
    }

    /// Returns whether the message is done with; `false` if there is no room for it.
    fn try_send<D: AsFd>(&mut self, message: &Message<D>) -> bool {
        let mut sent = message.send_to(&self.socket);
        if matches!(sent, Err(Errno::CONNREFUSED | Errno::NOTCONN)) {
            // It has been started anew, and listens there again.
            sent = connected(&self.address).and_then(|socket| {
                self.socket = socket;
                message.send_to(&self.socket)
            });
        }
        match sent {
            // Too many messages, or too many descriptors, are on their way to it.
            Err(Errno::AGAIN | Errno::TOOMANYREFS | Errno::NOBUFS) => return false,
            Err(errno) => warn!("the service manager is not told {message}: {errno}"),
            Ok(()) => {}
        }
        true
    }
}

impl<D: AsFd> Message<D> {
    /// Whether an older message need not be sent when this one is.
    fn supersedes(&self, older: &Message) -> bool {
        let (Self::Say(new), Message::Say(old)) = (self, older) else { return false };
        let variable = |text: &str| text.split('=').next().map(str::to_owned);
        variable(new) == variable(old)
    }

    /// Whether it is about what is held under this name.
    fn is_about(&self, held: &str) -> bool {
        match self {
            Self::Say(_) => false,
            Self::Store { name, .. } | Self::Remove { name } => name == held,
        }
    }

    fn send_to(&self, socket: &OwnedFd) -> Result<(), Errno> {
        let mut text = String::new();
        let mut fds = None;
        match self {
            Self::Say(said) => text.push_str(said),
            // Held whatever happens to it: an eventfd has an error when its counter is full.
            Self::Store { name, fd } => {
                text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n");
                fds = Some([fd.as_fd()]);
            }
            Self::Remove { name } => text = format!("FDSTOREREMOVE=1\nFDNAME={name}\n"),
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if let Some(fds) = &fds {
            let fits = ancillary.push(SendAncillaryMessage::ScmRights(fds));
            debug_assert!(fits, "there is room for one descriptor");
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut ancillary, flags).map(|_| ())
    }
}

impl Message<BorrowedFd<'_>> {
    fn to_owned(&self) -> Result<Message, Errno> {
        Ok(match self {
            Self::Say(text) => Message::Say(text.clone()),
            Self::Store { name, fd } => {
                Message::Store { name: name.clone(), fd: fcntl_dupfd_cloexec(fd, 0)? }
            }
            Self::Remove { name } => Message::Remove { name: name.clone() },
        })
    }
}

impl<D> fmt::Display for Message<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Say(text) => f.write_str(text.lines().next().unwrap_or_default()),
            Self::Store { name, .. } => write!(f, "to hold {name}"),
            Self::Remove { name } => write!(f, "to forget {name}"),
        }
    }
}

fn connected(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    connect(&socket, address)?;
    Ok(socket)
}

use std::io::{ErrorKind, Result as IoResult};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::frame::Frame;
use super::link::Received;

/// A UNIX datagram socket: each datagram is one Ethernet frame.
#[derive(Debug)]
pub(super) struct Socket {
    socket: UnixDatagram,
    peer: Peer,
    /// Where it is bound; removed in the end.
    _place: Option<Place>,
}

/// Where frames go.
#[derive(Debug)]
enum Peer {
    /// The socket is connected.
    Connected,
    /// To this address, whoever has it.
    Fixed(SocketAddr),
    /// To the first that sent something, until it is gone.
    Learned(Option<SocketAddr>),
}

/// A name of ours in the file system.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Socket {
    /// Binds a socket to `path`. A socket that nobody has open any more is replaced.
    ///
    /// # Errors
    /// Why not, in one line.
    pub(super) fn bind(path: &Path) -> Result<Self, String> {
        let told = |reason: &dyn std::fmt::Display| format!("{}: {reason}", path.display());
        let socket = match UnixDatagram::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path).map_err(|reason| told(&reason))?;
                UnixDatagram::bind(path)
            }
            result => result,
        };
        let socket = socket.map_err(|error| told(&error))?;
        let identity = identity(path).map_err(|error| told(&error))?;
        let place = Place { path: path.to_owned(), identity };
        socket.set_nonblocking(true).map_err(|error| told(&error))?;
        Ok(Self { socket, peer: Peer::Learned(None), _place: Some(place) })
    }

    /// With a peer that stays the same, and need not be there yet.
    ///
    /// # Errors
    /// When no socket can have this path.
    pub(super) fn with_peer(mut self, path: &Path) -> Result<Self, String> {
        let address = SocketAddr::from_pathname(path)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        self.peer = Peer::Fixed(address);
        Ok(self)
    }

    /// Takes over a connected socket.
    ///
    /// # Errors
    /// Why not, in one line.
    pub(super) fn inherited(fd: OwnedFd) -> Result<Self, String> {
        let socket = UnixDatagram::from(fd);
        socket.set_nonblocking(true).map_err(|error| error.to_string())?;
        Ok(Self { socket, peer: Peer::Connected, _place: None })
    }

    /// What becomes readable when there are frames.
    pub(super) fn port(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes the next frame.
    pub(super) fn receive(&mut self, frame: &mut Frame) -> Received {
        let received = match &mut self.peer {
            Peer::Learned(peer @ None) => frame.fill_bare(|bytes| {
                let (len, sender) = self.socket.recv_from(bytes)?;
                *peer = Some(sender).filter(|sender| !sender.is_unnamed());
                IoResult::Ok(len)
            }),
            _ => frame.fill_bare(|bytes| self.socket.recv(bytes)),
        };
        match received {
            Ok(true) => Received::Frame,
            Ok(false) => Received::Unusable,
            // A peer that went away is told once; what others sent lies behind it.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Received::Unusable,
            Err(_) => Received::Nothing,
        }
    }

    /// Sends a frame. Without a peer, or when it does not keep up, the frame is lost.
    pub(super) fn transmit(&mut self, frame: &Frame) -> bool {
        let data = frame.data();
        match &mut self.peer {
            Peer::Connected => self.socket.send(data).is_ok(),
            Peer::Fixed(peer) => self.socket.send_to_addr(data, peer).is_ok(),
            Peer::Learned(None) => false,
            Peer::Learned(peer @ Some(_)) => {
                let sent = peer.as_ref().map_or(Ok(0), |to| self.socket.send_to_addr(data, to));
                if let Err(error) = &sent
                    && matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
                {
                    // The next one that sends something takes its place.
                    *peer = None;
                }
                sent.is_ok()
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Somebody may have replaced it since; then it is theirs.
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity(path: &Path) -> IoResult<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket that nobody has open.
fn remove_stale(path: &Path) -> Result<(), String> {
    let metadata = std::fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !metadata.file_type().is_socket() {
        return Err("exists and is not a socket".to_owned());
    }
    let probe = UnixDatagram::unbound().map_err(|error| error.to_string())?;
    match probe.connect(path) {
        Err(error) if error.raw_os_error() == Some(Errno::CONNREFUSED.raw_os_error()) => {
            std::fs::remove_file(path).map_err(|error| error.to_string())
        }
        // EPROTOTYPE: a socket of another kind is there, and alive.
        _ => Err("in use by another process".to_owned()),
    }
}

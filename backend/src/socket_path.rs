//! The place of a listening socket in the file system.

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, flock, open, statat};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    socket_with,
};
use thiserror::Error;

/// Clients that wait while another one is served; further ones get EAGAIN or wait in connect.
const BACKLOG: i32 = 16;

/// How often and how long to wait for another starter, who needs the lock for a moment: a second.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A listening socket and its place in the file system, which is removed when this is dropped.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    listener: OwnedFd,
    /// Of what is to be removed in the end.
    identity: Option<(u64, u64)>,
}

/// Why a path can't be listened on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SocketError {
    /// A process listens there.
    #[error("in use by another process")]
    InUse,
    /// Another process keeps the directory locked.
    #[error("directory is locked by another process")]
    Locked,
    /// Something that is not a socket has this name; it is not ours to remove.
    #[error("exists and is not a socket")]
    NotASocket,
    /// What is to be gone on with does not listen, or nobody can find it.
    #[error("not a listening UNIX stream socket with a path")]
    NotListening,
    /// The kernel refused.
    #[error("{0}")]
    System(#[from] Errno),
}

impl SocketPath {
    /// Listens on `path`. A socket that nobody listens on any more is replaced, a live one is not.
    ///
    /// # Errors
    /// [`SocketError`] with the reason.
    pub fn claim(path: &Path) -> Result<Self, SocketError> {
        let _locked = lock_directory_of(path)?;
        let address = SocketAddrUnix::new(path)?;
        remove_stale(path, &address)?;
        let listener = unix_socket()?;
        bind(&listener, &address)?;
        listen(&listener, BACKLOG)?;
        let identity = Some(identity(path)?.ok_or(Errno::NOENT)?);
        Ok(Self { path: path.to_owned(), listener, identity })
    }

    /// Goes on with a socket that another process has listened on.
    ///
    /// # Errors
    /// [`SocketError::NotListening`] when that is something else, or its path has been removed.
    pub fn adopt(listener: OwnedFd) -> Result<Self, SocketError> {
        let listens = socket_acceptconn(&listener) == Ok(true)
            && socket_type(&listener) == Ok(SocketType::STREAM)
            && socket_domain(&listener) == Ok(AddressFamily::UNIX);
        let path =
            listens.then(|| path_of(&listener)).flatten().ok_or(SocketError::NotListening)?;
        let identity = Some(identity(&path)?.ok_or(SocketError::NotListening)?);
        ioctl_fionbio(&listener, true)?;
        Ok(Self { path, listener, identity })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is removed from the file system in the end.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.identity.is_some()
    }

    /// Leaves it in the file system in the end: somebody else goes on with it.
    pub fn leave(&mut self) {
        self.identity = None;
    }

    /// The listening socket, non-blocking.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        // Somebody may have replaced it since; then it is theirs.
        if self.identity.is_some() && identity(&self.path) == Ok(self.identity) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// Locks the directory that `path` is in, for as long as the descriptor is there.
///
/// Two starters could both find something stale and remove each other's fresh one: they take turns,
/// by a lock that leaves no file behind.
///
/// # Errors
/// [`SocketError`] when there is no such directory, or somebody keeps it locked.
pub(crate) fn lock_directory_of(path: &Path) -> Result<OwnedFd, SocketError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let directory = open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
    lock(&directory)?;
    Ok(directory)
}

/// Takes the lock as soon as it is free. Everybody who can read the directory can hold it, for as
/// long as they like, so patience ends.
fn lock(directory: &OwnedFd) -> Result<(), SocketError> {
    for _ in 0..LOCK_TRIES {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => thread::sleep(LOCK_PAUSE),
            result => return Ok(result?),
        }
    }
    Err(SocketError::Locked)
}

fn unix_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), SocketError> {
    let status = match statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => status,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
        return Err(SocketError::NotASocket);
    }
    match connect(&unix_socket()?, address) {
        Err(Errno::CONNREFUSED) => Ok(rustix::fs::unlink(path)?),
        // Connected, or a backlog so full that we would have to wait.
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Err(SocketError::InUse),
        Err(errno) => Err(errno.into()),
    }
}

/// The path that a socket is bound to.
fn path_of(socket: &OwnedFd) -> Option<PathBuf> {
    let address = SocketAddrUnix::try_from(getsockname(socket).ok()?).ok()?;
    Some(PathBuf::from(OsStr::from_bytes(address.path_bytes()?)))
}

/// Device and inode of what is at `path`, if anything is.
fn identity(path: &Path) -> Result<Option<(u64, u64)>, Errno> {
    match statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => Ok(Some((status.st_dev, status.st_ino))),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{inotify, readlink, symlink, unlink};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::{Output, watch};
use crate::socket_path::{SocketError, lock_directory_of};

/// A pseudoterminal with a name of the operator's choice.
///
/// Somebody is there while its other side is open. It says when that is closed, but not when it is
/// opened; inotify does.
#[derive(Debug)]
pub(super) struct Pty {
    master: OwnedFd,
    openings: OwnedFd,
    connected: bool,
    _link: Link,
}

const MASTER: u64 = 1;
const OPENINGS: u64 = 2;

impl Pty {
    pub(super) fn new(path: &Path, epoll: &OwnedFd) -> Result<Self, SocketError> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        make_raw(&master, flags)?;

        let name = ptsname(&master, Vec::new())?;
        let openings =
            inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let what = inotify::WatchFlags::OPEN | inotify::WatchFlags::CLOSE;
        inotify::add_watch(&openings, name.as_c_str(), what)?;
        watch(epoll, &openings, OPENINGS, EventFlags::IN)?;
        watch(epoll, &master, MASTER, EventFlags::IN | EventFlags::OUT)?;
        Ok(Self { _link: Link::claim(path, name)?, master, openings, connected: false })
    }

    pub(super) fn event(&mut self, source: u64) {
        if source == OPENINGS {
            // Which ones is of no interest.
            while rustix::io::read(&self.openings, &mut [0; 1024]).is_ok() {}
        }
        let immediately = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut master = [PollFd::new(&self.master, PollFlags::empty())];
        if poll(&mut master, Some(&immediately)).is_ok() {
            self.connected = !master[0].revents().contains(PollFlags::HUP);
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.connected
    }

    pub(super) fn read(&mut self, bytes: &mut [u8]) -> usize {
        // What was said before the other side was closed can still be read; behind it there is EIO.
        rustix::io::retry_on_intr(|| rustix::io::read(&self.master, &mut *bytes)).unwrap_or(0)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Output {
        if !self.connected {
            return Output::Nobody;
        }
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.master, bytes)) {
            Ok(0) | Err(Errno::AGAIN) => Output::Blocked,
            Ok(sent) => Output::Sent(sent),
            Err(_) => Output::Nobody,
        }
    }
}

/// Bytes pass as they are. The other side is open only here: while it has never been, nobody would
/// seem to be missing.
fn make_raw(master: &OwnedFd, flags: OpenptFlags) -> Result<(), Errno> {
    let slave = ioctl_tiocgptpeer(master, flags)?;
    let mut attributes = tcgetattr(&slave)?;
    attributes.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &attributes)
}

/// A symbolic link to a pseudoterminal, which is removed when this is dropped.
#[derive(Debug)]
struct Link {
    path: PathBuf,
    target: CString,
}

impl Link {
    /// Makes `path` a link to `target`. A link to a pseudoterminal that is no more is replaced, and
    /// so is one to `target` itself: it is a new one that got the name of an old one. If some other
    /// terminal got that name, nobody can tell whose link it is, and it stays.
    fn claim(path: &Path, target: CString) -> Result<Self, SocketError> {
        let _locked = lock_directory_of(path)?;
        match symlink(&target, path) {
            Err(Errno::EXIST) => {
                // What is no link at all is not ours to remove either.
                let found = readlink(path, Vec::new()).map_err(|_| Errno::EXIST)?;
                if !found.to_bytes().starts_with(b"/dev/pts/") {
                    return Err(Errno::EXIST.into());
                }
                let gone = || matches!(rustix::fs::stat(&found), Err(Errno::NOENT));
                if found != target && !gone() {
                    return Err(SocketError::InUse);
                }
                unlink(path)?;
                symlink(&target, path)?;
            }
            result => result?,
        }
        Ok(Self { path: path.to_owned(), target })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Somebody may have replaced it since; then it is theirs.
        if readlink(&self.path, Vec::new()).is_ok_and(|target| target == self.target) {
            let _ = unlink(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_the_own_terminal_is_taken_over_and_one_to_another_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("link");
        // It is always there, and never anybody's.
        let target = c"/dev/pts/ptmx";
        symlink(target, &path).unwrap();
        let error = Link::claim(&path, c"/dev/pts/1234567".into()).unwrap_err();
        assert_eq!(error, SocketError::InUse);
        let link = Link::claim(&path, target.into()).unwrap();
        assert_eq!(readlink(&path, Vec::new()).unwrap().as_c_str(), target);
        drop(link);
        assert!(path.symlink_metadata().is_err());
    }
}

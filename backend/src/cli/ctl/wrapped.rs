use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use barkeep_protocol::page::wrap::{LENGTH, NAME, PageError, Snapshot};
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, fstat, openat, readlinkat};
use rustix::io::Errno;

/// More descriptors of that name than a process of good will has.
const CANDIDATES: usize = 16;
/// More than the kernel tells about a process in one file.
const FILE_LENGTH: u64 = 64 << 10;

/// A process with the library in it.
#[derive(Debug)]
pub(super) struct Wrapped {
    /// What the kernel calls its program, in printable characters.
    pub(super) command: String,
    pub(super) snapshot: Snapshot,
}

/// Why there is nothing to tell.
#[derive(Debug, thiserror::Error)]
pub(super) enum WrappedError {
    #[error("there is no such process")]
    NoProcess,
    #[error("has ended")]
    Ended,
    #[error("not wrapped: it has no page of libbarkeep_preload.so")]
    NotWrapped,
    /// A child that the library did not see begin, or a process that was given the page.
    #[error("not wrapped: its page is that of process {0}")]
    Foreign(u32),
    #[error("{0}")]
    Page(#[from] PageError),
    #[error("{0}")]
    System(io::Error),
}

impl Wrapped {
    /// Finds the page of a process and reads it. The process is trusted with nothing: neither what it
    /// calls a page, nor what stands in it.
    pub(super) fn find(pid: u32) -> Result<Self, WrappedError> {
        // Whatever is opened from here on is this process's, even if its ID is used again.
        let process = open(CWD, &format!("/proc/{pid}"), OFlags::PATH | OFlags::DIRECTORY)?;
        let status = read(&process, "status")?;
        if field(&status, "State").is_some_and(|state| state.starts_with(['Z', 'X'])) {
            return Err(WrappedError::Ended);
        }
        let snapshot = Self::pages(&process)?;
        // The last one is what the process itself is told.
        let ids = field(&status, "NStgid").unwrap_or_default();
        if ids.split_whitespace().next_back() != Some(&snapshot.pid.to_string()) {
            return Err(WrappedError::Foreign(snapshot.pid));
        }
        let command = read(&process, "comm")?.trim_end().chars().map(printable).collect();
        Ok(Self { command, snapshot })
    }

    /// The first of its pages that is one, else why the last one is none.
    fn pages(process: &OwnedFd) -> Result<Snapshot, WrappedError> {
        let descriptors = open(process, "fd", OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut refused = WrappedError::NotWrapped;
        let mut candidates = 0;
        let wanted = format!("/memfd:{NAME} (deleted)");
        for entry in Dir::read_from(&descriptors)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_wanted = readlinkat(&descriptors, name, Vec::new())
                .is_ok_and(|link| link.as_bytes() == wanted.as_bytes());
            if !is_wanted {
                continue;
            }
            match page(&descriptors, &name.to_string_lossy()) {
                Ok(snapshot) => return Ok(snapshot),
                Err(error) => refused = error,
            }
            candidates += 1;
            if candidates == CANDIDATES {
                break;
            }
        }
        Err(refused)
    }
}

/// Reads one page. Nothing is mapped, so nobody can take it away meanwhile.
fn page(descriptors: &OwnedFd, name: &str) -> Result<Snapshot, WrappedError> {
    // The link's text could be any file's name, and to open a device or a pipe has effects. This has none.
    let found = open(descriptors, name, OFlags::PATH)?;
    if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::RegularFile {
        return Err(WrappedError::NotWrapped);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(open(CWD, &format!("/proc/self/fd/{}", raw(&found)), flags)?);
    let mut bytes = vec![0; LENGTH];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(Snapshot::parse(&bytes)?),
        Err(failure) if failure.kind() == io::ErrorKind::UnexpectedEof => {
            Err(PageError::TooShort.into())
        }
        Err(failure) => Err(WrappedError::System(failure)),
    }
}

fn raw(fd: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(fd)
}

fn open(at: impl std::os::fd::AsFd, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat(at, path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// A file of `/proc/PID`.
fn read(process: &OwnedFd, name: &str) -> Result<String, WrappedError> {
    let mut bytes = Vec::new();
    let file = File::from(open(process, name, OFlags::RDONLY)?);
    file.take(FILE_LENGTH).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':');
    status.lines().find_map(line).map(str::trim)
}

fn printable(character: char) -> char {
    if matches!(character, ' '..='~') { character } else { '?' }
}

impl From<Errno> for WrappedError {
    fn from(errno: Errno) -> Self {
        io::Error::from(errno).into()
    }
}

impl From<io::Error> for WrappedError {
    fn from(failure: io::Error) -> Self {
        match Errno::from_io_error(&failure) {
            Some(Errno::NOENT | Errno::SRCH) => Self::NoProcess,
            _ => Self::System(failure),
        }
    }
}

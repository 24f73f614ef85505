//! Descriptors of all kinds, opened anew for each use.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use barkeep_tests::memory::{sealed, shrinkable};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{CWD, Mode, OFlags, SealFlags, fcntl_add_seals, openat};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::pipe;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fd {
    /// A memfd of so many bytes that can shrink.
    Memory(u64),
    /// One that can't.
    Sealed(u64),
    /// A memfd of 64 KiB that must not be written.
    SealedAgainstWrites,
    /// A memfd of 64 KiB, opened for reading alone.
    ReadOnly,
    /// The same for writing.
    WriteOnly,
    /// The same as a mere place (`O_PATH`).
    PathOnly,
    Socket,
    Pipe,
    Eventfd,
    Epoll,
    /// One without a size.
    Directory,
    DevNull,
}

const SIZE: u64 = 1 << 16;

impl Fd {
    pub(crate) fn open(self) -> OwnedFd {
        match self {
            Self::Memory(size) => shrinkable(size).into(),
            Self::Sealed(size) => sealed(size).into(),
            Self::SealedAgainstWrites => {
                let memory = shrinkable(SIZE);
                fcntl_add_seals(&memory, SealFlags::WRITE).expect("a memfd can be sealed");
                memory.into()
            }
            Self::ReadOnly => memory_opened(OFlags::RDONLY),
            Self::WriteOnly => memory_opened(OFlags::WRONLY),
            Self::PathOnly => memory_opened(OFlags::PATH),
            Self::Socket => {
                let flags = SocketFlags::CLOEXEC;
                socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a pair").0
            }
            Self::Pipe => pipe().expect("a pipe").0,
            Self::Eventfd => eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
            Self::Epoll => {
                let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll instance");
                // Nested, and readable for ever.
                let counter = eventfd(1, EventfdFlags::CLOEXEC).expect("an eventfd");
                let data = epoll::EventData::new_u64(0);
                epoll::add(&epoll, &counter, data, epoll::EventFlags::IN).expect("an eventfd");
                epoll
            }
            Self::Directory => open("/proc", OFlags::RDONLY | OFlags::DIRECTORY),
            Self::DevNull => open("/dev/null", OFlags::RDWR),
        }
    }
}

fn memory_opened(flags: OFlags) -> OwnedFd {
    let memory = shrinkable(SIZE);
    open(&format!("/proc/self/fd/{}", memory.as_fd().as_raw_fd()), flags)
}

fn open(path: &str, flags: OFlags) -> OwnedFd {
    openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).expect("a path that is there")
}

//! Descriptors of all kinds, opened once.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use barkeep_backend::irq::EventFd;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{
    CWD, MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, openat,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::pipe;

/// Of the file that comes first.
const SHARED_SIZE: u64 = 1 << 16;

pub(crate) struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    pub(crate) fn get() -> &'static Self {
        static DESCRIPTORS: OnceLock<Descriptors> = OnceLock::new();
        DESCRIPTORS.get_or_init(|| {
            // What the process opens once to signal any eventfd is open from here on.
            EventFd::new(counter()).expect("an eventfd").signal();
            Self(open_all())
        })
    }

    pub(crate) fn of_kind(&self, kind: u8) -> BorrowedFd<'_> {
        self.0[usize::from(kind) % self.0.len()].as_fd()
    }

    /// Gives the file that can shrink another length, under whoever mapped it.
    pub(crate) fn truncate(&self, pages: u8) {
        ftruncate(&self.0[0], u64::from(pages) << 12).expect("room for a memfd");
    }

    /// As they were opened.
    pub(crate) fn restore(&self) {
        ftruncate(&self.0[0], SHARED_SIZE).expect("room for a memfd");
    }
}

/// In the order that the corpus knows them by.
fn open_all() -> Vec<OwnedFd> {
    let sealed = memory(1 << 16);
    fcntl_add_seals(&sealed, SealFlags::SHRINK | SealFlags::SEAL).expect("a memfd can be sealed");
    let shared = memory(SHARED_SIZE);
    let socket_flags = SocketFlags::CLOEXEC;
    let (socket, _) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, socket_flags, None).expect("a pair");
    let (read, write) = pipe().expect("a pipe");
    let open = |path: &str, flags| openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty());
    let read_only = {
        use std::os::fd::AsRawFd;
        open(&format!("/proc/self/fd/{}", shared.as_raw_fd()), OFlags::RDONLY)
    };
    vec![
        shared,
        sealed,
        counter(),
        memory(0),
        memory(1 << 40),
        read_only.expect("a memfd can be opened again"),
        socket,
        read,
        write,
        epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll instance"),
        open("/dev/null", OFlags::RDWR).expect("/dev/null"),
        open("/", OFlags::RDONLY | OFlags::DIRECTORY).expect("a directory"),
        open("/dev/zero", OFlags::RDWR).expect("/dev/zero"),
        open("/proc/self/exe", OFlags::RDONLY).expect("an executable"),
        open("/", OFlags::PATH).expect("a place"),
    ]
}

fn memory(size: u64) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("fuzz", flags).expect("a memfd");
    ftruncate(&memory, size).expect("room for a memfd");
    memory
}

fn counter() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd")
}

/// How many descriptors this process has open.
pub(crate) fn open() -> usize {
    let folder = File::open("/proc/self/fd").expect("procfs");
    rustix::fs::Dir::read_from(&folder).expect("a directory").count()
}

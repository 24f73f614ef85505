#![expect(unsafe_code, reason = "calls the C functions that this library stands in front of")]

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;

use rustix::io::Errno;

use super::real_sockets::{self, Recv, Recvmsg, Send, Sendmsg};
use super::{
    Answer, Duplicate, Mmap, Mremap, PageWords, SignalFunctions, SocketMessage, SocketReceived,
    System,
};
use crate::sigbus::{Action, Change};

type Ioctl = unsafe extern "C-unwind" fn(c_int, c_ulong, *mut c_void) -> c_int;
type Pwrite = unsafe extern "C-unwind" fn(c_int, *const c_void, usize, i64) -> isize;
type MmapCall = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;
type Munmap = unsafe extern "C" fn(*mut c_void, usize) -> c_int;
type MremapCall =
    unsafe extern "C" fn(*mut c_void, usize, usize, c_int, *mut c_void) -> *mut c_void;
type Close = unsafe extern "C-unwind" fn(c_int) -> c_int;
type CloseRange = unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int;
type Closefrom = unsafe extern "C" fn(c_int);
type Dup = unsafe extern "C" fn(c_int) -> c_int;
type Dup2 = unsafe extern "C" fn(c_int, c_int) -> c_int;
type Dup3 = unsafe extern "C" fn(c_int, c_int, c_int) -> c_int;
type Fcntl = unsafe extern "C-unwind" fn(c_int, c_int, *mut c_void) -> c_int;

/// The next definition of each function, as the dynamic loader would have bound it without us.
#[derive(Debug)]
pub(crate) struct Real {
    pub(crate) ioctl: Ioctl,
    pub(crate) pwrite: Pwrite,
    pub(crate) mmap: MmapCall,
    pub(crate) munmap: Munmap,
    pub(crate) mremap: MremapCall,
    pub(crate) close: Close,
    /// C libraries before 2.34 have none.
    pub(crate) close_range: Option<CloseRange>,
    /// Likewise.
    pub(crate) closefrom: Option<Closefrom>,
    pub(crate) dup: Dup,
    pub(crate) dup2: Dup2,
    pub(crate) dup3: Dup3,
    pub(crate) fcntl: Fcntl,
    pub(crate) signals: SignalFunctions,
    pub(crate) sendmsg: Sendmsg,
    pub(crate) recvmsg: Recvmsg,
    pub(crate) send: Send,
    pub(crate) recv: Recv,
}

/// The next definition of a function, as a pointer of the type that its declaration has.
macro_rules! next {
    ($name:literal as $type:ty) => {
        next($name).map(|found| {
            // SAFETY: the type is that of the C library's declaration. A variable argument is passed as a
            // fixed one is on x86-64, and off_t has 64 bits.
            unsafe { std::mem::transmute::<*mut c_void, $type>(found) }
        })
    };
}

impl Real {
    /// Looks the functions up. `None` if the C library lacks one, which no C library does.
    pub(crate) fn find() -> Option<Self> {
        Some(Self {
            ioctl: next!(c"ioctl" as Ioctl)?,
            pwrite: next!(c"pwrite64" as Pwrite)?,
            mmap: next!(c"mmap64" as MmapCall)?,
            munmap: next!(c"munmap" as Munmap)?,
            mremap: next!(c"mremap" as MremapCall)?,
            close: next!(c"close" as Close)?,
            close_range: next!(c"close_range" as CloseRange),
            closefrom: next!(c"closefrom" as Closefrom),
            dup: next!(c"dup" as Dup)?,
            dup2: next!(c"dup2" as Dup2)?,
            dup3: next!(c"dup3" as Dup3)?,
            fcntl: next!(c"fcntl" as Fcntl)?,
            signals: SignalFunctions::find(next)?,
            sendmsg: next!(c"sendmsg" as Sendmsg)?,
            recvmsg: next!(c"recvmsg" as Recvmsg)?,
            send: next!(c"send" as Send)?,
            recv: next!(c"recv" as Recv)?,
        })
    }
}

fn next(name: &CStr) -> Option<*mut c_void> {
    let name: *const c_char = name.as_ptr();
    // SAFETY: the name is a C string; the answer is an address or null.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name) };
    (!found.is_null()).then_some(found)
}

impl System for Real {
    fn ioctl(&self, fd: RawFd, request: u64, argument: usize) -> Answer<i32> {
        // SAFETY: the arguments are the VMM's own, or those of a structure that the caller holds.
        let answer = unsafe { (self.ioctl)(fd, request, argument as *mut c_void) };
        checked(answer.into()).map(|_| answer)
    }

    fn ask(&self, fd: RawFd, request: u64, argument: &mut [u8]) -> Answer<i32> {
        self.ioctl(fd, request, argument.as_mut_ptr().expose_provenance())
    }

    fn pread(&self, fd: RawFd, data: &mut [u8], offset: u64) -> Answer<usize> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        // SAFETY: the kernel says if the number is no descriptor's, and nothing closes it here.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // By the kernel itself: a thread may be cancelled in the C library's, also one that is in a call or
        // a handler of ours, where it must not be.
        rustix::io::pread(fd, data, offset)
    }

    fn mmap(&self, request: Mmap) -> Answer<usize> {
        let Mmap { address, len, protection, flags, fd, offset } = request;
        // SAFETY: the VMM asks for it, and vouches for what it maps over.
        let answer =
            unsafe { (self.mmap)(address as *mut c_void, len, protection, flags, fd, offset) };
        placed(answer)
    }

    fn munmap(&self, address: usize, len: usize) -> Answer<()> {
        // SAFETY: the VMM asks for it, and vouches that nothing uses the memory.
        let answer = unsafe { (self.munmap)(address as *mut c_void, len) };
        checked(answer.into())
    }

    fn mremap(&self, request: Mremap) -> Answer<usize> {
        let Mremap { address, len, new_len, flags, new_address } = request;
        // SAFETY: the VMM asks for it, and vouches for what it moves and maps over.
        let answer = unsafe {
            (self.mremap)(address as *mut c_void, len, new_len, flags, new_address as *mut c_void)
        };
        placed(answer)
    }

    fn close(&self, fd: RawFd) -> Answer<()> {
        // SAFETY: the VMM asks for it, and vouches that nothing of its own uses the descriptor.
        let answer = unsafe { (self.close)(fd) };
        checked(answer.into())
    }

    fn close_range(&self, first: u32, last: u32, flags: i32) -> Answer<()> {
        let close_range = self.close_range.ok_or(Errno::NOSYS)?;
        // SAFETY: the VMM asks for it, and vouches that nothing of its own uses the descriptors.
        let answer = unsafe { close_range(first, last, flags) };
        checked(answer.into())
    }

    fn duplicate(&self, fd: RawFd, how: Duplicate) -> Answer<RawFd> {
        let answer = match how {
            // SAFETY: descriptors are numbers.
            Duplicate::Lowest => unsafe { (self.dup)(fd) },
            // SAFETY: the VMM asks for it, and vouches that it may close what the number was.
            Duplicate::Over(to) => unsafe { (self.dup2)(fd, to) },
            // SAFETY: likewise.
            Duplicate::OverWith(to, flags) => unsafe { (self.dup3)(fd, to, flags) },
            // SAFETY: the argument is a number to these commands.
            Duplicate::Command(command, argument) => unsafe {
                (self.fcntl)(fd, command, argument as *mut c_void)
            },
        };
        checked(answer.into()).map(|()| answer)
    }

    fn process(&self) -> u32 {
        std::process::id()
    }

    fn read_memory(&self, address: usize, data: &mut [u8]) -> Answer<()> {
        let own = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        let other = libc::iovec { iov_base: address as *mut c_void, iov_len: data.len() };
        // SAFETY: the kernel writes to the buffer, and checks the other address.
        let answer = unsafe {
            libc::process_vm_readv(own_process(), &raw const own, 1, &raw const other, 1, 0)
        };
        whole(answer, data.len())
    }

    fn write_memory(&self, address: usize, data: &[u8]) -> Answer<()> {
        let own = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let other = libc::iovec { iov_base: address as *mut c_void, iov_len: data.len() };
        // SAFETY: the kernel reads from the buffer, and checks the other address. That its content may
        // change is what the caller wants.
        let answer = unsafe {
            libc::process_vm_writev(own_process(), &raw const own, 1, &raw const other, 1, 0)
        };
        whole(answer, data.len())
    }

    fn link(&self, fd: RawFd) -> Answer<Vec<u8>> {
        let link = fs::read_link(format!("/proc/self/fd/{fd}"));
        link.map(|path| path.into_os_string().into_vec()).map_err(|error| of(&error))
    }

    fn identity(&self, fd: RawFd) -> Answer<(u64, u64)> {
        let mut found = std::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the kernel writes to the structure if it is one, and the descriptor is a number.
        checked(unsafe { libc::fstat(fd, found.as_mut_ptr()) }.into())?;
        // SAFETY: the call above succeeded, so that all of it is written.
        let found = unsafe { found.assume_init() };
        Ok((found.st_dev, found.st_ino))
    }

    fn signal_action(&self, signal: i32, new: Option<Action>) -> Answer<Action> {
        self.signals.action(signal, new)
    }

    fn signal_mask(&self, change: Option<Change>) -> Answer<u64> {
        self.signals.mask(change)
    }

    fn signals_pending(&self) -> Answer<u64> {
        SignalFunctions::pending()
    }

    fn keep(&self, fd: RawFd) -> Answer<OwnedFd> {
        real_sockets::keep(fd)
    }

    fn sendmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<usize> {
        real_sockets::sendmsg(fd, message, flags)
    }

    fn recvmsg(&self, fd: RawFd, message: &SocketMessage, flags: i32) -> Answer<SocketReceived> {
        real_sockets::recvmsg(fd, message, flags)
    }

    fn close_own(&self, number: RawFd) {
        real_sockets::close_own(number);
    }

    fn page(&self, file: Option<BorrowedFd<'_>>, over: Option<PageWords>) -> Answer<PageWords> {
        real_sockets::page(file, over)
    }
}

fn own_process() -> libc::pid_t {
    std::process::id().cast_signed()
}

fn checked(answer: c_long) -> Answer<()> {
    if answer == -1 { Err(last_errno()) } else { Ok(()) }
}

fn placed(answer: *mut c_void) -> Answer<usize> {
    if answer == libc::MAP_FAILED { Err(last_errno()) } else { Ok(answer as usize) }
}

fn whole(answer: isize, len: usize) -> Answer<()> {
    match usize::try_from(answer) {
        Ok(copied) if copied == len => Ok(()),
        Ok(_) => Err(Errno::FAULT),
        Err(_) => Err(last_errno()),
    }
}

pub(super) fn last_errno() -> Errno {
    of(&std::io::Error::last_os_error())
}

fn of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

//! Signals by Linux AIO: the completion of a request signals an eventfd of one's choice. The request
//! here reads nothing from an empty file and is complete when `io_submit` returns.
#![expect(unsafe_code, reason = "Linux AIO has no safe interface")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::fs::{MemfdFlags, memfd_create};

/// An AIO context.
#[derive(Debug)]
pub(super) struct Aio {
    context: libc::c_ulong,
    /// What the requests read from.
    empty: OwnedFd,
}

/// `aio_context_t` needs room for completions that were not collected yet.
const EVENTS: usize = 64;
/// `IOCB_CMD_PREAD` in `<linux/aio_abi.h>`.
const CMD_PREAD: u16 = 0;
/// `IOCB_FLAG_RESFD`
const FLAG_RESFD: u32 = 1;

/// `struct iocb`, little-endian layout.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    result_file: u32,
}

/// `struct io_event`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Completion {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

impl Aio {
    /// `None` when the kernel has no AIO, or no more contexts.
    pub(super) fn new() -> Option<Self> {
        let empty = memfd_create("barkeep-empty", MemfdFlags::CLOEXEC).ok()?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes the new context to the variable and nothing else.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) };
        (result == 0).then_some(Self { context, empty })
    }

    pub(super) fn signal(&self, eventfd: BorrowedFd<'_>) {
        // EAGAIN means that completions fill the context: they are collected and it is tried again.
        if !self.submit(eventfd) {
            self.collect();
            self.submit(eventfd);
        }
    }

    fn submit(&self, eventfd: BorrowedFd<'_>) -> bool {
        let mut request = Request {
            opcode: CMD_PREAD,
            file: self.empty.as_raw_fd().cast_unsigned(),
            flags: FLAG_RESFD,
            result_file: eventfd.as_raw_fd().cast_unsigned(),
            ..Request::default()
        };
        let mut list = [&raw mut request];
        // SAFETY: the list holds one valid request, which the kernel copies before it returns; the
        // request reads 0 bytes, so its null buffer is never touched.
        let submitted =
            unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, list.as_mut_ptr()) };
        submitted == 1
    }

    /// Takes all completions off the context; what they say is known.
    fn collect(&self) {
        let mut events = [Completion::default(); EVENTS];
        let no_wait = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            // SAFETY: there is room for as many completions as are asked for, and the timeout is
            // only read.
            let count = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    0,
                    EVENTS,
                    events.as_mut_ptr(),
                    ptr::from_ref(&no_wait),
                )
            };
            if usize::try_from(count).unwrap_or(0) < EVENTS {
                return;
            }
        }
    }
}

//! io_uring: operations in the kernel, which works on guest memory itself.
#![expect(unsafe_code, reason = "the kernel accesses memory behind the compiler's back")]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::io::Errno;
use vm_memory::guest_memory::Permissions;

use super::engine::{Completion, Engine, Id, Operation, Span, ZEROS};
use crate::devices::virtio::MemoryGuard;
use crate::irq::EventFd;

/// An [`Engine`] that waits for nothing.
pub(super) struct UringEngine<G: MemoryGuard> {
    ring: IoUring,
    file: Arc<File>,
    /// Signalled by the kernel for each operation that is done.
    wake: Arc<EventFd>,
    /// What the ring has, by id.
    started: Vec<Option<Started<G>>>,
    /// Their number.
    running: usize,
    /// What the ring could not have.
    refused: VecDeque<Completion<G>>,
}

/// An operation that the ring has, with all that the kernel may access until it is done.
struct Started<G> {
    operation: Operation<G>,
    /// `struct iovec`: address and length. What they refer to is held by the operation.
    _vectors: Vec<Vector>,
}

/// `struct iovec`
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Vector {
    address: usize,
    len: usize,
}

/// `UIO_MAXIOV`: the most vectors of one operation. The rest of a longer one is done afterwards.
const MAX_VECTORS: usize = 1024;
/// Where no image has data that one could have to wait for.
const BEHIND_ALL: u64 = 1 << 62;
/// The most zeros of one operation: 1 MiB.
const MAX_ZEROS: usize = 16;
/// `IORING_MAX_ENTRIES`
const MAX_ENTRIES: u32 = 1 << 15;

impl<G: MemoryGuard> UringEngine<G> {
    /// An engine for so many operations at once.
    ///
    /// # Errors
    /// When the kernel has no io_uring, denies it, or lacks an operation.
    pub(super) fn new(file: Arc<File>, wake: Arc<EventFd>, depth: usize) -> io::Result<Self> {
        let entries = u32::try_from(depth).unwrap_or(u32::MAX).next_power_of_two();
        let ring = IoUring::builder()
            // As many results as operations, so none is ever lost or late.
            .setup_cqsize(entries)
            .setup_clamp()
            .build(entries.min(MAX_ENTRIES))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::SyncFileRange::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(wake.as_fd().as_raw_fd())?;
        let started = (0..depth).map(|_| None).collect();
        Ok(Self { ring, file, wake, started, running: 0, refused: VecDeque::new() })
    }

    /// What the kernel is told of an operation, and the vectors that this refers to.
    fn entry(&self, operation: &Operation<G>) -> Result<(squeue::Entry, Vec<Vector>), Errno> {
        let file = types::Fd(self.file.as_raw_fd());
        let mut vectors = Vec::new();
        let entry = match operation {
            Operation::Read { at, into } => {
                vectors = vectors_of(into, Permissions::Write)?;
                let (first, count) = raw(&vectors);
                opcode::Readv::new(file, first, count).offset(*at).build()
            }
            Operation::Write { at, from } => {
                vectors = vectors_of(from, Permissions::Read)?;
                let (first, count) = raw(&vectors);
                opcode::Writev::new(file, first, count).offset(*at).build()
            }
            Operation::Zeros { at, len } => {
                vectors = zeros(*len);
                let (first, count) = raw(&vectors);
                opcode::Writev::new(file, first, count).offset(*at).build()
            }
            Operation::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Ask(witness) => {
                let witness = types::Fd(witness.as_raw_fd());
                let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE;
                opcode::SyncFileRange::new(witness, 1).offset(BEHIND_ALL).flags(wait).build()
            }
            Operation::Allocate { at, len, mode } => {
                let mode = mode.bits().cast_signed();
                opcode::Fallocate::new(file, *len).offset(*at).mode(mode).build()
            }
        };
        Ok((entry, vectors))
    }
}

impl<G: MemoryGuard> Engine<G> for UringEngine<G> {
    fn start(&mut self, id: Id, operation: Operation<G>) {
        let (entry, vectors) = match self.entry(&operation) {
            Ok(told) => told,
            Err(errno) => {
                self.refused.push_back(Completion { id, operation, result: Err(errno) });
                return;
            }
        };
        if self.ring.submission().is_full() {
            self.submit();
        }
        let entry = entry.user_data(id.0 as u64);
        // SAFETY: what the entry refers to is moved into `started` right below, where it stays until
        // the kernel says that it is done; `drop` waits for that. The vectors lie on the heap. Guest
        // memory that they refer to stays mapped while the operation holds its guard, and is
        // accessed through volatile slices only; zeros are static and only read.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            let result = Err(Errno::AGAIN);
            self.refused.push_back(Completion { id, operation, result });
            return;
        }
        let before = self.started[id.0].replace(Started { operation, _vectors: vectors });
        assert!(before.is_none(), "an id has one operation at a time");
        self.running += 1;
    }

    fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The kernel is short of memory. The rest is submitted with the next ones, or
                    // when this wakes us.
                    self.wake.signal();
                    return;
                }
            }
        }
    }

    fn completed(&mut self) -> Option<Completion<G>> {
        if let Some(refused) = self.refused.pop_front() {
            return Some(refused);
        }
        let entry = self.ring.completion().next()?;
        let id = Id(usize::try_from(entry.user_data()).ok()?);
        let Started { operation, .. } = self.started.get_mut(id.0)?.take()?;
        self.running -= 1;
        let mut result = match u64::try_from(entry.result()) {
            Ok(moved) => Ok(moved),
            Err(_) => Err(Errno::from_raw_os_error(entry.result().saturating_neg())),
        };
        if let (Operation::Read { into, .. }, Ok(moved)) = (&operation, result) {
            result = into.written(moved).map(|()| moved);
        }
        Some(Completion { id, operation, result })
    }

    fn wait(&mut self) {
        if self.running > 0 && self.refused.is_empty() {
            // Interrupted or not, the caller looks what is done.
            let _ = self.ring.submit_and_wait(1);
        }
    }
}

impl<G: MemoryGuard> Drop for UringEngine<G> {
    /// The kernel goes on after the ring is closed, with memory that would be somebody else's.
    fn drop(&mut self) {
        while self.running > 0 {
            self.wait();
            while self.completed().is_some() {}
        }
    }
}

/// The vectors of guest memory, at most as many as one operation can have.
fn vectors_of<G: MemoryGuard>(span: &Span<G>, access: Permissions) -> Result<Vec<Vector>, Errno> {
    let mut vectors = Vec::new();
    span.slices(access, |slice| {
        let address = slice.ptr_guard().as_ptr().expose_provenance();
        vectors.push(Vector { address, len: slice.len() });
        vectors.len() < MAX_VECTORS
    })?;
    Ok(vectors)
}

/// As many zeros as one operation writes.
fn zeros(len: u64) -> Vec<Vector> {
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    let address = ZEROS.as_ptr().expose_provenance();
    let mut vectors = Vec::new();
    while left > 0 && vectors.len() < MAX_ZEROS {
        let len = left.min(ZEROS.len());
        vectors.push(Vector { address, len });
        left -= len;
    }
    vectors
}

/// As the kernel is told of them; they stay where they are when the `Vec` moves.
fn raw(vectors: &[Vector]) -> (*const libc::iovec, u32) {
    let count = u32::try_from(vectors.len()).expect("at most MAX_VECTORS");
    (vectors.as_ptr().cast(), count)
}

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SeekFrom, fallocate, fdatasync, seek};
use rustix::io::Errno;
use vm_memory::guest_memory::Permissions;
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::engine::{Completion, Engine, Id, Operation, Span, ZEROS};
use crate::devices::virtio::MemoryGuard;

/// Does each operation at once, in the calling thread: for kernels without io_uring.
#[derive(Debug)]
pub(super) struct SyncEngine<G> {
    /// Its position is this engine's own affair.
    file: Arc<File>,
    done: VecDeque<Completion<G>>,
}

impl<G> SyncEngine<G> {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self { file, done: VecDeque::new() }
    }
}

impl<G: MemoryGuard> Engine<G> for SyncEngine<G> {
    fn start(&mut self, id: Id, operation: Operation<G>) {
        let result = perform(&self.file, &operation);
        self.done.push_back(Completion { id, operation, result });
    }

    fn submit(&mut self) {}

    fn completed(&mut self) -> Option<Completion<G>> {
        self.done.pop_front()
    }

    fn wait(&mut self) {}
}

fn perform<G: MemoryGuard>(file: &File, operation: &Operation<G>) -> Result<u64, Errno> {
    match operation {
        Operation::Read { at, into } => transfer(file, *at, into, Permissions::Write),
        Operation::Write { at, from } => transfer(file, *at, from, Permissions::Read),
        Operation::Zeros { at, len } => {
            let len = usize::try_from(*len).unwrap_or(usize::MAX).min(ZEROS.len());
            let written = file.write_at(&ZEROS[..len], *at);
            written.map(|written| written as u64).map_err(|error| errno(&error))
        }
        Operation::Sync => fdatasync(file).map(|()| 0),
        Operation::Ask(witness) => fdatasync(witness).map(|()| 0),
        Operation::Allocate { at, len, mode } => fallocate(file, *mode, *at, *len).map(|()| 0),
    }
}

/// Moves as many bytes as the kernel does before it stops. `access` is the one to guest memory.
fn transfer<G: MemoryGuard>(
    file: &File,
    at: u64,
    span: &Span<G>,
    access: Permissions,
) -> Result<u64, Errno> {
    // All of it or nothing, as with io_uring.
    if !span.reachable(access) {
        return Err(Errno::FAULT);
    }
    seek(file, SeekFrom::Start(at))?;
    let mut done = 0;
    let mut failure = None;
    span.slices(access, |mut slice| {
        let moved = if access == Permissions::Write {
            file.as_fd().read_volatile(&mut slice)
        } else {
            file.as_fd().write_volatile(&slice)
        };
        match moved {
            Ok(moved) => {
                done += moved as u64;
                moved == slice.len()
            }
            Err(error) => {
                failure = Some(error);
                false
            }
        }
    })?;
    match failure {
        Some(VolatileMemoryError::IOError(error)) if done == 0 => Err(errno(&error)),
        Some(_) if done == 0 => Err(Errno::FAULT),
        // What failed behind that comes up again when the rest is tried.
        _ => Ok(done),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

//! What a request goes through: one operation after another, each told by the end of the last.

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use thiserror::Error;

use super::engine::{Operation, Span};
use super::request::{Command, Range, Status};
use crate::devices::virtio::MemoryGuard;

/// How far a request has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Bytes written to its buffers, from the first on.
    written: u64,
    /// What is written is to be on stable storage before the end.
    durable: bool,
    ranges: Option<Ranges>,
    retries: u32,
}

/// Ranges that are cleared one by one.
#[derive(Debug)]
struct Ranges {
    purpose: Purpose,
    /// How the last one of `left` is tried.
    method: Method,
    /// In reverse order.
    left: Vec<Range>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Discard,
    Zero,
}

/// Ways to clear a range. Not every file system knows all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Gives its space back.
    Punch,
    /// Keeps its space.
    Zero,
    /// Writes zeros: always possible, and slow.
    Write,
}

/// What comes next for a request.
#[derive(Debug)]
pub(super) enum Next<G> {
    Start(Operation<G>),
    Finish(Status),
    Fail(Failure),
}

/// Why the image could not serve a request.
#[derive(Debug, Error)]
pub(super) enum Failure {
    #[error("{what} at {at:#x}: {errno}")]
    Errno { what: &'static str, at: u64, errno: Errno },
    #[error("{what} at {at:#x}: the image ends there")]
    End { what: &'static str, at: u64 },
}

/// How often an operation is tried again when the kernel says that it may be.
const MAX_RETRIES: u32 = 16;

impl Progress {
    /// Bytes written to the request's buffers, from the first on.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// The first step. `durable`: what is written is to be on stable storage before the end.
    pub(super) fn start<G: MemoryGuard>(
        command: Command,
        memory: &G,
        durable: bool,
        serial: &[u8],
    ) -> (Self, Next<G>) {
        let mut progress = Self { durable, ..Self::default() };
        let span = |pieces| Span::new(memory.clone(), pieces);
        let next = match command {
            Command::Read { at, into } => read(at, span(into)),
            Command::Write { at, from } => progress.write(at, span(from)),
            Command::Flush => Next::Start(Operation::Sync),
            Command::Discard(ranges) => progress.clear(Purpose::Discard, ranges),
            Command::WriteZeroes(ranges) => progress.clear(Purpose::Zero, ranges),
            Command::GetId { into } => match span(into).fill(serial) {
                Ok(written) => {
                    progress.written = written;
                    Next::Finish(Status::Ok)
                }
                Err(_) => Next::Finish(Status::IoError),
            },
        };
        (progress, next)
    }

    /// The next step after an operation.
    pub(super) fn advance<G: MemoryGuard>(
        &mut self,
        operation: Operation<G>,
        result: Result<u64, Errno>,
    ) -> Next<G> {
        let moved = match result {
            Ok(moved) => moved,
            Err(Errno::INTR | Errno::AGAIN | Errno::CANCELED) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                return Next::Start(operation);
            }
            Err(errno) => return self.failed(&operation, errno),
        };
        match operation {
            Operation::Read { at, mut into } => {
                let moved = moved.min(into.len());
                if moved == 0 {
                    return Next::Fail(Failure::End { what: "reading", at });
                }
                self.written += moved;
                into.advance(moved);
                read(at + moved, into)
            }
            Operation::Write { at, mut from } => {
                let moved = moved.min(from.len());
                if moved == 0 {
                    return Next::Fail(Failure::End { what: "writing", at });
                }
                from.advance(moved);
                self.write(at + moved, from)
            }
            Operation::Zeros { at, len } => {
                let moved = moved.min(len);
                match len - moved {
                    _ if moved == 0 => Next::Fail(Failure::End { what: "writing", at }),
                    0 => self.next_range(),
                    left => Next::Start(Operation::Zeros { at: at + moved, len: left }),
                }
            }
            Operation::Sync | Operation::Ask(_) => Next::Finish(Status::Ok),
            Operation::Allocate { .. } => self.next_range(),
        }
    }

    fn failed<G>(&mut self, operation: &Operation<G>, errno: Errno) -> Next<G> {
        let (what, at) = match operation {
            Operation::Read { at, .. } => ("reading", *at),
            Operation::Write { at, .. } | Operation::Zeros { at, .. } => ("writing", *at),
            Operation::Sync | Operation::Ask(_) => ("flushing", 0),
            Operation::Allocate { at, .. } => {
                // A file system or block device may not know this way, or not for this range.
                if matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) {
                    return self.next_method();
                }
                ("clearing", *at)
            }
        };
        Next::Fail(Failure::Errno { what, at, errno })
    }

    fn write<G: MemoryGuard>(&self, at: u64, from: Span<G>) -> Next<G> {
        if from.is_empty() {
            return self.stored();
        }
        Next::Start(Operation::Write { at, from })
    }

    fn clear<G>(&mut self, purpose: Purpose, mut ranges: Vec<Range>) -> Next<G> {
        ranges.retain(|range| range.len > 0);
        ranges.reverse();
        let mut ranges = Ranges { purpose, method: Method::Punch, left: ranges };
        let operation = ranges.try_last();
        self.ranges = Some(ranges);
        operation.map_or_else(|| self.stored(), Next::Start)
    }

    fn next_range<G>(&mut self) -> Next<G> {
        let operation = self.ranges.as_mut().and_then(|ranges| {
            ranges.left.pop();
            ranges.try_last()
        });
        operation.map_or_else(|| self.stored(), Next::Start)
    }

    fn next_method<G>(&mut self) -> Next<G> {
        let Some(ranges) = &mut self.ranges else { return self.stored() };
        let operation = match (ranges.purpose, ranges.method) {
            // A discard is a hint: what is not given back stays.
            (Purpose::Discard, _) | (_, Method::Write) => return self.next_range(),
            (Purpose::Zero, Method::Punch) => ranges.by(Method::Zero),
            (Purpose::Zero, Method::Zero) => ranges.by(Method::Write),
        };
        operation.map_or_else(|| self.stored(), Next::Start)
    }

    /// The kernel has everything that is written.
    fn stored<G>(&self) -> Next<G> {
        if self.durable { Next::Start(Operation::Sync) } else { Next::Finish(Status::Ok) }
    }
}

impl Ranges {
    /// Tries the best way for the next range, if there is one.
    fn try_last<G>(&mut self) -> Option<Operation<G>> {
        let unmap = self.left.last().is_some_and(|range| range.unmap);
        let punch = unmap || self.purpose == Purpose::Discard;
        self.by(if punch { Method::Punch } else { Method::Zero })
    }

    fn by<G>(&mut self, method: Method) -> Option<Operation<G>> {
        let &Range { at, len, .. } = self.left.last()?;
        self.method = method;
        let mode = match method {
            Method::Punch => FallocateFlags::PUNCH_HOLE,
            Method::Zero => FallocateFlags::ZERO_RANGE,
            Method::Write => return Some(Operation::Zeros { at, len }),
        };
        let mode = mode | FallocateFlags::KEEP_SIZE;
        Some(Operation::Allocate { at, len, mode })
    }
}

fn read<G: MemoryGuard>(at: u64, into: Span<G>) -> Next<G> {
    if into.is_empty() {
        return Next::Finish(Status::Ok);
    }
    Next::Start(Operation::Read { at, into })
}

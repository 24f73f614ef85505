use std::sync::{Mutex, MutexGuard};

use rustix::io::Errno;

use super::*;
use crate::devices::virtio::blk::engine::Operation;

/// An engine whose operations end when and how the test says.
#[derive(Clone, Default)]
pub(super) struct Script(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    started: VecDeque<(Id, Operation<Memory>)>,
    done: VecDeque<Completion<Memory>>,
    /// What was started since the last submission.
    fresh: usize,
    /// The sizes of submissions that were not empty.
    submissions: Vec<usize>,
    /// What every transfer moves as soon as it is submitted, if there is a hurry.
    instant: Option<u64>,
}

impl Script {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// What the device has under way, oldest first, in short.
    pub(super) fn started(&self) -> Vec<String> {
        self.lock().started.iter().map(|(_, operation)| short(operation)).collect()
    }

    pub(super) fn submissions(&self) -> Vec<usize> {
        self.lock().submissions.clone()
    }

    /// From now on, every operation ends at once, after it moved so many bytes.
    pub(super) fn hurry(&self, bytes: u64) {
        self.lock().instant = Some(bytes);
    }

    /// Ends an operation.
    pub(super) fn end(&self, index: usize, result: Result<u64, Errno>) {
        let mut state = self.lock();
        let (id, operation) = state.started.remove(index).unwrap();
        state.done.push_back(Completion { id, operation, result });
    }
}

/// An operation in a few words; numbers are bytes.
fn short(operation: &Operation<Memory>) -> String {
    match operation {
        Operation::Read { at, into } => format!("read {at}+{}", into.len()),
        Operation::Write { at, from } => format!("write {at}+{}", from.len()),
        Operation::Zeros { at, len } => format!("zeros {at}+{len}"),
        Operation::Sync => "sync".into(),
        Operation::Ask(_) => "ask".into(),
        Operation::Allocate { at, len, mode } => {
            use rustix::fs::FallocateFlags;
            assert!(mode.contains(FallocateFlags::KEEP_SIZE));
            let punch = mode.contains(FallocateFlags::PUNCH_HOLE);
            format!("{} {at}+{len}", if punch { "punch" } else { "zero" })
        }
    }
}

/// What a kernel without troubles would return.
fn success(operation: &Operation<Memory>) -> u64 {
    match operation {
        Operation::Read { into: span, .. } | Operation::Write { from: span, .. } => span.len(),
        Operation::Zeros { len, .. } => *len,
        Operation::Sync | Operation::Ask(_) | Operation::Allocate { .. } => 0,
    }
}

impl Engine<Memory> for Script {
    fn start(&mut self, id: Id, operation: Operation<Memory>) {
        let mut state = self.lock();
        state.started.push_back((id, operation));
        state.fresh += 1;
    }

    fn submit(&mut self) {
        let mut state = self.lock();
        let fresh = std::mem::take(&mut state.fresh);
        if fresh > 0 {
            state.submissions.push(fresh);
        }
        if let Some(bytes) = state.instant {
            while let Some((id, operation)) = state.started.pop_front() {
                state.done.push_back(Completion { id, operation, result: Ok(bytes) });
            }
        }
    }

    fn completed(&mut self) -> Option<Completion<Memory>> {
        self.lock().done.pop_front()
    }

    /// The oldest operation succeeds.
    fn wait(&mut self) {
        let oldest = self.lock().started.front().map(|(_, operation)| success(operation));
        if let Some(result) = oldest {
            self.end(0, Ok(result));
        }
    }
}

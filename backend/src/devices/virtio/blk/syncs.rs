//! Getting what was written to stable storage, and knowing what never gets there.

use std::sync::Arc;

use rustix::io::Errno;

use super::engine::{Id, Operation, Witness};
use crate::devices::virtio::Words;

/// The requests that wait for stable storage.
///
/// There is one fdatasync at a time: of two that overlap, the kernel tells only one that something
/// could not be written, and the other one's requests would be acknowledged. Who comes while one is
/// under way shares the next one, since that begins behind everything that they are about.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// Whom the operation under way is for. It bears the number of the first of them.
    group: Vec<Id>,
    /// Who waits for the next one, oldest first.
    waiting: Vec<Id>,
    /// What was given back may never get to stable storage, as the kernel said.
    has_lost: bool,
    /// Where that is noted.
    words: Option<Words>,
    /// Asked before the next fdatasync what a predecessor may have been told of.
    ask: Option<Witness>,
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Step<G> {
    Start(Id, Operation<G>),
    /// These can't succeed any more.
    Fail(Vec<Id>),
}

/// What the end of an operation is for those who waited for it.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) group: Vec<Id>,
    pub(super) result: Result<u64, Errno>,
    /// It is the first that tells of a loss.
    pub(super) loses: bool,
}

impl Syncs {
    /// A request waits until what was written so far is on stable storage.
    pub(super) fn join(&mut self, id: Id) {
        self.waiting.push(id);
    }

    pub(super) fn are_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Begins with those who wait, unless there is an operation under way.
    pub(super) fn next<G>(&mut self) -> Option<Step<G>> {
        if !self.group.is_empty() {
            return None;
        }
        let first = *self.waiting.first()?;
        let waiting = std::mem::take(&mut self.waiting);
        if self.has_lost {
            return Some(Step::Fail(waiting));
        }
        self.group = waiting;
        let operation = self.ask.clone().map_or(Operation::Sync, Operation::Ask);
        Some(Step::Start(first, operation))
    }

    /// The operation under way is done.
    ///
    /// The kernel says once that it could not write what it had taken, forgets that, and calls the
    /// next attempt a success. So nothing succeeds any more after that, and neither does what was
    /// written while that attempt was under way.
    pub(super) fn end<G>(&mut self, operation: &Operation<G>, result: Result<u64, Errno>) -> Ended {
        let mut group = std::mem::take(&mut self.group);
        let mut loses = false;
        match result {
            Ok(_) if matches!(operation, Operation::Ask(_)) => {
                self.ask = None;
                group.append(&mut self.waiting);
                self.waiting = std::mem::take(&mut group);
            }
            Ok(_) | Err(Errno::INTR | Errno::AGAIN | Errno::CANCELED) => {}
            Err(_) => {
                loses = true;
                self.has_lost = true;
                if let Some(words) = &self.words {
                    words.set(0, 1);
                }
            }
        }
        Ended { group, result, loses }
    }

    /// Forgets whom `keep` does not want among those who wait.
    pub(super) fn retain(&mut self, keep: impl FnMut(&Id) -> bool) {
        self.waiting.retain(keep);
    }

    /// From now on, a loss is noted there; or was before.
    pub(super) fn set_words(&mut self, words: Words) {
        self.has_lost = words.get(0) != 0;
        self.words = Some(words);
    }

    /// A predecessor may have been told of a loss, and of it only the witness knows.
    pub(super) fn ask(&mut self, witness: &Witness) {
        self.ask = Some(Arc::clone(witness));
    }
}

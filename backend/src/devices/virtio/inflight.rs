//! What a device has taken from its queues and not given back, kept where it outlives the process.
//!
//! The driver's rings do not tell it: requests end in any order, and an entry of the available ring
//! is gone after a round. So a queue has a word for each descriptor, which says whether the request
//! that starts there was taken and when, and a word for the requests that are being given back: the
//! driver sees them from the store of the used ring's index on, and a process that is killed behind
//! that store has not noted yet that they are gone. It is the way of vhost-user for split queues
//! ("Inflight I/O tracking").
//!
//! From the words and the used ring's index follows where the queue is: what was given back is what
//! the driver sees, and what was taken is that and what is in flight.
//!
//! A queue that is served in order needs no word for each descriptor: what was taken and not given
//! back are the next entries of the available ring, which a driver can't have reused.

use std::cmp::Ordering as CmpOrdering;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use super::queue::QueueError;
use crate::state::Scratch;

/// Some of the words that outlive the process. Each store is on its own.
#[derive(Clone, Debug)]
pub struct Words {
    scratch: Scratch,
    first: usize,
    len: usize,
}

impl Words {
    /// All of them.
    #[must_use]
    pub fn new(scratch: Scratch) -> Self {
        Self { first: 0, len: scratch.len(), scratch }
    }

    /// Takes so many away from the front. There are as many.
    pub(super) fn take(&mut self, len: usize) -> Self {
        let taken = Self { scratch: self.scratch.clone(), first: self.first, len };
        self.first += len;
        self.len -= len;
        taken
    }

    /// Reads a word.
    ///
    /// # Panics
    /// If there is no such word.
    #[must_use]
    pub fn get(&self, word: usize) -> u64 {
        assert!(word < self.len, "word {word} of {}", self.len);
        self.scratch.get(self.first + word)
    }

    /// Stores a word. When it is there, so is everything that was stored before.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn set(&self, word: usize, value: u64) {
        assert!(word < self.len, "word {word} of {}", self.len);
        super::crash::point();
        self.scratch.set(self.first + word, value);
    }
}

/// What is known of one queue.
#[derive(Debug)]
pub struct Record {
    /// [`START`], [`RETURN`], and one for each descriptor if the queue is not served in order.
    words: Words,
    /// When the next request is taken, of all queues of the device.
    clock: Arc<AtomicU64>,
}

/// The [`Begun`].
const START: usize = 0;
/// The [`Return`].
const RETURN: usize = 1;
const DESCRIPTORS: usize = 2;

/// How many words the record of a queue of so many descriptors has.
#[must_use]
pub fn record_words(size: u16, in_order: bool) -> usize {
    DESCRIPTORS + if in_order { 0 } else { usize::from(size) }
}

/// Why a queue can't be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// The driver wrote to the used ring, which is the device's.
    #[error("the used ring's index is {found}, and not {expected}")]
    UsedIndex {
        /// What it is.
        found: u16,
        /// What the device left there.
        expected: u16,
    },
    /// What is noted can't be.
    #[error("the record of the requests in flight is damaged")]
    Damaged,
}

impl Record {
    /// The record in these words.
    pub(super) fn new(words: Words, clock: Arc<AtomicU64>) -> Self {
        Self { words, clock }
    }

    /// How it stands to a start of the queue. Starts are numbered in their order, from 1 on.
    pub(super) fn about(&self, start: u64) -> About {
        let Begun { start: noted, whole } = Begun::of(self.words.get(START));
        match noted.cmp(&start) {
            CmpOrdering::Less => About::Earlier,
            CmpOrdering::Equal if whole => About::This,
            CmpOrdering::Equal => About::Earlier,
            CmpOrdering::Greater => About::Later,
        }
    }

    /// The latest start that it knows of; 0 if there was none.
    pub(super) fn latest_start(&self) -> u64 {
        Begun::of(self.words.get(START)).start
    }

    /// Begins anew: the used ring's index is this, and these requests were taken before.
    pub(super) fn begin(&self, start: u64, used: u16, in_flight: impl Iterator<Item = u16>) {
        // What it was about before, it is not any more; this is not yet begun.
        self.words.set(START, Begun { start, whole: false }.word());
        for head in 0..self.descriptors() {
            self.words.set(DESCRIPTORS + head, 0);
        }
        if self.descriptors() > 0 {
            for head in in_flight {
                // It was found to be one when it was taken.
                let _ = self.take(head);
            }
        }
        self.words.set(RETURN, Return { used, count: 0, last: 0 }.word());
        self.words.set(START, Begun { start, whole: true }.word());
    }

    /// A request is taken.
    ///
    /// # Errors
    /// [`QueueError::Twice`]: it is in flight already.
    pub(super) fn take(&self, head: u16) -> Result<(), QueueError> {
        let Some(place) = self.place(head) else { return Ok(()) };
        if Entry::of(self.words.get(place)).taken.is_some() {
            return Err(QueueError::Twice(head));
        }
        // Only this process's one thread counts.
        let now = self.clock.load(Ordering::Relaxed);
        self.clock.store(now + 1, Ordering::Relaxed);
        self.words.set(place, Entry { taken: Some(now), next: 0 }.word());
        Ok(())
    }

    /// It is as if the request had not been taken.
    pub(super) fn untake(&self, head: u16) {
        if let Some(place) = self.place(head) {
            self.words.set(place, 0);
        }
    }

    /// The next store of the used ring's index, which is `used` now, gives these requests back.
    pub(super) fn begin_return(&self, used: u16, requests: &[(u16, u32)]) {
        let Some(&(last, _)) = requests.last().filter(|_| self.descriptors() > 0) else { return };
        for pair in requests.windows(2) {
            let [(next, _), (head, _)] = *pair else { continue };
            if let Some(place) = self.place(head) {
                let entry = Entry::of(self.words.get(place));
                self.words.set(place, Entry { next, ..entry }.word());
            }
        }
        let count = u16::try_from(requests.len()).unwrap_or(u16::MAX);
        self.words.set(RETURN, Return { used, count, last }.word());
    }

    /// They are the driver's.
    pub(super) fn end_return(&self) {
        if self.descriptors() > 0 {
            // What is damaged is found when somebody else goes on with it.
            let _ = self.finish(Return::of(self.words.get(RETURN)));
        }
    }

    /// Goes on where a process was killed, with the used ring's index as the driver sees it. Returns
    /// what is in flight, oldest first, with the time at which it was taken.
    ///
    /// # Errors
    /// [`RecordError`].
    pub(super) fn recover(&self, used: u16, size: u16) -> Result<Vec<(u64, u16)>, RecordError> {
        if self.descriptors() == 0 {
            return Ok(Vec::new());
        }
        let noted = Return::of(self.words.get(RETURN));
        if used == noted.end() {
            self.finish(noted)?;
        } else if used == noted.used {
            // The driver has seen nothing of it.
            self.words.set(RETURN, Return { count: 0, ..noted }.word());
        } else {
            return Err(RecordError::UsedIndex { found: used, expected: noted.end() });
        }
        let heads = 0..u16::try_from(self.descriptors()).unwrap_or(u16::MAX);
        let mut in_flight: Vec<_> =
            heads.filter_map(|head| Some((self.when(head)?, head))).collect();
        in_flight.sort_unstable();
        if in_flight.iter().any(|(_, head)| *head >= size) {
            return Err(RecordError::Damaged);
        }
        if let Some((last, _)) = in_flight.last() {
            self.clock.fetch_max(last + 1, Ordering::Relaxed);
        }
        Ok(in_flight)
    }

    /// Notes that requests are gone. Every one keeps its link until the last step, since this may be
    /// begun anew at any point.
    fn finish(&self, noted: Return) -> Result<(), RecordError> {
        let mut head = noted.last;
        for _ in 0..noted.count {
            let place = self.place(head).ok_or(RecordError::Damaged)?;
            let entry = Entry::of(self.words.get(place));
            self.words.set(place, Entry { taken: None, ..entry }.word());
            head = entry.next;
        }
        if noted.count > 0 {
            let done = Return { used: noted.end(), count: 0, last: 0 };
            self.words.set(RETURN, done.word());
        }
        Ok(())
    }

    fn when(&self, head: u16) -> Option<u64> {
        Entry::of(self.words.get(self.place(head)?)).taken
    }

    fn place(&self, head: u16) -> Option<usize> {
        let head = usize::from(head);
        (head < self.descriptors()).then_some(DESCRIPTORS + head)
    }

    fn descriptors(&self) -> usize {
        self.words.len - DESCRIPTORS
    }
}

/// What a record knows of a start of its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About {
    /// The queue has not been served since.
    Earlier,
    /// All of it.
    This,
    /// The queue was set up anew since.
    Later,
}

/// What the other words are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Begun {
    start: u64,
    /// Whether they are all there.
    whole: bool,
}

impl Begun {
    fn of(word: u64) -> Self {
        Self { start: word >> 1, whole: word & 1 != 0 }
    }

    fn word(self) -> u64 {
        self.start << 1 | u64::from(self.whole)
    }
}

/// The word of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    /// When the request that starts here was taken, while it is in flight.
    taken: Option<u64>,
    /// Another request that is given back together with this one.
    next: u16,
}

const IN_FLIGHT: u64 = 1 << 63;
/// At ten million requests a second, this lasts for five months; then a recovery may begin
/// requests anew in another order than that in which they were taken.
const TIME: u64 = (1 << 47) - 1;

impl Entry {
    fn of(word: u64) -> Self {
        let taken = (word & IN_FLIGHT != 0).then_some(word >> 16 & TIME);
        Self { taken, next: low(word) }
    }

    fn word(self) -> u64 {
        let taken = self.taken.map_or(0, |taken| IN_FLIGHT | (taken & TIME) << 16);
        taken | u64::from(self.next)
    }
}

/// Requests that are being given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Return {
    /// The used ring's index before.
    used: u16,
    /// How many they are; 0 if none.
    count: u16,
    /// The last of them, by the index of its first descriptor. It links to the one before.
    last: u16,
}

impl Return {
    fn of(word: u64) -> Self {
        Self { used: low(word), count: low(word >> 16), last: low(word >> 32) }
    }

    fn word(self) -> u64 {
        u64::from(self.used) | u64::from(self.count) << 16 | u64::from(self.last) << 32
    }

    /// The used ring's index behind them.
    fn end(self) -> u16 {
        self.used.wrapping_add(self.count)
    }
}

fn low(word: u64) -> u16 {
    let [low, high, ..] = word.to_le_bytes();
    u16::from_le_bytes([low, high])
}

#[cfg(test)]
mod tests;

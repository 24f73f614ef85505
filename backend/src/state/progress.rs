//! How far a stream has come, as the kernel records it.
//!
//! There are two records. One counts: its base, plus what the kernel has written to its header. The
//! other one is prepared for the next call, and then one store makes it the one that counts.

use super::memory::{Memory, WORD};
use super::socket::{self, HEADER_WORDS, Transferred};
use super::{StateError, checksum};

/// One direction of a stream.
#[derive(Debug)]
pub(super) struct Progress {
    /// The first of its words.
    first: usize,
    /// Which record counts.
    second: bool,
}

/// Words of a record: base, keys before, keys with the call's, the bytes asked for, a CRC of these,
/// and the header.
const HEADER_WORD: usize = 5;
const RECORD_WORDS: usize = HEADER_WORD + HEADER_WORDS;

/// Words that a direction needs.
pub(super) const WORDS: usize = 1 + 2 * RECORD_WORDS;

/// Larger counts of bytes or anything else are damage: nobody lives to see them.
pub(super) const MAX_COUNT: u64 = 1 << 62;

/// Bytes, and descriptors' keys, since the file was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) bytes: u64,
    pub(super) keys: u64,
}

impl Progress {
    /// Of a new file, whose words are zeros.
    pub(super) fn new(memory: &Memory, first: usize) -> Self {
        let mut progress = Self { first, second: true };
        progress.prepare(memory, Position::default(), 0, 0);
        progress
    }

    /// Of a file that may hold anything.
    pub(super) fn load(memory: &Memory, first: usize) -> Result<(Self, Position), StateError> {
        let damaged = StateError::Damaged("the progress of a stream");
        let second = match memory.get(first) {
            0 => false,
            1 => true,
            _ => return Err(damaged),
        };
        let progress = Self { first, second };
        let record = progress.record(second);
        let [bytes, keys, keys_with, asked, crc] =
            std::array::from_fn(|word| memory.get(record + word));
        let expected = checksum::of_words([bytes, keys, keys_with, asked]);
        let Transferred { bytes: done, fds } =
            socket::recorded(memory, record + HEADER_WORD).unwrap_or_default();
        let done = u64::from(done);
        let intact = checksum::matches(crc, expected) && done <= asked && bytes <= MAX_COUNT;
        let end = intact.then(|| bytes + done).ok_or(damaged)?;
        Ok((progress, Position { bytes: end, keys: if fds { keys_with } else { keys } }))
    }

    /// Makes a record count that says: at `position`, about to ask for so many bytes with so many keys.
    /// Returns the word of the header for the call.
    pub(super) fn prepare(
        &mut self,
        memory: &Memory,
        position: Position,
        keys: u64,
        asked: usize,
    ) -> usize {
        let second = !self.second;
        let record = self.record(second);
        let words = [position.bytes, position.keys, position.keys + keys, asked as u64];
        let [bytes, keys, keys_with, asked] = words;
        let words = [bytes, keys, keys_with, asked, checksum::of_words(words)];
        memory.write(record * WORD, words.map(u64::to_ne_bytes).as_flattened());
        socket::prepare(memory, record + HEADER_WORD);
        memory.set(self.first, second.into());
        self.second = second;
        record + HEADER_WORD
    }

    fn record(&self, second: bool) -> usize {
        self.first + 1 + if second { RECORD_WORDS } else { 0 }
    }
}

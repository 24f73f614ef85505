//! What has been committed: one of two records, and the word that says which.

use super::memory::{Memory, WORD};
use super::progress::{MAX_COUNT, Position};
use super::{StateError, StreamId, checksum};

/// Words of a record. Those that this version does not use are zeros, and mean what they mean in the
/// version that uses them: nothing.
const RECORD_WORDS: usize = 32;
const CRC_WORD: usize = RECORD_WORDS - 1;

/// Words that both need, with the one that decides.
pub(super) const WORDS: usize = 1 + 2 * RECORD_WORDS;

/// The committed state, but for what it refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    /// Counts commits. Its lowest bit says which record it is.
    pub(super) generation: u64,
    /// The serial number of the activity that was committed last.
    pub(super) finished: u64,
    /// Two bits for each section, see `sections`.
    pub(super) sections: u64,
    pub(super) streams: [StreamRecord; StreamId::ALL.len()],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct StreamRecord {
    /// All up to here is done.
    pub(super) taken: Position,
    /// How many messages that was.
    pub(super) messages: u64,
    /// Where the bytes to send begin and end.
    pub(super) outbox_start: u64,
    pub(super) outbox_end: u64,
    /// In how many frames they are.
    pub(super) frames: u32,
    /// In which half of the area they are.
    pub(super) second_half: bool,
}

impl Record {
    /// Makes all of this true at once, with what it refers to.
    pub(super) fn store(&self, memory: &Memory, first: usize) {
        let place = first + 1 + if self.generation & 1 == 1 { RECORD_WORDS } else { 0 };
        let mut words = [0; RECORD_WORDS];
        words[0] = self.generation;
        words[1] = self.finished;
        words[2] = self.sections;
        for (index, stream) in self.streams.iter().enumerate() {
            let place = 3 + index * StreamRecord::WORDS;
            words[place..place + StreamRecord::WORDS].copy_from_slice(&stream.words());
        }
        words[CRC_WORD] = Self::crc(&words);
        memory.write(place * WORD, words.map(u64::to_ne_bytes).as_flattened());
        memory.set(first, self.generation);
    }

    /// Of a file that may hold anything.
    pub(super) fn load(memory: &Memory, first: usize) -> Result<Self, StateError> {
        let generation = memory.get(first);
        let place = first + 1 + if generation & 1 == 1 { RECORD_WORDS } else { 0 };
        let words: [u64; RECORD_WORDS] = std::array::from_fn(|word| memory.get(place + word));
        if words[0] != generation || !checksum::matches(words[CRC_WORD], Self::crc(&words)) {
            return Err(StateError::Damaged("the committed record"));
        }
        let stream = |index: usize| {
            let place = 3 + index * StreamRecord::WORDS;
            let words = words[place..].first_chunk().expect("there is room for all streams");
            StreamRecord::parse(words)
        };
        let streams: [StreamRecord; _] = std::array::from_fn(stream);
        if !streams.iter().all(StreamRecord::is_possible) {
            return Err(StateError::Damaged("the committed record"));
        }
        Ok(Self { generation, finished: words[1], sections: words[2], streams })
    }

    fn crc(words: &[u64; RECORD_WORDS]) -> u64 {
        let words: &[u64; CRC_WORD] = words.first_chunk().expect("all but the CRC's");
        checksum::of_words(*words)
    }
}

impl StreamRecord {
    const WORDS: usize = 6;

    fn words(&self) -> [u64; Self::WORDS] {
        [
            self.taken.bytes,
            self.taken.keys,
            self.messages,
            self.outbox_start,
            self.outbox_end,
            u64::from(self.frames) | u64::from(self.second_half) << 32,
        ]
    }

    /// Nobody counts further.
    fn is_possible(&self) -> bool {
        let Position { bytes, keys } = self.taken;
        let counts = [bytes, keys, self.messages, self.outbox_start, self.outbox_end];
        counts.iter().all(|count| *count <= MAX_COUNT)
    }

    fn parse(words: &[u64; Self::WORDS]) -> Self {
        let &[bytes, keys, messages, outbox_start, outbox_end, frames] = words;
        let taken = Position { bytes, keys };
        let second_half = frames >> 32 & 1 == 1;
        let frames = (frames & 0xffff_ffff) as u32;
        Self { taken, messages, outbox_start, outbox_end, frames, second_half }
    }
}

//! What is saved of a function: for each section two slots, of which the record names one.

use thiserror::Error;

use super::layout::{Area, Layout};
use super::memory::{Memory, WORD};
use super::{SectionId, checksum};

/// A slot begins with: the section's number, its version in the second 16 bits and the oldest version
/// whose readers understand it in the third; its length in bytes; a CRC of these two words and the
/// content.
const HEADER_WORDS: usize = 8;
const HEADER: usize = HEADER_WORDS * WORD;
const VERSION: u64 = 1;
const OLDEST_READER: u64 = 1;

/// Why a section is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SectionError {
    /// Its checksum is wrong, or it is another section.
    #[error("it is damaged")]
    Damaged,
    /// It needs a later version of this program.
    #[error("it is of a later version")]
    Newer,
    /// It was longer than there is room for, so it was not saved.
    #[error("it was too long to be saved")]
    TooLong,
}

/// What the record says of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Absent = 0,
    First = 1,
    Second = 2,
    Lost = 3,
}

/// The sections' states in one word, two bits each. Those of sections that this version does not know
/// are 0 when it commits: what they were is not true any more.
#[derive(Debug, Default)]
pub(super) struct Sections(pub(super) u64);

impl Sections {
    /// Writes a section to the slot that does not count in what is committed. It does when this word
    /// does.
    pub(super) fn write(
        &mut self,
        committed: &Self,
        (memory, layout): (&Memory, &Layout),
        id: SectionId,
        bytes: &[u8],
    ) {
        let second = committed.get(id) == State::First;
        let slot = layout.section(id).half(second);
        if bytes.len() > slot.length - HEADER {
            self.set(id, State::Lost);
            return;
        }
        let mut words = [0; HEADER_WORDS];
        words[0] = id.index() as u64 | VERSION << 16 | OLDEST_READER << 32;
        words[1] = bytes.len() as u64;
        words[2] = crc(words[0], words[1], bytes);
        memory.write(slot.start + HEADER, bytes);
        memory.write(slot.start, words.map(u64::to_ne_bytes).as_flattened());
        self.set(id, if second { State::Second } else { State::First });
    }

    /// Reads a section out of memory that may hold anything.
    pub(super) fn read(
        &self,
        memory: &Memory,
        layout: &Layout,
        id: SectionId,
    ) -> Result<Option<Vec<u8>>, SectionError> {
        match self.get(id) {
            State::Absent => Ok(None),
            State::First => read_slot(memory, layout.section(id).half(false), id).map(Some),
            State::Second => read_slot(memory, layout.section(id).half(true), id).map(Some),
            State::Lost => Err(SectionError::TooLong),
        }
    }

    fn get(&self, id: SectionId) -> State {
        match self.0 >> (2 * id.index()) & 3 {
            0 => State::Absent,
            1 => State::First,
            2 => State::Second,
            _ => State::Lost,
        }
    }

    fn set(&mut self, id: SectionId, state: State) {
        let shift = 2 * id.index();
        self.0 = self.0 & !(3 << shift) | (state as u64) << shift;
    }
}

fn read_slot(memory: &Memory, slot: Area, id: SectionId) -> Result<Vec<u8>, SectionError> {
    let [kind, length, expected] = std::array::from_fn(|word| memory.get(slot.first_word() + word));
    if kind & 0xffff != id.index() as u64 {
        return Err(SectionError::Damaged);
    }
    let length_here = usize::try_from(length).ok().filter(|length| *length <= slot.length - HEADER);
    let mut bytes = vec![0; length_here.ok_or(SectionError::Damaged)?];
    memory.read(slot.start + HEADER, &mut bytes);
    if !checksum::matches(expected, crc(kind, length, &bytes)) {
        return Err(SectionError::Damaged);
    }
    if kind >> 32 & 0xffff > VERSION {
        return Err(SectionError::Newer);
    }
    Ok(bytes)
}

fn crc(kind: u64, length: u64, bytes: &[u8]) -> u64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update([kind, length].map(u64::to_ne_bytes).as_flattened());
    hasher.update(bytes);
    hasher.finalize().into()
}

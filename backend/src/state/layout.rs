//! Where everything is in a state file: a header with a table of areas.
//!
//! | word | what |
//! |---|---|
//! | 0 | [`MAGIC`], stored last |
//! | 1 | the layout's version, and in the upper half the oldest version whose readers understand it |
//! | 2 | the number of areas |
//! | 3 | a CRC of words 1, 2 and the table |
//! | 8.. | the table: for each area its kind, 16 bits of flags and its index in one word, then where it begins and how long it is, in bytes, and a word that is zero |
//!
//! Another version of this program may add areas, and make those that there are longer. It marks as
//! [`OPTIONAL`] what those that don't know it may leave alone.

use super::memory::{Memory, WORD};
use super::{SectionId, StateError, StreamId, checksum};

/// This program's layout.
pub(super) const VERSION: u32 = 1;
/// The oldest layout whose readers understand this one.
const OLDEST_READER: u32 = 1;

/// "barkeep" and a zero.
const MAGIC: u64 = u64::from_le_bytes(*b"barkeep\0");
const MAGIC_WORD: usize = 0;
const VERSION_WORD: usize = 1;
const COUNT_WORD: usize = 2;
const CRC_WORD: usize = 3;
const TABLE_WORD: usize = 8;
const ENTRY_WORDS: usize = 4;

/// Whoever does not know this area can do without it.
const OPTIONAL: u64 = 1 << 16;

/// Areas begin at multiples of it, and the header has one.
const PAGE: usize = 4096;
const MAX_AREAS: usize = (PAGE / WORD - TABLE_WORD) / ENTRY_WORDS;

/// Words of the area with the words that decide.
pub(super) const CONTROL_WORDS: usize = PAGE / WORD;

/// The longest message that there is room for, in bytes.
pub const MAX_FRAME: usize = (1 << 20) + (64 << 10);

/// A part of the file, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) start: usize,
    pub(super) length: usize,
}

impl Area {
    /// The first or second of two parts.
    pub(super) fn half(self, second: bool) -> Self {
        let length = self.length / 2 / WORD * WORD;
        Self { start: self.start + if second { length } else { 0 }, length }
    }

    pub(super) fn first_word(self) -> usize {
        self.start / WORD
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Identity,
    Control,
    Inbox(StreamId),
    Outbox(StreamId),
    /// Two slots.
    Section(SectionId),
    Scratch,
}

/// Where the areas of this version are in one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Layout {
    identity: Area,
    control: Area,
    inboxes: [Area; StreamId::ALL.len()],
    outboxes: [Area; StreamId::ALL.len()],
    sections: [Area; SectionId::ALL.len()],
    scratch: Area,
}

impl Layout {
    /// A new file's, and its length.
    pub(super) fn new(identity: &str, scratch_words: usize) -> (Self, usize) {
        let mut layout = Self::default();
        let mut end = PAGE;
        for kind in Kind::all() {
            let length = kind.least(identity, scratch_words);
            *layout.area_mut(kind) = Area { start: end, length };
            end = (end + length).next_multiple_of(PAGE);
        }
        (layout, end)
    }

    /// What is in the file is no state any more.
    pub(super) fn erase(memory: &Memory) {
        memory.set(MAGIC_WORD, 0);
    }

    /// Makes the file a state, whose areas are prepared.
    pub(super) fn store(&self, memory: &Memory, identity: &str) {
        memory.write(self.identity.start, identity.as_bytes());
        let mut words =
            vec![u64::from(VERSION) | u64::from(OLDEST_READER) << 32, Kind::all().count() as u64];
        let mut table = Vec::new();
        for kind in Kind::all() {
            let Area { start, length } = self.area(kind);
            table.extend([kind.code(), start as u64, length as u64, 0]);
        }
        memory.write(TABLE_WORD * WORD, &bytes_of(&table));
        memory.write(VERSION_WORD * WORD, &bytes_of(&words));
        words.extend(table);
        memory.set(CRC_WORD, crc32fast::hash(&bytes_of(&words)).into());
        memory.set(MAGIC_WORD, MAGIC);
    }

    /// Finds the areas in a file that may hold anything.
    pub(super) fn load(
        memory: &Memory,
        identity: &str,
        scratch_words: usize,
    ) -> Result<Self, StateError> {
        if memory.len() < PAGE || memory.get(MAGIC_WORD) != MAGIC {
            return Err(StateError::NoState);
        }
        let version = memory.get(VERSION_WORD);
        let count = memory.get(COUNT_WORD);
        let table = usize::try_from(count).ok().filter(|count| *count <= MAX_AREAS);
        let table = table.ok_or(StateError::Damaged("the header"))?;
        let table: Vec<u64> =
            (TABLE_WORD..TABLE_WORD + table * ENTRY_WORDS).map(|word| memory.get(word)).collect();
        let words = [&[version, count], table.as_slice()].concat();
        let crc = crc32fast::hash(&bytes_of(&words));
        if !checksum::matches(memory.get(CRC_WORD), crc.into()) {
            return Err(StateError::Damaged("the header"));
        }
        let oldest_reader = version >> 32;
        if oldest_reader > VERSION.into() {
            return Err(StateError::Newer { version: version & 0xffff_ffff, oldest_reader });
        }
        let layout = Self::parse(&table, memory.len())?;
        layout.check(memory, identity, scratch_words)?;
        Ok(layout)
    }

    fn parse(table: &[u64], length: usize) -> Result<Self, StateError> {
        let mut layout = Self::default();
        let mut places = vec![Area { start: 0, length: PAGE }];
        for entry in table.as_chunks::<ENTRY_WORDS>().0 {
            let area = Area::parse(entry[1], entry[2], length);
            let area = area.ok_or(StateError::Damaged("the table of areas"))?;
            places.push(area);
            match Kind::all().find(|kind| kind.code() == entry[0] & !OPTIONAL) {
                Some(kind) if layout.area(kind) == Area::default() => {
                    *layout.area_mut(kind) = area;
                }
                Some(_) => return Err(StateError::Damaged("the table of areas")),
                None if entry[0] & OPTIONAL != 0 => {}
                None => return Err(StateError::UnknownArea(entry[0])),
            }
        }
        places.sort_by_key(|area| area.start);
        let apart = places.is_sorted_by(|one, next| one.start + one.length <= next.start);
        if apart { Ok(layout) } else { Err(StateError::Damaged("the table of areas")) }
    }

    /// Whether the state is that of this function, with room for all that it may need.
    fn check(
        &self,
        memory: &Memory,
        identity: &str,
        scratch_words: usize,
    ) -> Result<(), StateError> {
        let mut found = vec![0; self.identity.length];
        memory.read(self.identity.start, &mut found);
        if found != padded(identity) {
            let found = String::from_utf8_lossy(&found).trim_end_matches('\0').to_owned();
            return Err(StateError::Foreign(found));
        }
        let room = |kind: &Kind| self.area(*kind).length >= kind.least(identity, scratch_words);
        if Kind::all().all(|kind| room(&kind)) { Ok(()) } else { Err(StateError::TooSmall) }
    }

    /// Word 0 of the words that decide.
    pub(super) fn control(&self) -> usize {
        self.control.first_word()
    }

    pub(super) fn control_bytes(&self) -> std::ops::Range<usize> {
        self.control.start..self.control.start + self.control.length
    }

    pub(super) fn inbox(&self, stream: StreamId) -> Area {
        self.area(Kind::Inbox(stream))
    }

    pub(super) fn outbox(&self, stream: StreamId) -> Area {
        self.area(Kind::Outbox(stream))
    }

    pub(super) fn section(&self, section: SectionId) -> Area {
        self.area(Kind::Section(section))
    }

    pub(super) fn scratch(&self) -> Area {
        self.scratch
    }

    fn area(&self, kind: Kind) -> Area {
        match kind {
            Kind::Identity => self.identity,
            Kind::Control => self.control,
            Kind::Inbox(stream) => self.inboxes[stream as usize],
            Kind::Outbox(stream) => self.outboxes[stream as usize],
            Kind::Section(section) => self.sections[section.index()],
            Kind::Scratch => self.scratch,
        }
    }

    fn area_mut(&mut self, kind: Kind) -> &mut Area {
        match kind {
            Kind::Identity => &mut self.identity,
            Kind::Control => &mut self.control,
            Kind::Inbox(stream) => &mut self.inboxes[stream as usize],
            Kind::Outbox(stream) => &mut self.outboxes[stream as usize],
            Kind::Section(section) => &mut self.sections[section.index()],
            Kind::Scratch => &mut self.scratch,
        }
    }
}

impl Kind {
    fn all() -> impl Iterator<Item = Self> {
        [Self::Identity, Self::Control]
            .into_iter()
            .chain(StreamId::ALL.map(Self::Inbox))
            .chain(StreamId::ALL.map(Self::Outbox))
            .chain(SectionId::ALL.map(Self::Section))
            .chain([Self::Scratch])
    }

    /// As the table has it, without flags.
    fn code(self) -> u64 {
        let (kind, index) = match self {
            Self::Identity => (1, 0),
            Self::Control => (2, 0),
            Self::Inbox(stream) => (3, stream as u64),
            Self::Outbox(stream) => (4, stream as u64),
            Self::Section(section) => (5, section.index() as u64),
            Self::Scratch => (6, 0),
        };
        kind | index << 32
    }

    /// The bytes that this version needs.
    fn least(self, identity: &str, scratch_words: usize) -> usize {
        match self {
            Self::Identity => padded(identity).len(),
            Self::Control => CONTROL_WORDS * WORD,
            Self::Inbox(_) => PAGE + MAX_FRAME,
            Self::Outbox(_) => 2 * (PAGE + 2 * MAX_FRAME),
            Self::Section(section) => 2 * (PAGE + section.room()),
            // Some room for a next version's, or for one more queue.
            Self::Scratch => (scratch_words.max(1) * WORD).next_multiple_of(PAGE),
        }
    }
}

impl Area {
    fn parse(start: u64, length: u64, end: usize) -> Option<Self> {
        let (start, length) = (usize::try_from(start).ok()?, usize::try_from(length).ok()?);
        let fits = start.is_multiple_of(PAGE)
            && length.is_multiple_of(WORD)
            && length > 0
            && start.checked_add(length)? <= end;
        fits.then_some(Self { start, length })
    }
}

fn padded(identity: &str) -> Vec<u8> {
    let mut bytes = identity.as_bytes().to_vec();
    bytes.resize(bytes.len().next_multiple_of(WORD).max(WORD), 0);
    bytes
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

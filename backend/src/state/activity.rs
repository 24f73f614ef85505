//! What a process is doing, and what it has cost so far.

use super::StateError;
use super::StreamId;
use super::memory::Memory;
use super::record::Record;

/// What a transaction is made of. Only one is under way at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activity {
    /// The message in the stream's inbox is executed.
    Message(StreamId),
    /// The device is woken by a descriptor of its own, its index.
    Wake(u16),
    /// The device does what it has left to do.
    Work,
    /// An interrupt is unmasked by a descriptor.
    Unmask,
    /// The device reloads what it was made from.
    Reload,
    /// Everything is put back in place after a death.
    Recovery,
}

/// How a predecessor ended, as far as whoever started it knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PreviousEnd {
    /// As it should, or there was none, or nobody knows.
    #[default]
    Orderly,
    /// Of what it did: it crashed, gave up or did not answer any more.
    ByItself,
    /// Somebody has killed it, or the kernel for want of memory, whatever it did.
    FromOutside,
}

/// What something has cost: the deaths in a row of those who did it. One that had its reason outside
/// weighs little beside one of its own, but who dies at every try does not get any number of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Toll(u8);

impl Toll {
    /// Deaths from outside that weigh as much as one of its own.
    const FROM_OUTSIDE: u8 = 16;

    /// Whether it is as much as so many deaths of its own: 15 at most, more are not counted.
    #[must_use]
    pub fn reaches(self, deaths: u32) -> bool {
        u32::from(self.0) >= deaths * u32::from(Self::FROM_OUTSIDE)
    }

    /// With one more death.
    pub(super) fn and(self, end: PreviousEnd) -> Self {
        Self(self.0.saturating_add(match end {
            PreviousEnd::ByItself => Self::FROM_OUTSIDE,
            // Who ends in order ends nothing half-way: this one's supervisor was not there to see it.
            PreviousEnd::FromOutside | PreviousEnd::Orderly => 1,
        }))
    }
}

/// The activity under way and, for each that may be, its [`Toll`].
///
/// | word | what |
/// |---|---|
/// | 0 | the last activity to begin: 16 bits of index, 7 of kind, [`DONE`], 40 bits of serial number. It is under way unless it is marked as done, or the committed record has its number |
/// | 1.. | deaths: 8 bits of toll, 16 to tell one message or wake from another, and the serial number of the last activity that was counted |
#[derive(Debug)]
pub(super) struct Activities {
    first: usize,
    current: u64,
}

/// Wakes with more indices than this share their words.
const WAKE_WORDS: u16 = 128;
const OTHER_WORDS: usize = 6;
/// Words for all of it.
pub(super) const WORDS: usize = 1 + OTHER_WORDS + WAKE_WORDS as usize;

/// It is done, and nothing came of it that had to be committed.
const DONE: u64 = 1 << 23;
const SERIAL_SHIFT: u64 = 24;
const SERIAL_MASK: u64 = u64::MAX >> SERIAL_SHIFT;

impl Activities {
    /// Of a new file, whose words are zeros.
    pub(super) fn new(first: usize) -> Self {
        Self { first, current: 0 }
    }

    /// Of a file that may hold anything. If the last one, who ended like this, died of something, it is
    /// counted, once, and returned with the toll so far.
    pub(super) fn load(
        memory: &Memory,
        first: usize,
        record: &Record,
        end: PreviousEnd,
    ) -> Result<(Self, Option<(Activity, Toll)>), StateError> {
        let activities = Self { first, current: memory.get(first) };
        let Some(activity) = activities.current(record.finished)? else {
            activities.forgive(memory, record);
            return Ok((activities, None));
        };
        let word = activities.deaths_word(activity);
        let mut deaths = Deaths::of(memory.get(word), activity.mark(record));
        if deaths.serial != activities.serial() {
            deaths.toll = deaths.toll.and(end);
            deaths.serial = activities.serial();
            memory.set(word, deaths.word());
        }
        Ok((activities, Some((activity, deaths.toll))))
    }

    /// Something is about to be done that has cost this.
    pub(super) fn begin(&mut self, memory: &Memory, record: &Record, activity: Activity) -> Toll {
        let serial = (self.serial() + 1) & SERIAL_MASK;
        let (kind, index) = activity.code();
        self.current = u64::from(index) | kind << 16 | serial << SERIAL_SHIFT;
        memory.set(self.first, self.current);
        let deaths = memory.get(self.deaths_word(activity));
        Deaths::of(deaths, activity.mark(record)).toll
    }

    /// What is under way is done, with nothing that came of it.
    pub(super) fn end(&mut self, memory: &Memory, record: &Record) {
        self.current |= DONE;
        memory.set(self.first, self.current);
        self.forgive(memory, record);
    }

    /// Nobody has died of it in a row any more: it is done.
    pub(super) fn forgive(&self, memory: &Memory, record: &Record) {
        // What can't be read has never been counted.
        let Ok(Some(activity)) = self.activity() else { return };
        let word = self.deaths_word(activity);
        let deaths = memory.get(word);
        let of_another = Deaths::of(deaths, activity.mark(record)).toll == Toll::default();
        if deaths != 0 && (!of_another || matches!(activity, Activity::Message(_))) {
            memory.set(word, 0);
        }
    }

    pub(super) fn serial(&self) -> u64 {
        self.current >> SERIAL_SHIFT
    }

    fn current(&self, finished: u64) -> Result<Option<Activity>, StateError> {
        let done = self.current & DONE != 0 || self.serial() == finished;
        if done { Ok(None) } else { self.activity() }
    }

    fn activity(&self) -> Result<Option<Activity>, StateError> {
        let index = (self.current & 0xffff) as u16;
        Ok(Some(match self.current >> 16 & 0x7f {
            0 => return Ok(None),
            1 => Activity::Message(StreamId::Client),
            2 => Activity::Message(StreamId::Twin),
            3 => Activity::Wake(index),
            4 => Activity::Work,
            5 => Activity::Unmask,
            6 => Activity::Reload,
            7 => Activity::Recovery,
            _ => return Err(StateError::Damaged("what was under way")),
        }))
    }

    fn deaths_word(&self, activity: Activity) -> usize {
        let place = match activity {
            Activity::Message(stream) => stream as usize,
            Activity::Work => 2,
            Activity::Unmask => 3,
            Activity::Reload => 4,
            Activity::Recovery => 5,
            Activity::Wake(index) => OTHER_WORDS + usize::from(index % WAKE_WORDS),
        };
        self.first + 1 + place
    }
}

impl Activity {
    fn code(self) -> (u64, u16) {
        match self {
            Self::Message(StreamId::Client) => (1, 0),
            Self::Message(StreamId::Twin) => (2, 0),
            Self::Wake(index) => (3, index),
            Self::Work => (4, 0),
            Self::Unmask => (5, 0),
            Self::Reload => (6, 0),
            Self::Recovery => (7, 0),
        }
    }

    /// Differs where the word is the same and what was done was not.
    fn mark(self, record: &Record) -> u16 {
        match self {
            Self::Message(stream) => (record.streams[stream as usize].messages & 0xffff) as u16,
            Self::Wake(index) => index,
            _ => 0,
        }
    }
}

#[derive(Debug)]
struct Deaths {
    toll: Toll,
    mark: u16,
    serial: u64,
}

impl Deaths {
    /// What a word says of whatever has this mark.
    fn of(word: u64, mark: u16) -> Self {
        let [toll, low, high, ..] = word.to_le_bytes();
        let same = mark == u16::from_le_bytes([low, high]);
        Self { toll: Toll(if same { toll } else { 0 }), mark, serial: word >> SERIAL_SHIFT }
    }

    fn word(&self) -> u64 {
        u64::from(self.toll.0) | u64::from(self.mark) << 8 | self.serial << SERIAL_SHIFT
    }
}

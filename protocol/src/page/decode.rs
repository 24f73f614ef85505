//! The decode page: what a function decodes and where its BARs are, as its server keeps it for a client
//! (docs/protocol.md, DECODE_PAGE).
//!
//! One process writes, any number of threads of any process read, and nobody waits for anybody: a seqlock.
//!
//! The writer makes the sequence odd, stores the words, and makes it even again. A reader that finds
//! the same even sequence before and behind its loads has seen the words of one state:
//!
//! - The odd sequence is stored before a release fence, the words behind it. A reader that loads one of
//!   these words and then passes its acquire fence therefore finds at least the odd sequence behind it,
//!   and tries again.
//! - The even sequence is stored with release, and loaded before an acquire fence: who has it sees all
//!   words of its state, or later ones, and the latter is the case above.
//!
//! All accesses are atomic, so that none is a data race, between processes as between threads. Loads are
//! relaxed, with fences of their own, since only those may be used on memory that is mapped read-only. The
//! counters lie outside of the sequence: each is true by itself, and counting disturbs no reader.
//!
//! A writer that dies in the middle leaves an odd sequence, and readers give up after a bounded number
//! of attempts. Whoever writes next ends it: an odd sequence stays odd until that state is complete.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Length of a page in bytes. What this version does not use is zeros.
pub const LENGTH: usize = 4096;
/// BARs of a function.
pub const BARS: usize = 6;

const MAGIC: u64 = u64::from_ne_bytes(*b"bkdecode");
const VERSION: u64 = 1;
/// How often a reader tries. The writer needs tens of nanoseconds, unless it is stopped in the middle.
const ATTEMPTS: u32 = 256;

/// Which word is what.
mod at {
    pub(super) const MAGIC: usize = 0;
    /// Version in the lower half, length in bytes in the upper.
    pub(super) const VERSION: usize = 1;
    pub(super) const SEQUENCE: usize = 2;
    pub(super) const EPOCH: usize = 3;
    pub(super) const READS_UR: usize = 4;
    pub(super) const WRITES_DROPPED: usize = 5;
    pub(super) const MEMORY_FAULTS: usize = 6;
    /// The first of the BARs, of [`BAR_WORDS`] each.
    pub(super) const BARS: usize = 8;
    pub(super) const BAR_WORDS: usize = 4;

    /// Words of a BAR.
    pub(super) const FLAGS: usize = 0;
    pub(super) const ADDRESS: usize = 1;
    pub(super) const SIZE: usize = 2;
    pub(super) const DECODED_AT: usize = 3;
}

const WORDS: usize = at::BARS + BARS * at::BAR_WORDS;
const DECODES: u64 = 1 << 0;
const IO: u64 = 1 << 1;

/// The words of a page that mean something.
type Words = [AtomicU64; WORDS];

/// What a function decodes at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DecodeState {
    /// Moves with every change of what the function claims or of a BAR address, but after the death of
    /// a server's process one number may stand for two states: whoever wants to notice changes
    /// compares [`DecodeReader::sequence`].
    pub epoch: u64,
    /// By index, where the function has one. Of a 64-bit BAR the lower index.
    pub bars: [Option<Bar>; BARS],
}

/// A BAR at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// What its registers say, decoding or not: also what a driver has written there to learn the size.
    pub address: u64,
    /// Length in bytes, not 0.
    pub size: u64,
    /// What kind of addresses these are.
    pub space: Space,
    /// Whether the function claims accesses to it.
    pub decodes: bool,
}

/// An address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Memory.
    Memory,
    /// I/O ports.
    Io,
}

/// A BAR as a page shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShownBar {
    /// The BAR.
    pub bar: Bar,
    /// Where it decoded last, which is its address while it does. `None` if it never did since the page
    /// is there; one that decodes at address 0 counts as such.
    pub decoded_at: Option<u64>,
}

/// A state as a page shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// See [`DecodeState::epoch`].
    pub epoch: u64,
    /// See [`DecodeState::bars`].
    pub bars: [Option<ShownBar>; BARS],
}

/// What the server has completed in the function's name, in all its regions. It begins at 0 with a
/// session, and again when another process of the server goes on with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads completed as Unsupported Request: all ones.
    pub reads_ur: u64,
    /// Writes completed as Unsupported Request: dropped.
    pub writes_dropped: u64,
    /// Memory faults that were forwarded.
    pub memory_faults: u64,
}

/// Writes a page. There is one at a time.
#[derive(Debug)]
pub struct DecodeWriter<W> {
    words: W,
    sequence: u64,
    decoded_at: [u64; BARS],
    state: Option<DecodeState>,
    counters: Option<Counters>,
}

impl<W: AsRef<[AtomicU64]>> DecodeWriter<W> {
    /// Of a page that is zeros, or that another writer has left in whatever state. Until something is
    /// [shown](Self::show) nothing is stored.
    ///
    /// None if there are fewer words than a page has.
    pub fn new(words: W) -> Option<Self> {
        let page = page(&words)?;
        let sequence = page[at::SEQUENCE].load(Ordering::Relaxed);
        // Whichever of them the last writer came to: a BAR did decode there.
        let decoded_at =
            std::array::from_fn(|bar| page[word(bar, at::DECODED_AT)].load(Ordering::Relaxed));
        Some(Self { words, sequence, decoded_at, state: None, counters: None })
    }

    /// Makes the page show this. What it shows already costs no store. `before_store` is called before
    /// each of them, for tests that end the process there.
    pub fn show(&mut self, state: &DecodeState, mut before_store: impl FnMut()) {
        if self.state.as_ref() == Some(state) {
            return;
        }
        let Some(page) = page(&self.words) else { return };
        for (decoded_at, bar) in self.decoded_at.iter_mut().zip(&state.bars) {
            match bar {
                Some(bar) if bar.decodes => *decoded_at = bar.address,
                Some(_) => {}
                None => *decoded_at = 0,
            }
        }
        let mut store = |word: usize, value: u64, order: Ordering| {
            before_store();
            page[word].store(value, order);
        };
        // One that was left odd stays so: nobody has taken the state behind it for complete.
        self.sequence |= 1;
        store(at::SEQUENCE, self.sequence, Ordering::Relaxed);
        // Who loads one of the words below finds this sequence or a later one behind them.
        fence(Ordering::Release);
        store(at::MAGIC, MAGIC, Ordering::Relaxed);
        store(at::VERSION, VERSION | (LENGTH as u64) << 32, Ordering::Relaxed);
        store(at::EPOCH, state.epoch, Ordering::Relaxed);
        for (index, (bar, decoded_at)) in state.bars.iter().zip(self.decoded_at).enumerate() {
            let (flags, address, size) = bar.map_or((0, 0, 0), |bar| bar.words());
            store(word(index, at::FLAGS), flags, Ordering::Relaxed);
            store(word(index, at::ADDRESS), address, Ordering::Relaxed);
            store(word(index, at::SIZE), size, Ordering::Relaxed);
            store(word(index, at::DECODED_AT), decoded_at, Ordering::Relaxed);
        }
        self.sequence = self.sequence.wrapping_add(1);
        // Who loads this sequence sees all words above.
        store(at::SEQUENCE, self.sequence, Ordering::Release);
        self.state = Some(*state);
    }

    /// Makes the page show these counters.
    pub fn count(&mut self, counters: Counters) {
        if self.counters == Some(counters) {
            return;
        }
        let Some(page) = page(&self.words) else { return };
        let Counters { reads_ur, writes_dropped, memory_faults } = counters;
        page[at::READS_UR].store(reads_ur, Ordering::Relaxed);
        page[at::WRITES_DROPPED].store(writes_dropped, Ordering::Relaxed);
        page[at::MEMORY_FAULTS].store(memory_faults, Ordering::Relaxed);
        self.counters = Some(counters);
    }

    /// Makes readers find nothing until something is [shown](Self::show) again, by whoever writes next.
    pub fn suspend(&mut self) {
        let Some(page) = page(&self.words) else { return };
        self.sequence |= 1;
        page[at::SEQUENCE].store(self.sequence, Ordering::Relaxed);
        self.state = None;
    }

    /// The page's memory.
    #[must_use]
    pub fn words(&self) -> &W {
        &self.words
    }
}

/// Reads a page: without locks, allocation or system calls, in a signal handler as anywhere.
///
/// The page may be a hostile process's, and hold anything at any time. Each answer is made of words
/// that were looked at once.
#[derive(Clone, Copy, Debug)]
pub struct DecodeReader<W> {
    words: W,
}

impl<W: AsRef<[AtomicU64]>> DecodeReader<W> {
    /// Of a page that a server has shown something on. None if it is something else than a decode page,
    /// or of a version with another layout.
    pub fn new(words: W) -> Option<Self> {
        let page = page(&words)?;
        let known = page[at::MAGIC].load(Ordering::Relaxed) == MAGIC
            && page[at::VERSION].load(Ordering::Relaxed) & 0xffff_ffff == VERSION;
        known.then_some(Self { words })
    }

    /// What the page shows. None while a write is not complete for longer than a reader has patience:
    /// the writer was stopped in the middle, or has died and nobody has gone on yet.
    pub fn read(&self) -> Option<Shown> {
        self.consistent(|page| {
            let epoch = page[at::EPOCH].load(Ordering::Relaxed);
            let bars = std::array::from_fn(|index| ShownBar::load(page, index));
            Shown { epoch, bars }
        })
    }

    /// One BAR, for less. The outer None is as for [`read`](Self::read), the inner one a BAR that the
    /// function does not have.
    pub fn bar(&self, index: usize) -> Option<Option<ShownBar>> {
        if index >= BARS {
            return Some(None);
        }
        self.consistent(|page| ShownBar::load(page, index))
    }

    /// Moves with every write, so that what was read is still shown as long as it has not: one load.
    /// None while a write is not complete.
    pub fn sequence(&self) -> Option<u64> {
        let sequence = page(&self.words)?[at::SEQUENCE].load(Ordering::Relaxed);
        // What is read behind this is of this state or a later one.
        fence(Ordering::Acquire);
        (sequence & 1 == 0).then_some(sequence)
    }

    /// The counters, each as of some moment of its own.
    pub fn counters(&self) -> Counters {
        let load = |word: usize| page(&self.words).map_or(0, |it| it[word].load(Ordering::Relaxed));
        Counters {
            reads_ur: load(at::READS_UR),
            writes_dropped: load(at::WRITES_DROPPED),
            memory_faults: load(at::MEMORY_FAULTS),
        }
    }

    fn consistent<T>(&self, load: impl Fn(&Words) -> T) -> Option<T> {
        let page = page(&self.words)?;
        for _ in 0..ATTEMPTS {
            let before = page[at::SEQUENCE].load(Ordering::Relaxed);
            if before & 1 == 0 {
                // What is loaded below is of this state or a later one.
                fence(Ordering::Acquire);
                let loaded = load(page);
                // What was loaded above was stored before the sequence below, or that one differs.
                fence(Ordering::Acquire);
                if page[at::SEQUENCE].load(Ordering::Relaxed) == before {
                    return Some(loaded);
                }
            }
            spin_loop();
        }
        None
    }
}

impl Bar {
    /// Flags, address and size.
    fn words(self) -> (u64, u64, u64) {
        let mut flags = 0;
        if self.decodes {
            flags |= DECODES;
        }
        if self.space == Space::Io {
            flags |= IO;
        }
        (flags, self.address, self.size)
    }
}

impl ShownBar {
    fn load(page: &Words, index: usize) -> Option<Self> {
        let load = |part: usize| page[word(index, part)].load(Ordering::Relaxed);
        let (flags, size, decoded_at) = (load(at::FLAGS), load(at::SIZE), load(at::DECODED_AT));
        let bar = Bar {
            address: load(at::ADDRESS),
            size,
            space: if flags & IO == 0 { Space::Memory } else { Space::Io },
            decodes: flags & DECODES != 0,
        };
        let decoded_at = (decoded_at != 0).then_some(decoded_at);
        (size != 0).then_some(Self { bar, decoded_at })
    }
}

/// The words of a page, if there are as many.
fn page(words: &impl AsRef<[AtomicU64]>) -> Option<&Words> {
    let words = words.as_ref();
    if size_of_val(words) < LENGTH { None } else { words.first_chunk() }
}

fn word(bar: usize, part: usize) -> usize {
    at::BARS + bar * at::BAR_WORDS + part
}

#[cfg(test)]
mod tests;

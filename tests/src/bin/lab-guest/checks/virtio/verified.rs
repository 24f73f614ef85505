//! Random writes each of which can be told from every other, by many writers at once.
//!
//! Every block holds its own number and the sequence of the write that it comes from, and is filled
//! from both. So a block that is lost, stale, torn or in another's place shows.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::pattern::{Pattern, hash};
use crate::{Result, ensure};

/// A multiple of every logical block size of the lab.
pub(crate) const BLOCK: usize = 4096;
const BLOCK_U64: u64 = BLOCK as u64;
/// Blocks of the longest write.
const MOST: u64 = 8;
const HEADER: usize = 24;

/// Blocks that this program alone writes.
#[derive(Debug, Clone)]
pub(crate) struct Area {
    pub(crate) path: PathBuf,
    /// Past the page cache.
    pub(crate) direct: bool,
    pub(crate) blocks: u64,
    /// Tells its blocks from what anybody else wrote.
    pub(crate) tag: u64,
}

/// What is known of a block. Zero stands for "never written".
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    attempted: u64,
    completed: u64,
    synced: u64,
}

/// What writers have done to an area.
#[derive(Debug)]
pub(crate) struct Ledger {
    known: Vec<Known>,
    /// What ended a writer before it was told to stop.
    pub(crate) failures: Vec<String>,
}

/// Writers at work.
#[derive(Debug)]
pub(crate) struct Writers {
    threads: Vec<JoinHandle<(Vec<Known>, Option<String>)>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    writes: AtomicU64,
}

impl Area {
    /// The tag of a run.
    pub(crate) fn tag(nonce: &str, of: &str) -> u64 {
        hash(format!("{nonce} {of}").as_bytes())
    }

    /// Starts `count` writers, each with a part of the area. They stop by themselves after `writes`
    /// writes each, if that is given.
    ///
    /// # Errors
    /// The area can't be opened.
    pub(crate) fn start(&self, count: u64, writes: Option<u64>) -> Result<Writers> {
        let shared = Arc::<Shared>::default();
        let share = self.blocks / count;
        let threads = (0..count)
            .map(|index| {
                let last = if index + 1 == count { self.blocks } else { (index + 1) * share };
                let mut writer = Writer::new(self, index * share..last)?;
                let shared = Arc::clone(&shared);
                Ok(thread::spawn(move || {
                    let failure = writer.run(&shared, writes).err();
                    (writer.known, failure.map(|error| error.to_string()))
                }))
            })
            .collect::<Result<_>>()?;
        Ok(Writers { threads, shared })
    }

    /// Writes all of what `count` writers have to write, and expects each write to succeed.
    ///
    /// # Errors
    /// A write or a sync failed, or a block read between writes is wrong.
    pub(crate) fn write(&self, count: u64, writes: u64) -> Result<Ledger> {
        let ledger = self.start(count, Some(writes))?.finish()?;
        ensure!(ledger.failures.is_empty(), "{}", ledger.failures.join("; "));
        Ok(ledger)
    }

    /// Writes a block and reads it back.
    ///
    /// # Errors
    /// Neither can be done, or it is not the same.
    pub(crate) fn write_one(&self, number: u64) -> Result<()> {
        let file = self.open()?;
        let mut buffer = Aligned::new(BLOCK);
        self.make_block(number, 1, buffer.bytes());
        file.write_all_at(buffer.bytes(), number * BLOCK_U64)
            .and_then(|()| file.sync_data())
            .map_err(|error| format!("block {number}: {error}"))?;
        buffer.bytes().fill(0);
        file.read_exact_at(buffer.bytes(), number * BLOCK_U64)?;
        self.sequence(number, buffer.bytes())?;
        Ok(())
    }

    /// Reads everything back: a block holds the last write that was synced or one that was attempted
    /// later.
    ///
    /// # Errors
    /// It can't be read, or a block is wrong.
    pub(crate) fn verify(&self, ledger: &Ledger) -> Result<String> {
        let file = self.open()?;
        let mut buffer = Aligned::new(BLOCK);
        let (mut held, mut synced) = (0, 0);
        for (number, known) in (0..).zip(&ledger.known) {
            if known.attempted == 0 {
                continue;
            }
            file.read_exact_at(buffer.bytes(), number * BLOCK_U64)
                .map_err(|error| format!("block {number}: {error}"))?;
            if known.synced == 0 && !self.is_ours(buffer.bytes()) {
                continue;
            }
            let sequence = self.sequence(number, buffer.bytes())?;
            ensure!(
                (known.synced..=known.attempted).contains(&sequence),
                "block {number} holds write {sequence}; {} was synced, {} the last",
                known.synced,
                known.attempted
            );
            held += 1;
            synced += u64::from(known.synced > 0);
        }
        ensure!(synced > 0, "nothing was ever synced");
        Ok(format!("{held} blocks, {synced} of them synced"))
    }

    fn open(&self) -> Result<File> {
        const O_DIRECT: i32 = 0x4000;
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(if self.direct { O_DIRECT } else { 0 })
            .open(&self.path)
            .map_err(|error| format!("{}: {error}", self.path.display()).into())
    }

    fn make_block(&self, number: u64, sequence: u64, block: &mut [u8]) {
        let (header, filling) = block.split_at_mut(HEADER);
        for (field, value) in header.chunks_exact_mut(8).zip([self.tag, number, sequence]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        Pattern::new(self.tag ^ number << 32 ^ sequence).fill(filling);
    }

    fn is_ours(&self, block: &[u8]) -> bool {
        block.starts_with(&self.tag.to_le_bytes())
    }

    /// The write that the block at `number` comes from.
    fn sequence(&self, number: u64, block: &[u8]) -> Result<u64> {
        let mut field = [0; 8];
        ensure!(
            self.is_ours(block),
            "block {number} starts with {:02x?}: nobody's write",
            &block[..HEADER]
        );
        field.copy_from_slice(&block[8..16]);
        let of = u64::from_le_bytes(field);
        ensure!(of == number, "block {number} holds block {of}");
        field.copy_from_slice(&block[16..HEADER]);
        let sequence = u64::from_le_bytes(field);
        let mut expected = [0; BLOCK];
        self.make_block(number, sequence, &mut expected);
        let at = block.iter().zip(&expected).position(|(is, should)| is != should);
        match at {
            None => Ok(sequence),
            Some(at) => Err(format!("block {number} of write {sequence} is torn at {at}").into()),
        }
    }
}

impl Writers {
    /// Writes completed so far.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::Relaxed)
    }

    /// Whether every writer has ended by itself.
    pub(crate) fn have_ended(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Lets the writers complete and sync what they are at, which they do in time or not at all.
    pub(crate) fn stop(self, patience: Duration) -> Result<Ledger> {
        self.shared.stopped.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + patience;
        while !self.have_ended() {
            let hang = self.threads.iter().filter(|thread| !thread.is_finished()).count();
            ensure!(Instant::now() < deadline, "{hang} writers hang for {patience:?}");
            thread::sleep(Duration::from_millis(5));
        }
        self.finish()
    }

    /// Waits for the writers' own end.
    pub(crate) fn finish(self) -> Result<Ledger> {
        let mut ledger = Ledger { known: Vec::new(), failures: Vec::new() };
        for thread in self.threads {
            let (known, failure) = thread.join().map_err(|_| "a writer panicked")?;
            ledger.known.extend(known);
            ledger.failures.extend(failure);
        }
        Ok(ledger)
    }
}

struct Writer {
    area: Area,
    file: File,
    own: Range<u64>,
    known: Vec<Known>,
    random: Pattern,
    buffer: Aligned,
}

impl Writer {
    fn new(area: &Area, own: Range<u64>) -> Result<Self> {
        let blocks = usize::try_from(own.end - own.start)?;
        ensure!(blocks > 0, "more writers than blocks");
        Ok(Self {
            file: area.open()?,
            known: vec![Known::default(); blocks],
            random: Pattern::new(area.tag ^ own.start),
            buffer: Aligned::new(BLOCK * usize::try_from(MOST)?),
            area: area.clone(),
            own,
        })
    }

    fn run(&mut self, shared: &Shared, writes: Option<u64>) -> Result<()> {
        for sequence in 1..=writes.unwrap_or(u64::MAX) {
            if shared.stopped.load(Ordering::Relaxed) {
                break;
            }
            self.write(sequence).map_err(|error| format!("write {sequence}: {error}"))?;
            shared.writes.fetch_add(1, Ordering::Relaxed);
            if sequence % 8 == 0 {
                self.read().map_err(|error| format!("read after write {sequence}: {error}"))?;
            }
            if sequence % 8 == 7 {
                self.sync().map_err(|error| format!("sync after write {sequence}: {error}"))?;
            }
        }
        self.sync().map_err(|error| format!("last sync: {error}").into())
    }

    fn write(&mut self, sequence: u64) -> Result<()> {
        let blocks = self.own.end - self.own.start;
        let first = self.random.below(blocks);
        let count = 1 + self.random.below(MOST.min(blocks - first));
        let touched = usize::try_from(first)?..usize::try_from(first + count)?;
        let bytes = &mut self.buffer.bytes()[..touched.len() * BLOCK];
        for (number, block) in (self.own.start + first..).zip(bytes.chunks_exact_mut(BLOCK)) {
            self.area.make_block(number, sequence, block);
        }
        for known in &mut self.known[touched.clone()] {
            known.attempted = sequence;
        }
        self.file.write_all_at(bytes, (self.own.start + first) * BLOCK_U64)?;
        for known in &mut self.known[touched] {
            known.completed = sequence;
        }
        Ok(())
    }

    /// A block of its own reads as its last write.
    fn read(&mut self) -> Result<()> {
        let index = self.random.below(self.own.end - self.own.start);
        let completed = self.known[usize::try_from(index)?].completed;
        // Not in a file before its first write.
        if completed == 0 {
            return Ok(());
        }
        let number = self.own.start + index;
        let block = &mut self.buffer.bytes()[..BLOCK];
        self.file.read_exact_at(block, number * BLOCK_U64)?;
        let sequence = self.area.sequence(number, block)?;
        ensure!(sequence == completed, "block {number} is {sequence}, not {completed}");
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.file.sync_data()?;
        for known in &mut self.known {
            known.synced = known.completed;
        }
        Ok(())
    }
}

/// Memory at a multiple of a page, as reads and writes past the page cache need it.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + BLOCK];
        // Whoever can't tell says `usize::MAX`; then direct access fails, and says so.
        let start = memory.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

//! What is to be sent: frames that were committed, in one half of an area.
//!
//! A half begins with a page: a CRC, the position of its first byte in the stream, the number of frames,
//! and for each frame a word with its length and its number of keys in the upper half, then the keys.
//! The bytes are behind the page. The CRC is that of the bytes, and then of the words behind it. It is written whole, while the record names the
//! other half or nothing in this one waits any more.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::layout::Area;
use super::memory::{Memory, WORD};
use super::progress::{Position, Progress};
use super::record::StreamRecord;
use super::{FdKey, StateError, checksum, socket};

/// Descriptors that go with one frame.
pub const MAX_FRAME_KEYS: usize = 16;

/// Frames that wait to be sent at once.
pub const MAX_FRAMES: usize = 16;

const HEADER: usize = 4096;
const TABLE_WORD: usize = 3;
const _: () = assert!((TABLE_WORD + MAX_FRAMES * (1 + MAX_FRAME_KEYS)) * WORD <= HEADER);

/// Bytes that are sent as a whole, with descriptors.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame<'a> {
    /// At least one.
    pub bytes: &'a [u8],
    /// Of descriptors that go with the first of them, no more than [`MAX_FRAME_KEYS`].
    pub keys: &'a [FdKey],
}

/// What became of a frame that was to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// It is on its way, all of it.
    Sent,
    /// The socket takes no more for now.
    Blocked,
}

/// What of one stream waits to be sent.
#[derive(Debug)]
pub(super) struct Outbox {
    area: Area,
    progress: Progress,
    /// All before this position is on its way.
    sent: u64,
    /// Where the first byte of the half is in the stream, and which half it is.
    start: u64,
    second_half: bool,
    frames: VecDeque<Pending>,
}

#[derive(Clone, Debug)]
struct Pending {
    /// Where it begins and ends in the stream.
    start: u64,
    end: u64,
    /// None once its first byte is on its way.
    keys: Vec<FdKey>,
}

impl Outbox {
    pub(super) fn new(area: Area, progress: Progress) -> Self {
        let frames = VecDeque::new();
        Self { area, progress, sent: 0, start: 0, second_half: false, frames }
    }

    /// Of a file that may hold anything.
    pub(super) fn load(
        memory: &Memory,
        area: Area,
        (progress, position): (Progress, Position),
        record: &StreamRecord,
    ) -> Result<Self, StateError> {
        let mut outbox = Self::new(area, progress);
        outbox.sent = position.bytes;
        outbox.start = record.outbox_start;
        outbox.second_half = record.second_half;
        let range = record.outbox_start..=record.outbox_end;
        if !range.contains(&position.bytes) {
            return Err(StateError::Damaged("how much was sent"));
        }
        if position.bytes < record.outbox_end {
            outbox.frames = outbox
                .load_frames(memory, record)
                .ok_or(StateError::Damaged("what is to be sent"))?;
            outbox.drop_sent();
        }
        Ok(outbox)
    }

    fn load_frames(&self, memory: &Memory, record: &StreamRecord) -> Option<VecDeque<Pending>> {
        let half = self.half(self.second_half);
        let mut table = vec![0; HEADER];
        memory.read(half.start, &mut table);
        let mut words = table.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
        let [crc, start, count] = [words.next()?, words.next()?, words.next()?];
        if start != record.outbox_start
            || count != u64::from(record.frames)
            || count > MAX_FRAMES as u64
        {
            return None;
        }
        let mut frames = VecDeque::new();
        let mut end = start;
        let mut table_words = TABLE_WORD;
        for _ in 0..count {
            let word = words.next()?;
            let start = end;
            end += Some(word & 0xffff_ffff).filter(|length| *length > 0)?;
            let keys = usize::try_from(word >> 32).ok().filter(|keys| *keys <= MAX_FRAME_KEYS)?;
            table_words += 1 + keys;
            let keys = words.by_ref().take(keys).map(FdKey).collect();
            frames.push_back(Pending { start, end, keys });
        }
        let length = usize::try_from(end - start).ok()?;
        if end != record.outbox_end || length > half.length - HEADER {
            return None;
        }
        let mut bytes = vec![0; length];
        memory.read(half.start + HEADER, &mut bytes);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes);
        hasher.update(&table[WORD..table_words * WORD]);
        checksum::matches(crc, hasher.finalize().into()).then_some(frames)
    }

    /// Bytes that fit behind those that wait.
    pub(super) fn room(&self) -> usize {
        if self.frames.len() == MAX_FRAMES {
            return 0;
        }
        self.half(false).length - HEADER - self.waiting()
    }

    fn waiting(&self) -> usize {
        let end = self.frames.back().map_or(self.sent, |frame| frame.end);
        usize::try_from(end - self.sent).expect("it fits into the area")
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn next_keys(&self) -> Option<&[FdKey]> {
        self.frames.front().map(|frame| frame.keys.as_slice())
    }

    pub(super) fn next_bytes<'b>(&self, memory: &Memory, room: &'b mut [u8]) -> &'b [u8] {
        let Some(frame) = self.frames.front().filter(|frame| frame.start == self.sent) else {
            return &[];
        };
        let length = room.len().min(to_usize(frame.end - frame.start));
        memory.read(self.place(frame.start), &mut room[..length]);
        &room[..length]
    }

    /// Whether nothing of the next frame is on its way.
    pub(super) fn next_is_whole(&self) -> bool {
        self.frames.front().is_some_and(|frame| frame.start == self.sent)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = FdKey> {
        self.frames.iter().flat_map(|frame| frame.keys.iter().copied())
    }

    /// Writes what waits, and more behind it; in the place of the first of it, `replacement`. It counts
    /// when the record does, and then this takes it over ([`adopt`](Self::adopt)).
    pub(super) fn stage<'a>(
        &self,
        memory: &Memory,
        replacement: Option<Frame<'a>>,
        frames: impl Iterator<Item = Frame<'a>>,
        record: &mut StreamRecord,
    ) -> Staged {
        // Mostly nothing waits, and then the half that was used last is free, and warm.
        let second_half = self.second_half == self.is_empty();
        let half = self.half(second_half);
        let mut staged = Staged::default();
        let mut table = vec![0, self.sent, 0];
        let mut hasher = crc32fast::Hasher::new();
        let mut at = 0;
        let mut add = |bytes: &[u8], keys: &[FdKey]| {
            assert!(!bytes.is_empty() && bytes.len() <= half.length - HEADER - at, "no room");
            assert!(keys.len() <= MAX_FRAME_KEYS && staged.frames.len() < MAX_FRAMES, "no room");
            table.push(bytes.len() as u64 | (keys.len() as u64) << 32);
            table.extend(keys.iter().map(|key| key.0));
            memory.write(half.start + HEADER + at, bytes);
            hasher.update(bytes);
            let start = self.sent + at as u64;
            at += bytes.len();
            let end = self.sent + at as u64;
            staged.frames.push_back(Pending { start, end, keys: keys.to_vec() });
        };
        let replaced = usize::from(replacement.is_some());
        if let Some(frame) = replacement {
            add(frame.bytes, frame.keys);
        }
        for frame in self.frames.iter().skip(replaced) {
            let start = frame.start.max(self.sent);
            let mut bytes = vec![0; to_usize(frame.end - start)];
            memory.read(self.place(start), &mut bytes);
            add(&bytes, &frame.keys);
        }
        frames.for_each(|frame| add(frame.bytes, frame.keys));

        table[2] = staged.frames.len() as u64;
        let words: Vec<u8> = table.iter().flat_map(|word| word.to_ne_bytes()).collect();
        hasher.update(&words[WORD..]);
        memory.write(half.start + WORD, &words[WORD..]);
        memory.set(half.first_word(), hasher.finalize().into());

        record.outbox_start = self.sent;
        record.outbox_end = self.sent + at as u64;
        record.frames = u32::try_from(staged.frames.len()).expect("no more than a few");
        record.second_half = second_half;
        staged
    }

    /// What was staged is committed.
    pub(super) fn adopt(&mut self, staged: Staged, record: &StreamRecord) {
        self.frames = staged.frames;
        self.start = record.outbox_start;
        self.second_half = record.second_half;
    }

    /// That nothing waits, for the record.
    pub(super) fn stage_empty(&self, record: &mut StreamRecord) -> Staged {
        record.outbox_start = self.sent;
        record.outbox_end = self.sent;
        record.frames = 0;
        Staged::default()
    }

    /// Sends the next frame, or what is left of it.
    pub(super) fn send(
        &mut self,
        memory: &Memory,
        socket: BorrowedFd<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Flush, Errno> {
        while let Some(frame) = self.frames.front() {
            let length = to_usize(frame.end - self.sent);
            let fds = if frame.keys.is_empty() { &[] } else { fds };
            let from = self.place(self.sent);
            let position = Position { bytes: self.sent, keys: 0 };
            let header = self.progress.prepare(memory, position, 0, length);
            match socket::send(socket, memory, header, from..from + length, fds) {
                Ok(done) => self.sent += u64::from(done.bytes),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(Flush::Blocked),
                Err(errno) => return Err(errno),
            }
            let frames = self.frames.len();
            self.drop_sent();
            if self.frames.len() < frames {
                break;
            }
        }
        Ok(Flush::Sent)
    }

    /// Forgets what is on its way.
    fn drop_sent(&mut self) {
        while self.frames.front().is_some_and(|frame| frame.end <= self.sent) {
            self.frames.pop_front();
        }
        if let Some(frame) = self.frames.front_mut()
            && frame.start < self.sent
        {
            frame.keys.clear();
        }
    }

    /// Where the byte at a position lies in the file.
    fn place(&self, position: u64) -> usize {
        self.half(self.second_half).start + HEADER + to_usize(position - self.start)
    }

    fn half(&self, second: bool) -> Area {
        self.area.half(second)
    }
}

/// Frames that are written and not committed.
#[derive(Debug, Default)]
pub(super) struct Staged {
    frames: VecDeque<Pending>,
}

fn to_usize(length: u64) -> usize {
    usize::try_from(length).expect("it fits into the area")
}

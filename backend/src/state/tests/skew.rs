//! States of this version as they were when it was released, and of a next one.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{fstat, ftruncate};
use rustix::io::{pread, pwrite};

use super::{IDENTITY, SCRATCH_WORDS, fresh, memfd, recover, toll};
use crate::state::{
    Activity, Commit, FdKey, Flush, Frame, Journal, Part, PreviousEnd, SectionError, SectionId,
    StateError, StateFile, StreamId,
};

const GOLDEN: &[u8] = include_bytes!("layout-1.bin");

// As `layout` describes the header.
const VERSION_WORD: u64 = 1;
const COUNT_WORD: u64 = 2;
const CRC_WORD: u64 = 3;
const TABLE_WORD: u64 = 8;
const ENTRY_WORDS: u64 = 4;

/// A state with something of everything in it.
pub(super) fn full() -> OwnedFd {
    let memfd = memfd();
    let (mut peer, socket) = UnixStream::pair().unwrap();
    peer.write_all(b"a request, and half of the next").unwrap();
    let mut journal = fresh(&memfd);
    journal.scratch().set(3, 0x0123_4567_89ab_cdef);
    assert_eq!(journal.new_key(), FdKey(1 << 33));
    assert_eq!(journal.stream(StreamId::Client).take(&socket, 9), Ok(9));
    assert_eq!(journal.begin(Activity::Message(StreamId::Client)), toll(0));
    journal.commit(Commit {
        sections: &[
            (SectionId::Session, b"s"),
            (SectionId::Function, b"of before"),
            (SectionId::Windows(Part::ALL[3]), b"windows"),
        ],
        taken: Some(StreamId::Client),
        send: &[(StreamId::Client, Frame { bytes: b"its reply", keys: &[] })],
    });
    assert_eq!(journal.stream(StreamId::Client).send(&socket, &[]), Ok(Flush::Sent));
    assert_eq!(journal.stream(StreamId::Client).take(&socket, 22), Ok(22));
    journal.begin(Activity::Wake(7));
    journal.commit(Commit {
        sections: &[(SectionId::Function, b"registers"), (SectionId::Device, &[0xa5; 3000])],
        taken: None,
        send: &[
            (
                StreamId::Twin,
                Frame { bytes: b"a command", keys: &[FdKey(1 << 32), FdKey(1 << 33)] },
            ),
            (StreamId::Twin, Frame { bytes: b"another", keys: &[] }),
        ],
    });
    journal.begin(Activity::Work);
    drop(journal);
    let (mut journal, _) = recover(&memfd).unwrap();
    assert_eq!(journal.begin(Activity::Work), toll(1));
    memfd
}

fn assert_full(memfd: &OwnedFd) {
    let (mut journal, recovered) = recover(memfd).unwrap();
    assert_eq!(recovered.interrupted, Some((Activity::Work, toll(2))));
    let sections: [Option<Vec<u8>>; 4] =
        [Some(b"s".to_vec()), None, Some(b"registers".to_vec()), Some(vec![0xa5; 3000])];
    assert_eq!(recovered.sections[..4], sections.map(Ok));
    for (part, section) in Part::ALL.into_iter().zip(&recovered.sections[4..]) {
        let saved = (part == Part::ALL[3]).then(|| b"windows".to_vec());
        assert_eq!(*section, Ok(saved));
    }
    assert_eq!(journal.scratch().get(3), 0x0123_4567_89ab_cdef);
    assert_eq!(journal.new_key(), FdKey((1 << 33) + 1));
    let client = journal.stream(StreamId::Client);
    assert_eq!(client.received(), b", and half of the next");
    assert!(client.is_empty());
    let mut twin = journal.stream(StreamId::Twin);
    assert_eq!(twin.pending(), Some(&[FdKey(1 << 32), FdKey(1 << 33)][..]));
    let (_peer, socket) = UnixStream::pair().unwrap();
    assert_eq!(twin.send(&socket, &[socket.as_fd(), socket.as_fd()]), Ok(Flush::Sent));
    assert_eq!(twin.pending(), Some(&[][..]));
    assert_eq!(journal.begin(Activity::Work), toll(2));
}

#[test]
fn a_state_of_the_released_layout_is_understood() {
    let golden = memfd();
    let (length, mut rest) = GOLDEN.split_first_chunk().unwrap();
    ftruncate(&golden, u64::from_le_bytes(*length)).unwrap();
    while let Some((word, more)) = rest.split_first_chunk::<16>() {
        let (at, value) = word.split_at(8);
        pwrite(&golden, value, u64::from_le_bytes(at.try_into().unwrap())).unwrap();
        rest = more;
    }
    assert_full(&golden);
    assert_full(&full());
}

/// The length of the file, and all words that are not zero, each behind its place.
#[test]
#[ignore = "writes the state that the test above reads"]
fn write_a_state_of_this_layout() {
    let memfd = full();
    let length = fstat(&memfd).unwrap().st_size.cast_unsigned();
    let mut golden = length.to_le_bytes().to_vec();
    for at in (0..length).step_by(8) {
        let word = word(&memfd, at / 8);
        if word != 0 {
            golden.extend([at.to_le_bytes(), word.to_le_bytes()].as_flattened());
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/state/tests/layout-1.bin");
    std::fs::write(path, golden).unwrap();
}

#[test]
fn a_next_layout_that_says_so_is_understood() {
    let memfd = full();
    let mut next = Next::of(&memfd);
    next.version = 2 | 1 << 32;
    // What this version can leave alone.
    let end = next.grow(4096);
    next.areas.push([7 | 1 << 16, end, 4096, 0]);
    next.store();
    assert_full(&memfd);
}

#[test]
fn sections_of_a_next_layout_may_be_longer() {
    let memfd = memfd();
    drop(fresh(&memfd));
    let mut next = Next::of(&memfd);
    next.version = 2 | 1 << 32;
    let length = 2 * (3 << 20);
    let end = next.grow(length);
    let device = next.areas.iter_mut().find(|area| area[0] == 5 | 3 << 32).unwrap();
    *device = [device[0], end, length, 0];
    next.store();
    let (mut journal, _) = recover(&memfd).unwrap();
    let long = vec![7; 2 << 20];
    assert!(long.len() > SectionId::Device.room());
    journal.commit(Commit { sections: &[(SectionId::Device, &long)], ..Commit::default() });
    let (_, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.sections[SectionId::Device.index()], Ok(Some(long)));
}

#[test]
fn a_next_layout_that_needs_its_own_reader_is_refused() {
    let memfd = full();
    let mut next = Next::of(&memfd);
    next.version = 3 | 2 << 32;
    next.store();
    let error = recover(&memfd).unwrap_err();
    assert_eq!(error.to_string(), "the state has layout 3, which needs a reader of layout 2");

    next.version = 2 | 1 << 32;
    let end = next.grow(4096);
    next.areas.push([7, end, 4096, 0]);
    next.store();
    assert!(matches!(recover(&memfd), Err(StateError::UnknownArea(7))));
}

#[test]
fn a_section_of_a_next_version_is_lost_alone() {
    let memfd = full();
    let device = Next::of(&memfd).areas.into_iter().find(|area| area[0] == 5 | 3 << 32).unwrap();
    let first = device[1] / 8;
    let kind = 3 | 2 << 16 | 2 << 32;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update([kind, 3000_u64].map(u64::to_le_bytes).as_flattened());
    hasher.update(&[0xa5; 3000]);
    set_word(&memfd, first, kind);
    set_word(&memfd, first + 2, hasher.finalize().into());
    let (_, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.sections[3], Err(SectionError::Newer));
    assert_eq!(recovered.sections[2], Ok(Some(b"registers".to_vec())));
}

#[test]
fn an_area_with_too_little_room_is_refused() {
    let memfd = full();
    let mut next = Next::of(&memfd);
    for index in 1..next.areas.len() {
        let whole = next.areas[index];
        next.areas[index][2] = 8;
        next.store();
        assert!(matches!(recover(&memfd), Err(StateError::TooSmall)), "{index}");
        next.areas[index] = whole;
    }
    next.store();
    assert!(recover(&memfd).is_ok());
    let file = StateFile::open(memfd.try_clone().unwrap()).unwrap();
    let more = Journal::recover(file, IDENTITY, 100 * SCRATCH_WORDS, PreviousEnd::Orderly);
    assert!(matches!(more, Err(StateError::TooSmall)));
}

#[test]
fn areas_that_overlap_or_are_missing_are_damage() {
    let memfd = full();
    let damages: BTreeMap<&str, fn(&mut Next<'_>)> = BTreeMap::from([
        ("twice", (|next| next.areas[4] = next.areas[5]) as fn(&mut Next<'_>)),
        ("overlapping", |next| next.areas[4][1] = next.areas[5][1]),
        ("in the header", |next| next.areas[1][1] = 0),
        ("behind the end", |next| next.areas[4][1] += 1 << 40),
        ("at the end of all", |next| next.areas[4][1] = u64::MAX - 4095),
        ("not at a page", |next| next.areas[1][1] += 8),
    ]);
    for (name, damage) in damages {
        let mut next = Next::of(&memfd);
        let whole = next.areas.clone();
        damage(&mut next);
        next.store();
        assert!(matches!(recover(&memfd), Err(StateError::Damaged(_))), "{name}");
        next.areas = whole;
        next.store();
    }
    let mut next = Next::of(&memfd);
    next.areas.pop();
    next.store();
    assert!(matches!(recover(&memfd), Err(StateError::TooSmall)));
}

/// The header of another version.
struct Next<'a> {
    memfd: &'a OwnedFd,
    version: u64,
    areas: Vec<[u64; 4]>,
}

impl<'a> Next<'a> {
    fn of(memfd: &'a OwnedFd) -> Self {
        let place = |area| TABLE_WORD + area * ENTRY_WORDS;
        let area = |index| [0, 1, 2, 3].map(|at| word(memfd, place(index) + at));
        let areas = (0..word(memfd, COUNT_WORD)).map(area).collect();
        Self { memfd, version: word(memfd, VERSION_WORD), areas }
    }

    /// Returns where it ended before.
    fn grow(&self, length: u64) -> u64 {
        let end = fstat(self.memfd).unwrap().st_size.cast_unsigned();
        ftruncate(self.memfd, end + length).unwrap();
        end
    }

    fn store(&self) {
        let mut words = vec![self.version, self.areas.len() as u64];
        words.extend(self.areas.as_flattened());
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        set_word(self.memfd, VERSION_WORD, words[0]);
        set_word(self.memfd, COUNT_WORD, words[1]);
        set_word(self.memfd, CRC_WORD, crc32fast::hash(&bytes).into());
        pwrite(self.memfd, &bytes[16..], TABLE_WORD * 8).unwrap();
    }
}

fn word(memfd: &OwnedFd, word: u64) -> u64 {
    let mut bytes = [0; 8];
    pread(memfd, &mut bytes, word * 8).unwrap();
    u64::from_le_bytes(bytes)
}

fn set_word(memfd: &OwnedFd, word: u64, value: u64) {
    pwrite(memfd, &value.to_le_bytes(), word * 8).unwrap();
}

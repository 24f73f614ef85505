//! Memory that holds anything.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use rustix::fs::{fstat, ftruncate};
use rustix::io::{pread, pwrite};

use super::skew::full;
use super::{memfd, recover};
use crate::state::{
    Activity, Commit, Frame, MAX_FRAME, SectionError, SectionId, StateError, StreamId,
};

/// The places of the words of such a state that are not zero, and of some beside them.
static WORDS_IN_USE: LazyLock<Vec<u64>> = LazyLock::new(|| words_in_use(&full()));

fn words_in_use(memfd: &OwnedFd) -> Vec<u64> {
    let length = fstat(memfd).unwrap().st_size.cast_unsigned();
    let mut page = vec![0; 4096];
    let mut words = Vec::new();
    for at in (0..length).step_by(page.len()) {
        pread(memfd, &mut page, at).unwrap();
        if page.iter().any(|byte| *byte != 0) {
            words.extend((at..at + 4096).step_by(8));
        }
    }
    words
}

fn values() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0..20_u64, Just(u64::MAX), (0..64_u64).prop_map(|bit| 1 << bit)]
}

/// Goes on from it, if that is possible.
fn go_on(memfd: &OwnedFd) {
    let Ok((mut journal, _)) = recover(memfd) else { return };
    let (_peer, socket) = UnixStream::pair().unwrap();
    for stream in StreamId::ALL {
        while journal.stream(stream).pending().is_some() {
            if journal.stream(stream).send(&socket, &[]).is_err() {
                break;
            }
        }
        assert!(journal.stream(stream).received().len() <= MAX_FRAME);
        journal.begin(Activity::Message(stream));
        let frame = Frame { bytes: b"reply", keys: &[] };
        let send = [(stream, frame)];
        let send = if journal.stream(stream).room() >= 5 { &send[..] } else { &[] };
        let sections = [(SectionId::Device, b"content".as_slice())];
        journal.commit(Commit { sections: &sections, taken: Some(stream), send });
    }
    let (again, recovered) = recover(memfd).expect("what was committed is whole");
    assert_eq!(recovered.interrupted, None);
    assert_eq!(recovered.sections[SectionId::Device.index()], Ok(Some(b"content".to_vec())));
    assert_eq!(again.keys(), journal.keys());
    journal.clear_session();
    assert_eq!(recover(memfd).unwrap().0.keys(), []);
}

proptest! {
    #[test]
    fn a_state_with_foreign_words_is_refused_or_gone_on_from(
        foreign in vec((any::<usize>(), values()), 1..5),
    ) {
        let memfd = full();
        let words = &WORDS_IN_USE;
        for (word, value) in foreign {
            pwrite(&memfd, &value.to_ne_bytes(), words[word % words.len()]).unwrap();
        }
        go_on(&memfd);
    }

    #[test]
    fn bytes_that_are_no_state_are_refused(bytes in vec(any::<u8>(), 0..10_000)) {
        let memfd = memfd();
        pwrite(&memfd, &bytes, 0).unwrap();
        assert!(matches!(recover(&memfd), Err(StateError::NoState)));
        ftruncate(&memfd, 1 << 20).unwrap();
        assert!(matches!(recover(&memfd), Err(StateError::NoState)));
    }
}

/// It would be read as a whole, before anything could be checked.
#[test]
fn a_part_that_is_longer_than_all_memory_is_refused() {
    let memfd = full();
    ftruncate(&memfd, 1 << 42).unwrap();
    let mut header = vec![0; 4096];
    pread(&memfd, &mut header, 0).unwrap();
    let words: Vec<u64> =
        header.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let areas = usize::try_from(words[2]).unwrap();
    for area in 0..areas {
        let mut words = words.clone();
        words[8 + 4 * area + 1..][..2].copy_from_slice(&[1 << 41, 1 << 40]);
        let bytes = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_ne_bytes()).collect()
        };
        let checked = [&words[1..3], &words[8..8 + 4 * areas]].concat();
        words[3] = crc32fast::hash(&bytes(&checked)).into();
        pwrite(&memfd, &bytes(&words), 0).unwrap();
        assert!(matches!(recover(&memfd), Err(StateError::Damaged(_))), "{area}");
    }
}

/// A change of any one word that decides is seen, or changes nothing that matters.
#[test]
fn a_section_or_what_decides_does_not_change_unnoticed() {
    let memfd = full();
    let read = || recover(&memfd).map(|(journal, recovered)| (journal.keys(), recovered.sections));
    let before = read().unwrap();
    for at in WORDS_IN_USE.iter().copied() {
        let mut word = [0; 8];
        pread(&memfd, &mut word, at).unwrap();
        if word == [0; 8] && !at.is_multiple_of(128) {
            continue;
        }
        pwrite(&memfd, &(u64::from_ne_bytes(word) ^ 1 << 9).to_ne_bytes(), at).unwrap();
        if let Ok((_, sections)) = read() {
            for (section, whole) in sections.into_iter().zip(before.1.clone()) {
                assert!(section == whole || section == Err(SectionError::Damaged), "{at:#x}");
            }
        }
        pwrite(&memfd, &word, at).unwrap();
    }
    assert_eq!(read().unwrap(), before);
}

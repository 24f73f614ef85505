//! A worker's state in which any words were changed, with checksums that hold all the same. Whoever
//! recovers it either refuses it or goes on, and then it is a state like any other.
#![no_main]

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use barkeep_backend::state::{
    Activity, Commit, FdKey, Frame, Journal, MAX_FRAME, PreviousEnd, Recovered, SectionId,
    StateError, StateFile, StreamId,
};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};

const IDENTITY: &str = "fuzz0";
const SCRATCH_WORDS: usize = 8;
const PAGE: usize = 4096;

/// Where it begins, and its bytes.
type Page = (u64, Vec<u8>);

/// A state with something of everything in it: its length, and the pages that are not zeros.
static BASE: LazyLock<(u64, Vec<Page>)> = LazyLock::new(|| {
    let memfd = full();
    let length = fstat(&memfd).expect("a file").st_size.cast_unsigned();
    let page = |at| {
        let mut page = vec![0; PAGE];
        pread(&memfd, &mut page, at).expect("inside the file");
        (at, page)
    };
    let pages = (0..length).step_by(PAGE).map(page);
    (length, pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0)).collect())
});

fuzz_target!(|edits: &[u8]| {
    let memfd = memfd();
    let (length, pages) = &*BASE;
    ftruncate(&memfd, *length).expect("memory");
    for (at, page) in pages {
        pwrite(&memfd, page, *at).expect("memory");
    }
    let (edits, _) = edits.as_chunks::<12>();
    for edit in edits.iter().take(16) {
        let [page, operation, word @ ..] = edit;
        let (word, value) = word.split_at(2);
        let word = u64::from(u16::from_le_bytes([word[0], word[1]]));
        let at = pages[usize::from(*page) % pages.len()].0 + word * 8 % PAGE as u64;
        let value = u64::from_le_bytes(value.try_into().expect("8 bytes are left"));
        let mut old = [0; 8];
        pread(&memfd, &mut old, at).expect("inside the file");
        let old = u64::from_ne_bytes(old);
        let new = match operation % 3 {
            0 => value,
            1 => old.wrapping_add(value),
            _ => old ^ value,
        };
        pwrite(&memfd, &new.to_ne_bytes(), at).expect("inside the file");
    }
    if let Ok((journal, recovered)) = recover(&memfd) {
        std::hint::black_box(recovered);
        go_on(&memfd, journal);
    }
});

fn go_on(memfd: &OwnedFd, mut journal: Journal) {
    let (mut peer, socket) = UnixStream::pair().expect("sockets");
    peer.write_all(b"more").expect("room for it");
    for stream in StreamId::ALL {
        while journal.stream(stream).pending().is_some() {
            if journal.stream(stream).send(&socket, &[]).is_err() {
                break;
            }
            drain(&peer);
        }
        let before = journal.stream(stream).received();
        let taken = journal.stream(stream).take(&socket, 2).unwrap_or(0);
        let after = journal.stream(stream).received();
        assert!(after.starts_with(&before) && after.len() == before.len() + taken);
        assert!(after.len() <= MAX_FRAME);
        journal.begin(Activity::Message(stream));
        let send = [(stream, Frame { bytes: b"reply", keys: &[] })];
        let send = if journal.stream(stream).room() >= 5 { &send[..] } else { &[] };
        let sections = [(SectionId::Device, b"content".as_slice())];
        journal.commit(Commit { sections: &sections, taken: Some(stream), send });
    }
    journal.new_key();
    let scratch = journal.scratch();
    scratch.set(SCRATCH_WORDS - 1, 1);
    let (again, recovered) = recover(memfd).expect("what was committed is whole");
    assert_eq!(recovered.interrupted, None);
    assert_eq!(recovered.sections[SectionId::Device.index()], Ok(Some(b"content".to_vec())));
    assert_eq!(again.keys(), journal.keys());
    journal.clear_session();
    let (cleared, _) = recover(memfd).expect("what was committed is whole");
    assert_eq!(cleared.keys(), []);
}

fn drain(mut peer: &UnixStream) {
    peer.set_nonblocking(true).expect("a socket");
    let mut bytes = [0; PAGE];
    while matches!(std::io::Read::read(&mut peer, &mut bytes), Ok(1..)) {}
}

fn full() -> OwnedFd {
    let memfd = memfd();
    let (mut peer, socket) = UnixStream::pair().expect("sockets");
    peer.write_all(b"a request, and half of the next").expect("room for it");
    let file = StateFile::create(memfd.try_clone().expect("a file")).expect("an empty file");
    let mut journal = Journal::fresh(file, IDENTITY, SCRATCH_WORDS).expect("memory");
    let mut client = journal.stream(StreamId::Client);
    client.take(&socket, 9).expect("a request");
    client.hold(&[FdKey(2), FdKey(3)]).expect("few");
    journal.begin(Activity::Message(StreamId::Client));
    journal.commit(Commit {
        sections: &SectionId::ALL.map(|section| (section, b"saved".as_slice())),
        taken: Some(StreamId::Client),
        send: &[(StreamId::Client, Frame { bytes: b"its reply", keys: &[] })],
    });
    journal.stream(StreamId::Client).take(&socket, 50).expect("half a request");
    let keys = [FdKey(1), FdKey(2)];
    let send = [
        (StreamId::Twin, Frame { bytes: b"a command", keys: &[] }),
        (StreamId::Twin, Frame { bytes: b"another", keys: &keys }),
    ];
    journal.commit(Commit { send: &send, ..Commit::default() });
    let _ = journal.stream(StreamId::Twin).send(&socket, &[socket.as_fd()]);
    journal.begin(Activity::Wake(3));
    memfd
}

fn recover(memfd: &OwnedFd) -> Result<(Journal, Recovered), StateError> {
    let file = StateFile::open(memfd.try_clone()?)?;
    Journal::recover(file, IDENTITY, SCRATCH_WORDS, PreviousEnd::ByItself)
}

fn memfd() -> OwnedFd {
    memfd_create("state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("memory")
}

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::cmsg_space;
use rustix::fs::{fstat, ftruncate};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{IDENTITY, SCRATCH_WORDS, fresh, memfd, recover, recover_after, toll};
use crate::state::plan::{Killed, killed_at, passed};
use crate::state::{
    Activity, Commit, FdKey, Flush, Frame, Journal, MAX_FRAME, MAX_MESSAGE_KEYS, PreviousEnd,
    SectionError, SectionId, StateError, StateFile, StreamId, Toll, TooManyKeys,
};

#[test]
fn a_message_is_taken_done_and_answered_across_three_processes() {
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let memfd = memfd();
    peer.write_all(b"request and more").unwrap();

    let mut journal = fresh(&memfd);
    let mut client = journal.stream(StreamId::Client);
    let peeked = client.peek(&socket, 100).unwrap();
    assert_eq!((peeked.bytes.as_slice(), peeked.fds.len()), (&b"request and more"[..], 0));
    assert_eq!(client.take(&socket, 7), Ok(7));
    assert_eq!(journal.begin(Activity::Message(StreamId::Client)), toll(0));
    drop(journal);

    let (mut journal, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.interrupted, Some((Activity::Message(StreamId::Client), toll(1))));
    assert_eq!(recovered.sections, [const { Ok(None) }; SectionId::ALL.len()]);
    assert_eq!(journal.stream(StreamId::Client).received(), b"request");
    assert_eq!(journal.begin(Activity::Message(StreamId::Client)), toll(1));
    journal.commit(Commit {
        sections: &[(SectionId::Function, b"registers")],
        taken: Some(StreamId::Client),
        send: &[(StreamId::Client, Frame { bytes: b"reply", keys: &[FdKey(3)] })],
    });
    drop(journal);

    let (mut journal, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.interrupted, None);
    assert_eq!(recovered.sections[2], Ok(Some(b"registers".to_vec())));
    let mut client = journal.stream(StreamId::Client);
    assert_eq!(client.received(), b"");
    assert_eq!(client.pending(), Some(&[FdKey(3)][..]));
    assert_eq!(client.send(&socket, &[socket.as_fd()]), Ok(Flush::Sent));
    assert!(client.is_empty());
    drop(journal);

    let (mut journal, _) = recover(&memfd).unwrap();
    let mut client = journal.stream(StreamId::Client);
    assert!(client.is_empty());
    assert_eq!(client.take(&socket, 100), Ok(9));
    assert_eq!(client.received(), b" and more");
    let mut reply = [0; 100];
    assert_eq!(peer.read(&mut reply).unwrap(), 5);
    assert_eq!(&reply[..5], b"reply");
}

fn send_with_fd(peer: &UnixStream, bytes: &[u8]) {
    let fds = [peer.as_fd()];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [IoSlice::new(bytes)];
    assert_eq!(sendmsg(peer, &parts, &mut ancillary, SendFlags::empty()), Ok(bytes.len()));
}

#[test]
fn descriptors_belong_to_the_message_whose_bytes_they_came_with() {
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let memfd = memfd();
    let mut journal = fresh(&memfd);
    peer.write_all(b"none").unwrap();
    send_with_fd(&peer, b"two ");
    send_with_fd(&peer, b"of it");

    let mut client = journal.stream(StreamId::Client);
    let peeked = client.peek(&socket, 4).unwrap();
    assert_eq!((peeked.bytes.as_slice(), peeked.fds.len()), (&b"none"[..], 1));
    client.hold(&[FdKey(1)]).unwrap();
    assert_eq!(client.take(&socket, 4), Ok(4));
    assert_eq!((client.received_keys(), client.held()), (&[][..], &[FdKey(1)][..]));
    journal.commit(Commit { taken: Some(StreamId::Client), ..Commit::default() });

    let mut client = journal.stream(StreamId::Client);
    assert_eq!(client.take(&socket, 2), Ok(2));
    assert_eq!((client.received_keys(), client.held()), (&[FdKey(1)][..], &[][..]));
    assert_eq!(client.take(&socket, 2), Ok(2));
    client.hold(&[FdKey(2)]).unwrap();
    assert_eq!(client.take(&socket, 9), Ok(5));
    drop(journal);

    let (mut journal, _) = recover(&memfd).unwrap();
    let mut client = journal.stream(StreamId::Client);
    assert_eq!(
        (client.received(), client.received_keys()),
        (b"two of it".to_vec(), &[FdKey(1), FdKey(2)][..])
    );
    assert_eq!(client.hold(&[FdKey(3); MAX_MESSAGE_KEYS - 1]), Err(TooManyKeys));
    assert_eq!(client.hold(&[FdKey(3); MAX_MESSAGE_KEYS - 2]), Ok(()));
}

#[test]
fn a_stream_says_what_the_socket_says() {
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let mut journal = fresh(&memfd());
    let frame = Frame { bytes: b"too late", keys: &[] };
    journal.commit(Commit { send: &[(StreamId::Client, frame)], ..Commit::default() });
    let mut client = journal.stream(StreamId::Client);
    assert_eq!(client.peek(&socket, 1).unwrap_err(), Errno::AGAIN);
    assert_eq!(client.take(&socket, 1), Err(Errno::AGAIN));
    peer.set_nonblocking(true).unwrap();
    let long = vec![7; MAX_FRAME + 1];
    let mut sent = 0;
    while client.received_len() < MAX_FRAME {
        sent += peer.write(&long[sent..]).unwrap();
        assert!(matches!(client.take(&socket, usize::MAX), Ok(1..)));
    }
    let _ = peer.write(&long[sent..]);
    assert_eq!(client.take(&socket, 1), Err(Errno::MSGSIZE));
    drop(peer);
    assert_eq!(client.send(&socket, &[]), Err(Errno::PIPE));
    assert_eq!(client.pending(), Some(&[][..]), "it waits still");
    let keys = journal.clear_session();
    assert_eq!(keys, []);
    let mut client = journal.stream(StreamId::Client);
    while client.take(&socket, 1) != Ok(0) {}
    assert!(client.peek(&socket, 1).unwrap().bytes.is_empty());
}

#[test]
fn frames_wait_behind_those_that_wait_and_the_next_one_can_be_replaced() {
    let (mut peer, socket) = UnixStream::pair().unwrap();
    let memfd = memfd();
    let mut journal = fresh(&memfd);
    let frame = |bytes| (StreamId::Twin, Frame { bytes, keys: &[FdKey(5)] });
    let room = journal.stream(StreamId::Twin).room();
    journal.commit(Commit { send: &[frame(b"one "), frame(b"two ")], ..Commit::default() });
    assert_eq!(journal.stream(StreamId::Twin).send(&socket, &[]), Ok(Flush::Sent));
    let mut point = 1;
    let replace = |mut journal: Journal| {
        journal.replace_next(StreamId::Twin, Frame { bytes: b"2 ", keys: &[] });
    };
    while killed_at(point, || replace(recover(&memfd).unwrap().0)) == Err(Killed) {
        let keys = recover(&memfd).unwrap().0.keys();
        assert!(keys == [FdKey(5)] || point == passed() && keys.is_empty());
        point += 1;
    }
    assert!(point > 3);
    let (mut journal, _) = recover(&memfd).unwrap();
    journal.commit(Commit { send: &[frame(b"three")], ..Commit::default() });
    assert_eq!(journal.stream(StreamId::Twin).room(), room - 7);
    assert_eq!(journal.keys(), [FdKey(5)]);
    while journal.stream(StreamId::Twin).pending().is_some() {
        assert_eq!(journal.stream(StreamId::Twin).send(&socket, &[]), Ok(Flush::Sent));
    }
    let mut bytes = [0; 20];
    assert_eq!(peer.read(&mut bytes).unwrap(), 11);
    assert_eq!(&bytes[..11], b"one 2 three");
}

#[test]
fn deaths_in_a_row_are_counted_for_each_activity() {
    let memfd = memfd();
    drop(fresh(&memfd));
    let die = |activity| {
        let (mut journal, _) = recover(&memfd).unwrap();
        journal.begin(activity)
    };
    assert_eq!([die(Activity::Work), die(Activity::Work)], [0, 1].map(toll));
    let wakes = [3, 4, 3].map(|index| die(Activity::Wake(index)));
    assert_eq!(wakes, [0, 0, 1].map(toll));
    assert_eq!([die(Activity::Work), die(Activity::Recovery)], [2, 0].map(toll));
    let (mut journal, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.interrupted, Some((Activity::Recovery, toll(1))));
    assert_eq!(journal.begin(Activity::Recovery), toll(1));
    journal.commit(Commit::default());
    drop(journal);

    // It died of nothing, and of what it had done nobody has died in a row any more.
    let (mut journal, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.interrupted, None);
    assert_eq!(journal.begin(Activity::Work), toll(3));
    journal.commit(Commit { sections: &[(SectionId::Device, b"")], ..Commit::default() });
    assert_eq!(journal.begin(Activity::Work), toll(0));
    assert_eq!(journal.begin(Activity::Wake(3)), toll(2));
}

#[test]
fn a_death_from_outside_weighs_a_sixteenth_of_one_of_its_own() {
    let memfd = memfd();
    drop(fresh(&memfd));
    let mut previous_end = PreviousEnd::Orderly;
    let mut dies = |end| {
        let (mut journal, _) = recover_after(&memfd, previous_end).unwrap();
        previous_end = end;
        journal.begin(Activity::Work)
    };
    for deaths in 0..48 {
        assert!(!dies(PreviousEnd::FromOutside).reaches(3), "{deaths}");
    }
    for deaths in 3..20 {
        let toll = dies(PreviousEnd::ByItself);
        assert!(toll.reaches(deaths.min(15)), "{deaths}");
        assert!(!toll.reaches(deaths + 1), "{deaths}");
    }
}

#[test]
fn who_dies_before_anything_is_begun_adds_nothing() {
    let memfd = memfd();
    fresh(&memfd).begin(Activity::Wake(0));
    let mut point = 1;
    let look = || drop(recover_after(&memfd, PreviousEnd::FromOutside).unwrap());
    while killed_at(point, look) == Err(Killed) {
        point += 1;
    }
    assert!(point > 1);
    let (_, recovered) = recover(&memfd).unwrap();
    let once = Toll::default().and(PreviousEnd::FromOutside);
    assert_eq!(recovered.interrupted, Some((Activity::Wake(0), once)));
}

#[test]
fn a_section_that_is_too_long_is_lost_alone_until_it_fits() {
    let memfd = memfd();
    let mut journal = fresh(&memfd);
    let room = vec![1; SectionId::Session.room()];
    let long = vec![1; SectionId::Session.room() + 4096];
    let sections =
        [(SectionId::Session, long.as_slice()), (SectionId::Function, b"kept".as_slice())];
    journal.commit(Commit { sections: &sections, ..Commit::default() });
    let (_, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.sections[0], Err(SectionError::TooLong));
    assert_eq!(recovered.sections[2], Ok(Some(b"kept".to_vec())));
    journal.commit(Commit { sections: &[(SectionId::Session, &room)], ..Commit::default() });
    let (_, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.sections[0], Ok(Some(room)));
}

#[test]
fn a_state_is_that_of_one_function() {
    const END: PreviousEnd = PreviousEnd::Orderly;
    let memfd = memfd();
    drop(fresh(&memfd));
    let open = || StateFile::open(memfd.try_clone().unwrap()).unwrap();
    let error = Journal::recover(open(), "edu1: edu", SCRATCH_WORDS, END).unwrap_err();
    assert_eq!(error.to_string(), format!("the state is that of \"{IDENTITY}\""));
    assert!(StateFile::create(memfd.try_clone().unwrap()).is_err());

    // More room, in the same file, and never less.
    let journal = Journal::fresh(open(), "edu1: edu", 100_000).unwrap();
    assert_eq!(journal.scratch().get(99_999), 0);
    assert!(Journal::recover(open(), "edu1: edu", 100_000, END).is_ok());
    let length = fstat(&memfd).unwrap().st_size.cast_unsigned();
    assert_eq!(ftruncate(&memfd, length - 1), Err(Errno::PERM));
}

#[test]
fn a_process_that_dies_while_it_begins_anew_leaves_no_state() {
    let memfd = memfd();
    let begin = || {
        let file = match StateFile::create(memfd.try_clone().unwrap()) {
            Ok(file) => file,
            Err(_) => StateFile::open(memfd.try_clone().unwrap()).unwrap(),
        };
        let journal = Journal::fresh(file, IDENTITY, SCRATCH_WORDS).unwrap();
        journal.scratch().set(SCRATCH_WORDS - 1, 1);
    };
    let mut point = 1;
    while killed_at(point, begin) == Err(Killed) {
        match recover(&memfd) {
            Err(StateError::NoState) => {}
            Ok((journal, _)) => assert_eq!(journal.scratch().get(SCRATCH_WORDS - 1), 0),
            Err(error) => panic!("{error}"),
        }
        point += 1;
    }
    assert!(point > 10);
}

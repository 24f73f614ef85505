use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::{fresh, memfd, recover};
use crate::state::{Activity, Commit, FdKey, Flush, Frame, SectionId, StreamId};

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
    assert_eq!(journal.begin(Activity::Message(StreamId::Client)), 1);
    drop(journal);

    let (mut journal, recovered) = recover(&memfd).unwrap();
    assert_eq!(recovered.interrupted, Some((Activity::Message(StreamId::Client), 1)));
    assert_eq!(recovered.sections, [const { Ok(None) }; 4]);
    assert_eq!(journal.stream(StreamId::Client).received(), b"request");
    assert_eq!(journal.begin(Activity::Message(StreamId::Client)), 2);
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

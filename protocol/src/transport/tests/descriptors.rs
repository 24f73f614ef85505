//! Whose descriptors are whose.

use super::*;

fn inode(fd: &OwnedFd) -> u64 {
    fstat(fd).unwrap().st_ino
}

fn inodes(fds: &[OwnedFd]) -> Vec<u64> {
    fds.iter().map(inode).collect()
}

/// A file whose last other owner is gone when the receiver has closed it.
struct Watched {
    reader: UnixStream,
}

/// A descriptor, and what tells whether anybody still has it.
fn watched() -> (UnixStream, Watched) {
    let (given, reader) = pair();
    (given, Watched { reader })
}

impl Watched {
    fn is_closed(&self) -> bool {
        let read = std::io::Read::read(&mut &self.reader, &mut [0]);
        matches!(read, Ok(0))
    }
}

/// How one message reaches the socket. Each part is sent in a call of its own, and the descriptors
/// travel with one of them.
#[derive(Clone, Debug)]
struct Sent {
    body: usize,
    cuts: Vec<usize>,
    fds: usize,
    with_part: usize,
    /// Whether the receiver is asked before the next message is sent.
    receive: bool,
}

prop_compose! {
    fn sent()(
        body in prop_oneof![4 => 0usize..40, 1 => 3900usize..4200, 1 => 60_000usize..80_000],
        cuts in prop_oneof![
            2 => Just(Vec::new()),
            1 => Just(vec![16]),
            1 => Just(vec![1; 20]),
            2 => prop::collection::vec(1usize..5000, 0..6),
        ],
        fds in prop_oneof![2 => Just(0usize), 2 => 1usize..3, 1 => Just(MAX_MESSAGE_FDS)],
        with_part in 0usize..6,
        receive in any::<bool>(),
    ) -> Sent {
        Sent { body, cuts, fds, with_part, receive }
    }
}

impl Sent {
    /// The parts that the message is sent in.
    fn parts<'a>(&self, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
        let mut parts = Vec::new();
        for cut in &self.cuts {
            if *cut >= bytes.len() {
                break;
            }
            let (part, rest) = bytes.split_at(*cut);
            parts.push(part);
            bytes = rest;
        }
        parts.push(bytes);
        parts
    }
}

proptest! {
    /// As long as no call that carries descriptors has bytes of two messages.
    #[test]
    fn every_message_gets_its_own_descriptors(messages in prop::collection::vec(sent(), 1..10)) {
        let (a, b) = pair();
        let mut receiver = Receiver::default();
        let mut received = Vec::new();
        let mut expected = Vec::new();
        for (id, sent) in (0..).zip(&messages) {
            let bytes = to_bytes(&command(id, &vec![u8::try_from(id).unwrap(); sent.body]));
            let files: Vec<OwnedFd> = (0..sent.fds).map(|_| memfd()).collect();
            let parts = sent.parts(&bytes);
            let carrier = sent.with_part % parts.len();
            for (index, part) in parts.into_iter().enumerate() {
                if index == carrier && !files.is_empty() {
                    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                    send_with_fds(&a, part, &fds);
                } else {
                    (&a).write_all(part).unwrap();
                }
                // What is in flight must fit into the socket.
                if sent.receive || sent.body > 5000 {
                    collect(&mut receiver, &b, &mut received);
                }
            }
            expected.push((id, sent.body, inodes(&files)));
        }
        collect(&mut receiver, &b, &mut received);
        prop_assert_eq!(received, expected);
    }
}

fn collect(receiver: &mut Receiver, socket: &UnixStream, into: &mut Vec<(u16, usize, Vec<u64>)>) {
    while let Received::Message(message) = receiver.receive(socket).unwrap() {
        let id = message.header.id.0;
        assert!(message.body.iter().all(|byte| u16::from(*byte) == id));
        into.push((id, message.body.len(), inodes(&message.fds)));
    }
}

/// No peer that is known does this. The stream stays intact, and whoever mixes messages in one call
/// learns that their descriptors went to the last of those that were read.
#[test]
fn descriptors_of_messages_sent_in_one_call_go_to_the_last_one() {
    let (a, b) = pair();
    let fd = memfd();
    let bytes: Vec<u8> = (1..4).flat_map(|id| to_bytes(&command(id, b"body"))).collect();
    send_with_fds(&a, &bytes, &[fd.as_fd()]);
    let mut receiver = Receiver::default();
    let fds: Vec<_> = (0..3).map(|_| inodes(&expect_frame(&mut receiver, &b).fds)).collect();
    assert_eq!(fds, [vec![], vec![], vec![inode(&fd)]]);
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
}

#[test]
fn descriptors_of_a_drained_message_are_closed_and_those_of_the_next_are_not() {
    let (mut a, b) = pair();
    let oversized = Header { body_size: MAX_MESSAGE_SIZE, ..command(1, b"").header };
    let (given, first) = watched();
    send_with_fds(&a, &oversized.to_bytes(), &[given.as_fd()]);
    drop(given);
    let mut receiver = Receiver::default();
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
    assert!(first.is_closed(), "it waits for no further byte");

    let mut rest = MAX_MESSAGE_SIZE as usize;
    while rest > 3000 {
        let count = (rest - 3000).min(50_000);
        a.write_all(&vec![0; count]).unwrap();
        assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
        rest -= count;
    }
    // The end of the one and the whole of the other come with one read.
    let (given, second) = watched();
    send_with_fds(&a, &vec![0; 1000], &[given.as_fd()]);
    drop(given);
    a.write_all(&vec![0; rest - 1000]).unwrap();
    let fd = memfd();
    send_with_fds(&a, &to_bytes(&command(2, b"next")), &[fd.as_fd()]);
    let refused = receiver.receive(&b).unwrap();
    assert!(matches!(refused, Received::Refused(h, WireError::TooLong(_)) if h == oversized));
    assert!(second.is_closed());
    let next = expect_frame(&mut receiver, &b);
    assert_eq!((next.header.id, inodes(&next.fds)), (MessageId(2), vec![inode(&fd)]));
}

#[test]
fn descriptors_at_the_very_end_of_a_drained_message_are_closed() {
    let (mut a, b) = pair();
    let oversized = Header { body_size: MAX_MESSAGE_SIZE, ..command(1, b"").header };
    let mut receiver = Receiver::default();
    a.write_all(&oversized.to_bytes()).unwrap();
    let mut rest = MAX_MESSAGE_SIZE as usize;
    while rest > 50_000 {
        a.write_all(&[0; 50_000]).unwrap();
        assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
        rest -= 50_000;
    }
    let (given, watched) = watched();
    a.write_all(&vec![0; rest - 1]).unwrap();
    send_with_fds(&a, &[0], &[given.as_fd()]);
    drop(given);
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Refused(..)));
    assert!(watched.is_closed());
    a.write_all(&to_bytes(&command(2, b"next"))).unwrap();
    assert!(expect_frame(&mut receiver, &b).fds.is_empty());
}

#[test]
fn more_descriptors_than_allowed_in_pieces_are_closed_as_they_come() {
    let (a, b) = pair();
    let bytes = to_bytes(&command(1, &[0; 30]));
    let mut receiver = Receiver::default();
    let fd = memfd();
    send_with_fds(&a, &bytes[..5], &[fd.as_fd(); MAX_MESSAGE_FDS]);
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
    for at in 5..45 {
        let (given, watched) = watched();
        send_with_fds(&a, &bytes[at..=at], &[given.as_fd()]);
        drop(given);
        assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
        assert!(watched.is_closed());
    }
    send_with_fds(&a, &bytes[45..], &[fd.as_fd()]);
    let refused = receiver.receive(&b).unwrap();
    assert!(matches!(refused, Received::Refused(_, WireError::TooManyFds)), "{refused:?}");
    send_with_fds(&a, &to_bytes(&command(2, b"next")), &[fd.as_fd()]);
    assert_eq!(expect_frame(&mut receiver, &b).fds.len(), 1);
}

#[test]
fn descriptors_of_a_message_that_never_ends_are_closed_with_its_connection() {
    let (a, b) = pair();
    let (given, watched) = watched();
    send_with_fds(&a, &to_bytes(&command(1, b"body"))[..7], &[given.as_fd()]);
    drop(given);
    let mut receiver = Receiver::default();
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
    assert!(!watched.is_closed());
    drop(a);
    assert!(matches!(receiver.receive(&b), Err(TransportError::Truncated)));
    drop(receiver);
    assert!(watched.is_closed());
}

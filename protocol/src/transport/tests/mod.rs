mod descriptors;
mod sending;

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, fstat, memfd_create};
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;
use crate::wire::limits::{MAX_MESSAGE_FDS, MAX_MESSAGE_SIZE};
use crate::wire::{Command, Header, MessageKind, WireError};

fn pair() -> (UnixStream, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    (a, b)
}

fn command(id: u16, body: &[u8]) -> Frame {
    Frame::command(MessageId(id), Command::RegionWrite, body.to_vec())
}

fn to_bytes(frame: &Frame) -> Vec<u8> {
    [&frame.header.to_bytes()[..], &frame.body].concat()
}

/// Sends bytes with descriptors in one system call.
fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let iov = [IoSlice::new(bytes)];
    let sent = sendmsg(socket, &iov, &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

fn memfd() -> OwnedFd {
    memfd_create("test", MemfdFlags::empty()).unwrap()
}

fn expect_frame(receiver: &mut Receiver, socket: &UnixStream) -> Frame {
    match receiver.receive(socket).unwrap() {
        Received::Message(message) => message.into_frame(),
        other => panic!("expected a message, got {other:?}"),
    }
}

#[test]
fn several_messages_in_one_write_come_out_one_by_one() {
    let (mut a, b) = pair();
    let mut bytes = Vec::new();
    for id in 0..3u8 {
        bytes.extend(to_bytes(&command(id.into(), &[id; 5])));
    }
    a.write_all(&bytes).unwrap();
    let mut receiver = Receiver::default();
    for id in 0..3u8 {
        let frame = expect_frame(&mut receiver, &b);
        assert_eq!((frame.header.id, frame.body), (MessageId(id.into()), vec![id; 5]));
    }
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
}

#[test]
fn descriptors_stay_with_their_message_when_messages_are_pipelined() {
    let (a, b) = pair();
    let fd = memfd();
    let inode = fstat(&fd).unwrap().st_ino;
    let mut sender = Sender::default();
    sender.queue(command(1, b"without"));
    sender.queue(command(2, b"with").with_fds(vec![fd]));
    sender.queue(command(3, b"without"));
    assert_eq!(sender.flush(&a).unwrap(), Flush::Done);

    let mut receiver = Receiver::default();
    let fds: Vec<_> = (0..3).map(|_| expect_frame(&mut receiver, &b).fds).collect();
    assert_eq!(fds.iter().map(Vec::len).collect::<Vec<_>>(), [0, 1, 0]);
    assert_eq!(fstat(&fds[1][0]).unwrap().st_ino, inode);
    assert!(fcntl_getfd(&fds[1][0]).unwrap().contains(FdFlags::CLOEXEC));
}

#[test]
fn too_many_descriptors_refuse_the_message_and_keep_the_stream() {
    let (a, b) = pair();
    let fd = memfd();
    send_with_fds(&a, &to_bytes(&command(7, b"x")), &[fd.as_fd(); MAX_MESSAGE_FDS + 1]);

    let mut receiver = Receiver::default();
    match receiver.receive(&b).unwrap() {
        Received::Refused(header, WireError::TooManyFds) => assert_eq!(header.id, MessageId(7)),
        other => panic!("{other:?}"),
    }
    let mut sender = Sender::default();
    sender.queue(command(8, b"next"));
    sender.flush(&a).unwrap();
    assert_eq!(expect_frame(&mut receiver, &b).body, b"next");
}

#[test]
fn an_oversized_message_is_drained_and_the_next_one_is_read() {
    let (mut a, b) = pair();
    let size = MAX_MESSAGE_SIZE as usize;
    let header = Header {
        id: MessageId(1),
        command: 10,
        body_size: MAX_MESSAGE_SIZE,
        kind: MessageKind::Command { no_reply: false },
    };
    let writer = std::thread::spawn(move || {
        a.set_nonblocking(false).unwrap();
        a.write_all(&header.to_bytes()).unwrap();
        a.write_all(&vec![0xaa; size]).unwrap();
        a.write_all(&to_bytes(&command(2, b"after"))).unwrap();
    });
    b.set_nonblocking(false).unwrap();
    let mut receiver = Receiver::default();
    let refused = receiver.receive(&b).unwrap();
    assert!(matches!(refused, Received::Refused(h, WireError::TooLong(_)) if h == header));
    assert_eq!(expect_frame(&mut receiver, &b).body, b"after");
    writer.join().unwrap();
}

#[test]
fn a_size_below_the_header_loses_the_framing() {
    let (mut a, b) = pair();
    let mut bytes = command(5, b"").header.to_bytes();
    bytes[4..8].copy_from_slice(&15u32.to_ne_bytes());
    a.write_all(&bytes).unwrap();
    match Receiver::default().receive(&b) {
        Err(TransportError::Framing { id, .. }) => assert_eq!(id, MessageId(5)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn end_of_stream_is_clean_only_between_messages() {
    let (a, b) = pair();
    drop(a);
    assert!(matches!(Receiver::default().receive(&b).unwrap(), Received::Closed));

    let (mut a, b) = pair();
    a.write_all(&command(1, b"body").header.to_bytes()).unwrap();
    drop(a);
    assert!(matches!(Receiver::default().receive(&b), Err(TransportError::Truncated)));
}

#[test]
fn a_sender_stops_where_the_socket_does_and_goes_on_there() {
    let (a, b) = pair();
    let mut sender = Sender::default();
    let body = vec![0x5a; 1 << 20];
    sender.queue(command(1, &body).with_fds(vec![memfd()]));
    sender.queue(command(2, b"tail"));
    assert_eq!(sender.flush(&a).unwrap(), Flush::Blocked);
    let waiting = sender.queued_bytes();
    assert!(waiting > 0 && waiting < (1 << 20) + 16 + 20, "{waiting}");
    assert_eq!(sender.queued_fds(), 0, "the descriptor went with the first bytes");
    sender.queue(command(3, b"more").with_fds(vec![memfd(), memfd()]));
    assert_eq!(sender.queued_fds(), 2);

    let mut receiver = Receiver::default();
    let mut frames = Vec::new();
    while frames.len() < 3 {
        match receiver.receive(&b).unwrap() {
            Received::Message(message) => frames.push(message.into_frame()),
            Received::Pending => {
                sender.flush(&a).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(frames[0].body, body);
    assert_eq!(frames[0].fds.len(), 1);
    assert_eq!(frames[1].body, b"tail");
    assert_eq!(frames[2].fds.len(), 2);
    assert_eq!((sender.queued_bytes(), sender.queued_fds()), (0, 0));
}

#[test]
fn what_one_read_has_brought_needs_no_other() {
    let (mut a, b) = pair();
    let bytes: Vec<u8> = (0..100u8).flat_map(|id| to_bytes(&command(id.into(), &[id]))).collect();
    a.write_all(&bytes).unwrap();
    let mut receiver = Receiver::default();
    assert_eq!(expect_frame(&mut receiver, &b).body, [0]);
    for id in 1..100 {
        match receiver.receive_within(&b, 0).unwrap() {
            Received::Message(message) => assert_eq!(message.body, [id]),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(receiver.receive_within(&b, 0).unwrap(), Received::Pending));
}

#[test]
fn a_socket_that_was_emptied_is_asked_only_by_receive() {
    let (mut a, b) = pair();
    let mut receiver = Receiver::default();
    for id in 0..2 {
        a.write_all(&to_bytes(&command(id, b"x"))).unwrap();
        assert!(matches!(receiver.receive(&b).unwrap(), Received::Message(_)));
        a.write_all(&to_bytes(&command(id, b"later"))).unwrap();
        assert!(matches!(receiver.receive_more(&b).unwrap(), Received::Pending));
        assert_eq!(expect_frame(&mut receiver, &b).body, b"later");
    }
}

#[test]
fn a_read_that_ends_at_descriptors_does_not_mean_that_the_socket_is_empty() {
    let (mut a, b) = pair();
    let fd = memfd();
    send_with_fds(&a, &to_bytes(&command(1, b"with")), &[fd.as_fd()]);
    a.write_all(&to_bytes(&command(2, b"without"))).unwrap();
    let mut receiver = Receiver::default();
    assert_eq!(expect_frame(&mut receiver, &b).body, b"with");
    match receiver.receive_more(&b).unwrap() {
        Received::Message(message) => assert_eq!(message.body, b"without"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_body_that_was_announced_and_a_large_one_that_was_read_cost_no_memory_afterwards() {
    let (mut a, b) = pair();
    let mut receiver = Receiver::default();
    let large = to_bytes(&command(1, &vec![7; 1 << 20]));
    let writer = std::thread::spawn(move || {
        a.set_nonblocking(false).unwrap();
        a.write_all(&large).unwrap();
        // The beginning of the next one is in the buffer when the large one is gone.
        a.write_all(&to_bytes(&command(2, b"after"))[..20]).unwrap();
        a
    });
    b.set_nonblocking(false).unwrap();
    assert_eq!(expect_frame(&mut receiver, &b).body.len(), 1 << 20);
    let _a = writer.join().unwrap();
    b.set_nonblocking(true).unwrap();
    assert!(matches!(receiver.receive(&b).unwrap(), Received::Pending));
    assert!(receiver.buffered_room() <= KEPT_BUFFER, "{}", receiver.buffered_room());
}

proptest! {
    /// However a stream is cut into writes, the same frames come out.
    #[test]
    fn framing_does_not_depend_on_how_the_stream_is_cut(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
        cuts in prop::collection::vec(1usize..30, 1..40),
    ) {
        let (mut a, b) = pair();
        let mut bytes = Vec::new();
        for (id, body) in (0..).zip(&bodies) {
            bytes.extend(to_bytes(&command(id, body)));
        }
        let mut receiver = Receiver::default();
        let mut received = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            a.write_all(now).unwrap();
            rest = later;
            while let Received::Message(message) = receiver.receive(&b).unwrap() {
                received.push(message.body.to_vec());
            }
            if rest.is_empty() { break; }
        }
        prop_assert_eq!(received, bodies);
    }
}

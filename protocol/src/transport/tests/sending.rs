//! What a sender writes, and in how many calls.

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

use super::*;
use crate::wire::Errno;

/// Sockets that keep apart what was sent apart: each send is one record.
fn records() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap()
}

fn record(socket: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 4096];
    match recv(socket, &mut bytes[..], RecvFlags::empty()) {
        Ok((count, _)) => bytes.truncate(count),
        Err(Errno::AGAIN) => return None,
        Err(errno) => panic!("{errno}"),
    }
    Some(bytes)
}

#[test]
fn a_flush_is_one_call_unless_descriptors_split_it() {
    let (a, b) = records();
    let mut sender = Sender::default();
    let frames = || (0..5).map(|id| command(id, &[0xee; 20]));
    frames().for_each(|frame| sender.queue(frame));
    assert_eq!(sender.flush(&a).unwrap(), Flush::Done);
    let whole: Vec<u8> = frames().flat_map(|frame| to_bytes(&frame)).collect();
    assert_eq!((record(&b), record(&b)), (Some(whole.clone()), None));

    for (index, frame) in frames().enumerate() {
        sender.queue(if index == 2 { frame.with_fds(vec![memfd()]) } else { frame });
    }
    assert_eq!(sender.flush(&a).unwrap(), Flush::Done);
    let parts: Vec<&[u8]> = vec![&whole[..72], &whole[72..108], &whole[108..]];
    let sent: Vec<_> = std::iter::from_fn(|| record(&b)).collect();
    assert_eq!(sent, parts, "the message with the descriptor has a call of its own");
}

#[test]
fn messages_are_written_as_their_frames_would_be() {
    let (a, b) = pair();
    let mut sender = Sender::default();
    let request = command(3, b"request").header;
    sender.reply(&request, vec![memfd()], |body| body.extend_from_slice(b"reply"));
    sender.error(MessageId(4), 9, Errno::NODEV);
    sender.command(MessageId(5), Command::DmaRead, true, Vec::new(), |body| body.extend([1, 2]));
    assert_eq!(sender.queued_bytes(), 3 * 16 + 5 + 2);
    assert_eq!(sender.flush(&a).unwrap(), Flush::Done);

    let mut receiver = Receiver::default();
    let reply = expect_frame(&mut receiver, &b);
    assert_eq!((&reply.body[..], reply.fds.len()), (&b"reply"[..], 1));
    assert_eq!(reply.header, Frame::reply(&request, reply.body.clone()).header);
    let error = expect_frame(&mut receiver, &b);
    assert_eq!(error.header, Frame::error(MessageId(4), 9, Errno::NODEV).header);
    let command = expect_frame(&mut receiver, &b);
    assert_eq!((command.header.command, command.body), (Command::DmaRead.code(), vec![1, 2]));
    assert_eq!(command.header.kind, MessageKind::Command { no_reply: true });
}

#[test]
fn a_slow_peer_gets_everything_in_order_and_costs_what_waits_for_it() {
    let (a, b) = pair();
    let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
    let mut expected = 0u16;
    for id in 0..3000u16 {
        let body = [u8::try_from(id % 251).unwrap(); 500];
        let fds = if id.is_multiple_of(97) { vec![memfd()] } else { Vec::new() };
        let header = command(id, &[]).header;
        sender.reply(&header, fds, |bytes| bytes.extend_from_slice(&body));
        let _ = sender.flush(&a).unwrap();
        assert!(sender.buffered_room() <= 3 * sender.queued_bytes() + 2 * KEPT_BUFFER);
        // It takes two thirds of what it is sent.
        if id % 3 > 0 {
            let frame = expect_frame(&mut receiver, &b);
            assert_eq!(frame.header.id, MessageId(expected));
            expected += 1;
        }
    }
    while expected < 3000 {
        let _ = sender.flush(&a).unwrap();
        while let Received::Message(message) = receiver.receive(&b).unwrap() {
            assert_eq!(message.header.id, MessageId(expected));
            assert_eq!(message.body, [u8::try_from(expected % 251).unwrap(); 500]);
            assert_eq!(message.fds.len(), usize::from(expected.is_multiple_of(97)));
            expected += 1;
        }
    }
    assert_eq!(sender.flush(&a).unwrap(), Flush::Done);
    assert!(sender.buffered_room() <= KEPT_BUFFER);
}

#[test]
fn a_reply_whose_descriptors_the_kernel_refuses_becomes_an_error_and_the_others_stay() {
    let (a, b) = pair();
    let mut sender = Sender::default();
    let header = |id| command(id, &[]).header;
    sender.reply(&header(1), Vec::new(), |body| body.extend([1; 30]));
    sender.reply(&header(2), vec![memfd()], |body| body.extend([2; 30]));
    sender.reply(&header(3), vec![memfd()], |body| body.extend([3; 30]));
    assert!(sender.refuse_next());
    assert_eq!(sender.queued_fds(), 1);
    assert_eq!(sender.flush(&a).unwrap(), Flush::Done);

    let mut receiver = Receiver::default();
    assert_eq!(expect_frame(&mut receiver, &b).body, [1; 30]);
    let refused = expect_frame(&mut receiver, &b);
    let code = header(2).command;
    assert_eq!(refused.header, Frame::error(MessageId(2), code, Errno::TOOMANYREFS).header);
    assert!(refused.fds.is_empty());
    let last = expect_frame(&mut receiver, &b);
    assert_eq!((last.header.id, &last.body[..], last.fds.len()), (MessageId(3), &[3; 30][..], 1));
}

#[test]
fn a_command_whose_descriptors_the_kernel_refuses_stays_queued() {
    let mut sender = Sender::default();
    sender.command(MessageId(1), Command::DmaMap, false, vec![memfd()], |_| {});
    assert!(!sender.refuse_next());
    assert_eq!((sender.queued_bytes(), sender.queued_fds()), (16, 1));
}

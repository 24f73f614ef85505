use std::io::{Read, Write};
use std::thread;

use rustix::event::Timespec;
use rustix::fs::fstat;

use super::*;

/// A relay in a thread of the test, with the test at both ends.
struct Relayed {
    front_end: UnixStream,
    back_end: UnixStream,
    relay: Arc<Relay>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Relayed {
    fn start() -> Self {
        let (front_end, front) = UnixStream::pair().unwrap();
        let (listener, stream) = connection().unwrap();
        let back_end = listener.accept().unwrap().0;
        back_end.set_nonblocking(false).unwrap();
        let relay = Arc::new(Relay { front_end: Arc::new(front), back_end: stream });
        let running = Arc::clone(&relay);
        let thread = Some(thread::spawn(move || running.run()));
        Self { front_end, back_end, relay, thread }
    }

    /// Waits for the end of the relay.
    fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        let _ = self.front_end.shutdown(Shutdown::Both);
        let _ = self.back_end.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [&[request, 1, size].map(u32::to_ne_bytes).concat(), payload].concat()
}

/// What the crate gets instead of the first SET_VRING_ENABLE.
fn preceded(request: &[u8]) -> Vec<u8> {
    [&message(SET_FEATURES, &(1_u64 << 30).to_ne_bytes()), request].concat()
}

fn expect(mut socket: &UnixStream, bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    socket.read_exact(&mut read).unwrap();
    assert_eq!(read, bytes);
}

fn expect_end(mut socket: &UnixStream) {
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

/// Reads so many bytes as the crate reads a header. The inodes of what came with them.
fn expect_with_files(socket: &UnixStream, bytes: &[u8]) -> Vec<u64> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut room = vec![0; bytes.len()];
    let parts = &mut [IoSliceMut::new(&mut room)];
    let read = recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(&room[..read.bytes], bytes);
    let mut files = Vec::new();
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = item {
            files.extend(received.map(|file| inode(&file)));
        }
    }
    files
}

fn inode(file: &OwnedFd) -> u64 {
    fstat(file).unwrap().st_ino
}

fn files(count: usize) -> (Vec<OwnedFd>, Vec<u64>) {
    let files: Vec<OwnedFd> = (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect();
    let inodes = files.iter().map(inode).collect();
    (files, inodes)
}

#[test]
fn messages_and_their_descriptors_go_both_ways_unchanged() {
    let relayed = Relayed::start();
    for (from, to) in
        [(&relayed.front_end, &relayed.back_end), (&relayed.back_end, &relayed.front_end)]
    {
        let (one, many) = (files(1), files(MAX_FILES));
        let plain = message(1, &[]);
        let with_one = message(12, &[1; 8]);
        let with_many = message(5, &[7; MAX_PAYLOAD as usize]);
        // All of them before any is read.
        send(from.as_fd(), &plain, &[]).unwrap();
        send(from.as_fd(), &with_one, &one.0).unwrap();
        send(from.as_fd(), &plain, &[]).unwrap();
        send(from.as_fd(), &with_many, &many.0).unwrap();
        assert!(expect_with_files(to, &plain).is_empty());
        assert_eq!(expect_with_files(to, &with_one[..HEADER]), one.1);
        assert!(expect_with_files(to, &with_one[HEADER..]).is_empty());
        assert!(expect_with_files(to, &plain).is_empty());
        assert_eq!(expect_with_files(to, &with_many[..HEADER]), many.1);
        // In one piece: the crate reads once.
        assert!(expect_with_files(to, &with_many[HEADER..]).is_empty());
    }
}

#[test]
fn a_message_that_comes_in_pieces_arrives_in_one() {
    let relayed = Relayed::start();
    let (file, inodes) = files(1);
    let whole = message(12, &[1; 200]);
    for (index, byte) in whole.iter().enumerate() {
        let files = if index == 0 { &file[..] } else { &[] };
        send(relayed.front_end.as_fd(), &[*byte], files).unwrap();
        // The first answer goes by the second request.
        if index == 100 {
            (&relayed.back_end).write_all(&message(1, &[3; 8])).unwrap();
            expect(&relayed.front_end, &message(1, &[3; 8]));
        }
    }
    assert_eq!(expect_with_files(&relayed.back_end, &whole), inodes);
}

#[test]
fn features_are_set_before_a_ring_is_enabled_without_them() {
    let enable = message(SET_VRING_ENABLE, &[1; 8]);
    let other = message(1, &[]);
    let relayed = Relayed::start();
    let (mut front_end, back_end) = (&relayed.front_end, &relayed.back_end);
    front_end.write_all(&[other.clone(), enable.clone(), enable.clone()].concat()).unwrap();
    expect(back_end, &other);
    expect(back_end, &preceded(&enable));
    expect(back_end, &enable);
    for reset in [RESET_DEVICE, RESET_OWNER] {
        front_end
            .write_all(&[message(reset, &[]), enable.clone(), enable.clone()].concat())
            .unwrap();
        expect(back_end, &message(reset, &[]));
        expect(back_end, &preceded(&enable));
        expect(back_end, &enable);
    }
}

#[test]
fn features_that_are_set_stay_as_they_are() {
    let relayed = Relayed::start();
    let (mut front_end, back_end) = (&relayed.front_end, &relayed.back_end);
    for reset in [None, Some(RESET_DEVICE)] {
        let reset = reset.map_or(Vec::new(), |reset| message(reset, &[]));
        let set = message(SET_FEATURES, &[0; 8]);
        let all = [reset, set, message(SET_VRING_ENABLE, &[1; 8])].concat();
        front_end.write_all(&all).unwrap();
        expect(back_end, &all);
    }
}

#[test]
fn what_is_too_long_is_the_last_that_the_crate_sees() {
    for size in [MAX_PAYLOAD + 1, u32::MAX] {
        let relayed = Relayed::start();
        let header = [1, 1, size].map(u32::to_ne_bytes).concat();
        (&relayed.front_end).write_all(&[&header[..], &[0; 100]].concat()).unwrap();
        expect(&relayed.back_end, &header);
        expect_end(&relayed.back_end);
    }
}

#[test]
fn the_end_of_requests_leaves_their_answers() {
    let mut relayed = Relayed::start();
    (&relayed.front_end).write_all(&message(1, &[])).unwrap();
    relayed.front_end.shutdown(Shutdown::Write).unwrap();
    expect(&relayed.back_end, &message(1, &[]));
    expect_end(&relayed.back_end);
    (&relayed.back_end).write_all(&message(1, &[5; 8])).unwrap();
    relayed.back_end.shutdown(Shutdown::Both).unwrap();
    expect(&relayed.front_end, &message(1, &[5; 8]));
    expect_end(&relayed.front_end);
    relayed.join();
}

#[test]
fn a_side_that_is_gone_ends_the_other() {
    let mut relayed = Relayed::start();
    relayed.back_end.shutdown(Shutdown::Both).unwrap();
    expect_end(&relayed.front_end);
    relayed.join();
    let mut relayed = Relayed::start();
    (&relayed.front_end).write_all(&message(1, &[])[..5]).unwrap();
    relayed.front_end.shutdown(Shutdown::Both).unwrap();
    expect_end(&relayed.back_end);
    relayed.back_end.shutdown(Shutdown::Both).unwrap();
    relayed.join();
}

#[test]
fn a_crate_that_left_its_end_open_is_given_up() {
    let mut relayed = Relayed::start();
    (&relayed.back_end).write_all(&message(1, &[5; 8])).unwrap();
    relayed.relay.finish();
    expect(&relayed.front_end, &message(1, &[5; 8]));
    expect_end(&relayed.front_end);
    relayed.join();
}

#[test]
fn a_front_end_that_reads_no_answer_is_not_waited_for_at_the_end() {
    let mut relayed = Relayed::start();
    // Until both sockets are full.
    let request = message(1, &[0; 1000]);
    let writable = |socket: &UnixStream| {
        let briefly = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&briefly)) == Ok(1)
    };
    while writable(&relayed.front_end) || writable(&relayed.back_end) {
        for socket in [&relayed.front_end, &relayed.back_end] {
            let _ = send(socket.as_fd(), &request, &[]);
        }
    }
    relayed.relay.front_end.shutdown(Shutdown::Both).unwrap();
    relayed.join();
}

#[test]
fn a_connection_to_the_crate_is_nobody_elses() {
    let (listener, stream) = connection().unwrap();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let other = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let address = getsockname(&listener).unwrap();
    assert_eq!(connect(&other, &address), Err(Errno::AGAIN));
    let mut accepted = listener.accept().unwrap().0;
    (&stream).write_all(b"mine").unwrap();
    let mut read = [0; 4];
    accepted.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"mine");
}

#[test]
fn few_messages_wait_for_the_crate() {
    let (_listener, stream) = connection().unwrap();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut sent = 0;
    while poll(&mut [PollFd::new(&stream, PollFlags::OUT)], Some(&now)) == Ok(1) {
        send(stream.as_fd(), &message(12, &[0; 8]), &[]).unwrap();
        sent += 1;
    }
    assert!((1..10).contains(&sent), "{sent}");
}

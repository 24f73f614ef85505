use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendFlags, send};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::*;
use crate::state::Holder;

/// A file that tells what it is.
fn file(text: &str) -> OwnedFd {
    let mut file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(text.as_bytes()).unwrap();
    file.into()
}

fn text_of(fd: OwnedFd) -> String {
    let mut text = String::new();
    let mut file = File::from(fd);
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn links() -> (SupervisorLink, WorkerLink) {
    let (supervisor, theirs) = SupervisorLink::pair().unwrap();
    (supervisor, WorkerLink::from_fd(theirs))
}

fn begun(limit: usize) -> (SupervisorLink, WorkerLink) {
    let (mut supervisor, worker) = links();
    supervisor.tell(ToWorker::State(0, Arc::new(file("state"))));
    supervisor.tell(ToWorker::Begin { limit, previous_end: PreviousEnd::Orderly });
    supervisor.flush().unwrap();
    worker.begin().unwrap();
    (supervisor, worker)
}

#[test]
fn a_worker_begins_with_everything_that_is_held() {
    let (mut supervisor, worker) = links();
    let send = |supervisor: &mut SupervisorLink, order| {
        supervisor.tell(order);
        supervisor.flush().unwrap();
    };
    send(&mut supervisor, ToWorker::State(7, Arc::new(file("state 7"))));
    send(&mut supervisor, ToWorker::Client(7, Arc::new(file("client 7"))));
    send(&mut supervisor, ToWorker::Fd(7, FdKey(1 << 32), Arc::new(file("first"))));
    send(&mut supervisor, ToWorker::Fd(7, FdKey(u64::MAX), Arc::new(file("last"))));
    send(&mut supervisor, ToWorker::State(9, Arc::new(file("state 9"))));
    let previous_end = PreviousEnd::FromOutside;
    send(&mut supervisor, ToWorker::Begin { limit: 2, previous_end });
    send(&mut supervisor, ToWorker::Ping(5));
    let mut held = worker.begin().unwrap();
    assert_eq!(held.len(), 2);
    let Held { function, state, client, fds, previous_end } = held.pop().unwrap();
    assert_eq!((function, client.is_none(), fds.len()), (9, true, 0));
    assert_eq!(previous_end, PreviousEnd::FromOutside);
    assert_eq!(text_of(state), "state 9");
    let Held { function, state, client, fds, .. } = held.pop().unwrap();
    assert_eq!((function, text_of(state).as_str()), (7, "state 7"));
    assert_eq!(text_of(client.unwrap()), "client 7");
    let fds: Vec<_> = fds.into_iter().map(|(key, fd)| (key, text_of(fd))).collect();
    assert_eq!(fds, [(FdKey(1 << 32), "first".into()), (FdKey(u64::MAX), "last".into())]);
    assert!(matches!(worker.next(), Ok(Some(Order::Ping(5)))));
    assert!(matches!(worker.next(), Ok(None)));
}

#[test]
fn orders_arrive_as_they_were_given() {
    let (mut supervisor, worker) = begun(1);
    supervisor.tell(ToWorker::Client(65535, Arc::new(file("new"))));
    supervisor.tell(ToWorker::Drain);
    supervisor.tell(ToWorker::Stop);
    supervisor.flush().unwrap();
    let Ok(Some(Order::Client { function: 65535, socket })) = worker.next() else {
        panic!("a client")
    };
    assert_eq!(text_of(socket), "new");
    assert!(matches!(worker.next(), Ok(Some(Order::Drain))));
    assert!(matches!(worker.next(), Ok(Some(Order::Stop))));
}

#[test]
fn what_a_worker_has_said_outlives_it() {
    let (mut supervisor, worker) = begun(9);
    // It never reads this, which the kernel tells the other end as an error before anything else.
    supervisor.tell(ToWorker::Ping(1));
    supervisor.flush().unwrap();
    worker.report(Report::Ready).unwrap();
    worker.report(Report::Pong(u32::MAX)).unwrap();
    let mut holder = worker.holder(3);
    holder.store(FdKey(4), file("four").as_fd()).unwrap();
    holder.forget(FdKey(4));
    worker.report(Report::SessionEnded { function: 3 }).unwrap();
    worker.report(Report::Drained).unwrap();
    drop((worker, holder));

    assert!(matches!(supervisor.next(), Ok(Some(FromWorker::Ready))));
    assert!(matches!(supervisor.next(), Ok(Some(FromWorker::Pong(u32::MAX)))));
    let Ok(Some(FromWorker::Store(3, FdKey(4), fd))) = supervisor.next() else { panic!("stored") };
    assert_eq!(text_of(fd), "four");
    assert!(matches!(supervisor.next(), Ok(Some(FromWorker::Forget(3, FdKey(4))))));
    assert!(matches!(supervisor.next(), Ok(Some(FromWorker::SessionEnded(3)))));
    assert!(matches!(supervisor.next(), Ok(Some(FromWorker::Drained))));
    for _ in 0..2 {
        assert_eq!(supervisor.next().unwrap_err(), LinkError::Closed);
    }
    supervisor.tell(ToWorker::Stop);
    assert_eq!(supervisor.flush(), Err(LinkError::Closed));
}

#[test]
fn a_worker_goes_on_without_a_supervisor() {
    let (mut supervisor, worker) = begun(9);
    supervisor.tell(ToWorker::Ping(1));
    supervisor.flush().unwrap();
    // Never read, as above.
    worker.report(Report::Ready).unwrap();
    drop(supervisor);
    let mut holder = worker.holder(0);
    holder.store(FdKey(1), file("").as_fd()).unwrap();
    holder.forget(FdKey(1));
    worker.report(Report::Ready).unwrap();
    assert!(matches!(worker.next(), Ok(Some(Order::Ping(1)))));
    for _ in 0..2 {
        assert_eq!(worker.next().unwrap_err(), LinkError::Closed);
    }
}

#[test]
fn a_standby_that_is_not_needed_any_more_learns_it() {
    let (supervisor, worker) = links();
    drop(supervisor);
    assert_eq!(worker.begin().unwrap_err(), LinkError::Closed);
}

#[test]
fn a_function_has_no_more_held_than_its_share() {
    let (supervisor, worker) = begun(2);
    let fd = file("");
    let (mut holder, mut other) = (worker.holder(0), worker.holder(1));
    holder.store(FdKey(1), fd.as_fd()).unwrap();
    worker.holder(0).store(FdKey(2), fd.as_fd()).unwrap();
    let refused = holder.store(FdKey(3), fd.as_fd()).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(Errno::MFILE.raw_os_error()));
    holder.store(FdKey(2), fd.as_fd()).unwrap();
    holder.forget(FdKey(9));
    holder.store(FdKey(3), fd.as_fd()).unwrap_err();
    holder.forget(FdKey(1));
    holder.store(FdKey(3), fd.as_fd()).unwrap();
    other.store(FdKey(3), fd.as_fd()).unwrap();
    let mut said = Vec::new();
    while let Ok(Some(told)) = supervisor.next() {
        said.push(match told {
            FromWorker::Store(function, FdKey(key), _) => (function, key, true),
            FromWorker::Forget(function, FdKey(key)) => (function, key, false),
            other => panic!("{other:?}"),
        });
    }
    let expected =
        [(0, 1, true), (0, 2, true), (0, 2, true), (0, 1, false), (0, 3, true), (1, 3, true)];
    assert_eq!(said, expected);
}

#[test]
fn a_worker_that_reads_nothing_stops_nobody() {
    let (mut supervisor, worker) = begun(1);
    let mut told = 0;
    while !supervisor.has_unsent() {
        supervisor.tell(ToWorker::Ping(told));
        supervisor.flush().unwrap();
        told += 1;
    }
    assert!(told > 100, "{told}");
    supervisor.tell(ToWorker::Stop);
    supervisor.flush().unwrap();
    for number in 0..told {
        assert!(matches!(worker.next(), Ok(Some(Order::Ping(got))) if got == number));
        supervisor.flush().unwrap();
    }
    assert!(matches!(worker.next(), Ok(Some(Order::Stop))));
    assert!(!supervisor.has_unsent());
}

#[test]
fn nonsense_is_told_from_frames() {
    for bytes in [&[0xff; 16][..], &[0; 15], &[0; 17], &[0; 16], &[9]] {
        let (supervisor, theirs) = SupervisorLink::pair().unwrap();
        send(&theirs, bytes, SendFlags::empty()).unwrap();
        assert_eq!(supervisor.next().unwrap_err(), LinkError::Garbled, "{bytes:?}");
        assert!(matches!(supervisor.next(), Ok(None)));
    }
    // Without its descriptor.
    let (supervisor, theirs) = SupervisorLink::pair().unwrap();
    let frame = Frame { kind: Kind::Store, function: 0, number: 0 };
    send(&theirs, &frame.to_bytes(), SendFlags::empty()).unwrap();
    assert_eq!(supervisor.next().unwrap_err(), LinkError::Garbled);
}

#[test]
fn a_descriptor_that_there_is_no_room_for_is_told() {
    if std::env::var_os("NEXTEST").is_none() {
        return crate::skip::skip("other tests in this process open files");
    }
    let (supervisor, worker) = begun(9);
    let mut holder = worker.holder(0);
    holder.store(FdKey(1), file("").as_fd()).unwrap();
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit { current: Some(0), maximum: before.maximum };
    setrlimit(Resource::Nofile, none).unwrap();
    let told = supervisor.next();
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(matches!(told, Ok(Some(FromWorker::Lost(0, FdKey(1))))), "{told:?}");
    holder.store(FdKey(2), file("").as_fd()).unwrap();
    assert!(matches!(supervisor.next(), Ok(Some(FromWorker::Store(0, FdKey(2), _)))));
}

#[test]
fn a_worker_learns_how_the_last_one_ended() {
    for end in ENDS {
        let (mut supervisor, worker) = links();
        supervisor.tell(ToWorker::State(0, Arc::new(file(""))));
        supervisor.tell(ToWorker::Begin { limit: 1, previous_end: end });
        supervisor.flush().unwrap();
        assert_eq!(worker.begin().unwrap()[0].previous_end, end);
    }
}

#[test]
fn every_kind_of_frame_is_what_it_was() {
    for kind in Kind::ALL {
        let frame = Frame { kind, function: 0x1234, number: 0x0123_4567_89ab_cdef };
        assert_eq!(Frame::parse(&frame.to_bytes()), Ok(frame));
    }
}

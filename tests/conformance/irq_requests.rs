//! "VFIO_USER_DEVICE_SET_IRQS": which requests are understood.

use std::os::fd::{AsFd, BorrowedFd};

use barkeep_tests::backend::Backend;
use barkeep_tests::edu;
use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::memory::shrinkable;
use barkeep_tests::peer::message::command;
use barkeep_tests::peer::requests::{irq::*, set_irqs};
use rustix::io::Errno;

#[test]
fn a_request_that_makes_no_sense_is_refused() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    let trigger = ACTION_TRIGGER;
    for (name, body) in [
        ("no action", set_irqs(DATA_NONE, INTX, 0, 1, &[])),
        ("no data", set_irqs(trigger, INTX, 0, 1, &[])),
        ("two actions", set_irqs(DATA_NONE | trigger | ACTION_MASK, INTX, 0, 1, &[])),
        ("two kinds of data", set_irqs(DATA_NONE | DATA_BOOL | trigger, INTX, 0, 1, &[1])),
        ("an unknown flag", set_irqs(DATA_NONE | trigger | 1 << 6, INTX, 0, 1, &[])),
        ("INTx 1", set_irqs(DATA_NONE | trigger, INTX, 1, 1, &[])),
        ("two pins", set_irqs(DATA_NONE | trigger, INTX, 0, 2, &[])),
        ("MSI 1 of 1", set_irqs(DATA_NONE | trigger, MSI, 1, 1, &[])),
        ("two vectors of one", set_irqs(DATA_NONE | trigger, MSI, 0, 2, &[])),
        ("a range that wraps", set_irqs(DATA_NONE | trigger, MSI, u32::MAX, 2, &[])),
        ("2^32 - 1 eventfds", set_irqs(DATA_EVENTFD | trigger, MSI, 0, u32::MAX, &[])),
        ("bools that are missing", set_irqs(DATA_BOOL | trigger, MSI, 0, 1, &[])),
        ("2^32 - 1 bools", set_irqs(DATA_BOOL | trigger, MSI, 0, u32::MAX, &[1])),
        ("MSI-X of a function without", set_irqs(DATA_NONE | trigger, 2, 0, 1, &[])),
        ("all MSI-X of a function without", set_irqs(DATA_NONE | trigger, 2, 0, 0, &[])),
        ("a second error interrupt", set_irqs(DATA_NONE | trigger, 3, 1, 1, &[])),
        ("two request interrupts", set_irqs(DATA_NONE | trigger, 4, 0, 2, &[])),
        ("index 5", set_irqs(DATA_NONE | trigger, 5, 0, 1, &[])),
        ("index 2^32 - 1", set_irqs(DATA_NONE | trigger, u32::MAX, 0, 1, &[])),
        // GET_IRQ_INFO does not offer MASKABLE for MSI.
        ("masking MSI", set_irqs(DATA_NONE | ACTION_MASK, MSI, 0, 1, &[])),
        ("unmasking MSI", set_irqs(DATA_NONE | ACTION_UNMASK, MSI, 0, 1, &[])),
        ("short", set_irqs(DATA_NONE | trigger, INTX, 0, 1, &[])[..19].to_vec()),
        ("empty", vec![]),
        ("argsz below the fixed part", {
            let mut body = set_irqs(DATA_NONE | trigger, INTX, 0, 1, &[]);
            body[..4].copy_from_slice(&19u32.to_ne_bytes());
            body
        }),
    ] {
        println!("{name}");
        peer.expect_errno(command::SET_IRQS, &body, Errno::INVAL);
    }
}

#[test]
fn descriptors_must_be_eventfds_and_as_many_as_vectors() {
    let backend = Backend::serve(&["edu"]);
    let mut peer = backend.client();
    edu::enable(&mut peer);
    let counter = EventCounter::new();
    peer.set_eventfd(INTX, 0, counter.as_fd());

    let other = EventCounter::new();
    let (pipe, _other_end) = rustix::pipe::pipe().expect("a pipe");
    let memory = shrinkable(4096);
    let (socket, _) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    let eventfd = other.as_fd();
    let set = |flags, index, count| set_irqs(flags | ACTION_TRIGGER, index, 0, count, &[]);
    let cases: [(&str, Vec<u8>, &[BorrowedFd<'_>]); 10] = [
        ("a pipe", set(DATA_EVENTFD, INTX, 1), &[pipe.as_fd()]),
        ("a memfd", set(DATA_EVENTFD, INTX, 1), &[memory.as_fd()]),
        ("a socket", set(DATA_EVENTFD, INTX, 1), &[socket.as_fd()]),
        ("two for one pin", set(DATA_EVENTFD, INTX, 1), &[eventfd, eventfd]),
        ("one for two pins", set(DATA_EVENTFD, INTX, 2), &[eventfd]),
        ("two for one vector", set(DATA_EVENTFD, MSI, 1), &[eventfd, eventfd]),
        ("two for two vectors of one", set(DATA_EVENTFD, MSI, 2), &[eventfd, eventfd]),
        ("one for none", set(DATA_EVENTFD, INTX, 0), &[eventfd]),
        ("one with NONE", set(DATA_NONE, INTX, 1), &[eventfd]),
        ("one to mask with", set_irqs(DATA_EVENTFD | ACTION_MASK, INTX, 0, 1, &[]), &[eventfd]),
    ];
    for (name, body, fds) in cases {
        println!("{name}");
        peer.call_with_fds(command::SET_IRQS, &body, fds).failure(Errno::INVAL);
    }

    edu::raise(&mut peer);
    assert_eq!((counter.take(), other.take()), (1, 0), "a refused request changes nothing");
}

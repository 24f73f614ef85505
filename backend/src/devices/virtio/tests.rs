//! Queues and chains.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::spec::{avail, descriptor, feature};
use super::testing::{Driver, Part};
use super::*;

fn pop(driver: &mut Driver) -> Result<Option<Chain>, QueueError> {
    let mut chain = Chain::default();
    let taken = driver.queue(0).unwrap().pop(&mut chain)?;
    Ok(taken.then_some(chain))
}

#[test]
fn a_chain_has_what_the_device_reads_and_what_it_writes() {
    let mut driver = Driver::new(1);
    let parts = [Part::Readable(b"abc"), Part::Readable(b"defg"), Part::Writable(5)];
    let sent = driver.send(0, &parts);
    let chain = pop(&mut driver).unwrap().unwrap();
    assert_eq!((chain.head(), chain.readable.len(), chain.writable.len()), (sent.head, 7, 5));
    let mut data = [0; 5];
    chain.readable.read(&*driver.memory, 1, &mut data).unwrap();
    assert_eq!(&data, b"bcdef");
    chain.writable.write(&*driver.memory, 2, b"xyz").unwrap();
    assert_eq!(driver.bytes(sent.addresses[2], 5), b"\0\0xyz");
    let short = chain.writable.write(&*driver.memory, 3, b"xyz");
    assert!(matches!(short, Err(QueueError::Short)), "{short:?}");
    assert!(pop(&mut driver).unwrap().is_none());
}

#[test]
fn a_queue_that_stops_gives_no_request_and_takes_those_it_gave() {
    let mut driver = Driver::new(1);
    let first = driver.send(0, &[Part::Writable(5)]);
    pop(&mut driver).unwrap().unwrap();
    let second = driver.send(0, &[Part::Writable(5)]);
    let mut stopping = driver.queue(0).unwrap().without_new_requests();
    assert!(!stopping.pop(&mut Chain::default()).unwrap() && !stopping.rearm().unwrap());
    stopping.push(first.head, 0).unwrap();
    assert_eq!(driver.used(0), Some((first.head, 0)));
    assert_eq!(pop(&mut driver).unwrap().unwrap().head(), second.head);
}

#[test]
fn a_request_that_is_given_back_is_used_and_interrupts_once() {
    let mut driver = Driver::new(1);
    let sent = driver.send(0, &[Part::Writable(5)]);
    pop(&mut driver).unwrap().unwrap();
    assert!(!driver.interrupted(0));
    driver.queue(0).unwrap().push(sent.head, 3).unwrap();
    assert_eq!(driver.used(0), Some((sent.head, 3)));
    assert!(driver.interrupted(0));
    assert!(!driver.interrupted(0));
    driver.set_avail_flags(0, avail::NO_INTERRUPT);
    driver.queue(0).unwrap().push(sent.head, 3).unwrap();
    assert!(!driver.interrupted(0));
}

#[test]
fn an_indirect_table_is_followed_if_it_was_negotiated() {
    let mut driver = Driver::new(1);
    let table = driver.room(32);
    let first = [0x10_0000u64.to_le_bytes(), [4, 0, 0, 0, 1, 0, 1, 0]].concat();
    let second = [0x10_1000u64.to_le_bytes(), [8, 0, 0, 0, 2, 0, 0, 0]].concat();
    driver.memory.write_slice(&[first, second].concat(), GuestAddress(table)).unwrap();
    driver.send(0, &[Part::Raw(table, 32, descriptor::INDIRECT)]);
    let chain = pop(&mut driver).unwrap().unwrap();
    assert_eq!((chain.readable.len(), chain.writable.len()), (4, 8));

    driver.send(0, &[Part::Raw(table, 32, descriptor::INDIRECT)]);
    driver.features &= !feature::INDIRECT_DESC;
    let refused = pop(&mut driver);
    assert!(matches!(refused, Err(QueueError::Indirect)), "{refused:?}");
}

#[test]
fn a_malformed_chain_is_an_error_and_not_an_end() {
    const INDIRECT: u16 = descriptor::INDIRECT;
    type Check = fn(&QueueError) -> bool;
    let rows: [(&str, &[Part<'_>], Check); 8] = [
        ("order", &[Part::Writable(1), Part::Readable(b"x")], |e| matches!(e, QueueError::Order)),
        ("table of odd length", &[Part::Raw(0, 17, INDIRECT)], |e| {
            matches!(e, QueueError::Indirect)
        }),
        ("empty table", &[Part::Raw(0, 0, INDIRECT)], |e| matches!(e, QueueError::Indirect)),
        ("huge table", &[Part::Raw(0, 16 << 16, INDIRECT)], |e| matches!(e, QueueError::Indirect)),
        ("table in the middle", &[Part::Raw(0, 16, INDIRECT), Part::Writable(1)], |e| {
            matches!(e, QueueError::Indirect)
        }),
        ("table out of memory", &[Part::Raw(1 << 40, 16, INDIRECT)], |e| {
            matches!(e, QueueError::Memory(_))
        }),
        ("wrapping table", &[Part::Raw(u64::MAX - 7, 32, INDIRECT)], |e| {
            matches!(e, QueueError::Memory(_) | QueueError::Index(_))
        }),
        ("4 GiB and more", &[Part::Raw(0, u32::MAX, 0), Part::Raw(0, 2, 0)], |e| {
            matches!(e, QueueError::TooLong)
        }),
    ];
    for (name, parts, check) in rows {
        let mut driver = Driver::new(1);
        driver.send(0, parts);
        let error = pop(&mut driver).unwrap_err();
        assert!(check(&error), "{name}: {error:?}");
        // It was not taken.
        assert!(pop(&mut driver).is_err(), "{name}");
    }
}

#[test]
fn a_loop_and_a_head_outside_of_the_table_are_errors() {
    let mut driver = Driver::new(1);
    driver.send(0, &[Part::Writable(1)]);
    // The first descriptor follows itself.
    driver.memory.write_slice(&[3, 0, 0, 0], GuestAddress(12)).unwrap();
    let error = pop(&mut driver).unwrap_err();
    assert!(matches!(error, QueueError::Loop), "{error:?}");

    let mut driver = Driver::new(1);
    driver.make_available(0, 256);
    let error = pop(&mut driver).unwrap_err();
    assert!(matches!(error, QueueError::Index(256)), "{error:?}");
}

#[test]
fn a_chain_that_no_driver_makes_is_not_followed_to_its_end() {
    let chained = |descriptors: u16| {
        let mut driver = Driver::new(1);
        let table = driver.room(u64::from(descriptors) * descriptor::SIZE);
        for index in 0..descriptors {
            let flags = if index + 1 < descriptors { descriptor::NEXT } else { 0 };
            let entry =
                [&[0; 8][..], &[1, 0, 0, 0], &flags.to_le_bytes(), &(index + 1).to_le_bytes()];
            let at = GuestAddress(table + u64::from(index) * descriptor::SIZE);
            driver.memory.write_slice(&entry.concat(), at).unwrap();
        }
        let len = u32::from(descriptors) * 16;
        driver.send(0, &[Part::Raw(table, len, descriptor::INDIRECT)]);
        pop(&mut driver)
    };
    assert_eq!(chained(2048).unwrap().unwrap().readable.len(), 2048);
    for descriptors in [2049, u16::MAX] {
        let error = chained(descriptors).map(drop).unwrap_err();
        assert!(matches!(error, QueueError::Loop), "{error:?}");
    }
}

#[test]
fn more_requests_than_a_queue_holds_are_an_error() {
    let mut driver = Driver::new(1);
    driver.overstate(0, 257);
    let error = pop(&mut driver).unwrap_err();
    assert!(matches!(error, QueueError::TooManyAvailable(257)), "{error:?}");
}

#[test]
fn buffers_that_are_not_in_memory_are_told() {
    let mut driver = Driver::new(1);
    driver.send(0, &[Part::Raw(u64::MAX - 3, 8, 0)]);
    let chain = pop(&mut driver).unwrap().unwrap();
    let error = chain.readable.read(&*driver.memory, 0, &mut [0; 8]).unwrap_err();
    assert!(matches!(error, QueueError::Memory(_)), "{error:?}");
}

#[test]
fn requests_that_are_given_back_at_once_are_seen_together_or_not_at_all() {
    let mut driver = Driver::new(1);
    for _ in 0..3 {
        driver.send(0, &[Part::Writable(1)]);
    }
    driver.queue(0).unwrap().push_all(&[(0, 5), (1, 6), (2, 7)]).unwrap();
    let used: Vec<_> = std::iter::from_fn(|| driver.used(0)).collect();
    assert_eq!(used, [(0, 5), (1, 6), (2, 7)]);

    // Memory ends behind the second entry of the used ring.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let ring = 0x1000 - 4 - 2 * 8;
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_used_ring_address(GuestAddress(ring)).unwrap();
    let (memory, mut used) = (Arc::new(memory), false);
    let mut access = QueueAccess::new(&mut queue, &memory, 0, &mut used);
    let result = access.push_all(&[(0, 5), (1, 6), (2, 7), (3, 8)]);
    assert!(matches!(result, Err(QueueError::Memory(_))), "{result:?}");
    let index: u16 = memory.read_obj(GuestAddress(ring + 2)).unwrap();
    assert_eq!((index, used), (0, false));
}

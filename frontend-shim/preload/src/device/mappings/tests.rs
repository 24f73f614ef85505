use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;

use super::Mappings;
use crate::device::{BarMapping, DeviceId, Turn};

fn mapping(start: usize, len: usize, offset: u64) -> BarMapping {
    BarMapping { device: DeviceId(7), bar: 2, start, len, offset }
}

#[test]
fn a_whole_range_lies_in_one_mapping_or_in_none() {
    let turn = Mutex::new(Turn::default());
    let writing = turn.lock().expect("nobody else has it");
    let mappings = Mappings::default();
    assert!(mappings.insert(&mapping(0x2000, 0x2000, 0x100), &writing));
    assert!(mappings.insert(&mapping(0x4000, 0x1000, 0x2100), &writing));
    assert_eq!(mappings.within(0x2000, 0x2000), Some(mapping(0x2000, 0x2000, 0x100)));
    assert_eq!(mappings.within(0x3fff, 1), Some(mapping(0x2000, 0x2000, 0x100)));
    assert_eq!(mappings.within(0x3fff, 2), None);
    assert_eq!(mappings.within(0x1fff, 2), None);
    assert_eq!(mappings.within(0x2001, usize::MAX), None);
    assert_eq!(mappings.at(0x5000), None);
}

#[test]
fn a_full_table_says_so_and_keeps_what_it_has() {
    let turn = Mutex::new(Turn::default());
    let writing = turn.lock().expect("nobody else has it");
    let mappings = Mappings::default();
    for index in 0..1024 {
        assert!(mappings.insert(&mapping(0x10_0000 + 0x4000 * index, 0x3000, 0), &writing));
    }
    assert!(!mappings.insert(&mapping(0x1000, 0x1000, 0), &writing));
    // The hole in the middle leaves two, and there is room for one.
    let (taken, room) = mappings.remove(0x10_1000, 0x1000, &writing);
    assert_eq!(taken, [mapping(0x10_1000, 0x1000, 0x1000)]);
    assert!(room.is_err());
    assert!(mappings.at(0x10_0000).is_some());
    assert_eq!(mappings.at(0x10_2000), None);
    assert!(mappings.at(0x10_0000 + 0x4000 * 1023).is_some());
}

#[test]
fn an_entry_is_not_believed_while_it_is_written() {
    let mappings = Mappings::default();
    let turn = Mutex::new(Turn::default());
    let writing = turn.lock().expect("nobody else has it");
    assert!(mappings.insert(&mapping(0x1000, 0x1000, 0), &writing));
    assert!(mappings.insert(&mapping(0x4000, 0x1000, 0), &writing));
    // As a handler sees it that interrupted the writer: it neither believes nor waits for ever.
    mappings.entries[0].begin();
    assert_eq!(mappings.at(0x1000), None);
    assert_eq!(mappings.at(0x4000), Some(mapping(0x4000, 0x1000, 0)));
    mappings.entries[0].sequence.fetch_add(1, Ordering::Release);
    assert_eq!(mappings.at(0x1000), Some(mapping(0x1000, 0x1000, 0)));
}

/// One thread makes and removes mappings whose parts all say where in the BAR they are by
/// their address. Readers must never see a part of one and a part of another, and must always find
/// what is never taken away.
#[test]
fn readers_see_whole_entries_only() {
    const STAYS: usize = 0x10_0000;
    let mappings = Mappings::default();
    let turn = Mutex::new(Turn::default());
    let done = AtomicBool::new(false);
    let begin = Barrier::new(4);
    // Device and BAR follow from the start as well.
    let of = |start: usize, len: usize| BarMapping {
        device: DeviceId(u32::try_from(start >> 12).expect("addresses are small")),
        bar: u8::try_from(start >> 12 & 3).expect("less than four"),
        start,
        len,
        offset: start as u64 * 3,
    };
    {
        let writing = turn.lock().expect("nobody else has it");
        assert!(mappings.insert(&of(STAYS, 0x1000), &writing));
    }
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                begin.wait();
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(mappings.at(STAYS), Some(of(STAYS, 0x1000)));
                    for host in (0x1000..0x9000).step_by(0x1000) {
                        if let Some(found) = mappings.at(host) {
                            assert_eq!(found, of(found.start, found.len));
                            assert!(found.start <= host && host < found.start + found.len);
                        }
                    }
                }
            });
        }
        begin.wait();
        for round in 0..100_000_usize {
            let writing = turn.lock().expect("nobody else has it");
            // Each time the same entry, with another content.
            let start = |round| 0x1000 * (1 + round % 7);
            assert!(mappings.insert(&of(start(round), 0x1000 * (1 + round % 2)), &writing));
            let _ = mappings.remove(0x1000, 0x9000, &writing);
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// Another thread splits a mapping while a reader is between two entries, and one half goes to an
/// entry that the reader has passed.
#[test]
fn a_mapping_that_moves_behind_a_reader_is_found() {
    let mappings = Mappings::default();
    let turn = Mutex::new(Turn::default());
    let writing = turn.lock().expect("nobody else has it");
    for (start, len) in [(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x3000)] {
        assert!(mappings.insert(&mapping(start, len, 0), &writing));
    }
    let _ = mappings.remove(0x1000, 0x1000, &writing);
    let mut seen = Vec::new();
    let found = mappings.find(|found| {
        if seen.is_empty() {
            let _ = mappings.remove(0x5000, 0x1000, &writing);
        }
        seen.push(found.start);
        found.start == 0x6000
    });
    assert_eq!(seen, [0x2000, 0x4000, 0x6000]);
    assert_eq!(found, Some(mapping(0x6000, 0x1000, 0x2000)));
}

/// What is left of a mapping on both sides of a hole is found while the hole is made.
#[test]
fn what_stays_is_always_found_while_a_mapping_is_split() {
    let mappings = Mappings::default();
    let turn = Mutex::new(Turn::default());
    let done = AtomicBool::new(false);
    let begin = Barrier::new(3);
    // Never the same twice, so that a reader can tell whether it was the place all the time.
    let place = |round: usize| 0x10_0000 + 0x4000 * round;
    let current = AtomicUsize::new(place(0));
    let whole = |start| mapping(start, 0x3000, 0);
    assert!(mappings.insert(&whole(place(0)), &turn.lock().expect("nobody else has it")));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                begin.wait();
                while !done.load(Ordering::Relaxed) {
                    let start = current.load(Ordering::Acquire);
                    let found = [0, 0x2fff].map(|inside| mappings.at(start + inside));
                    if current.load(Ordering::Acquire) != start {
                        continue;
                    }
                    for (found, inside) in found.into_iter().zip([0, 0x2fff]) {
                        let found = found.expect("it stays mapped");
                        assert_eq!(
                            found.offset + (start + inside - found.start) as u64,
                            inside as u64
                        );
                    }
                }
            });
        }
        begin.wait();
        for round in 0..20_000 {
            let writing = turn.lock().expect("nobody else has it");
            let start = place(round);
            let _ = mappings.remove(start + 0x1000, 0x1000, &writing);
            assert_eq!(mappings.at(start + 0x1000), None);
            assert!(mappings.insert(&whole(place(round + 1)), &writing));
            current.store(place(round + 1), Ordering::Release);
            let _ = mappings.remove(start, 0x3000, &writing);
        }
        done.store(true, Ordering::Relaxed);
    });
}

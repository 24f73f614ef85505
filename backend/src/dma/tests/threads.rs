//! Guards that threads of a device hold, and the unmapping that waits for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::*;

/// Takes the windows away with `unmap` while a thread holds a guard of them.
fn unmap_under_a_guard(unmap: impl FnOnce(DmaTable) -> Option<DmaTable>) {
    let (ours, theirs) = named(0x1000);
    let mut table = DmaTable::new(10);
    table.map(Iova(0x4000), 0x1000, READ_WRITE, Some((ours, 0))).unwrap();
    let handle = table.handle();
    let (held, holds) = mpsc::channel();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let done = &done;
        scope.spawn(move || {
            let guard = handle.memory();
            // Its copy holds the window as well.
            let copy = guard.clone();
            held.send(()).unwrap();
            // Nobody gets the window any more: the unmapping is under way.
            while handle.memory().read(Iova(0x4000), &mut [0]).is_ok() {
                thread::yield_now();
            }
            drop(guard);
            assert_eq!(mappings_of(NAME), 1);
            copy.write_slice(b"in flight", GuestAddress(0x4000)).unwrap();
            done.store(true, Ordering::SeqCst);
            drop(copy);
        });
        holds.recv().unwrap();
        let left = unmap(table);
        assert!(done.load(Ordering::SeqCst), "the transfer under way came first");
        assert_eq!(mappings_of(NAME), 0);
        assert_eq!(bytes_at(&theirs, 0, 9), b"in flight");
        drop(left);
    });
}

#[test]
fn unmapping_waits_for_the_transfers_of_threads() {
    unmap_under_a_guard(|mut table| {
        table.unmap(Iova(0x4000), 0x1000).unwrap();
        Some(table)
    });
    unmap_under_a_guard(|mut table| {
        table.unmap_all().unwrap();
        Some(table)
    });
}

#[test]
fn a_table_is_not_gone_before_the_transfers_of_threads() {
    unmap_under_a_guard(|table| {
        drop(table);
        None
    });
}

#[test]
fn a_guard_delays_only_the_windows_that_it_holds() {
    let mut table = DmaTable::new(10);
    table.map(Iova(0x1000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    let handle = table.handle();
    let before = handle.memory();
    // Neither mapping nor unmapping what came later waits.
    table.map(Iova(0x2000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    before.write(Iova(0x1000), b"old").unwrap();
    assert_eq!(before.write(Iova(0x2000), b"new"), Err(DmaError::Unmapped(0x2000)));
    handle.memory().write(Iova(0x2000), b"new").unwrap();
    table.unmap(Iova(0x2000), 0x1000).unwrap();
    assert_eq!(handle.memory().write(Iova(0x2000), b"new"), Err(DmaError::Unmapped(0x2000)));
    drop(before);
    drop(table);
    let error = handle.memory().write(Iova(0x1000), b"old");
    assert_eq!(error, Err(DmaError::Unmapped(0x1000)), "what is left of no table");
}

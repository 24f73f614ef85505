//! The engines and a client's memory, which has rights and can go away.

use std::io::Write;
use std::sync::mpsc;
use std::thread;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;

use super::*;
use crate::devices::virtio::blk::engine::{Operation, Span};
use crate::dma::{DmaAccess, DmaGuard, DmaTable, Iova};

const PAGE: u64 = 4096;

type Engines<G> = [(&'static str, Box<dyn Engine<G>>); 2];

fn engines<G: MemoryGuard>(file: &File) -> Engines<G> {
    let file = Arc::new(file.try_clone().unwrap());
    let wake = Arc::new(EventFd::create().unwrap());
    let ring = UringEngine::new(Arc::clone(&file), wake, 4).unwrap();
    [("io_uring", Box::new(ring)), ("sync", Box::new(SyncEngine::new(file)))]
}

/// A table with a window of so many pages at address 0, and its memory.
fn window(pages: u64, access: DmaAccess) -> (DmaTable, File) {
    let ours = memfd_create("client", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ours, pages * PAGE).unwrap();
    let theirs = File::from(ours.try_clone().unwrap());
    let mut table = DmaTable::new(10);
    table.map(Iova(0), pages * PAGE, access, Some((ours, 0))).unwrap();
    (table, theirs)
}

fn perform<G>(engine: &mut dyn Engine<G>, operation: Operation<G>) -> Completion<G> {
    engine.start(Id(3), operation);
    engine.submit();
    loop {
        if let Some(completion) = engine.completed() {
            assert_eq!(completion.id, Id(3));
            return completion;
        }
        engine.wait();
    }
}

fn read(table: &DmaTable, address: u64, len: usize) -> Operation<DmaGuard> {
    let into = Span::new(table.handle().memory(), vec![(GuestAddress(address), len)]);
    Operation::Read { at: 0, into }
}

fn write(table: &DmaTable, address: u64, len: usize) -> Operation<DmaGuard> {
    let from = Span::new(table.handle().memory(), vec![(GuestAddress(address), len)]);
    Operation::Write { at: 0, from }
}

#[test]
fn pages_that_the_kernel_wrote_to_are_dirty_and_no_others() {
    let image = image(5000);
    for (name, mut engine) in engines(image.as_file()) {
        let (mut table, _memory) = window(8, DmaAccess::all());
        table.start_logging(&[], PAGE).unwrap();
        let dirty = |table: &mut DmaTable| {
            let mut bitmap = [0; 8];
            table.report(Iova(0), 8 * PAGE, PAGE, &mut bitmap).unwrap();
            bitmap[0]
        };
        // The image ends in the second page of three.
        assert_eq!(perform(&mut *engine, read(&table, PAGE, 3 * 4096)).result, Ok(5000), "{name}");
        assert_eq!(dirty(&mut table), 0b110, "{name}");
        assert_eq!(perform(&mut *engine, write(&table, 0, 4096)).result, Ok(4096), "{name}");
        assert_eq!(dirty(&mut table), 0, "{name}");
    }
}

#[test]
fn memory_that_may_not_be_accessed_so_is_not() {
    let image = image(MIB);
    image.as_file().write_all_at(&[1; 4096], 0).unwrap();
    for (name, mut engine) in engines(image.as_file()) {
        let (table, memory) = window(1, DmaAccess::READ);
        assert_eq!(perform(&mut *engine, read(&table, 0, 512)).result, Err(Errno::FAULT), "{name}");
        let mut bytes = [9; 512];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0; 512], "{name}");
        assert_eq!(perform(&mut *engine, write(&table, 0, 512)).result, Ok(512), "{name}");

        let (table, _memory) = window(1, DmaAccess::WRITE);
        let refused = perform(&mut *engine, write(&table, 0, 512)).result;
        assert_eq!(refused, Err(Errno::FAULT), "{name}");
        assert_eq!(perform(&mut *engine, read(&table, 0, 512)).result, Ok(512), "{name}");
    }
}

#[test]
fn memory_that_its_owner_takes_away_is_an_error() {
    let image = image(MIB);
    for (name, mut engine) in engines(image.as_file()) {
        let (table, memory) = window(2, DmaAccess::all());
        memory.set_len(PAGE).unwrap();
        for operation in [read(&table, PAGE, 512), write(&table, PAGE, 512)] {
            assert_eq!(perform(&mut *engine, operation).result, Err(Errno::FAULT), "{name}");
        }
        assert_eq!(perform(&mut *engine, read(&table, 0, 512)).result, Ok(512), "{name}");
        // Somebody else touches the page: what is there now is nobody's memory.
        assert!(table.write(Iova(PAGE), &[1]).is_err());
        let lost = perform(&mut *engine, read(&table, PAGE, 512)).result;
        assert_eq!(lost, Err(Errno::FAULT), "{name}");
    }
}

#[test]
fn what_is_too_much_for_one_operation_is_done_in_parts() {
    const PIECES: usize = 2500;
    let image = image(4 * MIB);
    for (name, mut engine) in engines::<Memory>(image.as_file()) {
        let driver = Driver::new(1);
        let data = pattern(PIECES * 512, 20);
        driver.memory.write_slice(&data, GuestAddress(MIB)).unwrap();
        let piece = |index: usize| (GuestAddress(MIB + index as u64 * 512), 512);
        let span = Span::new(Arc::clone(&driver.memory), (0..PIECES).map(piece).collect());
        let mut operation = Operation::Write { at: 0, from: span };
        loop {
            let Completion { operation: done, result, .. } = perform(&mut *engine, operation);
            let Operation::Write { at, mut from } = done else { unreachable!() };
            let moved = result.unwrap();
            assert!(moved > 0, "{name}");
            from.advance(moved);
            if from.is_empty() {
                break;
            }
            operation = Operation::Write { at: at + moved, from };
        }
        let mut stored = vec![0; PIECES * 512];
        image.as_file().read_exact_at(&mut stored, 0).unwrap();
        assert!(stored == data, "{name}");
    }
}

#[test]
fn one_operation_takes_no_longer_than_others_can_wait() {
    let image = image(4 * MIB);
    for (name, mut engine) in engines::<Memory>(image.as_file()) {
        let driver = Driver::new(1);
        // As long as a request may be, in memory that is the same again and again.
        let pieces: Vec<_> = (0..64).map(|_| (GuestAddress(MIB), 1 << 26 >> 1)).collect();
        let span = || Span::new(Arc::clone(&driver.memory), pieces.clone());
        let reading = Operation::Read { at: 0, into: span() };
        assert_eq!(perform(&mut *engine, reading).result, Ok(MIB), "{name}");
        let writing = Operation::Write { at: 0, from: span() };
        assert_eq!(perform(&mut *engine, writing).result, Ok(MIB), "{name}");
    }
}

/// An engine that reads from a pipe, which takes as long as the test wants.
fn piped() -> (UringEngine<Memory>, File, Arc<EventFd>) {
    let (from, to) = rustix::pipe::pipe().unwrap();
    let wake = Arc::new(EventFd::create().unwrap());
    let file = Arc::new(File::from(from));
    (UringEngine::new(file, Arc::clone(&wake), 4).unwrap(), File::from(to), wake)
}

#[test]
fn memory_is_held_until_the_kernel_is_done_with_it() {
    let driver = Driver::new(1);
    let (mut engine, mut pipe, wake) = piped();
    let into = Span::new(Arc::clone(&driver.memory), vec![(GuestAddress(MIB), 100)]);
    engine.start(Id(0), Operation::Read { at: 0, into });
    engine.submit();
    assert!(engine.completed().is_none());
    assert_eq!(Arc::strong_count(&driver.memory), 2);
    pipe.write_all(b"now").unwrap();
    let mut polled = [PollFd::new(&wake, PollFlags::IN)];
    assert_eq!(poll(&mut polled, Some(&Timespec { tv_sec: 60, tv_nsec: 0 })).unwrap(), 1);
    let completion = engine.completed().unwrap();
    assert_eq!((completion.id, completion.result), (Id(0), Ok(3)));
    drop(completion);
    assert_eq!(Arc::strong_count(&driver.memory), 1);
    assert_eq!(driver.bytes(MIB, 3), b"now");
}

#[test]
fn the_rest_of_a_transfer_goes_to_the_rest_of_the_memory() {
    let driver = Driver::new(1);
    let (mut engine, mut pipe, _wake) = piped();
    let pieces =
        vec![(GuestAddress(MIB), 4), (GuestAddress(2 * MIB), 4), (GuestAddress(MIB + 4), 1)];
    let mut into = Span::new(Arc::clone(&driver.memory), pieces);
    for (data, left) in [(&b"ab"[..], 7), (b"cdef", 3), (b"ghi", 0)] {
        pipe.write_all(data).unwrap();
        let Completion { operation, result, .. } =
            perform(&mut engine, Operation::Read { at: 0, into });
        let Operation::Read { into: rest, .. } = operation else { unreachable!() };
        into = rest;
        into.advance(result.unwrap());
        assert_eq!((into.len(), into.is_empty()), (left, left == 0));
    }
    assert_eq!(driver.bytes(MIB, 5), b"abcdi");
    assert_eq!(driver.bytes(2 * MIB, 4), b"efgh");
}

#[test]
fn an_engine_goes_away_when_the_kernel_is_done() {
    let driver = Driver::new(1);
    let (mut engine, mut pipe, _wake) = piped();
    let into = Span::new(Arc::clone(&driver.memory), vec![(GuestAddress(MIB), 100)]);
    engine.start(Id(0), Operation::Read { at: 0, into });
    engine.submit();
    let (tell, gone) = mpsc::channel();
    let dropping = thread::spawn(move || {
        drop(engine);
        tell.send(()).unwrap();
    });
    // However long one waits: the kernel is not done.
    let early = gone.recv_timeout(Duration::from_millis(50));
    assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
    pipe.write_all(b"last").unwrap();
    dropping.join().unwrap();
    assert_eq!(driver.bytes(MIB, 4), b"last");
    assert_eq!(Arc::strong_count(&driver.memory), 1);
}

//! What the handler allocates: nothing. And what the C library copies with.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::{PAGE, PAGES, bench};
use crate::status::Count;

/// The system's allocator, which counts for each thread how often it is asked for memory.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every method does what the system's allocator does, with the same arguments; the counter is
// a plain cell of the thread, which allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn completing_accesses_allocates_nothing_from_the_first_on() {
    let bench = bench();
    let mut bytes = [0_u8; 300];
    let before = COUNT.get();
    let first = bench.read::<u8>(1);
    bench.write::<u64>(8, 5);
    // SAFETY: the BAR is mapped, and as long.
    unsafe { std::ptr::copy_nonoverlapping(bench.bar as *const u8, bytes.as_mut_ptr(), 300) };
    bench.present_after(2);
    bench.set_command(super::MEMORY);
    let there = bench.read::<u32>(0);
    assert_eq!(COUNT.get() - before, 0);
    assert_eq!((first, bytes, there), (0xff, [0xff; 300], 0));
    assert!(bench.shim.status.get(Count::SigbusCompleted) > 3);
}

#[test]
fn a_thread_that_never_asked_for_anything_allocates_nothing_either() {
    let bench = bench();
    let (read, allocated) = std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let before = COUNT.get();
            (bench.read::<u16>(4), COUNT.get() - before)
        });
        other.join().unwrap()
    });
    assert_eq!((read, allocated), (u16::MAX, 0));
}

#[test]
fn copies_of_the_c_library_complete_in_all_lengths() {
    let bench = bench();
    let around = |buffer: &[u8], len| buffer[len..].iter().all(|byte| *byte == 0x55);
    let lengths = (0..300).chain([511, 512, 513, 1000, 2048, 4096, 5000, PAGES * PAGE]);
    for len in lengths {
        let mut buffer = vec![0x55_u8; PAGES * PAGE + 64];
        let bar = bench.bar as *mut libc::c_void;
        // SAFETY: both are as long.
        unsafe { libc::memcpy(buffer.as_mut_ptr().cast(), bar, len) };
        assert!(buffer[..len].iter().all(|byte| *byte == 0xff), "{len} bytes out");
        assert!(around(&buffer, len), "{len} bytes out, and no more");
        // SAFETY: both are as long.
        unsafe { libc::memcpy(bar, buffer.as_ptr().cast(), len) };
        // SAFETY: the BAR is as long.
        unsafe { libc::memmove(bar.byte_add(1), bar, len.min(PAGES * PAGE - 1)) };
        // SAFETY: the BAR is as long.
        unsafe { libc::memset(bar, 7, len) };
    }
    assert_eq!(bench.shim.status.get(Count::FailOpens), 0);
}

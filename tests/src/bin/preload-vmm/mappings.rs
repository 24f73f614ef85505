//! The mmap family, none of which is about a BAR.

use std::sync::Barrier;

use crate::raw::{self, ANONYMOUS, READ_WRITE};
use crate::{Outcome, say};

const PAGE: usize = 0x1000;

/// A file with a page number at the start of each page.
fn numbered(pages: u32) -> raw::Answer<i32> {
    let file = raw::memfd(u64::from(pages) * PAGE as u64)?;
    for page in 0..pages {
        raw::pwrite(file, &page.to_le_bytes(), i64::from(page) * PAGE as i64)?;
    }
    Ok(file)
}

pub(crate) fn mapping() -> Outcome {
    let file = numbered(4)?;
    let whole = raw::shared(file, 4 * PAGE)?;
    say("third page", raw::load(whole + 2 * PAGE));
    let tail = raw::mmap64(0, 2 * PAGE, libc::MAP_SHARED, file, 2 * PAGE as i64)?;
    say("by its offset", raw::load(tail));
    raw::store(tail, 0x1234);
    say("the same page", raw::load(whole + 2 * PAGE));
    let private = raw::mmap64(0, PAGE, libc::MAP_PRIVATE, file, 0)?;
    raw::store(private, 0x99);
    say("not the same page", raw::load(whole));
    let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
    let over = raw::mmap(whole + PAGE, PAGE, READ_WRITE, fixed, file, 3 * PAGE as i64)?;
    say("over it", (over == whole + PAGE, raw::load(whole + PAGE), raw::load(whole + 2 * PAGE)));
    say("the rest", raw::munmap(whole, 4 * PAGE));
    say("twice", raw::munmap(whole, 4 * PAGE));
    Ok(())
}

pub(crate) fn errors() -> Outcome {
    let file = numbered(1)?;
    say("no length", raw::shared(file, 0));
    say("no descriptor", raw::shared(-1, PAGE));
    say("a bad descriptor", raw::shared(1 << 20, PAGE));
    say("a bad offset", raw::mmap(0, PAGE, READ_WRITE, libc::MAP_SHARED, file, 1));
    say("a negative offset", raw::mmap(0, PAGE, READ_WRITE, libc::MAP_SHARED, file, -4096));
    say("no flags", raw::mmap(0, PAGE, READ_WRITE, 0, file, 0));
    say("too much", raw::shared(file, usize::MAX & !0xfff));
    say("misaligned and fixed", raw::mmap(1, PAGE, READ_WRITE, ANONYMOUS | libc::MAP_FIXED, -1, 0));
    let place = raw::anonymous(2 * PAGE)?;
    let polite = ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    say("not over it", raw::mmap(place, PAGE, READ_WRITE, polite, -1, 0));
    say("misaligned", raw::munmap(place + 1, PAGE));
    say("nothing unmapped", raw::munmap(place, 0));
    say("wraps around", raw::munmap(usize::MAX & !0xfff, 2 * PAGE));
    say("moves nothing", raw::mremap(place, PAGE, 0, 0, 0));
    say("moves what is not there", raw::mremap(0x10000, PAGE, PAGE, libc::MREMAP_MAYMOVE, 0));
    say("moves to nowhere", raw::mremap(place, PAGE, PAGE, libc::MREMAP_FIXED, 0));
    Ok(())
}

pub(crate) fn moving() -> Outcome {
    let file = numbered(8)?;
    let from = raw::shared(file, 8 * PAGE)?;
    let to = raw::anonymous(16 * PAGE)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let moved = raw::mremap(from + 2 * PAGE, 2 * PAGE, 2 * PAGE, flags, to + PAGE)?;
    say("moved", (moved == to + PAGE, raw::load(moved), raw::load(moved + PAGE)));
    say("what stayed", (raw::load(from), raw::load(from + 4 * PAGE)));
    let shrunk = raw::mremap(moved, 2 * PAGE, PAGE, 0, 0)?;
    say("shrunk", (shrunk == moved, raw::load(moved)));
    let grown = raw::mremap(from + 4 * PAGE, PAGE, 3 * PAGE, libc::MREMAP_MAYMOVE, 0)?;
    say("grown", (raw::load(grown), raw::load(grown + 2 * PAGE)));
    let copy = raw::mremap(grown, 0, PAGE, libc::MREMAP_MAYMOVE, 0)?;
    say("a second mapping", (copy != grown, raw::load(copy), raw::load(grown)));
    let kept = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    say("left behind", raw::mremap(to + 8 * PAGE, PAGE, PAGE, kept, 0).map(|_| ()));
    Ok(())
}

pub(crate) fn partial_unmapping() -> Outcome {
    let file = numbered(8)?;
    let at = raw::shared(file, 8 * PAGE)?;
    say("a hole", raw::munmap(at + 3 * PAGE, PAGE));
    say("its ends", (raw::load(at + 2 * PAGE), raw::load(at + 4 * PAGE)));
    say("the head", raw::munmap(at, PAGE));
    say("the tail", raw::munmap(at + 7 * PAGE, PAGE));
    say("left", (raw::load(at + PAGE), raw::load(at + 6 * PAGE)));
    let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
    raw::mmap(at, 8 * PAGE, READ_WRITE, fixed, file, 0)?;
    say("mended", (raw::load(at), raw::load(at + 3 * PAGE)));
    let part = raw::munmap(at + 100 * PAGE - 100 * PAGE, 8 * PAGE - 1);
    say("an odd length", part);
    Ok(())
}

/// Threads map and unmap at once.
pub(crate) fn threads() -> Outcome {
    let file = numbered(16)?;
    let start = Barrier::new(4);
    let good = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4u32)
            .map(|worker| {
                let start = &start;
                scope.spawn(move || {
                    start.wait();
                    (0..2000).map(|round| map_once(file, (worker + round) % 16)).sum()
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap_or(Err(0))).collect()
    });
    let good: raw::Answer<Vec<u32>> = good;
    say("good", good);
    Ok(())
}

fn map_once(file: i32, page: u32) -> raw::Answer<u32> {
    let at = raw::mmap64(0, PAGE, libc::MAP_SHARED, file, i64::from(page) * PAGE as i64)?;
    let good = raw::load(at) == page;
    raw::munmap(at, PAGE)?;
    Ok(u32::from(good))
}

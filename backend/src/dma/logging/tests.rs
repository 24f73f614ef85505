use std::thread;

use super::*;

const PAGE: u64 = 4096;
const NONE: [u64; 0] = [];

fn started(ranges: &[(Iova, u64)], page_size: u64) -> DirtyLog {
    let log = DirtyLog::default();
    log.start(ranges, page_size).unwrap();
    log
}

/// The pages of a report of all of `pages` pages from `page` on.
fn reported(log: &DirtyLog, page: u64, pages: u64, page_size: u64) -> Vec<u64> {
    let (iova, len) = (Iova(page * page_size), pages * page_size);
    let mut bitmap = vec![0xff; bitmap_size(iova, len, page_size).unwrap()];
    log.report(iova, len, page_size, &mut bitmap).unwrap();
    let bit = |bit: &u64| bitmap[usize::try_from(bit / 8).unwrap()] & (1 << (bit % 8)) != 0;
    (0..bitmap.len() as u64 * 8).filter(bit).collect()
}

/// A name, ranges and page size, and the page size that is chosen.
type StartRow = (&'static str, Vec<(Iova, u64)>, u64, Result<u64, Errno>);

#[test]
fn logging_is_refused_with_the_errno_of_vfio() {
    let many = |count: u64| (0..count).map(|page| (Iova(page * PAGE), PAGE)).collect();
    let rows: &[StartRow] = &[
        ("everything", vec![], PAGE, Ok(PAGE)),
        ("smaller pages than there are", vec![], 1, Ok(PAGE)),
        ("large pages", vec![(Iova(0), 2 << 20)], 2 << 20, Ok(2 << 20)),
        ("larger pages than are useful", vec![], 1 << 63, Ok(2 << 20)),
        ("no page size", vec![], 0, Err(Errno::INVAL)),
        ("half a page size", vec![], 0x1800, Err(Errno::INVAL)),
        ("as many ranges as may be", many(256), PAGE, Ok(PAGE)),
        ("one more", many(257), PAGE, Err(Errno::TOOBIG)),
        ("an empty range", vec![(Iova(0), 0)], PAGE, Err(Errno::INVAL)),
        ("half a page", vec![(Iova(0), 0x800)], PAGE, Err(Errno::INVAL)),
        ("at half a page", vec![(Iova(0x800), PAGE)], PAGE, Err(Errno::INVAL)),
        ("the last page", vec![(Iova(u64::MAX - 0xfff), PAGE)], PAGE, Ok(PAGE)),
        ("past it", vec![(Iova(u64::MAX - 0xfff), 2 * PAGE)], PAGE, Err(Errno::OVERFLOW)),
        ("neighbours", vec![(Iova(PAGE), PAGE), (Iova(0), PAGE)], PAGE, Ok(PAGE)),
        ("the same", vec![(Iova(0), PAGE), (Iova(0), PAGE)], PAGE, Err(Errno::INVAL)),
        ("overlap", vec![(Iova(PAGE), PAGE), (Iova(0), 2 * PAGE)], PAGE, Err(Errno::INVAL)),
    ];
    for (what, ranges, page_size, expected) in rows {
        let log = DirtyLog::default();
        let outcome = log.start(ranges, *page_size);
        assert_eq!(outcome.map_err(LoggingError::errno), *expected, "{what}");
        assert_eq!(log.is_started(), expected.is_ok(), "{what}");
    }
    let log = started(&[], PAGE);
    log.mark(0, 1);
    assert_eq!(log.start(&[], PAGE), Err(LoggingError::Started));
    assert_eq!(reported(&log, 0, 8, PAGE), [0], "the log that there is goes on");
}

/// A name, range, page size and length of a bitmap, and the outcome of the report.
type ReportRow = (&'static str, u64, u64, u64, usize, Result<(), Errno>);

#[test]
fn a_report_is_refused_with_the_errno_of_vfio_and_forgets_nothing() {
    let rows: &[ReportRow] = &[
        ("no length", 0, 0, PAGE, 8, Err(Errno::INVAL)),
        ("no page size", 0, PAGE, 0, 8, Err(Errno::INVAL)),
        ("half a page size", 0, PAGE, 0x1800, 8, Err(Errno::INVAL)),
        ("pages that are too small", 0, PAGE, 2048, 8, Err(Errno::INVAL)),
        ("wraps", PAGE, u64::MAX, PAGE, 8, Err(Errno::OVERFLOW)),
        ("a bitmap of gigabytes", 0, 1 << 44, PAGE, 8, Err(Errno::INVAL)),
        ("no room", 0, PAGE, PAGE, 7, Err(Errno::INVAL)),
        ("no room for one more", 0, 65 * PAGE, PAGE, 8, Err(Errno::INVAL)),
        ("room for all", 0, 64 * PAGE, PAGE, 8, Ok(())),
    ];
    let log = started(&[], PAGE);
    log.mark(0, 1);
    for (what, iova, len, page_size, room, expected) in rows {
        assert!(log.is_dirty(0), "before {what}");
        let mut bitmap = vec![0; *room];
        let outcome = log.report(Iova(*iova), *len, *page_size, &mut bitmap);
        assert_eq!(outcome.map_err(LoggingError::errno), *expected, "{what}");
    }
    log.stop();
    let outcome = log.report(Iova(0), PAGE, PAGE, &mut [0; 8]);
    assert_eq!(outcome, Err(LoggingError::NotStarted));
    log.stop();
    assert_eq!(bitmap_size(Iova(0), 8 << 40, PAGE), Ok(256 << 20));
}

#[test]
fn a_page_is_reported_once_for_each_time_it_was_written() {
    let log = started(&[(Iova(0x10 * PAGE), 0x10 * PAGE), (Iova(0x80 * PAGE), PAGE)], PAGE);
    log.mark(0xf * PAGE, 1);
    log.mark(0x11 * PAGE - 1, 2);
    log.mark(0x1f * PAGE, 0x70 * PAGE);
    log.mark(0x12 * PAGE, 0);
    // Only what was to be logged is.
    assert_eq!(reported(&log, 0, 0x100, PAGE), [0x10, 0x11, 0x1f, 0x80]);
    assert_eq!(reported(&log, 0, 0x100, PAGE), NONE);
    log.mark(0x11 * PAGE, 8);
    log.mark(0x13 * PAGE, 8);
    // The bit is counted from the start of the report, and what is not in it stays.
    assert_eq!(reported(&log, 0x11, 2, PAGE), [0]);
    assert_eq!(reported(&log, 0x11, 3, PAGE), [2]);
    log.mark(0x11 * PAGE, 8);
    log.stop();
    log.mark(0x12 * PAGE, 8);
    log.start(&[], PAGE).unwrap();
    assert_eq!(reported(&log, 0, 0x100, PAGE), NONE, "what came before is forgotten");
    log.mark(u64::MAX, 1);
    log.mark(u64::MAX - 1, 100);
    assert_eq!(reported(&log, (1 << 52) - 2, 2, PAGE), [1]);
}

#[test]
fn a_report_may_use_another_page_size_than_the_log() {
    let log = started(&[], 8 * PAGE);
    log.mark(9 * PAGE, 1);
    // In smaller pages, all that the page of the log consists of may have been written. As it is
    // not reported as a whole, it is not forgotten.
    assert_eq!(reported(&log, 6, 6, PAGE), [2, 3, 4, 5]);
    assert_eq!(reported(&log, 8, 8, PAGE), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(reported(&log, 8, 8, PAGE), NONE);
    log.mark(9 * PAGE, 1);
    log.mark(63 * PAGE, 1);
    assert_eq!(reported(&log, 0, 10, 64 * PAGE), [0]);
    assert_eq!(reported(&log, 0, 10, 64 * PAGE), NONE);
}

#[test]
fn a_log_is_bounded_and_reports_rather_too_much_than_too_little() {
    let mut pages = DirtyPages::new(vec![(0, u64::MAX)], PAGE).with_leaves(16);
    let addresses: Vec<u64> = (0..1000).map(|index: u64| index << 40).chain([u64::MAX]).collect();
    for address in &addresses {
        if !pages.mark(*address, *address) {
            pages.mark_with_room(*address, *address);
        }
        assert!(pages.leaves() <= 16);
    }
    assert!(addresses.iter().all(|address| pages.is_dirty(*address)));
    let before = pages.page_size();
    assert!(before > PAGE);
    // All of it at once.
    pages.mark_with_room(0, u64::MAX);
    assert!(pages.leaves() <= 16);
    let mut bitmap = [0; 8];
    pages.report((1 << 30, (1 << 30) + 0xffff), 12, &mut bitmap);
    assert_eq!(bitmap, [0xff, 0xff, 0, 0, 0, 0, 0, 0]);
    // Reported as a whole, it takes no room.
    let mut bitmap = [0; 8];
    pages.report((0, u64::MAX), 63, &mut bitmap);
    assert_eq!((bitmap[0], pages.leaves()), (0b11, 0));
}

#[test]
fn no_page_of_any_thread_is_missed_while_reports_are_made() {
    const PAGES: u64 = 3000;
    let log = started(&[], PAGE);
    let mut seen = vec![false; 4 * usize::try_from(PAGES).unwrap()];
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let log = &log;
                scope.spawn(move || {
                    (0..PAGES).for_each(|page| log.mark((page * 4 + thread) * PAGE, 1))
                })
            })
            .collect();
        let mut last_round = false;
        while !last_round {
            last_round = threads.iter().all(thread::ScopedJoinHandle::is_finished);
            for page in reported(&log, 0, 4 * PAGES, PAGE) {
                let page = &mut seen[usize::try_from(page).unwrap()];
                assert!(!std::mem::replace(page, true), "reported twice");
            }
        }
    });
    assert!(seen.iter().all(|page| *page));
}

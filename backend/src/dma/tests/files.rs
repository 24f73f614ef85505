//! Windows that show their files.

use super::*;

fn inode(file: &impl AsFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(file).unwrap();
    (stat.st_dev, stat.st_ino)
}

/// Maps so many windows of one page each, the n-th of them from 0x1000 * n on.
fn map(table: &mut DmaTable, windows: u64) {
    for window in 0..windows {
        table.map(Iova(window * 0x1000), 0x1000, READ_WRITE, shared(0x1000)).unwrap();
    }
}

fn with_files(table: &DmaTable) -> usize {
    table.windows().filter(|window| window.file.is_some()).count()
}

#[test]
fn a_window_shows_what_it_was_announced_with() {
    let mut table = DmaTable::new(8);
    table.keep_files(8);
    let (file, theirs) = named(0x3000);
    table.map(Iova(0x8000), 0x1000, DmaAccess::READ, Some((file, 0x2000))).unwrap();
    table.map(Iova(0), 0x2000, READ_WRITE, None).unwrap();

    let windows: Vec<_> = table.windows().collect();
    assert_eq!((windows[0].iova, windows[0].size), (Iova(0), 0x2000));
    assert_eq!(windows[0].access, READ_WRITE);
    assert!(windows[0].file.is_none());
    assert_eq!((windows[1].iova, windows[1].size), (Iova(0x8000), 0x1000));
    assert_eq!(windows[1].access, DmaAccess::READ);
    let shown = windows[1].file.unwrap();
    assert_eq!((shown.offset, shown.id), (0x2000, inode(&theirs)));
    assert_eq!(inode(&shown.fd), inode(&theirs));
}

#[test]
fn nobody_who_does_not_ask_holds_descriptors_of_the_clients() {
    let mut table = DmaTable::new(8);
    let (file, _theirs) = named(0x1000);
    table.map(Iova(0), 0x1000, READ_WRITE, Some((file, 0))).unwrap();
    assert_eq!(with_files(&table), 0);
}

#[test]
fn windows_beyond_the_limit_have_no_files_until_others_go() {
    let mut table = DmaTable::new(8);
    table.keep_files(2);
    map(&mut table, 4);
    let shown: Vec<_> = table.windows().map(|window| window.file.is_some()).collect();
    assert_eq!(shown, [true, true, false, false]);

    table.unmap(Iova(0), 0x2000).unwrap();
    map(&mut table, 2);
    let shown: Vec<_> = table.windows().map(|window| window.file.is_some()).collect();
    assert_eq!(shown, [true, true, false, false]);
}

#[test]
fn a_window_that_is_refused_counts_for_nothing() {
    let mut table = DmaTable::new(8);
    table.keep_files(1);
    assert!(table.map(Iova(0), 0x2000, READ_WRITE, shared(0x1000)).is_err());
    map(&mut table, 1);
    assert_eq!(with_files(&table), 1);
}

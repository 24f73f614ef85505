//! Memory that its owner takes away. What could kill or fill up a process runs in one of its own.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;

use nix::sys::signal::{Signal, raise};
use vm_memory::guest_memory::GuestMemory;
use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion, Permissions};

use super::*;

const CHILD: &str = "BARKEEP_TEST_CHILD";

/// Runs a test again, in a process of its own, where [`is_child`] holds.
fn in_a_child(test: &str) -> ExitStatus {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", &format!("dma::tests::lost::{test}"), "--nocapture"]);
    command.env(CHILD, "1").status().unwrap()
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// A table with a window of two pages, the second of which is not there.
fn half_a_window() -> DmaTable {
    let (ours, theirs) = named(0x2000);
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x2000, READ_WRITE, Some((ours, 0))).unwrap();
    theirs.set_len(0x1000).unwrap();
    table
}

#[test]
fn a_page_that_is_gone_is_lost_and_the_rest_of_its_window_is_not() {
    let table = half_a_window();
    assert_eq!(table.read(Iova(0xffe), &mut [0; 4]), Err(DmaError::Vanished(0xffe)));
    table.write(Iova(0xffc), b"here").unwrap();
    let mut back = [0; 4];
    table.read(Iova(0xffc), &mut back).unwrap();
    assert_eq!(&back, b"here");
    assert_eq!(table.write(Iova(0x1ffc), b"gone"), Err(DmaError::Vanished(0x1ffc)));
}

#[test]
fn a_file_that_grows_again_brings_nothing_back() {
    let (ours, theirs) = named(0x1000);
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x1000, READ_WRITE, Some((ours, 0))).unwrap();
    theirs.set_len(0).unwrap();
    assert_eq!(table.write(Iova(0), b"gone"), Err(DmaError::Vanished(0)));
    theirs.set_len(0x1000).unwrap();
    assert_eq!(table.write(Iova(0), b"gone"), Err(DmaError::Vanished(0)));
    assert_eq!(bytes_at(&theirs, 0, 4), [0; 4]);
    // What takes the place of the window has lost nothing.
    table.unmap(Iova(0), 0x1000).unwrap();
    let again = theirs.try_clone().unwrap().into();
    table.map(Iova(0), 0x1000, READ_WRITE, Some((again, 0))).unwrap();
    table.write(Iova(0), b"back").unwrap();
    assert_eq!(bytes_at(&theirs, 0, 4), b"back");
}

#[test]
fn slices_of_lost_memory_read_zeros_and_the_view_tells() {
    let table = half_a_window();
    let view = table.view();
    let range = (GuestAddress(0x1000), 8, Permissions::ReadWrite);
    let slice = view.get_slices(range.0, range.1, range.2).unwrap().next().unwrap().unwrap();
    view.intact(Iova(0x1000), 8).expect("nobody has looked yet");
    let mut back = [7; 8];
    slice.read_slice(&mut back, 0).unwrap();
    assert_eq!(back, [0; 8]);
    assert_eq!(view.intact(Iova(0x1000), 8), Err(DmaError::Vanished(0x1000)));
    view.intact(Iova(0), 0x1000).unwrap();
    assert!(!view.check_range(range.0, range.1, range.2), "no new slices");
}

#[test]
fn threads_that_meet_the_same_hole_all_survive() {
    let (ours, theirs) = named(0x40_0000);
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x40_0000, READ_WRITE, Some((ours, 0))).unwrap();
    theirs.set_len(0).unwrap();
    let handle = table.handle();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for page in 0..0x400 {
                    let outcome = handle.memory().read(Iova(page << 12), &mut [0; 8]);
                    assert_eq!(outcome, Err(DmaError::Vanished(page << 12)));
                }
            });
        }
    });
}

/// Replacing a page splits a mapping, and a process may have only so many.
#[test]
fn many_lost_pages_cost_the_window_and_no_mappings() {
    const SIZE: u64 = 0x80_0000;
    let (ours, theirs) = named(SIZE);
    let mut table = DmaTable::new(10);
    table.map(Iova(0), SIZE, READ_WRITE, Some((ours, 0))).unwrap();
    theirs.set_len(0x1000).unwrap();
    let lines = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let before = lines();
    // Every other page, which the kernel can't join.
    let mut most = 0;
    for page in (2..0x800).step_by(2) {
        table.read(Iova(page << 12), &mut [0; 8]).unwrap_err();
        if page == 0x200 {
            table.read(Iova(0), &mut [0; 8]).expect("up to a number of pages, the rest stays");
            most = lines();
        }
    }
    assert!(most >= before + 0x200, "{most} mappings");
    assert_eq!(table.read(Iova(0), &mut [0; 8]), Err(DmaError::Vanished(0)));
    assert!(lines() <= before, "{} mappings", lines());
    table.unmap(Iova(0), SIZE).unwrap();
}

#[test]
fn a_fault_outside_of_windows_kills_as_ever() {
    if !is_child() {
        let status = in_a_child("a_fault_outside_of_windows_kills_as_ever");
        assert_eq!(status.signal(), Some(Signal::SIGBUS as i32), "{status}");
        return;
    }
    let table = half_a_window();
    table.read(Iova(0x1000), &mut [0]).unwrap_err();
    let (_ours, theirs) = named(0x1000);
    let elsewhere = FileOffset::new(theirs.try_clone().unwrap(), 0);
    let elsewhere = MmapRegion::<()>::from_file(elsewhere, 0x1000).unwrap();
    theirs.set_len(0).unwrap();
    use vm_memory::VolatileMemory;
    let _ = elsewhere.get_slice(0, 8).unwrap().read_slice(&mut [0; 8], 0);
}

#[test]
fn a_window_that_was_unmapped_is_guarded_no_more() {
    if !is_child() {
        let status = in_a_child("a_window_that_was_unmapped_is_guarded_no_more");
        assert_eq!(status.signal(), Some(Signal::SIGBUS as i32), "{status}");
        return;
    }
    let (ours, theirs) = named(0x1000);
    let mut table = DmaTable::new(10);
    table.map(Iova(0), 0x1000, READ_WRITE, Some((ours, 0))).unwrap();
    let windows_address = table.view().windows.share(0, 1).unwrap().window.host_memory();
    table.unmap(Iova(0), 0x1000).unwrap();
    let elsewhere = FileOffset::new(theirs.try_clone().unwrap(), 0);
    let elsewhere = MmapRegion::<()>::from_file(elsewhere, 0x1000).unwrap();
    // The kernel gives out the same address again.
    assert_eq!(windows_address.unwrap().address(), elsewhere.as_ptr().addr() as u64);
    theirs.set_len(0).unwrap();
    use vm_memory::VolatileMemory;
    let _ = elsewhere.get_slice(0, 8).unwrap().read_slice(&mut [0; 8], 0);
}

#[test]
fn a_sigbus_that_somebody_sent_goes_where_it_went_before_and_the_handler_stays() {
    const TEST: &str =
        "a_sigbus_that_somebody_sent_goes_where_it_went_before_and_the_handler_stays";
    if !is_child() {
        let status = in_a_child(TEST);
        assert!(status.success(), "{status}");
        return;
    }
    let table = half_a_window();
    // Rust's own handler, which takes itself away, as without ours.
    raise(Signal::SIGBUS).unwrap();
    assert_eq!(table.read(Iova(0x1000), &mut [0]), Err(DmaError::Vanished(0x1000)));
}

/// The kernel bounds the mappings of a process (`vm.max_map_count`).
#[test]
fn too_many_mappings_are_an_error_and_all_others_stay() {
    const MOST: u64 = 65535;
    if !is_child() {
        let status = in_a_child("too_many_mappings_are_an_error_and_all_others_stay");
        assert!(status.success(), "{status}");
        return;
    }
    let (_ours, theirs) = named(MOST << 12);
    let mut table = DmaTable::new(usize::MAX);
    // All over the file: the kernel would join neighbours.
    let offset_of = |page: u64| (page * 7919 % MOST) << 12;
    let map = |table: &mut DmaTable, page: u64| {
        let file = theirs.try_clone().unwrap().into();
        table.map(Iova(page << 12), 0x1000, READ_WRITE, Some((file, offset_of(page))))
    };
    let refused = (0..MOST).find_map(|page| Some((page, map(&mut table, page).err()?)));
    let Some((count, error)) = refused else {
        println!("this kernel allows mappings for all windows");
        return;
    };
    assert_eq!((error.errno(), error), (Errno::NOMEM, DmaError::Backing(Errno::NOMEM)));
    for page in [0, count / 2, count - 1] {
        table.write(Iova(page << 12), b"mapped").unwrap();
        assert_eq!(bytes_at(&theirs, offset_of(page), 6), b"mapped");
    }
    assert_eq!(table.read(Iova(count << 12), &mut [0]), Err(DmaError::Unmapped(count << 12)));
    table.unmap(Iova(0), 0x1000).unwrap();
    map(&mut table, count).expect("one went, one comes");
    map(&mut table, 0).unwrap_err();
    // What the process itself needs is to be had, and pages are lost as ever.
    let elsewhere = Arc::new(theirs.try_clone().unwrap());
    let elsewhere = || FileOffset::from_arc(Arc::clone(&elsewhere), 0);
    let room: Result<Vec<_>, _> =
        (0..2000).map(|_| MmapRegion::<()>::from_file(elsewhere(), 0x1000)).collect();
    room.unwrap();
    theirs.set_len(0).unwrap();
    for page in (1..=count).rev().step_by(701) {
        assert_eq!(table.read(Iova(page << 12), &mut [0]), Err(DmaError::Vanished(page << 12)));
    }
    table.unmap_all().unwrap();
    assert_eq!(mappings_of(NAME), 0);
}

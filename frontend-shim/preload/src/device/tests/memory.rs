use std::collections::BTreeMap;

use proptest::prelude::{Strategy, prop_oneof};
use proptest::{collection, proptest};
use rustix::io::Errno;

use super::{DEVICE, Fake};
use crate::Shim;
use crate::device::BarMapping;
use crate::status::Count;
use crate::system::{Mmap, Mremap};

const PAGE: usize = 0x1000;
/// BAR 2 of the device, which has 256 pages.
const BAR2: u64 = 2 << 40;

fn mapping(shim: &Shim<Fake>, bar: u8, start: usize, len: usize, offset: u64) -> BarMapping {
    BarMapping { device: shim.device(), bar, start, len, offset }
}

#[test]
fn a_mapping_of_a_bar_is_followed() {
    let shim = Shim::faked();
    shim.map(DEVICE, 0x10000, 0x3000, libc::MAP_SHARED, BAR2 + 0x5000);
    let whole = mapping(&shim, 2, 0x10000, 0x3000, 0x5000);
    assert_eq!(shim.mapping_at(0x12fff), Some(whole));
    assert_eq!(shim.mapping_at(0x13000), None);
    assert_eq!(shim.mappings_in(0x10000, 0x3000), Some(whole));
    assert_eq!(shim.mappings_in(0x10000, 0x3001), None);
}

#[test]
fn a_bar_of_less_than_a_page_is_mapped_with_its_page() {
    let shim = Shim::faked();
    shim.map(DEVICE, 0x10000, 0x80, libc::MAP_SHARED, 4 << 40);
    assert_eq!(shim.mappings_in(0x10000, PAGE), Some(mapping(&shim, 4, 0x10000, PAGE, 0)));
}

#[test]
fn what_is_no_bar_is_not_followed() {
    let shim = Shim::faked();
    // The configuration space, a place behind a BAR, another file, no file.
    shim.map(DEVICE, 0x10000, PAGE, libc::MAP_SHARED, super::CONFIG);
    shim.map(DEVICE, 0x20000, PAGE, libc::MAP_SHARED, 0x1000);
    shim.map(DEVICE + 1, 0x30000, PAGE, libc::MAP_SHARED, 0);
    shim.map(DEVICE, 0x40000, PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0);
    for host in [0x10000, 0x20000, 0x30000, 0x40000] {
        assert_eq!(shim.mapping_at(host), None);
    }
}

#[test]
fn a_call_that_fails_changes_nothing() {
    let shim = Shim::faked();
    shim.map(DEVICE, 0x10000, 0x3000, libc::MAP_SHARED, BAR2);
    let failing = shim.answering(Err(Errno::NOMEM));
    assert_eq!(failing.munmap(0x11000, PAGE), Err(Errno::NOMEM));
    let over = Mmap {
        address: 0x10000,
        len: 0x3000,
        protection: 0,
        flags: libc::MAP_FIXED | libc::MAP_PRIVATE,
        fd: 5,
        offset: 0,
    };
    assert_eq!(shim.answering(Err(Errno::BADF)).mmap(over), Err(Errno::BADF));
    let away = Mremap {
        address: 0x10000,
        len: 0x3000,
        new_len: 0x3000,
        flags: libc::MREMAP_MAYMOVE,
        new_address: 0,
    };
    assert_eq!(shim.answering(Err(Errno::FAULT)).mremap(away), Err(Errno::FAULT));
    for page in 0..3 {
        let found = shim.mapping_at(0x10000 + page * PAGE).expect("it's still mapped");
        assert_eq!(
            found.offset + (0x10000 + page * PAGE - found.start) as u64,
            (page * PAGE) as u64
        );
    }
}

#[test]
fn a_range_that_the_kernel_refuses_is_left_alone() {
    let shim = Shim::faked();
    shim.map(DEVICE, 0x10000, 0x3000, libc::MAP_SHARED, BAR2);
    for (start, len) in
        [(0x10001, PAGE), (0x10000, 0), (0x10000, usize::MAX), (PAGE, usize::MAX - PAGE)]
    {
        assert_eq!(shim.answering(Err(Errno::INVAL)).munmap(start, len), Err(Errno::INVAL));
    }
    assert_eq!(shim.mapping_at(0x10000), Some(mapping(&shim, 2, 0x10000, 0x3000, 0)));
}

#[test]
fn the_child_of_a_vfork_changes_nothing() {
    let shim = Shim::faked();
    shim.system.world().process = 100;
    shim.at_home();
    shim.map(DEVICE, 0x10000, 0x3000, libc::MAP_SHARED, BAR2);
    shim.system.world().process = 101;
    shim.answering(Ok(0)).munmap(0x10000, 0x3000).expect("the kernel unmaps");
    shim.close(DEVICE).expect("the test has opened it");
    shim.close_range(0, u32::MAX, 0).expect("the kernel closes");
    assert!(shim.mapping_at(0x10000).is_some());
    assert!(shim.source_of().is_some());
    // The child of a fork has its own.
    shim.at_home();
    shim.answering(Ok(0)).munmap(0x10000, 0x3000).expect("the kernel unmaps");
    assert!(shim.mapping_at(0x10000).is_none());
}

#[test]
fn what_is_mapped_where_a_mapping_went_unseen_is_not_a_bar() {
    let shim = Shim::faked();
    shim.map(DEVICE, 0x10000, 0x3000, libc::MAP_SHARED, BAR2);
    shim.map(-1, 0x11000, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, 0);
    assert_eq!(shim.mapping_at(0x11000), None);
    assert_eq!(shim.mapping_at(0x12000), Some(mapping(&shim, 2, 0x12000, PAGE, 0x2000)));
}

#[test]
fn an_old_length_of_nothing_maps_the_same_twice() {
    let shim = Shim::faked();
    shim.map(DEVICE, 0x10000, 0x3000, libc::MAP_SHARED, BAR2);
    let twice = Mremap {
        address: 0x11000,
        len: 0,
        new_len: 0x1000,
        flags: libc::MREMAP_MAYMOVE,
        new_address: 0,
    };
    assert_eq!(shim.answering(Ok(0x40000)).mremap(twice), Ok(0x40000));
    assert_eq!(shim.mapping_at(0x40000), Some(mapping(&shim, 2, 0x40000, PAGE, 0x1000)));
    assert_eq!(shim.mapping_at(0x11000), Some(mapping(&shim, 2, 0x10000, 0x3000, 0)));
}

/// What the VMM does to its memory, in pages.
#[derive(Clone, Debug)]
enum Call {
    Bar { at: usize, pages: usize, offset: usize },
    Other { at: usize, pages: usize },
    Unmap { at: usize, pages: usize },
    Move { at: usize, pages: usize, to: usize, new_pages: usize, stays: bool },
    Resize { at: usize, pages: usize, new_pages: usize },
}

fn calls() -> impl Strategy<Value = Call> {
    let at = || 0_usize..48;
    let pages = || 1_usize..10;
    prop_oneof![
        (at(), pages(), 0_usize..250).prop_map(|(at, pages, offset)| Call::Bar {
            at,
            pages,
            offset
        }),
        (at(), pages()).prop_map(|(at, pages)| Call::Other { at, pages }),
        (at(), pages()).prop_map(|(at, pages)| Call::Unmap { at, pages }),
        (at(), pages(), at(), pages(), proptest::bool::ANY).prop_map(
            |(at, pages, to, new_pages, stays)| {
                // DONTUNMAP goes with equal lengths.
                let new_pages = if stays { pages } else { new_pages };
                Call::Move { at, pages, to, new_pages, stays }
            }
        ),
        (at(), pages(), pages()).prop_map(|(at, pages, new_pages)| Call::Resize {
            at,
            pages,
            new_pages
        }),
    ]
}

/// Which page of BAR 2 each page of memory is.
type Model = BTreeMap<usize, usize>;

fn apply(model: &mut Model, call: &Call) {
    let clear = |model: &mut Model, at: usize, pages: usize| {
        model.retain(|page, _| !(at..at + pages).contains(page));
    };
    match *call {
        Call::Bar { at, pages, offset } => {
            clear(model, at, pages);
            // What is behind the end of the BAR is none.
            let pages = pages.min(256 - offset);
            model.extend((0..pages).map(|page| (at + page, offset + page)));
        }
        Call::Other { at, pages } | Call::Unmap { at, pages } => clear(model, at, pages),
        Call::Move { at, pages, to, new_pages, stays } => {
            let old = model.clone();
            if !stays {
                clear(model, at, pages);
            }
            clear(model, to, new_pages);
            moved(model, &old, (at, pages), (to, new_pages));
        }
        Call::Resize { at, pages, new_pages } => {
            let old = model.clone();
            clear(model, at, pages);
            clear(model, at, new_pages);
            moved(model, &old, (at, pages), (at, new_pages));
        }
    }
}

fn moved(model: &mut Model, old: &Model, from: (usize, usize), to: (usize, usize)) {
    for page in 0..to.1 {
        let source = if page < from.1 {
            old.get(&(from.0 + page)).copied()
        } else {
            // What grows goes on where it ended, as far as the BAR goes.
            old.get(&(from.0 + from.1 - 1)).map(|last| last + page - (from.1 - 1))
        };
        if let Some(source) = source.filter(|source| page < from.1 || *source < 256) {
            model.insert(to.0 + page, source);
        }
    }
}

fn perform(shim: &Shim<Fake>, call: &Call) {
    let host = |page: usize| 0x10_0000 + page * PAGE;
    let fixed = libc::MAP_FIXED | libc::MAP_SHARED;
    match *call {
        Call::Bar { at, pages, offset } => {
            shim.map(DEVICE, host(at), pages * PAGE, fixed, BAR2 + (offset * PAGE) as u64);
        }
        Call::Other { at, pages } => {
            shim.map(-1, host(at), pages * PAGE, fixed | libc::MAP_ANONYMOUS, 0);
        }
        Call::Unmap { at, pages } => {
            // Lengths need not be whole pages.
            let answer = shim.answering(Ok(0)).munmap(host(at), pages * PAGE - 5);
            assert_eq!(answer, Ok(()));
        }
        Call::Move { at, pages, to, new_pages, stays } => {
            let stays = if stays { libc::MREMAP_DONTUNMAP } else { 0 };
            let request = Mremap {
                address: host(at),
                len: pages * PAGE,
                new_len: new_pages * PAGE,
                flags: libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | stays,
                new_address: host(to),
            };
            assert_eq!(shim.answering(Ok(host(to))).mremap(request), Ok(host(to)));
        }
        Call::Resize { at, pages, new_pages } => {
            let request = Mremap {
                address: host(at),
                len: pages * PAGE,
                new_len: new_pages * PAGE,
                flags: 0,
                new_address: 0xdead_b000,
            };
            assert_eq!(shim.answering(Ok(host(at))).mremap(request), Ok(host(at)));
        }
    }
}

fn is_possible(call: &Call) -> bool {
    match *call {
        // The kernel refuses to move a range into itself.
        Call::Move { at, pages, to, new_pages, .. } => at + pages <= to || to + new_pages <= at,
        _ => true,
    }
}

proptest! {
    #[test]
    fn mappings_are_what_a_page_by_page_model_says(calls in collection::vec(calls(), 1..40)) {
        let shim = Shim::faked();
        let mut model = Model::new();
        for call in calls.iter().filter(|call| is_possible(call)) {
            apply(&mut model, call);
            perform(&shim, call);
            for page in 0..64 {
                let host = 0x10_0000 + page * PAGE;
                let found = shim.mapping_at(host + 7).map(|found| {
                    assert_eq!((found.device, found.bar), (shim.device(), 2));
                    let place = found.offset + (host - found.start) as u64;
                    usize::try_from(place).expect("BARs of tests are small") / PAGE
                });
                assert_eq!(found, model.get(&page).copied(), "page {page} after {call:?}");
            }
        }
        assert_eq!(shim.status.get(Count::FailOpens), 0);
    }
}

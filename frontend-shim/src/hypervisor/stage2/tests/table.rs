//! The return codes of the page table.

use super::*;

const R: Perms = Perms::R;
const RW: Perms = Perms::RW;
const AGAIN: Result<(), TableError> = Err(TableError::Again);
const BAD: Result<(), TableError> = Err(TableError::BadRange);

fn at(index: u64) -> GuestAddress {
    GuestAddress(page(index))
}

fn leaf(index: u64, size: u64, frame: u64, perms: Perms) -> Entry {
    Entry::Valid(Leaf { ipa: at(index), size, frame, perms })
}

#[test]
fn mapping_what_is_mapped_already_is_refused_whatever_the_permissions() {
    for (size, first) in [(PAGE_SIZE, R), (PAGE_SIZE, RW), (BLOCK_SIZE, RW)] {
        for second in [Perms::NONE, R, RW, Perms::RWX] {
            let table = Stage2::new();
            assert_eq!(table.map(at(0), size, FRAME, first), Ok(()));
            let changes = table.changes(at(0));
            assert_eq!(table.map(at(0), size, FRAME, second), AGAIN, "{size:#x} {first} {second}");
            assert_eq!(table.lookup(at(0)), leaf(0, size, FRAME, first));
            assert_eq!(table.changes(at(0)), changes);
        }
    }
}

#[test]
fn mapping_other_memory_replaces_the_entry_and_breaks_it_first() {
    for size in [PAGE_SIZE, BLOCK_SIZE] {
        let table = Stage2::new();
        let other = FRAME + BLOCK_SIZE;
        table.map(at(0), size, FRAME, RW).unwrap();
        let mut walk = table.shared().map(at(0), size, other, R).unwrap();
        let mut seen = vec![table.lookup(at(0))];
        loop {
            let result = walk.step();
            if seen.last() != Some(&table.lookup(at(0))) {
                seen.push(table.lookup(at(0)));
            }
            if let Some(result) = result {
                assert_eq!(result, Ok(()));
                break;
            }
        }
        let invalid = Entry::Invalid { size };
        assert_eq!(seen, [leaf(0, size, FRAME, RW), invalid, leaf(0, size, other, R)]);
    }
}

#[test]
fn relaxing_adds_permissions_to_a_valid_entry_and_to_no_other() {
    for size in [PAGE_SIZE, BLOCK_SIZE] {
        let table = Stage2::new();
        assert_eq!(table.relax(at(0), R), AGAIN);
        table.map(at(0), size, FRAME, RW).unwrap();
        assert_eq!(table.relax(at(0), Perms::X), Ok(()));
        assert_eq!(table.lookup(at(0)), leaf(0, size, FRAME, Perms::RWX));
        let changes = table.changes(at(0));
        assert_eq!(table.relax(at(0), R), Ok(()), "nothing to add is no error");
        assert_eq!(table.lookup(at(0)), leaf(0, size, FRAME, Perms::RWX));
        assert_eq!(table.changes(at(0)), changes);
        table.unmap(at(0), size).unwrap();
        assert_eq!(table.relax(at(0), R), AGAIN);
        assert_eq!(table.leaves(), []);
    }
}

#[test]
fn a_range_is_mapped_with_blocks_where_both_sides_are_aligned() {
    let table = Stage2::new();
    let size = 2 * BLOCK_SIZE + 2 * PAGE_SIZE;
    table.map(at(511), size, FRAME - PAGE_SIZE, RW).unwrap();
    let last = 512 + 2 * 512;
    let expected = [(511, PAGE_SIZE), (512, BLOCK_SIZE), (1024, BLOCK_SIZE), (last, PAGE_SIZE)];
    let leaves: Vec<_> = table.leaves().iter().map(|leaf| (leaf.ipa, leaf.size)).collect();
    assert_eq!(leaves, expected.map(|(index, size)| (at(index), size)));
    for leaf in table.leaves() {
        assert_eq!(leaf.frame, FRAME + leaf.ipa.0 - page(512));
    }

    let shifted = Stage2::new();
    shifted.map(at(0), BLOCK_SIZE, FRAME + PAGE_SIZE, RW).unwrap();
    assert_eq!(shifted.leaves().len(), 512);
}

#[test]
fn a_range_is_mapped_up_to_the_entry_that_is_refused() {
    let table = Stage2::new();
    table.map(at(2), PAGE_SIZE, FRAME + 2 * PAGE_SIZE, R).unwrap();
    assert_eq!(table.map(at(0), 4 * PAGE_SIZE, FRAME, RW), AGAIN);
    let perms = [0, 1, 2, 3].map(|index| match table.lookup(at(index)) {
        Entry::Valid(leaf) => leaf.perms,
        Entry::Invalid { .. } => Perms::NONE,
    });
    assert_eq!(perms, [RW, RW, R, Perms::NONE]);
}

#[test]
fn a_page_mapped_into_a_block_breaks_it_and_the_rest_comes_back_by_faults() {
    let table = Stage2::new();
    table.map(at(0), BLOCK_SIZE, FRAME, RW).unwrap();
    assert_eq!(table.map(at(3), PAGE_SIZE, FRAME + 3 * PAGE_SIZE, R), Ok(()));
    assert_eq!(table.leaves().len(), 1);
    assert_eq!(table.lookup(at(3)), leaf(3, PAGE_SIZE, FRAME + 3 * PAGE_SIZE, R));
    assert_eq!(table.lookup(at(4)), Entry::Invalid { size: PAGE_SIZE });
}

#[test]
fn a_block_mapped_over_pages_takes_their_place() {
    let table = Stage2::new();
    table.map(at(3), PAGE_SIZE, FRAME + 3 * PAGE_SIZE, Perms::RX).unwrap();
    assert_eq!(table.map(at(0), BLOCK_SIZE, FRAME, RW), Ok(()));
    assert_eq!(table.leaves(), [Leaf { ipa: at(0), size: BLOCK_SIZE, frame: FRAME, perms: RW }]);
}

#[test]
fn a_walk_in_a_table_that_a_block_replaces_loses() {
    let table = Stage2::new();
    table.map(at(0), PAGE_SIZE, FRAME, R).unwrap();
    // Up to before each of its steps, as often as it takes any.
    for steps in 1..=2 {
        table.unmap(at(0), BLOCK_SIZE).unwrap();
        table.map(at(0), PAGE_SIZE, FRAME, R).unwrap();
        let mut walk = table.shared().map(at(3), PAGE_SIZE, FRAME + 3 * PAGE_SIZE, R).unwrap();
        for _ in 0..steps {
            assert_eq!(walk.step(), None);
        }
        table.map(at(0), BLOCK_SIZE, FRAME, RW).unwrap();
        assert_eq!(walk.step(), Some(AGAIN));
        drop(walk);
        assert_eq!(table.leaves().len(), 1);
    }
}

#[test]
fn splitting_a_block_keeps_every_page_and_its_permissions() {
    let table = Stage2::new();
    table.map(at(0), 2 * BLOCK_SIZE, FRAME, RW).unwrap();
    table.exclusive().split(at(5), PAGE_SIZE).unwrap();
    let leaves = table.leaves();
    assert_eq!(leaves.len(), 513);
    for leaf in leaves {
        let size = if leaf.ipa < at(512) { PAGE_SIZE } else { BLOCK_SIZE };
        assert_eq!((leaf.size, leaf.perms), (size, RW));
        assert_eq!(leaf.frame, FRAME + leaf.ipa.0 - BASE);
    }
}

#[test]
fn unmapping_removes_pages_in_the_range_and_the_whole_of_a_block() {
    let table = Stage2::new();
    for index in 0..8 {
        table.map(at(index), PAGE_SIZE, FRAME + index * PAGE_SIZE, RW).unwrap();
    }
    table.map(at(512), BLOCK_SIZE, FRAME + BLOCK_SIZE, RW).unwrap();
    table.unmap(at(2), 4 * PAGE_SIZE).unwrap();
    let left: Vec<_> = table.leaves().iter().map(|leaf| leaf.ipa).collect();
    assert_eq!(left, [at(0), at(1), at(6), at(7), at(512)]);
    table.unmap(at(7), 506 * PAGE_SIZE).unwrap();
    let left: Vec<_> = table.leaves().iter().map(|leaf| leaf.ipa).collect();
    assert_eq!(left, [at(0), at(1), at(6)]);
    table.unmap(at(0), BLOCK_SIZE).unwrap();
    assert_eq!(
        table.lookup(at(0)),
        Entry::Invalid { size: BLOCK_SIZE },
        "the empty table went too"
    );
}

#[test]
fn write_protection_takes_nothing_but_write_and_skips_what_is_not_mapped() {
    let table = Stage2::new();
    table.map(at(0), PAGE_SIZE, FRAME, Perms::RWX).unwrap();
    table.map(at(2), PAGE_SIZE, FRAME + 2 * PAGE_SIZE, RW).unwrap();
    table.map(at(512), BLOCK_SIZE, FRAME + BLOCK_SIZE, RW).unwrap();
    table.exclusive().write_protect(at(0), 2 * PAGE_SIZE).unwrap();
    table.exclusive().write_protect(at(513), PAGE_SIZE).unwrap();
    let perms: Vec<_> = table.leaves().iter().map(|leaf| leaf.perms).collect();
    assert_eq!(perms, [Perms::RX, RW, R]);
}

#[test]
fn a_walk_that_is_given_up_leaves_no_entry_locked() {
    for size in [PAGE_SIZE, BLOCK_SIZE] {
        for steps in 0..8 {
            let table = Stage2::new();
            let mut walk = table.shared().map(at(0), size, FRAME, RW).unwrap();
            let finished = (0..steps).any(|_| walk.step().is_some());
            drop(walk);
            assert!(!table.is_being_replaced(at(0)), "{size:#x} after {steps} steps");
            let again = if finished { AGAIN } else { Ok(()) };
            assert_eq!(table.map(at(0), size, FRAME, RW), again);
            assert!(table.try_exclusive().is_some());
        }
    }
}

#[test]
fn a_walk_keeps_exclusive_changes_out_until_it_ends() {
    let table = Stage2::new();
    let walk = table.shared().map(at(0), PAGE_SIZE, FRAME, RW).unwrap();
    assert!(table.try_exclusive().is_none());
    walk.run().unwrap();
    assert!(table.try_exclusive().is_some());
}

#[test]
fn ranges_that_are_no_pages_of_the_address_space_are_refused() {
    let table = Stage2::new();
    let rows = [
        (0, 0, 0),
        (1, PAGE_SIZE, 0),
        (0, PAGE_SIZE + 1, 0),
        (0, PAGE_SIZE, 1),
        (IPA_LIMIT, PAGE_SIZE, 0),
        (IPA_LIMIT - PAGE_SIZE, 2 * PAGE_SIZE, 0),
        (u64::MAX - PAGE_SIZE + 1, 2 * PAGE_SIZE, 0),
        (0, 2 * PAGE_SIZE, u64::MAX - PAGE_SIZE + 1),
    ];
    for (ipa, size, frame) in rows {
        assert_eq!(table.map(GuestAddress(ipa), size, frame, RW), BAD, "{ipa:#x} {size:#x}");
    }
    for (ipa, size, _) in rows.into_iter().filter(|(_, _, frame)| *frame == 0) {
        assert_eq!(table.unmap(GuestAddress(ipa), size), BAD, "{ipa:#x} {size:#x}");
    }
    assert_eq!(table.map(GuestAddress(IPA_LIMIT - PAGE_SIZE), PAGE_SIZE, FRAME, RW), Ok(()));
    assert_eq!(table.lookup(GuestAddress(u64::MAX)), Entry::Invalid { size: BLOCK_SIZE });
    assert_eq!(table.relax(GuestAddress(u64::MAX), RW), AGAIN);
}

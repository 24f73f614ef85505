//! The table of windows alone: lookups see all of the old state or all of the new.

use std::sync::Arc;

use shuttle::thread;

use super::{Search, check};
use crate::bar::{AddressSpace, BarWindow, WindowTable};
use crate::fault::FaultCounts;

fn window(function: usize, start: u64, decodes: bool) -> BarWindow {
    let (space, len, bar, offset) = (AddressSpace::Memory, 0x1000, 2, 0);
    BarWindow { space, start, len, function, bar, offset, decodes }
}

/// Function 0 moves between two places and always has the window at `0x1000`; function 1, at
/// `0x3000`, gets another one and loses it.
fn publish_against_lookup() -> FaultCounts {
    let table = Arc::new(WindowTable::new(Vec::new()));
    let stays = window(0, 0x1000, true);
    table.publish(0, vec![stays, window(0, 0x5000, true)]);
    table.publish(1, vec![window(1, 0x3000, true)]);
    let mover = Arc::clone(&table);
    let other = Arc::clone(&table);
    let threads = [
        thread::spawn(move || {
            mover.publish(0, vec![window(0, 0x7000, true), stays]);
        }),
        thread::spawn(move || {
            other.publish(1, vec![window(1, 0x3000, false), window(1, 0x4000, true)]);
            other.publish(1, vec![window(1, 0x3000, true)]);
        }),
    ];
    let find = |address| table.find(AddressSpace::Memory, address).map(|(window, _)| window);
    let mut moved = false;
    for _ in 0..2 {
        assert_eq!(find(0x1000), Some(stays), "in both states");
        assert!(find(0x3000).is_some_and(|window| window.function == 1), "in both states");
        // One lookup of both places: the pieces of an access are of one state.
        let targets: Vec<_> = table.pieces(AddressSpace::Memory, 0x5000, 0x3000).collect();
        let at = |place: u64| {
            let found =
                targets.iter().find_map(|piece| piece.target.filter(|t| t.0.start == place));
            found.is_some()
        };
        assert!(at(0x5000) != at(0x7000), "at exactly one place");
        assert!(!moved || at(0x7000), "it went back");
        moved = at(0x7000);
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!((find(0x5000), find(0x4000)), (None, None));
    assert_eq!(find(0x7000), Some(window(0, 0x7000, true)));
    FaultCounts::default()
}

/// The slot of a BAR moves, as it does with its window: suspended, placed, mapped. A fault in between
/// always finds the function.
fn slots_against_faults() -> FaultCounts {
    let table = Arc::new(WindowTable::new(Vec::new()));
    let (old, new) = (window(0, 0x1000, true), window(0, 0x3000, true));
    table.publish(0, vec![old]);
    table.publish_slots(0, vec![old]);
    let mover = Arc::clone(&table);
    let thread = thread::spawn(move || {
        mover.publish_slots(0, vec![]);
        mover.publish(0, vec![new]);
        mover.publish_slots(0, vec![new]);
    });
    let at_old = table.find_faulting(0x1800).is_some();
    let at_new = table.find_faulting(0x3800).is_some();
    assert!(at_old || at_new, "nowhere while it moves");
    thread.join().unwrap();
    assert_eq!(table.find_faulting(0x1800), None);
    assert_eq!(table.find_faulting(0x3800), Some((new, 0x800)));
    FaultCounts::default()
}

#[test]
fn lookups_see_the_old_state_or_the_new() {
    check("windows", Search::Random, 1, publish_against_lookup);
    check("windows", Search::Pct, 1, publish_against_lookup);
    check("windows", Search::First(3000), 1, publish_against_lookup);
}

#[test]
fn a_fault_finds_a_bar_that_moves() {
    check("slots", Search::All, 1, slots_against_faults);
}

//! Every row in every mode and every flood, against one process, which is none the worse for it.

use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use barkeep_tests::event_counter::EventCounter;
use barkeep_tests::peer::Peer;
use barkeep_tests::peer::requests::irq::{ACTION_TRIGGER, DATA_NONE, MSI};

use crate::table::play::{MODES, play};
use crate::table::process::Sidecar;
use crate::table::{Function, Row};
use crate::{floods, rows};

/// Memory that may stay, whatever was done: allocators keep what they have had.
const MAY_GROW_KIB: u64 = 10 * 1024;

#[test]
fn the_same_process_serves_after_every_row_and_every_flood() {
    let rows = rows::all();
    assert!(rows.len() >= 150, "{} rows", rows.len());
    let mut sidecar = Sidecar::start();
    // What the process opens once, for all eventfds that it will ever signal, is open from here on.
    signal_once(&sidecar);
    let before = sidecar.usage();

    let mut failures = play_all(&rows, &sidecar);
    for (name, flood) in floods::ALL {
        if catch_unwind(AssertUnwindSafe(|| flood(&sidecar))).is_err() {
            failures.push(format!("flood: {name}"));
        }
        sidecar.assert_served();
    }
    let after = sidecar.usage();
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    println!("{} rows in {} modes, {before:?}, {after:?}", rows.len(), MODES.len());
    assert_eq!(after.fds, before.fds, "descriptors stay behind");
    let grown = after.resident_kib.saturating_sub(before.resident_kib);
    assert!(grown <= MAY_GROW_KIB, "{grown} KiB stay behind");
}

/// Apart from the rest: what the allocator keeps of 65535 small windows, or does not, is most of what
/// the process may grow by.
#[test]
fn more_windows_than_are_announced_cost_no_descriptors_and_no_service() {
    let mut sidecar = Sidecar::start();
    let before = sidecar.usage();
    floods::too_many_windows(&sidecar);
    sidecar.assert_served();
    assert_eq!(sidecar.usage().fds, before.fds);
}

/// Commands that a backend may not serve at all yet. What it answers then is not what the rows ask
/// for; a backend that does serve them keeps to every row.
#[test]
fn optional_commands_are_refused_as_documented() {
    let rows = rows::of_optional_commands();
    let mut sidecar = Sidecar::start();
    let failures = play_all(&rows, &sidecar);
    sidecar.assert_served();
    let count = rows.len() * MODES.len();
    assert!(failures.is_empty(), "{} of {count} failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_row_has_a_name_of_its_own() {
    let mut names: Vec<String> = rows::all().into_iter().map(|row| row.name).collect();
    names.extend(rows::of_optional_commands().into_iter().map(|row| row.name));
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}

fn signal_once(sidecar: &Sidecar) {
    let counter = EventCounter::new();
    let mut peer = Peer::greeted(&sidecar.socket_of(Function::Edu));
    peer.set_eventfd(MSI, 0, counter.as_fd());
    let reply = peer.set_irqs(DATA_NONE | ACTION_TRIGGER, MSI, 0, 1);
    assert_eq!((reply.error, counter.take()), (0, 1), "an honest client");
}

fn play_all(rows: &[Row], sidecar: &Sidecar) -> Vec<String> {
    let plays = rows.iter().flat_map(|row| MODES.map(|mode| play(row, mode, sidecar)));
    plays.filter_map(Result::err).collect()
}

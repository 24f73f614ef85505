//! What is checked: VMs, and what happens to them.

use std::time::Duration;

use super::device::{Backing, Kind};
use super::world::Op::{
    Attend, Behind, Command, ConfigRead, Detach, Die, DieAnswering, Flr, GiveUp, Move, Power, Read,
    Recheck, Reset, ResetBehind, RestoreBehind, Setup, StartAgain, Touch, TouchRam, Write,
};
use super::world::{BAR0_0, BAR2_0, BAR2_1, PLACES, Scenario, Style, run};
use super::{Search, check};
use crate::bar::SuspendOrder;
use crate::client::DeadBackend;

const VFIO: Kind = Kind { barkeep: true, backing: Backing::Refusing, sparse: false };
const MEMFD: Kind = Kind { backing: Backing::Open, ..VFIO };
const PLAIN: Kind = Kind { barkeep: false, ..VFIO };
const PLAIN_MEMFD: Kind = Kind { barkeep: false, ..MEMFD };
const SPARSE: Kind = Kind { sparse: true, ..VFIO };
const BROKEN: Kind = Kind { backing: Backing::Broken, ..VFIO };

const A: u64 = BAR2_0 + 0x3000;
const B: u64 = BAR2_0 + 0x8004;
const TRAPPED: u64 = BAR0_0 + 8;
/// In BAR2 after [`Move`] to [`ELSEWHERE`].
const C: u64 = ELSEWHERE as u64 + 0x3000;
const ELSEWHERE: u32 = 0xa000_0000;
const OTHER: u64 = BAR2_1 + 0x3000;

const BASE: Scenario = Scenario {
    name: "",
    devices: &[VFIO],
    order: SuspendOrder::SlotsFirst,
    style: Style::Reported,
    dead_backend: DeadBackend::UnsupportedRequest,
    failures: 0,
    stays_trapped: false,
    max_faults: 8,
    actors: &[],
    shuffled: false,
    effort: 1,
};

const STYLES: [Style; 3] = [Style::Reported, Style::OneOf, Style::Unknown];
const ORDERS: [SuspendOrder; 3] =
    [SuspendOrder::SlotsFirst, SuspendOrder::BackingFirst, SuspendOrder::Alternate];

fn search(scenario: Scenario) {
    let name = format!("{}, {:?}, {:?}", scenario.name, scenario.style, scenario.order);
    for search in [Search::Random, Search::Pct] {
        check(&name, search, scenario.effort, move || run(scenario));
    }
}

fn search_styles(scenario: Scenario) {
    STYLES.into_iter().for_each(|style| search(Scenario { style, ..scenario }));
}

#[test]
fn one_access_against_a_revoke_in_all_schedules() {
    let actors: &[&[_]] = &[&[Detach(0)], &[Touch(A)]];
    let scenario = Scenario { devices: &[MEMFD], actors, stays_trapped: true, ..BASE };
    check("revoke", Search::All, 1, move || run(scenario));
}

#[test]
fn one_access_against_one_toggle() {
    for (devices, order) in [
        (&[MEMFD], SuspendOrder::SlotsFirst),
        (&[VFIO], SuspendOrder::BackingFirst),
        (&[PLAIN], SuspendOrder::SlotsFirst),
    ] {
        let actors: &[&[_]] = &[&[Command(0, false)], &[Touch(A)]];
        let scenario = Scenario { devices, order, actors, ..BASE };
        let name = format!("{devices:?}, {order:?}");
        for search in [Search::First(2000), Search::Random, Search::Pct] {
            check(&name, search, 1, move || run(scenario));
        }
    }
}

#[test]
fn the_guest_toggles_decode_of_memory_that_stays_accessible() {
    let actors: &[&[_]] = &[
        &[Command(0, false), Command(0, true), Command(0, false)],
        &[Read(A), Write(B), Read(TRAPPED)],
        &[Write(A), Read(B)],
    ];
    for (name, devices) in [("memfd", &[MEMFD]), ("plain memfd", &[PLAIN_MEMFD])] {
        for order in ORDERS {
            // The order with the backing first takes the memory away with mprotect.
            search(Scenario { name, devices, order, actors, ..BASE });
        }
    }
}

#[test]
fn the_guest_toggles_decode_of_memory_that_refuses() {
    let actors: &[&[_]] = &[
        &[Command(0, false), Command(0, true), Command(0, false), Command(0, true)],
        &[Read(A), Write(B)],
        &[Write(A), Read(B)],
    ];
    for devices in [&[VFIO], &[PLAIN], &[SPARSE]] {
        let scenario = Scenario { name: "guest toggles", devices, actors, ..BASE };
        search_styles(Scenario { order: SuspendOrder::BackingFirst, ..scenario });
        search(Scenario { order: SuspendOrder::Alternate, ..scenario });
    }
}

#[test]
fn somebody_else_toggles_decode() {
    let actors: &[&[_]] = &[
        &[Behind(0, false), Read(A), Behind(0, true), Read(TRAPPED), Behind(0, false), Write(B)],
        &[Read(A), Write(B), Read(TRAPPED), Behind(0, true), Read(A)],
        &[Write(A), Read(B), Recheck(0)],
    ];
    for devices in [&[VFIO], &[PLAIN], &[MEMFD], &[PLAIN_MEMFD]] {
        search_styles(Scenario { name: "behind", devices, actors, ..BASE });
    }
}

#[test]
fn the_guest_and_somebody_else_toggle_decode() {
    let actors: &[&[_]] = &[
        &[Behind(0, false), Write(A), Behind(0, true), Read(B)],
        &[Command(0, false), Command(0, true), Read(TRAPPED)],
        &[Read(A), Write(B), Read(A)],
    ];
    for devices in [&[VFIO], &[PLAIN]] {
        search_styles(Scenario { name: "both toggle", devices, actors, ..BASE });
    }
}

#[test]
fn somebody_else_resets_and_restores_the_function() {
    let actors: &[&[_]] = &[
        &[ResetBehind(0), Write(A), RestoreBehind(0), Read(B)],
        &[Read(A), Write(B), Read(A)],
        &[ConfigRead(0), Write(A)],
    ];
    for devices in [&[VFIO], &[PLAIN]] {
        search_styles(Scenario { name: "reset behind", devices, actors, ..BASE });
    }
}

#[test]
fn bars_move_and_power_goes() {
    let actors: &[&[_]] = &[
        &[Move(0, ELSEWHERE), Power(0, 3), Power(0, 0), Move(0, PLACES[0])],
        &[Read(A), Write(C), Read(C)],
        &[Write(A), Read(C)],
    ];
    for devices in [&[VFIO], &[MEMFD], &[SPARSE], &[PLAIN_MEMFD]] {
        search_styles(Scenario { name: "moves", devices, actors, ..BASE });
    }
}

#[test]
fn functions_are_reset_and_set_up_again() {
    let actors: &[&[_]] = &[
        &[Flr(0), Setup(0), Reset, Setup(1)],
        &[Read(A), Write(OTHER)],
        &[Write(A), Read(OTHER), Setup(0)],
    ];
    let devices = &[MEMFD, PLAIN];
    search_styles(Scenario { name: "resets", devices, actors, ..BASE });
}

#[test]
fn bars_are_placed_over_each_other_and_over_ram() {
    let actors: &[&[_]] = &[
        &[Move(1, PLACES[0]), Move(1, 0), Move(1, PLACES[1])],
        &[Move(0, PLACES[1]), Command(0, false), Move(0, PLACES[0]), Command(0, true)],
        &[Read(A), Write(OTHER), TouchRam, Read(OTHER)],
    ];
    let devices = &[VFIO, VFIO];
    let scenario = Scenario { name: "overlaps", devices, actors, stays_trapped: true, ..BASE };
    search(scenario);
    search(Scenario { style: Style::Unknown, ..scenario });
}

#[test]
fn a_backend_dies() {
    let actors: &[&[_]] = &[
        &[Die(0)],
        &[Read(A), Write(B), Read(TRAPPED)],
        &[Command(0, false), Command(0, true), Write(OTHER)],
        &[Behind(0, false), Recheck(0), Read(B), ConfigRead(0)],
    ];
    for devices in [&[VFIO, VFIO], &[PLAIN, PLAIN], &[MEMFD, MEMFD], &[SPARSE, PLAIN]] {
        search_styles(Scenario { name: "death", devices, actors, ..BASE });
    }
}

/// Time stands still for the model checker, so who is not woken waits for ever, and is found.
const POLICIES: [DeadBackend; 2] =
    [DeadBackend::UnsupportedRequest, DeadBackend::Stall(Duration::from_secs(3600))];

#[test]
fn the_end_of_a_session_against_slots_that_come() {
    let actors: &[&[_]] = &[
        &[Die(0), Attend(0)],
        &[Command(0, false), Command(0, true)],
        &[Read(A), Attend(0), Write(B)],
    ];
    for devices in [&[VFIO], &[MEMFD], &[PLAIN], &[PLAIN_MEMFD], &[SPARSE]] {
        search(Scenario { name: "end", devices, actors, ..BASE });
        search(Scenario { name: "end", devices, actors, failures: 4, max_faults: 16, ..BASE });
    }
}

#[test]
fn a_backend_comes_back() {
    let actors: &[&[_]] = &[
        &[Die(0), Attend(0), StartAgain(0)],
        &[Read(A), Write(TRAPPED), Read(TRAPPED), Write(B)],
        &[Command(0, false), Command(0, true), Write(OTHER)],
        &[ConfigRead(0), Recheck(0), Read(B)],
    ];
    for devices in [&[VFIO, VFIO], &[PLAIN, MEMFD], &[MEMFD, PLAIN], &[SPARSE, SPARSE]] {
        for dead_backend in POLICIES {
            search(Scenario { name: "return", devices, actors, dead_backend, ..BASE });
        }
    }
    search_styles(Scenario { name: "return", devices: &[VFIO, VFIO], actors, ..BASE });
}

#[test]
fn two_vcpus_notice_the_end_at_once() {
    let actors: &[&[_]] =
        &[&[Die(0), StartAgain(0)], &[Write(TRAPPED), Read(A)], &[Write(TRAPPED), ConfigRead(0)]];
    for devices in [&[MEMFD], &[PLAIN]] {
        for dead_backend in POLICIES {
            let scenario = Scenario { name: "two notice", devices, actors, dead_backend, ..BASE };
            search(scenario);
            check("two notice", Search::First(2000), 1, move || run(scenario));
        }
    }
}

#[test]
fn one_access_against_a_return_in_many_schedules() {
    let actors: &[&[_]] = &[&[Die(0), StartAgain(0)], &[Touch(A)]];
    for dead_backend in POLICIES {
        let scenario = Scenario { devices: &[MEMFD], actors, dead_backend, ..BASE };
        check("return", Search::First(5000), 1, move || run(scenario));
    }
}

#[test]
fn a_backend_that_dies_again_and_again_comes_back_each_time() {
    let actors: &[&[_]] = &[
        &[Die(0), StartAgain(0), Setup(0), Die(0), Attend(0), StartAgain(0), Setup(0)],
        &[Read(A), Write(B), Write(TRAPPED), Read(A)],
        &[Attend(0), Write(A), Move(0, ELSEWHERE), Read(C), Attend(0)],
    ];
    for devices in [&[VFIO], &[MEMFD], &[PLAIN], &[PLAIN_MEMFD], &[SPARSE]] {
        for dead_backend in POLICIES {
            let scenario = Scenario { name: "flapping", devices, actors, dead_backend, ..BASE };
            search(scenario);
        }
        let scenario = Scenario { failures: 4, max_faults: 16, actors, devices, ..BASE };
        search(Scenario { name: "flapping", ..scenario });
    }
}

#[test]
fn what_a_backend_did_before_it_died_is_not_done_again() {
    // It may die after it was started again, and nobody starts it once more: who waits must be told.
    let actors: &[&[_]] = &[
        &[DieAnswering(0), ConfigRead(1), GiveUp(0)],
        &[Write(TRAPPED), Write(A), Read(TRAPPED)],
        &[Write(TRAPPED), Write(TRAPPED), Command(0, true)],
        &[Die(0), StartAgain(0), Setup(0)],
    ];
    for devices in [&[VFIO, VFIO], &[PLAIN, PLAIN], &[MEMFD, PLAIN]] {
        for dead_backend in POLICIES {
            search(Scenario { name: "answering", devices, actors, dead_backend, ..BASE });
        }
    }
}

#[test]
fn a_write_that_was_lost_with_its_answer_is_not_done_again() {
    let actors: &[&[_]] =
        &[&[DieAnswering(0), StartAgain(0), Setup(0)], &[Write(TRAPPED)], &[GiveUp(0)]];
    let dead_backend = POLICIES[1];
    for devices in [&[MEMFD], &[PLAIN]] {
        let scenario = Scenario { name: "lost answer", devices, actors, dead_backend, ..BASE };
        (0..4).for_each(|_| search(scenario));
    }
}

#[test]
fn who_waits_for_a_backend_that_nobody_brings_is_told() {
    let actors: &[&[_]] =
        &[&[Die(0), GiveUp(0)], &[Write(TRAPPED), Read(A)], &[Command(0, true), ConfigRead(0)]];
    for devices in [&[VFIO], &[PLAIN_MEMFD]] {
        search(Scenario { name: "given up", devices, actors, dead_backend: POLICIES[1], ..BASE });
    }
}

#[test]
fn faults_in_ram_are_not_resolved() {
    let actors: &[&[_]] = &[
        &[Behind(0, false), Behind(0, true), Move(0, 0), Move(0, PLACES[0])],
        &[TouchRam],
        &[Write(A), Read(OTHER), Command(1, false), Command(1, true)],
    ];
    let devices = &[VFIO, PLAIN];
    // With BARs among the candidates they lose their slots before the fault is escalated.
    let scenario = Scenario { name: "RAM", devices, actors, stays_trapped: true, ..BASE };
    search(scenario);
    search(Scenario { style: Style::Unknown, ..scenario });
    search(Scenario { style: Style::OneOf, effort: 50, ..scenario });
}

#[test]
fn the_hypervisor_runs_out_of_memory() {
    let actors: &[&[_]] = &[
        &[Command(0, false), Command(0, true), Move(0, ELSEWHERE), Move(0, PLACES[0])],
        &[Read(A), Write(C), Read(A)],
        &[Write(B), Read(C)],
    ];
    for devices in [&[VFIO], &[MEMFD], &[SPARSE]] {
        let scenario = Scenario { name: "ENOMEM", devices, actors, failures: 6, ..BASE };
        search_styles(Scenario { max_faults: 16, ..scenario });
    }
}

#[test]
fn memory_that_always_refuses_ends_in_quarantine() {
    let actors: &[&[_]] = &[&[Read(A), Write(B)], &[Write(A), Command(0, false), Command(0, true)]];
    let scenario = Scenario { name: "broken", devices: &[BROKEN], actors, ..BASE };
    search(Scenario { stays_trapped: true, max_faults: 200, ..scenario });
}

#[test]
fn anything_happens() {
    let actors: &[&[_]] = &[
        &[Read(A), Write(B), Read(C), Write(A), Read(TRAPPED), Write(OTHER)],
        &[Command(0, false), Command(0, true), Move(0, ELSEWHERE), Move(0, PLACES[0]), Setup(0)],
        &[Behind(0, false), Behind(0, true), Power(0, 3), Power(0, 0), Recheck(0)],
        &[Flr(0), Reset, Setup(0), Setup(1), Command(1, false), ConfigRead(0), Read(OTHER)],
    ];
    for devices in [&[VFIO, VFIO], &[MEMFD, PLAIN], &[PLAIN, SPARSE]] {
        for order in ORDERS {
            let scenario = Scenario { name: "anything", devices, actors, order, ..BASE };
            let scenario = Scenario { shuffled: true, max_faults: 16, effort: 2, ..scenario };
            search_styles(scenario);
        }
    }
}
